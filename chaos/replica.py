"""A second Redis, to which the first fails over while all connections stay open."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import redis

from cerberus import stack
from cerberus.stack import ports, process
from chaos import forwarder

_WAIT_S = 30.0


class Pair:
    """The Redis of a run and one more, behind one address.

    Args:
        first: The port of the Redis that is running.
        site: Where the second one keeps its files.
        front: The address that the service knows.
    """

    def __init__(self, first: int, site: process.Site, front: forwarder.Forwarder) -> None:
        second = ports.assign({"replica": 0}, site.directory / "replica.ports.json")["replica"]
        self._ports = [first, second]
        self._front = front
        self._site = site
        self._second = process.Process("replica", site)

    async def hand_over(self, *, back: bool) -> None:
        """Make the other server the primary, as a planned failover does.

        Args:
            back: To the first one.

        Raises:
            TimeoutError: The servers did not do so within 30 s.
        """
        await asyncio.to_thread(self._hand_over, back)

    def stop(self) -> None:
        """Stop the second server, and let the first one accept writes again."""
        with contextlib.suppress(redis.exceptions.RedisError), self._client(0) as first:
            first.execute_command("REPLICAOF", "NO", "ONE")
        self._second.stop()

    def _client(self, number: int) -> redis.Redis:
        return redis.Redis(port=self._ports[number])

    def _hand_over(self, back: bool) -> None:
        if not back:
            self._start()
        old, new = self._ports[back], self._ports[not back]
        with self._client(back) as giver, self._client(not back) as taker:
            if not back:
                taker.replicaof("127.0.0.1", old)
            _wait(lambda: taker.info("replication").get("master_link_status") == "up")
            self._front.port = new
            giver.execute_command("FAILOVER", "TO", "127.0.0.1", new, "TIMEOUT", 10_000)
            _wait(lambda: taker.info("replication")["role"] == "master")
            _wait(lambda: giver.info("replication")["role"] == "slave")

    def _start(self) -> None:
        self._second.stop()
        home = self._site.directory / "replica"
        home.mkdir(exist_ok=True)
        program = stack.redis.find(self._site.environ)
        command = [str(program.path), "--bind", "127.0.0.1", "--port", str(self._ports[1])]
        command += ["--save", "", "--repl-diskless-sync-delay", "0"]
        self._second.start(command, home, self._site.environ)
        with self._client(1) as second:
            _wait(second.ping)


def _wait(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + _WAIT_S
    while time.monotonic() < end_s:
        try:
            if condition():
                return
        except redis.exceptions.RedisError:
            pass
        time.sleep(0.05)
    raise TimeoutError("Redis did not hand over")
