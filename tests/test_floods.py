"""The whole service under clients that open or send too much: well-behaved ones are served."""

import asyncio
import contextlib
import multiprocessing
import pathlib
import shutil
import statistics
import subprocess
import threading
import time
from concurrent import futures

import asyncpg
import orjson
import pytest
import redis
from service import service
from test_service import QUIET
from wire import Wire, ask, request

UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
)
LOCAL = b"Host: localhost\r\n"


def local(sent):
    """Ask for a name of this machine, as a caller without a key has to."""
    return sent.replace(b"Host: a\r\n", LOCAL)


def label(number, padding=""):
    return {
        "transaction_id": f"t{number}",
        "label": "fraud",
        "source": "test",
        "labelled_at": "2026-01-01T00:00:00Z",
        "note": padding,
    }


@contextlib.contextmanager
def calm(environ, **files):
    with service(environ | QUIET, **files) as running:
        running.wait_until_ready()
        yield running


def resident_mib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class Asking(threading.Thread):
    """Asks for predictions on one connection, one after the other, until it is stopped."""

    def __init__(self, running):
        super().__init__()
        self.took_s, self.statuses = [], set()
        self._running, self._stop_asking = running, threading.Event()

    def run(self):
        sent = local(request(path=b"/predict"))
        with Wire(self._running.port, seconds=60) as wire:
            while not self._stop_asking.is_set():
                began_s = time.monotonic()
                self.statuses.add(wire.send(sent).answer().status)
                self.took_s.append(time.monotonic() - began_s)
                time.sleep(0.01)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *raised):
        self._stop_asking.set()
        self.join(timeout=20)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_every_route_with_a_body_ignores_an_upgrade(environ, chunked):
    labelled = orjson.dumps(label(1))
    with calm(environ) as running:
        for path, body in ((b"/predict", b'{"user_id": 1005}'), (b"/labels", labelled)):
            sent = local(request(UPGRADE, body, path=path, chunked=chunked))
            head = sent.index(b"\r\n\r\n") + 4
            for parts in ([sent], [sent[:head], sent[head:]]):
                [answer] = ask(running.port, *parts, pause_s=0.05, quiet_s=1)
                assert answer.status == 200, answer.body
        with Wire(running.port) as wire:
            [answer] = wire.send(local(request(path=b"/predict"))).end().answers()
            assert answer.told["user_id"] == 1005


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on PATH")
def test_curl_may_ask_for_http2(environ):
    with calm(environ) as running:
        url = f"http://localhost:{running.port}/predict"
        told = subprocess.run(
            ["curl", "-s", "--max-time", "10", "--http2", url, "-d", '{"user_id": 1005}'],
            capture_output=True,
            check=True,
        )
    assert orjson.loads(told.stdout)["user_id"] == 1005


def flood(port, sent, callers, rounds):
    """Send so many requests at once, so often, from another process; return the answers."""

    def post(_):
        found = []
        for _ in range(rounds):
            with Wire(port, seconds=60) as wire:
                found.append(wire.send(sent).answer())
        return found

    with futures.ThreadPoolExecutor(callers) as pool:
        return [answer for found in pool.map(post, range(callers)) for answer in found]


def test_a_flood_of_large_bodies_is_refused_unparsed_and_predictions_go_on(environ):
    body = orjson.dumps({"labels": [label(n, "x" * 780) for n in range(1_000)]})
    assert 850_000 < len(body) < 2**20
    sent = local(request(body=body, path=b"/labels"))
    apart = futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with calm(environ | {"CERBERUS_READ_TIMEOUT_MS": "10000"}) as running, apart:
        told = apart.submit(flood, running.port, sent, 1, 5).result()
        assert {answer.status for answer in told} == {200}
        before_mib = resident_mib(running.process.pid)
        with Asking(running) as asking:
            told = apart.submit(flood, running.port, sent, 80, 10).result()
        grown_mib = resident_mib(running.process.pid) - before_mib
    assert len(told) == 800
    assert {answer.status for answer in told} == {200, 503}
    refused = [answer for answer in told if answer.status == 503]
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert {answer.told["code"] for answer in refused} <= {"overloaded", "labels_unavailable"}
    assert asking.statuses == {200}
    assert statistics.median(asking.took_s) < 2
    assert grown_mib < 100


def test_a_body_of_brackets_is_refused_unparsed(environ):
    body = b'{"labels": [' + b"{}," * 300_000 + b"{}]}"
    with calm(environ) as running:
        [answer] = ask(running.port, local(request(body=body, path=b"/labels")), quiet_s=2)
    assert (answer.status, answer.told["code"]) == (413, "too_large")


async def end_sessions(url):
    connection = await asyncpg.connect(url, timeout=10)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


def test_with_few_files_and_many_half_open_connections_the_service_serves(environ):
    few = 256
    with calm(environ, files=few) as running, contextlib.ExitStack() as stack:
        for sent in (b"", b"POST /pre", local(request(path=b"/predict"))[:-1]):
            for _ in range(300):
                stack.enter_context(Wire(running.port)).send(sent)
            for user in range(1_000, 1_010):
                assert running.predict(user).status_code == 200
        with redis.Redis.from_url(environ["REDIS_URL"]) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        asyncio.run(end_sessions(environ["DATABASE_URL"]))
        running.wait(lambda: running.predict(1_001).status_code == 200, "predictions go on")
        running.wait(
            lambda: (h := running.health()) and not any(h["servers"].values()),
            "every store is reached again",
        )
        assert "Too many open files" not in running.written()
