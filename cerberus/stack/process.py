"""Child processes that do not outlive us: each has a session, a log file and a pid file."""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from cerberus import errors

_GRACE_S = 15.0
_LOG_BYTES = 16 * 1024 * 1024
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Site:
    """Where children keep their files, and where progress is reported.

    Attributes:
        directory: Absolute; holds data, logs and pid files.
        environ: What children inherit.
        say: Prints one line.
        durable: Whether data must survive a crash of the machine.
        cancelled: Ends every wait when set.
    """

    directory: pathlib.Path
    environ: Mapping[str, str]
    say: Callable[[str], None] = print
    durable: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, name: str, text: str) -> None:
        """Print one line; lines of several threads do not mix."""
        with self._lock:
            self.say(f"{name:<12} {text}".rstrip())

    def report(self, name: str, text: str, outcome: str = "") -> None:
        """Print the line of a part that is done."""
        self.tell(name, f"{text:<62} {outcome}")


class Failed(errors.ServerUnavailable):
    """A child process with a task exited with a status other than 0.

    Args:
        message: What happened, with the last lines of its log.
        status: Its exit status.
        last_line: The last line of its log.
    """

    def __init__(self, message: str, status: int, last_line: str) -> None:
        super().__init__(message)
        self.status = status
        self.last_line = last_line


class Cancelled(errors.ServerUnavailable):
    """The start was given up before it was complete."""


class Process:
    """One child in a session of its own, so that Ctrl-C reaches us and not it.

    Attributes:
        name: Also the stem of its log and pid file.
        log: Everything it printed; emptied when it starts above 16 MiB.
        log_start: Where in it the present run begins, bytes.
    """

    def __init__(self, name: str, site: Site, stop_signals: Sequence[int] = ()) -> None:
        self.name = name
        self.log = site.directory / f"{name}.log"
        self._site = site
        self._stop_signals = tuple(stop_signals) or (signal.SIGTERM,)
        self._pid_file = site.directory / f"{name}.pid"
        self._child: Any = None
        self.log_start = 0

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs and before it was started."""
        return None if self._child is None else self._child.poll()

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        cwd: pathlib.Path,
        environ: Mapping[str, str],
        uid: int | None = None,
    ) -> None:
        """Start it; `uid` also is its only group.

        Raises:
            ServerUnavailable: The program cannot be run.
        """
        identity = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        with self.log.open("ab") as log:
            if log.tell() > _LOG_BYTES:
                log.truncate(0)
            self.log_start = log.tell()
            try:
                self._child = psutil.Popen(
                    [os.fspath(part) for part in command],
                    cwd=cwd,
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **identity,
                )
            except OSError as error:
                raise errors.ServerUnavailable(
                    f"{self.name}: cannot run {command[0]}: {error}"
                ) from error
        self._pid_file.write_text(f"{self._child.pid}\n")

    def wait_for(self, done: Callable[[], bool], within_s: float, doing: str) -> None:
        """Wait until `done()`, and report every 2 s.

        Raises:
            ServerUnavailable: It ended first, or was not done in time; the message quotes its log.
        """
        began = told = time.monotonic()
        while not done():
            now = time.monotonic()
            if self.status is not None:
                if done():  # it ended since the question above
                    break
                raise errors.ServerUnavailable(self.account(ending(self.status)))
            if now - began > within_s:
                raise errors.ServerUnavailable(self.account(f"still {doing} after {within_s:g} s"))
            if now - told >= 2.0:
                told = now
                self._site.tell(self.name, f"{doing}, {now - began:.0f} s")
            if self._site.cancelled.wait(0.02):
                raise Cancelled

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        cwd: pathlib.Path,
        environ: Mapping[str, str],
        uid: int | None = None,
        within_s: float = 120.0,
    ) -> None:
        """Start it and wait until it has succeeded.

        Raises:
            Failed: It exited with a status other than 0.
            ServerUnavailable: It did not end in time.
        """
        self.start(command, cwd, environ, uid)
        try:
            self.wait_for(lambda: self.status is not None, within_s, "at work")
            if self.status:
                message = self.account(ending(self.status))
                raise Failed(message, self.status, message.splitlines()[-1].strip())
        finally:
            self.stop()

    def stop(self, grace_s: float = _GRACE_S) -> None:
        """Ask it to end, then kill it; does nothing if it does not run."""
        if self._child is not None:
            _end(self._child, self._stop_signals, grace_s)
            self._child = None
            self._pid_file.unlink(missing_ok=True)

    def kill(self, number: int) -> None:
        """Send a signal; SIGSTOP and SIGCONT reach its children too, SIGKILL waits for its end."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            _signal([self._child, *_children(self._child)], number)
        elif number == signal.SIGKILL:
            _end(self._child, (), 0.0)
        else:
            self._child.send_signal(number)

    def end_leftover(
        self, owned: Callable[[Any], bool], more: Iterable[pathlib.Path] = ()
    ) -> int | None:
        """End a process that a killed run left behind.

        Args:
            owned: Says whether a process (of psutil) is ours, by more than its id.
            more: Files besides its own whose first line is its process id.

        Returns:
            Its process id; None if there was none.
        """
        for file in (self._pid_file, *more):
            # Another user's process, one that is gone, or a broken file: not ours.
            with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
                process = psutil.Process(int(file.read_text().splitlines()[0]))
                if owned(process):
                    _end(process, self._stop_signals, _GRACE_S)
                    return int(process.pid)
        return None

    def account(self, what: str) -> str:
        """Return what happened to it, with the last lines of its log."""
        return f"{self.name} {what}; {self.log} ends with:\n{self._tail() or '    nothing'}"

    def _tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self.log_start, os.fstat(log.fileno()).st_size - 64 * 1024))
            lines = log.read().decode(errors="replace").splitlines()
        # Java says what is wrong above a long stack trace.
        telling = [line for line in lines if not line.startswith("\tat ")]
        return "\n".join(f"    {line}" for line in telling[-_TAIL_LINES:])


def ending(status: int | None) -> str:
    """Say how a process ended, by its status."""
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def end_all(owned: Callable[[Any], bool]) -> None:
    """Kill our processes that are left from a run that was killed."""
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if owned(each):
                each.kill()
                each.wait(_GRACE_S)


def alive(pid: int) -> bool:
    """Return whether a process with this id exists."""
    return bool(psutil.pid_exists(pid))


def _end(process: Any, signals: Sequence[int], grace_s: float) -> None:
    children = _children(process)
    for number in signals:
        # A stopped process gets no signal but SIGKILL until it goes on.
        _signal([process], number)
        _signal([process, *children], signal.SIGCONT)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(grace_s)
            break
    else:
        children = children or _children(process)
        _signal([process], signal.SIGKILL)
        process.wait(_GRACE_S)
    _, left = psutil.wait_procs(children, timeout=5.0)
    _signal(left, signal.SIGKILL)
    # Its orphans: it led a process group, which exists as long as one member lives.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _children(process: Any) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _signal(processes: Iterable[Any], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
