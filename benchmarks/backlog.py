"""How fast a service that starts with a backlog processes it, and with how much memory.

    python benchmarks/backlog.py [--events 1000000] [--users 100000]

The topic is filled before the service starts for the first time. Every second the script samples
how many records are stored, with all their effects, and the resident memory. Memory should grow
only with the content of the windows, not with the backlog. Kafka, Redis and Postgres run on the
same machine, in a temporary directory.
"""

import argparse
import asyncio
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import psutil

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import replay  # noqa: E402

from cerberus import kafka, settings, stack  # noqa: E402

DEADLINE_S = 1_800.0


def start(environ):
    """Start the service on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "cerberus.app:app", "--no-access-log"]
    return port, subprocess.Popen(
        [*command, "--port", str(port)],
        env=os.environ | environ,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def offsets(port):
    """Return how many offsets the service has processed; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            parts = json.load(answer)["partitions"].values()
    except OSError:
        return 0
    return sum(part["offset"] for part in parts)


def process_backlog(environ, total):
    """Start the service on the backlog and print its progress."""
    port, service = start(environ)
    process = psutil.Process(service.pid)
    began_s, peak, first, done = time.monotonic(), 0, None, 0
    try:
        while done < total and time.monotonic() - began_s < DEADLINE_S:
            time.sleep(1)
            done, rss = offsets(port), process.memory_info().rss
            first, peak = first or (done and rss), max(peak, rss)
            print(f"{time.monotonic() - began_s:>6.0f} s {done:>10,} {rss / 2**20:>7.0f} MiB")
        took_s = time.monotonic() - began_s
    finally:
        service.terminate()
        service.wait(timeout=30)
    print(f"\n{done / took_s:,.0f} events/s stored, including the start of the service")
    print(
        f"memory: {(first or 0) / 2**20:.0f} MiB at the first effects, peak {peak / 2**20:.0f} MiB"
    )


def main():
    """Start the servers, fill the topic, let the service process it, stop the servers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000, help="records in the backlog")
    parser.add_argument("--users", type=int, default=100_000, help="users who pay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory).chmod(0o755)
        with stack.servers(pathlib.Path(directory), os.environ, durable=False) as servers:
            environ = servers.environ | {
                "CERBERUS_PARTITIONS": str(replay.PARTITIONS),
                "CERBERUS_TASKS": "api,consumer",
                "CERBERUS_RATE": "0",
                "CERBERUS_API_KEY": "",
                "CERBERUS_OPEN": "loopback",
            }
            config = settings.load(environ)
            asyncio.run(kafka.create_topics(config))
            _, total = asyncio.run(
                replay.publish(config, options.events, options.users, committed=False)
            )
            process_backlog(environ, total)


if __name__ == "__main__":
    main()
