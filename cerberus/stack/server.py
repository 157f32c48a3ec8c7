"""What the three servers have in common, whether given or started here."""

import importlib.util
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cerberus import errors
from cerberus.stack import ports, process

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Program:
    """A server's program that runs on this machine.

    Attributes:
        path: The binary, or the directory of several.
        version: Its leading numbers.
        origin: Name, version and where it was found, to be printed.
    """

    path: pathlib.Path
    version: tuple[int, ...]
    origin: str


class Server:
    """A server that somebody else runs: it is neither started nor stopped here.

    Attributes:
        name: kafka, redis or postgres.
        url: `host:port` for Kafka, else a URL.
        origin: Where it comes from, a few words.
        ready_s: From its start until it answered; 0 when it was not started here.
        created: Whether this start created its data.
    """

    def __init__(self, name: str, url: str, origin: str) -> None:
        self.name = name
        self.url = url
        self.origin = origin
        self.ready_s = 0.0
        self.created = False

    def start(self) -> None:
        """Start it and return when it answers.

        Raises:
            ServerUnavailable: It did not start; the message names its log and quotes the end.
        """

    def stop(self) -> None:
        """Stop it within bounds, at last by SIGKILL. Idempotent: yes."""

    def kill(self, number: int) -> None:
        """Send a signal to this server alone; SIGSTOP and SIGCONT reach its children too.

        Raises:
            ServerUnavailable: It was not started here.
        """
        raise errors.ServerUnavailable(f"{self.name} was not started here, so it gets no signal")

    def restart(self) -> None:
        """Stop it and start it on the same port with the same data."""
        self.stop()
        self.start()


class Local(Server):
    """A server started here, alone in its session, with its data in a home directory.

    Attributes:
        WANTS: Names of its ports, each with its usual number or 0; its main port is first.
        STOP_SIGNALS: Tried in turn before SIGKILL.
    """

    WANTS: ClassVar[Mapping[str, int]]
    STOP_SIGNALS: ClassVar[Sequence[int]] = ()

    def __init__(self, name: str, program: Program, home: pathlib.Path, site: process.Site) -> None:
        super().__init__(name, "", program.origin)
        self._program = program
        self._home = home
        self._site = site
        self._ports: Mapping[str, int] = {}
        self._process = process.Process(name, site, self.STOP_SIGNALS)

    @property
    def status(self) -> int | None:
        """How its process ended by itself; None while it runs, and after a stop."""
        return self._process.status

    def account(self, what: str) -> str:
        """Return what happened to it, with the last lines of its log."""
        return self._process.account(what)

    def revive(self) -> None:
        """Start it again after it died, on the same ports with the same data; see `start`."""
        self.stop()
        process.end_all(self._owns)
        self.start()

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return self._ports[self.name]

    def settle(self, chosen: Mapping[str, int]) -> None:
        """Take its ports; `origin` then says if the usual one is in use."""
        self._ports = {name: chosen[name] for name in self.WANTS}
        self.url = self._address()
        expected = self.WANTS[self.name]
        if self._site.durable and self.port != expected and not ports.free(expected):
            self.origin += f"; port {expected} is in use by another program"

    def end_leftover(self) -> None:
        """End the server of these data that a killed run left behind."""
        pid = self._process.end_leftover(self._owns, self._pid_files())
        if pid:
            self._site.tell(self.name, f"ended process {pid}, left by a run that was killed")

    def start(self) -> None:
        """See `Server.start`."""
        began = time.monotonic()
        self._prepare()
        self._process.start(self._command(), self._cwd(), self._environ(), self._uid())
        try:
            self._process.wait_for(self._answers, READY_S, "starting")
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    def stop(self) -> None:
        """See `Server.stop`."""
        self._process.stop()

    def kill(self, number: int) -> None:
        """See `Server.kill`."""
        self._process.kill(number)

    def _address(self) -> str:
        raise NotImplementedError

    def _prepare(self) -> None:
        raise NotImplementedError

    def _command(self) -> Sequence[str | pathlib.Path]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _cwd(self) -> pathlib.Path:
        return self._home

    def _environ(self) -> Mapping[str, str]:
        return self._site.environ

    def _uid(self) -> int | None:
        return None

    def _pid_files(self) -> Sequence[pathlib.Path]:
        return ()

    def _owns(self, candidate: Any) -> bool:
        # Every server runs in the directory of its data, and nothing else does.
        return pathlib.Path(candidate.cwd()) == self._cwd().resolve()


def ask(port: int, request: bytes, length: int) -> bytes:
    """Send bytes to a port of 127.0.0.1 and return the start of the answer; b"" if none comes.

    Deadline: 1 s.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(request)
            answer = b""
            while len(answer) < length and (more := connection.recv(length - len(answer))):
                answer += more
            return answer
    except OSError:
        return b""


def version(
    command: Sequence[str | pathlib.Path], pattern: str, environ: Mapping[str, str]
) -> tuple[int, ...] | None:
    """Run a program that prints its version; None if it does not run or prints something else."""
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=10.0, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout + done.stderr)
    return tuple(int(part) for part in found.groups()) if found and not done.returncode else None


def on_path(names: Sequence[str], environ: Mapping[str, str]) -> Iterator[pathlib.Path]:
    """Find programs on PATH, unless CERBERUS_STACK says `wheel`."""
    if environ.get("CERBERUS_STACK") != "wheel":
        for name in names:
            if found := shutil.which(name, path=environ.get("PATH", "")):
                yield pathlib.Path(found)


def in_wheel(package: str, environ: Mapping[str, str]) -> Iterator[pathlib.Path]:
    """Find an installed package's directory, unless CERBERUS_STACK says `system`."""
    if environ.get("CERBERUS_STACK") != "system":
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            yield pathlib.Path(spec.origin).parent
