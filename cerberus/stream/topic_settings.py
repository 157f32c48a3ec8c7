"""Ask for the settings of a topic repeatedly, because they may change while it is read."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

from cerberus import errors, kafka, settings

_ASK_S = 10.0


def advise_policy(topic: str, found: Mapping[str, str]) -> str | None:
    """Return what is wrong with a topic's cleanup policy; None if nothing is."""
    policy = found.get("cleanup.policy", "delete")
    if "compact" not in policy:
        return None
    return (
        f"topic {topic} has cleanup.policy={policy}: compaction removes all but the last record "
        "of a key, and all of them are needed; set cleanup.policy=delete"
    )


class TopicSettings:
    """Asks for the settings of a topic and of its dead letters.

    Args:
        config: Settings.
        name: Of the topic, without the prefix.
        dead_letters: Of theirs, without the prefix.

    Attributes:
        found: The brokers' last answer about the topic; empty before that.
    """

    def __init__(self, config: settings.Settings, name: str, dead_letters: str) -> None:
        self._config = config
        self._topic = config.kafka.topic(name)
        self._dead_letters = config.kafka.topic(dead_letters)
        self.found: Mapping[str, str] = {}
        self._of_letters: Mapping[str, str] = {}
        self._asked_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    @property
    def advice(self) -> str | None:
        """What is wrong with the topic's cleanup policy."""
        return advise_policy(self._topic, self.found)

    @property
    def advice_on_letters(self) -> str | None:
        """What is wrong with the cleanup policy of the dead letters."""
        return advise_policy(self._dead_letters, self._of_letters)

    async def ask(self) -> None:
        """Ask the brokers for the topic's settings. Deadline: 15 s a call.

        Raises:
            StoreUnavailable: They did not answer.
        """
        async with kafka.admin(self._config.kafka) as client:
            self.found = await kafka.topic_config(client, self._topic)
            self._of_letters = await kafka.topic_config(client, self._dead_letters)

    def look(self, *, now: bool = False) -> None:
        """Ask in the background, at most every 10 s unless `now`."""
        if not now and time.monotonic() - self._asked_s < _ASK_S:
            return
        if self._asking is None or self._asking.done():
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask_again())

    async def _ask_again(self) -> None:
        with contextlib.suppress(errors.StoreUnavailable):  # the last answer remains valid
            await self.ask()

    async def stop(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
