"""How fast `POST /predict` is, compared with a Starlette route that only echoes JSON.

    python benchmarks/predict.py [--rounds 5] [--seconds 2]

It measures requests about a user alone, and about a transaction in hand, which is claimed. All
servers run under the same uvicorn settings, and one client calls them in turns, with 1 and with 32
connections, so the ratios are valid even if the machine is busy. Kafka, Redis and Postgres are
started for the run and store every decision meanwhile.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import orjson
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ROOT = pathlib.Path(__file__).parent.parent
CONNECTIONS = (1, 32)
ROUTES = ("echo", "user", "in hand")
FIRST_USER, USERS = 1_000, 1_000
DEADLINE_S = 20.0


async def _echo(request: Request) -> Response:
    told = orjson.loads(await request.body())
    return Response(orjson.dumps(told), media_type="application/json")


echo = Starlette(routes=[Route("/predict", _echo, methods=["POST"])])


class _Caller(asyncio.Protocol):
    """One connection that sends its next request when the last answer is complete."""

    def __init__(self, requests, until_s):
        self.closed = asyncio.get_running_loop().create_future()
        self.latencies, self.refused = [], 0
        self._requests, self._until_s, self._buffer = requests, until_s, b""

    def connection_made(self, transport):
        self._transport = transport
        self._call()

    def _call(self):
        self._began_s = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data):
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().split(b"content-length: ")[1].split()[0]):
            return
        self.latencies.append(time.perf_counter() - self._began_s)
        self.refused += not head.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        if time.perf_counter() >= self._until_s:
            self._transport.close()
        else:
            self._call()

    def connection_lost(self, error):
        self.closed.set_result(None)


def _requests(port, in_hand):
    """Yield requests about one user after another."""
    head = (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n" % port
    )
    for i in itertools.count(time.time_ns()):
        told: dict[str, object] = {"user_id": FIRST_USER + i % USERS}
        if in_hand:
            told |= {"transaction_id": str(i), "amount": 42.5}
        body = orjson.dumps(told)
        yield head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def call(port, connections, route, seconds):
    """Send requests over these connections for `seconds`, and print the figures as JSON."""
    requests = _requests(port, route == "in hand")
    loop = asyncio.get_running_loop()
    began_s = time.perf_counter()
    callers = []
    for _ in range(connections):
        made = loop.create_connection(
            lambda: _Caller(requests, began_s + seconds), "127.0.0.1", port
        )
        callers.append((await made)[1])
    async with asyncio.timeout(seconds + DEADLINE_S):
        await asyncio.gather(*(caller.closed for caller in callers))
    took_s = time.perf_counter() - began_s
    latencies = [latency for caller in callers for latency in caller.latencies]
    cuts = statistics.quantiles(latencies, n=100)
    told = {"rps": len(latencies) / took_s, "p50": cuts[49] * 1000, "p99": cuts[98] * 1000}
    print(json.dumps(told | {"refused": sum(caller.refused for caller in callers)}))


@contextlib.contextmanager
def serving(target, environ):
    """Run uvicorn on a free port, yield the port, stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", target, "--port", str(port), "--no-access-log"]
    places = ["--app-dir", str(ROOT if target.startswith("cerberus") else ROOT / "benchmarks")]
    process = subprocess.Popen([*command, *places], env=environ, stderr=subprocess.PIPE)
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


def _wait_for(port, process):
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError):
            body = b'{"user_id": %d}' % FIRST_USER
            url = f"http://127.0.0.1:{port}/predict"
            with urllib.request.urlopen(url, data=body, timeout=5) as answer:
                told = json.load(answer)
            if told.get("degraded"):
                raise RuntimeError(f"the answer is degraded: {told}")
            return
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the server did not start: {process.stderr.read().decode()}")


async def rows(environ):
    """Write some events of each user, as the consumer does."""
    from cerberus import assembly, clock, settings, transactions, window
    from cerberus.features import fences
    from cerberus.features import packed as packed_windows
    from cerberus.online import user_rows

    config = settings.load(environ)
    spans = window.Spans.of(config.windows)
    now_ms, windows = clock.now_ms(), window.PartitionWindows(spans)
    users = range(FIRST_USER, FIRST_USER + USERS)
    for i in range(3 * USERS):
        event_ms = now_ms - 60_000 + i
        windows.observe(
            transactions.Transaction(f"t{i}", users[i % USERS], 1_250, "USD", "m", event_ms)
        )
    fence = fences.Fence(1, 3 * USERS, windows.frontier_ms)
    packed = [
        user_rows.StreamRow(
            user_id,
            packed_windows.pack(user, fence, 0, windows.lower_ms, spans),
            windows.stats(user_id, fence.as_of_ms),
            fence,
            0,
        )
        for user_id in users
        if (user := windows.user(user_id))
    ]
    # It says that it is caught up an hour ahead, as nobody refreshes it during the run.
    state = fences.PartitionState(1, 3 * USERS, "live", now_ms + 3_600_000)
    async with assembly.open(config) as service:
        await service.online.write(packed)
        await service.online.write_states(1, {0: state}, create=True)


async def vouch(environ):
    """Write the marks that make Redis trusted with claims, as it is a minute after its start."""
    from cerberus import settings
    from cerberus.online import pool as redis_pool

    async with redis_pool.connect(settings.load(environ)) as client:
        await client.mset({f"cerberus:claim:{{{bucket}}}": 0 for bucket in range(64)})


def measure(ports, rounds, seconds):
    """Call every server in turn, in reverse order every other round; return all figures."""
    found = collections.defaultdict(list)
    for number in range(rounds):
        for connections in CONNECTIONS:
            turn = list(ports.items())
            for name, port in turn if number % 2 else reversed(turn):
                command = [sys.executable, __file__, "--call", str(port), str(connections), name]
                command += ["--seconds", str(seconds)]
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, timeout=seconds + 2 * DEADLINE_S
                )
                found[name, connections].append(json.loads(done.stdout))
    return found


def report(found, rounds, seconds):
    """Print medians over the rounds, and their ratios to the echo's."""
    print(
        f"medians of {rounds} rounds of {seconds:g} s, {os.cpu_count()} cores; ms, and as "
        "multiples of echo"
    )
    print(f"{'connections':>11} {'route':<8}{'requests/s':>18}{'p50':>16}{'p99':>16}{'refused':>9}")
    for connections in CONNECTIONS:
        medians = {
            name: [
                statistics.median(told[figure] for told in found[name, connections])
                for figure in ("rps", "p50", "p99")
            ]
            for name in ROUTES
        }
        for name, values in medians.items():
            refused = sum(told["refused"] for told in found[name, connections])
            shown = [
                f"{value:>{width}.{places}f} ×{value / of_echo:>6.2f}"
                for value, of_echo, width, places in zip(
                    values, medians["echo"], (10, 8, 8), (0, 3, 3), strict=True
                )
            ]
            print(f"{connections:>11} {name:<8}{''.join(shown)}{refused:>9}")


async def run(rounds, seconds):
    """Start the servers, measure, report, stop the servers."""
    from cerberus import stack

    ours = {"CERBERUS_TASKS": "api", "CERBERUS_API_KEY": "", "CERBERUS_OPEN": "loopback"}
    given = {
        k: v for k, v in os.environ.items() if not k.startswith(("KAFKA", "REDIS", "DATABASE"))
    }
    with tempfile.TemporaryDirectory(prefix="cerberus-") as directory:
        with stack.servers(pathlib.Path(directory), given, durable=False) as running:
            environ = given | running.environ | ours
            await rows(environ)
            with serving("predict:echo", environ) as echo_port:
                with serving("cerberus.app:app", environ) as predict_port:
                    await vouch(environ)
                    ports = dict(zip(ROUTES, (echo_port, predict_port, predict_port), strict=True))
                    found = await asyncio.to_thread(measure, ports, rounds, seconds)
    report(found, rounds, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="calls of each server")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each call")
    parser.add_argument("--call", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.call:
        port, connections, route = asked.call
        uvloop.run(call(int(port), int(connections), route, asked.seconds))
    else:
        sys.path.insert(0, str(ROOT))
        asyncio.run(run(asked.rounds, asked.seconds))
