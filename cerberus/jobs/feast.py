"""Feast, from child processes: definitions to the registry, batch views to Redis.

Only this module of the package imports Feast, and only inside its functions: the import takes
seconds and 110 MB, so the serving process starts `python -m cerberus materialize` and calls
nothing here. Calls block; the parent kills the child at the deadline.
"""

import asyncio
import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from cerberus import environment, errors, settings
from cerberus.addresses import postgres as addresses
from cerberus.features import declared
from cerberus.jobs import feast_stores
from cerberus.online import layout, partition_states
from cerberus.online import pool as redis_pool

REPO = settings.FEATURE_REPO
_SERVED = (declared.STATS_VIEW, declared.WINDOW_VIEW, declared.CREDIT_VIEW)
_TYPES = {"Int64", "Float64", "Bytes"}
_BATCH_ROWS = 10_000
# Feast offers no other way to set an option of its sessions: it sends "-c search_path=" followed by
# this text and ",public", which a meaningless setting absorbs at the end. Without nested loops,
# 10,000 rows of history take seconds instead of minutes.
_SESSION = "public -c enable_nestloop=off {options} -c cerberus.client=feast"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a materialization did.

    Attributes:
        full: Whether Redis had lost the batch views, so that everything not expired was loaded.
        new_rows: How many rows of `credit_scores` are served from now on.
    """

    full: bool
    new_rows: int


def place() -> pathlib.Path | None:
    """Return the checkout's feature repo; None if it is read-only or part of an installation.

    The rendered file holds passwords, so it is never left in an installed package.
    """
    in_checkout = REPO.parent == environment.ROOT
    return REPO if in_checkout and os.access(REPO, os.W_OK) else None


def render(config: settings.Settings, directory: pathlib.Path) -> pathlib.Path:
    """Write `feature_store.yaml` (mode 0600) for Feast's command line and notebooks.

    Raises:
        ConfigError: An address cannot be expressed in Feast's terms.
    """
    path = directory / "feature_store.yaml"
    with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:  # mode 0600
        file.write("# Written by `python -m cerberus features render`; it holds passwords.\n")
        yaml.safe_dump(repo_config(config), file, sort_keys=False)
    os.replace(file.name, path)
    return path


def repo_config(config: settings.Settings) -> dict[str, Any]:
    """Translate the settings into Feast's; `window` is an addition for `feature_repo/features.py`.

    Raises:
        ConfigError: An address cannot be expressed in Feast's terms.
    """
    registry, offline_store = _postgres(config.postgres.address)
    return {
        "project": layout.PROJECT,
        "provider": "local",
        "entity_key_serialization_version": 3,
        "registry": {"registry_type": "sql", "path": registry, "cache_ttl_seconds": 0},
        "online_store": {
            "type": "redis",
            "redis_type": "redis_cluster" if config.redis.cluster else "redis",
            "connection_string": _redis(config),
        },
        "offline_store": {"type": "postgres"} | offline_store,
        "materialization": {"pull_latest_features": True, "online_write_batch_size": _BATCH_ROWS},
        "window": {
            "names": list(config.windows.spans),
            "allowed_lateness_ms": config.windows.allowed_lateness_ms,
            "max_future_skew_ms": config.windows.max_future_skew_ms,
        },
    }


def apply(
    config: settings.Settings, directory: pathlib.Path | None = None, deadline_s: float = 120.0
) -> str:
    """Write `feature_store.yaml`, run `feast apply` and return its output. Idempotent: yes.

    Args:
        config: All settings.
        directory: Holds `features.py`; `place()` by default, else a private copy that is removed.
        deadline_s: Of `feast apply`.

    Raises:
        StoreUnavailable: It failed or took longer than the deadline; the message says why.
        ConfigError: Postgres refuses the address, the user or a permission.
    """
    if directory := directory or place():
        return _apply(config, directory, deadline_s)
    with tempfile.TemporaryDirectory(prefix="cerberus-") as private:  # mode 0700
        directory = pathlib.Path(private) / REPO.name
        directory.mkdir()
        shutil.copy(REPO / "features.py", directory)
        # The definitions look for the package beside their directory if it is not on the path.
        (directory.parent / "cerberus").symlink_to(environment.PACKAGE)
        return _apply(config, directory, deadline_s)


def _apply(config: settings.Settings, directory: pathlib.Path, deadline_s: float) -> str:
    feast_stores.check_postgres(config, applies=True)
    render(config, directory)
    command = [sys.executable, "-c", "from feast.cli.cli import cli; cli()", "apply"]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={name: value for name, value in os.environ.items() if not _of_libpq(name)},
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise errors.StoreUnavailable(
            f"feast apply did not finish within {deadline_s:g} s: does Postgres answer?"
        ) from error
    if done.returncode:
        # The line of the exception; the failed statement may follow it.
        said = re.findall(r"^[A-Za-z_][\w.]*: .+$", done.stdout + done.stderr, re.MULTILINE)
        reason = said[-1] if said else "silently"
        feast_stores.raise_refusal(config, reason, applies=True)
        raise errors.StoreUnavailable(f"feast apply failed: {reason}")
    return done.stdout


def compile_plan(config: settings.Settings) -> layout.Plan:
    """Compile the applied registry into what serving must know.

    Raises:
        ModelMismatch: A view is missing, or the fast path cannot serve it.
        StoreUnavailable: Postgres does not answer.
    """
    with _opened(config) as store:
        return plan(store.list_feature_views(), store.list_feature_services())


def plan(views: Iterable[Any], services: Iterable[Any]) -> layout.Plan:
    """Compile Feast's definitions into what serving must know.

    Raises:
        ModelMismatch: A view is missing, or the fast path cannot serve it.
    """
    known = {view.name: view for view in views}
    names: dict[bytes, str] = {}
    for view in known.values():
        for feature in view.features:
            name = f"{view.name}:{feature.name}"
            other = names.setdefault(layout.field(view.name, feature.name), name)
            if other != name:
                raise errors.ModelMismatch(f"{other} and {name} hash to one field: rename one")
    for service in services:
        for projection in service.feature_view_projections:
            if projection.name_alias or projection.join_key_map:
                raise errors.ModelMismatch(
                    f"{service.name} renames {projection.name} or its key: serving reads by "
                    "the view's own names"
                )
    if missing := [name for name in _SERVED if name not in known]:
        raise errors.ModelMismatch(
            f"{', '.join(missing)} is not in the registry: `python -m cerberus features apply`"
        )
    return layout.Plan(
        project=layout.PROJECT,
        ttl_ms={n: known[n].ttl // datetime.timedelta(milliseconds=1) for n in _SERVED},
        schema={n: _schema(known[n]) for n in _SERVED},
    )


def materialize(config: settings.Settings, now_ms: int) -> Loaded:
    """Load `credit_scores` from Postgres into Redis as of `now_ms`. Idempotent: yes.

    If the definitions are not applied yet, it applies them first.

    A row is new while its `created_timestamp` is null. When Feast has loaded the new rows, they are
    stamped with the time after the load, so history (with `filter_by_created_timestamp=True`) never
    shows a score before it could be served. The stamp is set in the database snapshot that was
    opened before the load, so a row that arrived meanwhile stays new. Rows are facts: a corrected
    score is a new row with a later `event_timestamp`.

    The load begins at the oldest new row, so it includes rows that arrive late; Feast's incremental
    load, which begins where the last one ended, would miss them. When Redis has lost
    `partition_states.MATERIALIZED`, the load begins one TTL ago.

    Cost: two queries when nothing is new; memory for one row of each user with new rows.

    Raises:
        StoreUnavailable: A store failed, or Redis lost its data meanwhile; run again.
    """
    import psycopg.conninfo

    with _opened(config) as store:
        end = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
        begin = end - _credit_view(store, config).ttl
        lost = asyncio.run(_begin(config, now_ms))
        conninfo = psycopg.conninfo.make_conninfo(**_libpq(config.postgres.address))
        with psycopg.connect(conninfo) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            new = "created_timestamp IS NULL AND event_timestamp BETWEEN %s AND %s"
            connection.execute("SET idle_in_transaction_session_timeout = 0")
            oldest = connection.execute(
                f"SELECT min(event_timestamp) FROM credit_scores WHERE {new}", (begin, end)
            ).fetchone()
            start = begin if lost else oldest and oldest[0]
            if start:
                with contextlib.redirect_stdout(sys.stderr):
                    store.materialize(start, end, [declared.CREDIT_VIEW])
            if not asyncio.run(_finish(config)):
                raise errors.StoreUnavailable("Redis was emptied during the load; load again")
            stamped = connection.execute(
                f"UPDATE credit_scores SET created_timestamp = clock_timestamp() WHERE {new}",
                (begin, end),
            )
        return Loaded(full=lost, new_rows=stamped.rowcount)


def _credit_view(store: Any, config: settings.Settings) -> Any:
    """Return the applied view; apply the definitions first if nothing was applied yet."""
    import feast.errors

    try:
        return store.get_feature_view(declared.CREDIT_VIEW)
    except feast.errors.FeatureViewNotFoundException:
        apply(config)
        return store.get_feature_view(declared.CREDIT_VIEW)


async def _begin(config: settings.Settings, now_ms: int) -> bool:
    """Set a mark that is lost with the data, then say whether the batch views are lost."""
    async with redis_pool.connect(config) as client:
        await client.set(partition_states.LOADING, now_ms)
        return not await client.exists(partition_states.MATERIALIZED)


async def _finish(config: settings.Settings) -> bool:
    """Turn the mark into the sign that the views are loaded; False when the mark is gone."""
    async with redis_pool.connect(config) as client:
        return bool(
            await client.copy(partition_states.LOADING, partition_states.MATERIALIZED, replace=True)
        )


def _schema(view: Any) -> dict[str, str]:
    keys = [(column.name, str(column.dtype)) for column in view.entity_columns]
    if keys != [("user_id", "Int64")]:
        raise errors.ModelMismatch(f"{view.name}: its key must be user_id, Int64, not {keys}")
    types = {feature.name: str(feature.dtype) for feature in view.features}
    for name, kind in types.items():
        if kind not in _TYPES:
            raise errors.ModelMismatch(
                f"{view.name}:{name} is {kind}; serving reads {', '.join(sorted(_TYPES))}"
            )
    return types


def _postgres(address: addresses.Postgres) -> tuple[str, dict[str, Any]]:
    """Return the registry's address and the options of the offline store.

    Raises:
        ConfigError: A file of certificates cannot be read.
    """
    import sqlalchemy

    address.tls()
    parts = _libpq(address)
    options = parts.pop("options", "")
    offline_store = {
        "host": address.host,
        "port": address.port,
        "database": address.database,
        "user": address.user,
        "password": address.password,
        "db_schema": _SESSION.format(options=options),
        "sslmode": address.sslmode,
        "keepalives_idle": 30,
    }
    files = {f"{k}_path": parts[k] for k in ("sslrootcert", "sslcert", "sslkey") if k in parts}
    registry = sqlalchemy.URL.create(
        "postgresql+psycopg",
        username=parts.pop("user"),
        password=parts.pop("password", None),
        database=parts.pop("dbname"),
        # The host may be the directory of a socket, which only the query part can hold.
        query=parts | ({"options": options} if options else {}),
    )
    return registry.render_as_string(hide_password=False), offline_store | files


def _libpq(address: addresses.Postgres) -> dict[str, str]:
    parts = {"connect_timeout": "10"} | address.libpq()
    if address.sslrootcert == addresses.SYSTEM:
        # The libpq in psycopg's wheel does not know where this system keeps them.
        parts["sslrootcert"] = ssl.get_default_verify_paths().cafile or addresses.SYSTEM
    return parts


def _of_libpq(name: str) -> bool:
    """Return whether libpq would read a variable, which the service itself never does."""
    return name.startswith("PG") and name.replace("_", "").isalpha()


def _redis(config: settings.Settings) -> str:
    """Write the serving process' own connection options as `host:port,option=value,…`.

    Feast splits them at commas and reads each value as JSON, so commas in a password are escaped.
    """
    options = redis_pool.options(config)
    host, port = options.pop("host"), options.pop("port")
    if ":" in host:
        raise errors.ConfigError(f"REDIS_URL: Feast needs a host name, not {host}")
    options |= {"socket_timeout": 30}
    pairs = (f"{k}={json.dumps(v)}".replace(",", "\\u002c") for k, v in options.items())
    return ",".join((f"{host}:{port}", *pairs))


@contextlib.contextmanager
def _opened(config: settings.Settings) -> Iterator[Any]:
    """Yield Feast's store; its failures become `StoreUnavailable` with a message of one line."""
    import feast
    import psycopg
    import redis.exceptions
    import sqlalchemy.exc

    failures = (
        OSError,
        psycopg.Error,
        redis.exceptions.RedisError,
        redis.exceptions.RedisClusterException,
        sqlalchemy.exc.SQLAlchemyError,
    )
    for name in filter(_of_libpq, list(os.environ)):
        del os.environ[name]
    feast_stores.check_postgres(config)
    try:
        store: Any = feast.FeatureStore(config=feast.RepoConfig(**repo_config(config)))
        with contextlib.ExitStack() as stack:
            stack.callback(store.registry.write_engine.dispose)
            yield store
    except failures as error:
        reason = str(error).partition("\n")[0]
        feast_stores.raise_refusal(config, reason)
        raise errors.StoreUnavailable(f"Feast could not use a store: {reason}") from error
