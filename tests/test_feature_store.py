import json
import pathlib
import stat
import subprocess
import sys

import feast_rig
import pytest

from cerberus import errors, settings, window
from cerberus.features import declared
from cerberus.jobs import feast as feast_store
from cerberus.online import layout
from cerberus.online import pool as redis_pool

LOOPBACK = {
    "KAFKA_BROKER": "127.0.0.1:9092",
    "REDIS_URL": "redis://127.0.0.1:6379/3",
    "DATABASE_URL": "postgresql://me@127.0.0.1:5432/cerberus",
}
COMPOSE = {
    "KAFKA_BROKER": "kafka:9092",
    "REDIS_URL": "redis://:0123%2C%3D%22%3A@redis:6379",
    "DATABASE_URL": "postgres://cerberus:p%40ss%2F%3A@postgres/cerberus?sslmode=disable",
}
COMMITTED = settings.load(LOOPBACK).model.plan_path


def test_the_module_alone_imports_neither_feast_nor_its_drivers():
    program = (
        "import sys, cerberus.jobs.feast;"
        "print([m for m in ('feast', 'pandas', 'sqlalchemy', 'psycopg') if m in sys.modules])"
    )
    root = feast_store.REPO.parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_committed_plan_is_what_the_definitions_compile_to(tmp_path):
    plan = feast_rig.compiled(feast_rig.load(feast_rig.repo(LOOPBACK, tmp_path)))
    assert COMMITTED.read_bytes() == plan.pack()
    assert layout.Plan.load(COMMITTED) == plan


@pytest.mark.parametrize("spans", ["10m", "5s,1h,24h"])
def test_the_definitions_follow_the_window_definition(tmp_path, spans):
    environ = LOOPBACK | {"CERBERUS_SPANS": spans, "CERBERUS_ALLOWED_LATENESS_S": "7"}
    module = feast_rig.load(feast_rig.repo(environ, tmp_path))
    plan = feast_rig.compiled(module)
    kept = window.Spans(tuple(spans.split(",")), 7_000, 60_000)
    streamed = declared.names(declared.streamed(kept.names))
    types = {name: "Int64" if "count" in name else "Float64" for name in streamed}
    assert plan == layout.Plan(
        project=layout.PROJECT,
        ttl_ms={
            declared.STATS_VIEW: kept.keep_ms,
            declared.WINDOW_VIEW: kept.keep_ms,
            declared.CREDIT_VIEW: feast_rig.CREDIT_TTL_MS,
        },
        schema={
            declared.STATS_VIEW: types,
            declared.WINDOW_VIEW: {"recent": "Bytes"},
            declared.CREDIT_VIEW: {declared.CREDIT_SCORE.name: "Int64"},
        },
    )
    served = [p.name for p in module.fraud_model.feature_view_projections]
    assert served == [declared.STATS_VIEW, declared.CREDIT_VIEW]


def colliding_names(view):
    seen = {}
    for number in range(2**20):
        other = seen.setdefault(layout.field(view, f"f{number}"), number)
        if other != number:
            return f"f{other}", f"f{number}"
    raise AssertionError("no two names collide")


def test_what_the_fast_path_cannot_serve_is_refused(tmp_path):
    import feast
    from feast.types import Array, Int64, String

    module = feast_rig.load(feast_rig.repo(LOOPBACK, tmp_path))
    streamed, credit = [module.user_transaction_stats, module.user_window], module.user_credit
    text_user = feast.Entity(name="user", join_keys=["user_id"], value_type=feast.ValueType.STRING)
    merchant = feast.Entity(
        name="merchant", join_keys=["merchant"], value_type=feast.ValueType.INT64
    )

    def refusal(entities, **schema):
        view = feast.FeatureView(
            name=declared.CREDIT_VIEW,
            entities=entities,
            schema=[feast.Field(name=name, dtype=dtype) for name, dtype in schema.items()],
            source=credit.batch_source,
        )
        with pytest.raises(errors.ModelMismatch) as refused:
            feast_store.plan([*streamed, view], [])
        return str(refused.value)

    def service_refusal(projection):
        service = feast.FeatureService(name="s", features=[projection])
        with pytest.raises(errors.ModelMismatch) as refused:
            feast_store.plan([*streamed, credit], [service])
        return str(refused.value)

    with pytest.raises(errors.ModelMismatch, match="user_credit is not in the registry"):
        feast_store.plan(streamed, [])
    assert "score is String" in refusal([module.user], user_id=Int64, score=String)
    assert "score is Array(Int64)" in refusal([module.user], user_id=Int64, score=Array(Int64))
    assert "key must be" in refusal([text_user], user_id=String, score=Int64)
    assert "key must be" in refusal(
        [module.user, merchant], user_id=Int64, merchant=Int64, score=Int64
    )
    one, other = colliding_names(declared.CREDIT_VIEW)
    assert f"user_credit:{other} hash to one field" in refusal(
        [module.user], user_id=Int64, **{one: Int64, other: Int64}
    )
    assert "s renames user_credit" in service_refusal(credit.with_name("other"))
    assert "s renames user_credit" in service_refusal(
        credit.with_join_key_map({"user_id": "payer"})
    )


@pytest.mark.parametrize("environ", [LOOPBACK, COMPOSE], ids=["loopback", "compose"])
def test_the_settings_render_to_what_feast_connects_with(tmp_path, environ):
    import sqlalchemy
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.infra.utils.postgres.connection_utils import _get_conninfo
    from feast.repo_config import load_repo_config
    from psycopg.conninfo import conninfo_to_dict

    directory = feast_rig.repo(environ, tmp_path)
    path = directory / "feature_store.yaml"
    loaded = load_repo_config(directory, path)
    config = settings.load(environ)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert loaded.project == layout.PROJECT
    assert loaded.entity_key_serialization_version == 3

    ours = redis_pool.connect(config).connection_pool.connection_kwargs
    nodes, options = RedisOnlineStore._parse_connection_string(
        loaded.online_store.connection_string
    )
    assert nodes == [{"host": ours["host"], "port": str(ours.get("port", 6379))}]
    assert options.get("password") == ours.get("password")
    assert (options.get("db", 0), options.get("ssl")) == (ours["db"], None)

    wanted = {"port": "5432", "sslmode": "prefer"} | conninfo_to_dict(config.postgres.url)
    offered = conninfo_to_dict(_get_conninfo(loaded.offline_store))
    offered["sslmode"] = loaded.offline_store.sslmode
    assert {name: value for name, value in offered.items() if value} == wanted
    url = sqlalchemy.make_url(loaded.registry.path)
    _, arguments = url.get_dialect()().create_connect_args(url)
    assert arguments.pop("connect_timeout") == "10"
    assert {name: str(value) for name, value in arguments.items()} == wanted


def test_tls_and_sockets_reach_feast():
    environ = LOOPBACK | {
        "REDIS_URL": "rediss://user:pw@cache:6380",
        "REDIS_TLS_VERIFY": "0",
        "DATABASE_URL": "postgres://me:pw@/db?host=/run/pg&sslmode=verify-full&sslrootcert=/ca",
    }
    rendered = feast_store.repo_config(settings.load(environ))
    address, *pairs = rendered["online_store"]["connection_string"].split(",")
    options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
    assert address == "cache:6380"
    assert options.items() >= {
        ("ssl", True),
        ("ssl_cert_reqs", 0),
        ("ssl_check_hostname", False),
        ("username", "user"),
        ("password", "pw"),
    }
    assert rendered["offline_store"].items() >= {
        ("host", "/run/pg"),
        ("sslmode", "verify-full"),
        ("sslrootcert_path", "/ca"),
    }
    assert "host=%2Frun%2Fpg" in rendered["registry"]["path"]
    assert "sslrootcert=%2Fca" in rendered["registry"]["path"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REDIS_URL", "redis://[::1]:6379"),
        ("REDIS_URL", "rediss://cache?ssl_ca_certs=/nowhere"),
        ("DATABASE_URL", "postgres://me:pw@h/d?sslmode=require&sslrootcert=/nowhere"),
    ],
)
def test_an_address_that_feast_cannot_be_told_is_named(variable, value):
    config = settings.load(LOOPBACK | {variable: value})
    with pytest.raises(errors.ConfigError, match=variable):
        feast_store.repo_config(config)


def test_feast_apply_works_by_hand_and_again_after_the_windows_changed(environ, tmp_path):
    directory = feast_rig.repo(environ, tmp_path)
    command: list[str | pathlib.Path] = [pathlib.Path(sys.executable).with_name("feast"), "apply"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    plan = feast_store.compile_plan(settings.load(environ))
    assert plan == layout.Plan.load(COMMITTED)

    config = settings.load(environ | {"CERBERUS_SPANS": "10m,1h"})
    assert "user_window" in feast_store.apply(config, directory)
    plan = feast_store.compile_plan(config)
    assert "total_amount_1h" in plan.schema[declared.STATS_VIEW]
    assert plan.ttl_ms[declared.WINDOW_VIEW] == 3_600_000 + feast_rig.SPANS.slack_ms


def test_a_store_that_does_not_answer_is_said_in_one_line(tmp_path):
    environ = LOOPBACK | {"DATABASE_URL": "postgresql://me@127.0.0.1:1/none"}
    directory, config = feast_rig.repo(environ, tmp_path), settings.load(environ)
    for call in (
        lambda: feast_store.apply(config, directory),
        lambda: feast_store.compile_plan(config),
        lambda: feast_store.materialize(config, feast_rig.NOW_MS),
    ):
        with pytest.raises(errors.StoreUnavailable, match=r"^[^\n]*refused[^\n]*$"):
            call()
    with pytest.raises(errors.StoreUnavailable, match=r"did not finish within 0\.05 s"):
        feast_store.apply(config, directory, deadline_s=0.05)
