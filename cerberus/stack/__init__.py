"""Kafka, Redis and Postgres on this machine, for `make run` and for the tests.

Each is looked for in this order: its URL in the environment (nothing is started), a program of the
system, an installed Python package. If one is missing, one sentence says what to do; nothing stands
in for a real server.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import types
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass

from cerberus import errors
from cerberus.stack import kafka, ports, postgres, process, redis, watch
from cerberus.stack.server import Local, Server

__all__ = ["Local", "Server", "Stack", "clean", "servers"]

_VARIABLES = {
    "kafka": ("KAFKA_BROKER", "KAFKA_URL"),
    "redis": ("REDIS_TLS_URL", "REDIS_URL"),
    "postgres": ("DATABASE_URL",),
}
_NOTHING: Mapping[str, str] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Stack:
    """The three servers, running."""

    kafka: Server
    redis: Server
    postgres: Server
    site: process.Site

    def watch(self) -> watch.Watch:
        """Return a context that restarts the servers of this run if they die."""
        everyone = (self.kafka, self.redis, self.postgres)
        return watch.Watch([each for each in everyone if isinstance(each, Local)], self.site)

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which a process reaches them."""
        return {
            "KAFKA_BROKER": self.kafka.url,
            "REDIS_URL": self.redis.url,
            "DATABASE_URL": self.postgres.url,
        }


@contextlib.contextmanager
def servers(
    directory: pathlib.Path,
    environ: Mapping[str, str],
    *,
    say: Callable[[str], None] = print,
    kafka_properties: Mapping[str, str] = _NOTHING,
    durable: bool = True,
) -> Iterator[Stack]:
    """Start the servers that the environment does not name; at the end stop them, and only them.

    Args:
        directory: Holds data, ports, logs and process ids; one run at a time may use it.
        environ: The environment of the caller. `CERBERUS_STACK=wheel` ignores programs of the
            system, `CERBERUS_STACK=system` ignores packages.
        say: Receives one line for each server, and one every 2 s while something takes long.
        kafka_properties: Override those of the broker.
        durable: False for throw-away data: any free ports, and Postgres does not wait for disks.

    Raises:
        ServerUnavailable: A server is missing, or does not start within 60 s.
        ConfigError: CERBERUS_STACK has another value.
    """
    if environ.get("CERBERUS_STACK", "") not in ("", "wheel", "system"):
        raise errors.ConfigError("CERBERUS_STACK must be wheel or system, or not set")
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    site = process.Site(directory.resolve(), environ, say, durable)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_alone(site.directory))
        stack = _found(site, kafka_properties)
        everyone = (stack.kafka, stack.redis, stack.postgres)
        _settle([server for server in everyone if isinstance(server, Local)], site)
        for server in everyone:
            undo.callback(server.stop)
        _start(everyone, site)
        yield stack


def clean(directory: pathlib.Path) -> None:
    """End the processes that a killed run left behind, and remove a stack's data and logs.

    Raises:
        ServerUnavailable: It is running.
    """
    directory = directory.resolve()
    if directory.exists():
        with _alone(directory):
            home = postgres.home(directory)
            places = (directory, home)
            site = process.Site(directory, os.environ)
            for name in _VARIABLES:
                process.Process(name, site).end_leftover(
                    lambda found: any(pathlib.Path(found.cwd()).is_relative_to(p) for p in places),
                    (home / "data" / "postmaster.pid",) if name == "postgres" else (),
                )
            shutil.rmtree(home, ignore_errors=True)
            shutil.rmtree(directory)


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    with (directory / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise errors.ServerUnavailable(
                f"{directory} is in use by process {lock.read().strip()}: stop that first"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _found(site: process.Site, kafka_properties: Mapping[str, str]) -> Stack:
    makers: dict[str, Callable[[], Server]] = {
        "kafka": lambda: kafka.Kafka(kafka.find(site.environ), site, kafka_properties),
        "redis": lambda: redis.Redis(redis.find(site.environ), site),
        "postgres": lambda: postgres.Postgres(postgres.find(site), site),
    }
    found: dict[str, Server] = {}
    missing = []
    for name, make in makers.items():
        try:
            found[name] = _given(name, site.environ) or make()
        except errors.ServerUnavailable as error:
            missing.append(str(error))
    if missing:
        raise errors.ServerUnavailable("\n".join(missing))
    return Stack(**found, site=site)


def _given(name: str, environ: Mapping[str, str]) -> Server | None:
    for variable in _VARIABLES[name]:
        if url := environ.get(variable, "").strip():
            return Server(name, url, f"{variable} in the environment")
    return None


def _settle(started: list[Local], site: process.Site) -> None:
    for server in started:
        server.end_leftover()
    wanted = {
        name: port if site.durable else 0
        for server in started
        for name, port in server.WANTS.items()
    }
    chosen = ports.assign(wanted, site.directory / "ports.json")
    for server in started:
        server.settle(chosen)


def _start(everyone: tuple[Server, ...], site: process.Site) -> None:
    with futures.ThreadPoolExecutor(len(everyone)) as pool:
        try:
            starting = {pool.submit(server.start): server for server in everyone}
            for future in futures.as_completed(starting):
                future.result()
                _report(starting[future], site)
        except BaseException:
            # The others give up and are stopped by the caller.
            site.cancelled.set()
            raise


def _report(server: Server, site: process.Site) -> None:
    """Print the address and the origin of a server, without the secrets of a URL."""
    addresses = [
        urllib.parse.urlsplit(part if "://" in part else f"//{part}").netloc.rpartition("@")[2]
        for part in server.url.split(",")
    ]
    took = f"ready in {server.ready_s:.1f} s" if isinstance(server, Local) else ""
    site.report(server.name, f"{','.join(addresses):<17} {server.origin}", took)
