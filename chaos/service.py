"""One process that runs the service."""

import pathlib
import signal
import sys
import time
from collections.abc import Mapping

from cerberus.stack import ports, process

_ROOT = pathlib.Path(__file__).parent.parent
_STOP_S = 30.0


class Instance:
    """One process that runs the service.

    Attributes:
        name: Of its log and pid file.
        tree: The checkout whose code it runs.
        port: Where it answers.
        up: Whether it was started and neither killed, stopped nor paused since.
        killed_s: When it was killed, wall clock.
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
        self.port = ports.assign({name: 0}, site.directory / f"{name}.ports.json")[name]
        self.up = self._started = False
        self.killed_s: list[float] = []
        self._process = process.Process(name, site)
        self._environ = environ
        self._command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]
        self._command += ["--app-dir", str(site.directory), "--no-access-log"]
        self._process.end_leftover(lambda candidate: app in candidate.cmdline())

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.status

    @property
    def log(self) -> pathlib.Path:
        """Everything it wrote."""
        return self._process.log

    def start(self) -> None:
        """Start it; it serves some seconds later."""
        self._process.start(self._command, self.tree, self._environ)
        self.up = self._started = True

    def pause(self) -> None:
        """Stop it where it stands."""
        self.up = False
        self._process.kill(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
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
        """Ask it to end and return its status; None when it had to be killed after 30 s."""
        self.up = False
        self._process.kill(signal.SIGTERM)
        end_s = time.monotonic() + _STOP_S
        while self.status is None and time.monotonic() < end_s:
            time.sleep(0.05)
        status = self.status
        self.kill()
        return status
