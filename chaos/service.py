"""An instance of the service, as a process."""

import pathlib
import re
import signal
import sys
import time
from collections.abc import Mapping

from cerberus.stack import ports, process

_ROOT = pathlib.Path(__file__).parent.parent
_STOP_S = 30.0
AHEAD = "chaos.ahead:app"
"""The application with a clock that is an hour ahead."""


class Instance:
    """One process that runs the service.

    Attributes:
        name: Name of the instance, of its log and of its pid file.
        tree: The checkout whose code it runs.
        port: The port where it answers.
        up: Whether it was started and not killed, stopped or paused since.
        killed_s: When it was killed each time, wall clock.
    """

    def __init__(
        self,
        name: str,
        site: process.Site,
        environ: Mapping[str, str],
        app: str,
        tree: pathlib.Path = _ROOT,
    ) -> None:
        self.name = name
        self.tree = tree
        self._directory = site.directory
        self.port = ports.assign({name: 0}, site.directory / f"{name}.ports.json")[name]
        self.up = self._started = False
        self.killed_s: list[float] = []
        self._process = process.Process(name, site)
        self._environ = environ
        self._app = app
        self._command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]
        self._command += ["--app-dir", str(site.directory), "--no-access-log"]
        ours = {app, AHEAD}
        self._process.end_leftover(lambda candidate: not ours.isdisjoint(candidate.cmdline()))

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.status

    @property
    def greatest_bytes(self) -> int:
        """The peak of its memory since it was started."""
        pid = int((self._directory / f"{self.name}.pid").read_text())
        told = pathlib.Path(f"/proc/{pid}/status").read_text()
        [found] = re.findall(r"VmHWM:\s+(\d+) kB", told)
        return int(found) * 1024

    @property
    def log(self) -> pathlib.Path:
        """The file with everything that it has printed."""
        return self._process.log

    def start(self, app: str | None = None) -> None:
        """Start it, by default with its own application; it serves some seconds later."""
        command = [app if word == self._app and app else word for word in self._command]
        self._process.start(command, self.tree, self._environ)
        self.up = self._started = True

    def pause(self) -> None:
        """Freeze it, by SIGSTOP."""
        self.up = False
        self._process.kill(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it continue, by SIGCONT."""
        self._process.kill(signal.SIGCONT)
        self.up = True

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        if self._started:
            if self.status is None:
                self.killed_s.append(time.time())
            self._process.kill(signal.SIGKILL)
            self._process.stop()
        self.up = self._started = False

    def end(self) -> int | None:
        """Ask it to end and return its exit status; None when it had to be killed after 30 s."""
        self.up = False
        self._process.kill(signal.SIGTERM)
        end_s = time.monotonic() + _STOP_S
        while self.status is None and time.monotonic() < end_s:
            time.sleep(0.05)
        status = self.status
        self.kill()
        return status
