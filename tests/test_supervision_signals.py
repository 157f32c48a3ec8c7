import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

DEADLINE_S = 60.0
ROOT = pathlib.Path(__file__).parent.parent

# Two tasks behind three routes; what each does stands in the environment, as one word a run.
APP = """
import asyncio, contextlib, json, logging, os, pathlib, time, warnings
import anyio
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from cerberus import errors, shutdown, supervision
from cerberus.telemetry import logs

TOLD = json.loads(os.environ["TOLD"])
log = logging.getLogger("tiny")
logs.configure("INFO")
beats = {}


def task(name, words):
    async def run(progress):
        word = words.pop(0) if words else "work"
        if word == "raise":
            raise RuntimeError("as told")
        if word == "bug":
            raise errors.ConfigError("TINY is not set")
        if word == "return":
            return
        if word == "cancel":
            raise asyncio.CancelledError
        if word == "hang":
            progress.lagging(True)
            await asyncio.sleep(1000)
        if word == "once":  # the first process of all gives up, later ones work
            with contextlib.suppress(FileExistsError):
                pathlib.Path(os.environ["ONCE"]).touch(exist_ok=False)
                raise errors.ConfigError("TINY is not set")
        while not progress.stopping.is_set():
            beats[name] = beats.get(name, 0) + 1
            progress.beat()
            await progress.wait(0.02)
        if word == "deaf":
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)
        if word == "block":
            time.sleep(1000)
        await asyncio.sleep(TOLD.get("drain_s", 0))
        log.info("drained", extra={"action": "drained", "odd": {1, 2}, "huge": 2**70})

    return run


@contextlib.asynccontextmanager
async def lifespan(app):
    leaving = shutdown.Exit(TOLD.get("deadline_s", 19.0))
    leaving.watch()
    log.info("opening", extra={"action": "opening"})
    await asyncio.sleep(TOLD.get("opens_s", 0))
    policy = supervision.Policy(**TOLD.get("policy", {}))
    supervisor = app.state.supervisor = supervision.Supervisor(leaving.request, policy=policy)
    for name in ("first", "second"):
        supervisor.add(name, task(name, TOLD.get(name, [])))

    async def drain():
        await leaving.asked.wait()
        await supervisor.stop(["second", "first"])

    try:
        async with anyio.create_task_group() as group:
            supervisor.start(group)
            group.start_soon(drain)
            yield
            leaving.asked.set()
        log.info("pools closed", extra={"action": "closed"})
        if TOLD.get("teardown_fails"):
            raise RuntimeError("a pool does not close")
    finally:
        leaving.finish()


async def status(request):
    supervisor = request.app.state.supervisor
    tasks = {
        name: [task.state, task.restarts, task.sound, task.last_error]
        for name, task in supervisor.status().items()
    }
    code = 503 if supervisor.gave_up else 200
    return JSONResponse({"pid": os.getpid(), "tasks": tasks, "beats": beats}, code)


async def slow(request):
    supervision.current_task.set("api")
    await asyncio.sleep(1.0)
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("two\\nlines")
    warnings.warn("a warning")
    log.info("where", stack_info=True)
    return JSONResponse({"answer": "whole"})


async def endless(request):
    async def parts():
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    return StreamingResponse(parts())


app = Starlette(
    routes=[Route("/status", status), Route("/slow", slow), Route("/endless", endless)],
    lifespan=lifespan,
)
"""

# uvicorn's own command line, whose parent tells how each of its workers ended.
TELLING_PARENT = """
import uvicorn
from uvicorn.supervisors import multiprocess

join = multiprocess.Process.join


def tell(process):
    join(process)
    print(f"worker {process.pid} ended with {process.exitcode}", flush=True)


if __name__ == "__main__":
    multiprocess.Process.join = tell
    uvicorn.main()
"""


class Server:
    """A uvicorn process of the tiny app, what it said, and the way to ask it."""

    def __init__(self, folder: pathlib.Path, told: dict[str, Any], *options: str) -> None:
        (folder / "tiny.py").write_text(APP)
        (folder / "parent.py").write_text(TELLING_PARENT)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._said = folder / "said"
        environ = os.environ | {
            "TOLD": json.dumps(told),
            "ONCE": str(folder / "once"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        }
        launcher = [str(folder / "parent.py")] if "--workers" in options else ["-m", "uvicorn"]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "tiny:app", "--port", str(self.port), *options],
                stdout=said,
                stderr=said,
                env=environ,
                cwd=folder,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._said.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def actions(self) -> list[tuple[str, str]]:
        """Return who did what, after the start."""
        told = [(line["task"], line["action"]) for line in self.lines() if "action" in line]
        return told[1:]

    def status(self) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=2) as reply:
                return dict(json.load(reply))
        except OSError:
            return None

    def until(self, true: Callable[[], Any]) -> Any:
        ends = time.monotonic() + DEADLINE_S
        while not (found := true()):
            assert time.monotonic() < ends, self.said()
            time.sleep(0.05)
        return found

    def until_up(self) -> dict[str, Any]:
        return dict(self.until(self.status))

    def until_tasks(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if status and true(status["tasks"]) else None

        return dict(self.until(look))

    def exit_status(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still alive, having said:\n{self.said()}")

    @contextlib.contextmanager
    def request(self, path: str, rest: str = "\r\n") -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{rest}".encode())
            yield client


@pytest.fixture
def serve(tmp_path: pathlib.Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(told: dict[str, Any], *options: str) -> Server:
        servers.append(Server(tmp_path, told, *options))
        return servers[-1]

    yield start
    for server in servers:
        # The session that was made for it, so that its workers end too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(DEADLINE_S)


QUICK = {"backoff_base_s": 0.05, "watch_s": 0.05, "stall_s": 0.3}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("raise", "RuntimeError: as told"),
        ("return", "returned, though it should run for ever"),
        ("cancel", "was cancelled, though not by its supervisor"),
        ("hang", "made no progress for 0.3 s"),
    ],
)
def test_a_task_that_fails_is_started_anew_and_the_other_works_on(serve, word, said):
    server = serve({"first": [word, word], "policy": QUICK})
    seen = server.until_tasks(lambda tasks: tasks["first"][:3] == ["running", 2, True])
    assert seen["tasks"] == {
        "first": ["running", 2, True, said],
        "second": ["running", 0, True, None],
    }
    server.until(lambda: server.status()["beats"]["second"] > seen["beats"]["second"])


@pytest.mark.parametrize(
    ("loop", "number", "status"),
    [
        ("uvloop", signal.SIGTERM, -signal.SIGTERM),
        ("asyncio", signal.SIGTERM, -signal.SIGTERM),
        ("uvloop", signal.SIGINT, 0),
    ],
)
def test_a_signal_drains_one_task_after_the_other_and_then_closes(serve, loop, number, status):
    server = serve({"drain_s": 1.0}, "--loop", loop)
    server.until_up()
    server.process.send_signal(number)
    assert server.exit_status() == status
    assert server.actions() == [
        ("second", "drained"),
        ("second", "task_stopped"),
        ("first", "drained"),
        ("first", "task_stopped"),
        ("main", "closed"),
    ]


def test_a_signal_ends_a_wait_before_a_restart(serve):
    server = serve({"first": ["raise"], "policy": {"backoff_base_s": 1e6, "backoff_cap_s": 1e6}})
    server.until_tasks(lambda tasks: tasks["first"][0] == "backing_off")
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() == -signal.SIGTERM
    assert ("main", "closed") in server.actions()


@pytest.mark.parametrize(
    ("words", "restarts"), [(["bug"], 0), (["raise"] * 6, 5)], ids=["at once", "after restarts"]
)
def test_a_task_that_cannot_be_kept_alive_ends_the_process_with_70(serve, words, restarts):
    server = serve({"first": words, "policy": QUICK})
    assert server.exit_status() == 70
    actions = server.actions()
    assert actions.count(("first", "task_failed")) == restarts + 1
    assert actions.count(("first", "give_up")) == 1
    assert actions[-3:] == [("second", "drained"), ("second", "task_stopped"), ("main", "closed")]


def test_a_teardown_that_fails_after_a_give_up_is_told_and_changes_nothing(serve):
    server = serve({"first": ["bug"], "teardown_fails": True})
    assert server.exit_status() == 70
    assert server.actions()[-1] == ("main", "give_up")
    assert "a pool does not close" in server.lines()[-1]["traceback"]


def test_after_a_give_up_open_requests_are_answered_and_logged_before_the_end(serve):
    server = serve({"first": ["hang", "bug"], "policy": QUICK | {"stall_s": 1.0}})
    server.until_up()
    with server.request("/slow") as client:
        server.until(lambda: ("first", "give_up") in server.actions())
        reply = client.makefile("rb").read()
    assert b'{"answer":"whole"}' in reply
    assert server.exit_status() == 70
    assert any("GET /slow" in line["message"] for line in server.lines())


def test_a_worker_that_gave_up_ends_with_70_and_is_replaced_while_the_other_serves(serve):
    server = serve({"first": ["once"]}, "--workers", "2")
    server.until(lambda: "ended with 70" in server.said())
    server.until_up()
    assert server.process.poll() is None
    server.until(lambda: server.said().count("Application startup complete") == 3)
    assert server.said().count("ended with") == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() == 0
    assert server.said().count(f"ended with {-signal.SIGTERM}") == 2


@pytest.mark.parametrize(
    "rest", ["\r\n", "Content-Length: 9\r\n\r\nhalf"], ids=["a reply", "a body"]
)
@pytest.mark.parametrize(("words", "status"), [([], 143), (["hang", "bug"], 70)])
def test_a_client_that_holds_its_connection_does_not_hold_the_end(serve, rest, words, status):
    server = serve({"first": words, "policy": QUICK | {"stall_s": 1.0}, "deadline_s": 2.0})
    server.until_up()
    with server.request("/endless", rest) as client:
        assert client.recv(8) == b"HTTP/1.1"
        if not words:
            server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == status
    # The drain does not wait for the client.
    assert ("second", "task_stopped") in server.actions()
    assert server.actions()[-1] == ("main", "exit_forced")


@pytest.mark.parametrize("word", ["deaf", "block"])
def test_a_task_that_does_not_hear_does_not_hold_the_end(serve, word):
    policy = {"stop_s": 1.0, "cut_s": 0.2}
    server = serve({"first": [word], "policy": policy, "deadline_s": 2.0})
    server.until_up()
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() == (143 if word == "block" else -signal.SIGTERM)
    assert ("second", "task_stopped") in server.actions()


def test_a_start_that_hangs_does_not_hold_the_end(serve):
    server = serve({"opens_s": 1000, "deadline_s": 1.0})
    server.until(lambda: "opening" in server.said())
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() == 143


def test_every_line_is_one_object_that_names_its_task(serve):
    server = serve({"first": ["raise"], "policy": QUICK}, "--no-use-colors")
    server.until_tasks(lambda tasks: tasks["first"][1] == 1)
    with server.request("/slow", "Connection: close\r\n\r\n") as client:
        client.makefile("rb").read()
    server.process.send_signal(signal.SIGTERM)
    server.exit_status()
    lines = [json.loads(line) for line in server.said().splitlines()]
    for line in lines:
        assert list(line)[:5] == ["time", "level", "logger", "task", "message"]
        assert line["time"].endswith("Z")
    assert {"uvicorn.error", "uvicorn.access", "tiny", "py.warnings"} <= {
        x["logger"] for x in lines
    }
    failure = next(x for x in lines if x.get("action") == "task_failed")
    assert failure["task"] == "first"
    assert failure["traceback"].endswith("RuntimeError: as told")
    assert ("api", "two\nlines") in {(x["task"], x["message"]) for x in lines}
    assert any(x["logger"] == "uvicorn.access" and "GET /slow" in x["message"] for x in lines)
    where = next(line for line in lines if line["message"] == "where")
    assert "in slow" in where["stack"]
    drained = next(x for x in lines if x.get("action") == "drained")
    assert {"odd", "huge"} <= set(drained)
