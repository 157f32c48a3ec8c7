"""Start the servers that are missing, prepare the stores and the model, and serve (`make run`).

Each part prints one line. SIGINT, SIGTERM or SIGHUP stops in reverse order all that was started.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from cerberus import assembly, environment, errors, printable, settings, stack, window
from cerberus.jobs import feast, materializer
from cerberus.online import layout, user_rows
from cerberus.online import pool as redis_pool
from cerberus.stack import ports, process, watch
from cerberus.stack import service as running

PORT = 8000
_APP = "cerberus.app:app"
_CONFIG_STATUS = 78
_HEALTHY_S, _STOP_S, _STEP_S, _TRAINING_S = 60.0, 25.0, 180.0, 900.0
_CURL = "curl -s localhost:{port}/predict{key} -H 'content-type: application/json' -d '{body}'"
# The definitions in `feature_repo` also depend on these modules.
_DEFINING = ("jobs/feast", "features/declared", "online/layout", "window")
DIRECTORY = pathlib.Path(".cerberus")
# Minutes instead of days, so that the first figures of accuracy appear while somebody watches.
_SOON = {
    "CERBERUS_SYNTHETIC_LABEL_DELAY_S": "60",
    "CERBERUS_LABEL_MATURITY_DAYS": f"{5 / 1440:.8f}",
}
# They stand in while the settings are checked; the servers that start replace them.
_ADDRESSES = {
    "KAFKA_BROKER": "127.0.0.1:9092",
    "REDIS_URL": "redis://127.0.0.1",
    "DATABASE_URL": "postgresql://127.0.0.1",
}


def clean(directory: pathlib.Path = DIRECTORY) -> None:
    """Remove all that `run` has left behind.

    Raises:
        ServerUnavailable: `run` is running.
    """
    if directory.exists():
        _end_service(process.Site(directory.resolve(), os.environ, _say))
    stack.clean(directory)


def _end_service(site: process.Site) -> None:
    left = process.Process("service", site).end_leftover(lambda found: _APP in found.cmdline())
    if left:
        site.tell("service", f"ended process {left}, left by a run that was killed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = __doc__
    parser.add_argument(
        "--port", type=_port, default=PORT, help=f"port of the service (default: {PORT})"
    )
    parser.add_argument("--rate", help="synthetic transactions per second; 0 for none")


def run(arguments: argparse.Namespace) -> int:
    """Run everything on this machine until a signal comes; return the exit status."""
    environ = dict(os.environ)
    if arguments.rate is not None:
        environ["CERBERUS_RATE"] = arguments.rate
    with _interruptible():
        return start(environ, port=arguments.port)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError("must be from 1 to 65535")
    return int(text)


def start(
    environ: Mapping[str, str],
    directory: pathlib.Path = DIRECTORY,
    port: int = PORT,
) -> int:
    """Start all, serve until interrupted, stop all.

    Args:
        environ: Settings. A server whose address it gives is used; the others are started.
        directory: Holds data and logs between runs.
        port: The port of the service on 127.0.0.1; if it is taken, the next free one is used.

    Returns:
        0 after an interrupt, else the status with which the service ended by itself. A server that
        dies is started again, three times in ten minutes at most.

    Raises:
        ConfigError: A setting is wrong; nothing was started.
        ServerUnavailable: A server or a step failed; the message quotes its log.
    """
    given = {name: value for name, value in environ.items() if value}
    environ = _completed(environ, given, directory)
    try:
        with (
            concurrent.futures.ThreadPoolExecutor() as pool,
            stack.servers(directory, environ, say=_say) as servers,
        ):
            environ |= servers.environ
            site = process.Site(directory.resolve(), environ, _say)
            config = settings.load(environ)
            _prepare(site, servers, config, pool)
            with servers.watch() as watching:
                return _serve(site, config, port, pool, watching)
    except KeyboardInterrupt:
        return 0
    except errors.ServerUnavailable as error:
        if not (set_by := sorted({*_ADDRESSES, "KAFKA_URL"} & given.keys())):
            raise
        raise errors.ServerUnavailable(
            f"{error}\n{', '.join(set_by)}: set, so no such server was started; unset it to "
            "start one"
        ) from error


def _completed(
    environ: Mapping[str, str], given: Mapping[str, str], directory: pathlib.Path
) -> dict[str, str]:
    """Check the settings, and return them with what suits a run on this machine."""
    told = settings.load({**_ADDRESSES, **given})
    assembly.check_files(told)
    soon = _SOON if told.kafka.on_loopback else {}
    completed = {**environ, **soon, **given, "PYTHONUNBUFFERED": "1"}
    if not told.serving.api_keys:
        completed["CERBERUS_OPEN"] = "loopback"  # it serves on a loopback address
    if "CERBERUS_MODEL" not in given and window.Spans.of(told.windows) != window.Spans():
        # The committed model and plan are for the default windows, and stay.
        completed["CERBERUS_MODEL"] = str(directory.resolve() / "model" / settings.MODEL_PATH.name)
    return completed


def _prepare(
    site: process.Site,
    servers: stack.Stack,
    config: settings.Settings,
    pool: concurrent.futures.Executor,
) -> None:
    jobs: list[Callable[[], None]] = [
        lambda: _prepare_model(site, config),
        lambda: _prepare_stores(site, servers, config),
    ]
    try:
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            done.result()
    except BaseException:
        site.cancelled.set()
        raise


def _prepare_model(site: process.Site, config: settings.Settings) -> None:
    from cerberus.decisions import models  # the import takes a second; the other job runs meanwhile

    try:
        models.Model.load(config.model.path, config.windows.spans)
    except errors.ModelMismatch as error:
        site.tell("model", f"{error}")
        _step(site, "train", "a model was trained", within_s=_TRAINING_S)
    else:
        site.report("model", f"{config.model.path.name} fits")


def _prepare_stores(site: process.Site, servers: stack.Stack, config: settings.Settings) -> None:
    _step(site, "migrate", "tables and topics are up to date")
    stamp, current = site.directory / "features.stamp", _definitions(config)
    known = stamp.read_text() if stamp.exists() else ""
    # A database that was not started here may not be the one of last time.
    lasting = isinstance(servers.postgres, stack.Local) and not servers.postgres.created
    place = feast.place()
    rendered = place is None or (place / "feature_store.yaml").exists()
    if known == current and lasting and rendered:
        site.report("features", "definitions have not changed")
    else:
        _step(site, "features", "definitions are applied", "apply")
        if config.rate > 0:
            asyncio.run(_seed(config))
        _step(site, "materialize", "credit scores are online")
        stamp.write_text(current)
    try:
        plan = layout.Plan.load(config.model.plan_path)
        user_rows.OnlineStore(redis_pool.connect(config), plan, window.Spans.of(config.windows), "")
    except errors.ModelMismatch:
        config.model.plan_path.parent.mkdir(exist_ok=True)
        _step(site, "features", "the feature plan is compiled", "compile")


async def _seed(config: settings.Settings) -> None:
    async with assembly.for_command(config) as service:
        await materializer.seed_credit_scores(config, service.postgres)


def _definitions(config: settings.Settings) -> str:
    digest = hashlib.sha256()
    sources = (environment.PACKAGE / f"{name}.py" for name in _DEFINING)
    for file in (*sorted(settings.FEATURE_REPO.glob("*.py")), *sources):
        digest.update(file.read_bytes())
    said = (config.postgres.url, config.redis.url, config.windows.spans)
    limits = (config.windows.allowed_lateness_ms, config.windows.max_future_skew_ms)
    digest.update(repr((said, limits)).encode())
    return digest.hexdigest()


def _step(
    site: process.Site, name: str, outcome: str, *arguments: str, within_s: float = _STEP_S
) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "cerberus", name, *arguments]
    try:
        child = process.Process(name, site)
        child.run(command, pathlib.Path.cwd(), site.environ, within_s=within_s)
    except process.Failed as failed:
        if failed.status == _CONFIG_STATUS:
            said = failed.last_line.removeprefix(f"cerberus {name}: ")
            raise errors.ConfigError(said) from failed
        raise
    site.report(name, outcome, f"done in {time.monotonic() - began:.1f} s")


def _serve(
    site: process.Site,
    config: settings.Settings,
    wanted: int,
    pool: concurrent.futures.Executor,
    watching: watch.Watch,
) -> int:
    service = process.Process("service", site)
    _end_service(site)
    port = _free_port(wanted, site)
    command = [sys.executable, "-m", "uvicorn", _APP, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--timeout-keep-alive", "75"]
    # In a thread: an interrupt between fork and bookkeeping would leave it behind.
    starting = pool.submit(service.start, command, pathlib.Path.cwd(), site.environ)
    try:
        starting.result()
        warnings = running.Warnings(service, site)
        _wait_for(service, warnings, site, running.Health(port, config.serving.api_keys))
        if service.status is None:
            _invite(site, config, port)
        while service.status is None:
            warnings.show()
            if watching.failure is not None:
                raise watching.failure
            time.sleep(0.2)
        site.say(service.account(process.ending(service.status)))
        return service.status if service.status >= 0 else 128 - service.status
    finally:
        concurrent.futures.wait([starting])
        service.stop(_STOP_S)


def _free_port(wanted: int, site: process.Site) -> int:
    for port in range(wanted, 65_536):
        if ports.free(port):
            if port != wanted:
                site.tell("service", f"port {wanted} is in use by another program; using {port}")
            return port
    raise errors.ConfigError(f"no port from {wanted} upwards is free; choose another with --port")


def _wait_for(
    service: process.Process,
    warnings: running.Warnings,
    site: process.Site,
    health: running.Health,
) -> None:
    def settled() -> bool:
        warnings.show()
        return service.status is not None or health.settled()

    began = time.monotonic()
    service.wait_for(settled, _HEALTHY_S, f"waiting for {health.url}/health")
    if service.status is None:
        took = f"{health.status} in {time.monotonic() - began:.1f} s"
        site.report("service", f"{health.url}; log in {_short(service.log)}", took)
        for reason in health.reasons:
            site.tell("", reason)


def _invite(site: process.Site, config: settings.Settings, port: int) -> None:
    idle = "idle; CERBERUS_RATE above 0 starts it"
    busy = f"{config.rate:g} synthetic transactions/s; CERBERUS_RATE=0 stops it"
    site.report("producer", busy if config.rate else idle)
    key = ' -H "x-api-key: $CERBERUS_API_KEY"' if config.serving.api_keys else ""
    body = f'{{"user_id": {config.synthetic.first_user_id + 5}}}'
    site.say(f"\n{_CURL.format(port=port, key=key, body=body)}\n\nCtrl-C stops everything.")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the first signal that ends us into an interrupt, and ignore the next ones."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        # Python's own streams may be in the middle of a write.
        with contextlib.suppress(OSError):
            os.write(1, b"\nstopping everything that was started\n")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _short(path: pathlib.Path) -> pathlib.Path:
    here = pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _say(text: str) -> None:
    # A closed terminal must not keep us from stopping what we started.
    with contextlib.suppress(OSError):
        sys.stdout.write(f"{printable.lines(text)}\n")
        sys.stdout.flush()
