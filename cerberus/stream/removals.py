"""Find out what a log has lost that windows need, and what its topic's settings may lose."""

from collections.abc import Iterable, Mapping

import aiokafka

from cerberus import fetching, kafka
from cerberus.stream import dependencies, ownership, topic_settings

_BATCH_BYTES = 8 << 20
Parts = Mapping[aiokafka.TopicPartition, ownership.Owned]


def advise(
    topic: str, found: Mapping[str, str], keep_ms: int, held_ms: int | None
) -> dict[str, str | None]:
    """Return a sentence for each problem of a topic's settings, by name; None for no problem.

    Args:
        topic: Its name.
        found: Its settings.
        keep_ms: How long windows need a record.
        held_ms: Age of the oldest record, in the partition where that is least; None: unknown.
    """
    wanted_ms = 3 * keep_ms
    told: dict[str, str | None] = dict.fromkeys(("retention", "retention_bytes", "batch_bytes"))
    told["cleanup"] = topic_settings.advise_policy(topic, found)
    retention_ms = int(found.get("retention.ms", -1))
    if 0 <= retention_ms < wanted_ms:
        told["retention"] = (
            f"topic {topic} has retention.ms={retention_ms}: set retention.ms to at least "
            f"{wanted_ms}, or windows cannot be recovered after an outage"
        )
    retention_bytes = int(found.get("retention.bytes", -1))
    if retention_bytes >= 0 and (held_ms is None or held_ms < wanted_ms):
        told["retention_bytes"] = (
            f"topic {topic} has retention.bytes={retention_bytes}, which may be less than "
            f"{wanted_ms} ms of records: set retention.bytes=-1, or raise it until each partition "
            "holds that much"
        )
    batch_bytes = int(found.get("max.message.bytes", 0))
    if batch_bytes > _BATCH_BYTES:
        told["batch_bytes"] = (
            f"topic {topic} has max.message.bytes={batch_bytes}: each partition may take as "
            f"much memory; set max.message.bytes to at most {_BATCH_BYTES}"
        )
    return told


class Removals:
    """Watches one topic's settings and the gaps in its logs.

    Args:
        given: Settings and windows.

    Attributes:
        settings: Those of the topic.
    """

    def __init__(self, given: dependencies.Dependencies) -> None:
        self._spans = given.spans
        self._clock = given.clock
        self._topic = given.config.kafka.topic(kafka.TRANSACTIONS)
        self.settings = topic_settings.TopicSettings(
            given.config, kafka.TRANSACTIONS, kafka.DEAD_LETTERS
        )
        self._lost: dict[int, tuple[int, int]] = {}

    def miss(self, holes: Iterable[fetching.Hole], parts: Parts) -> None:
        """Doubt the windows that need what was removed from inside a log."""
        for hole in holes:
            owned = parts.get(aiokafka.TopicPartition(hole.topic, hole.partition))
            if owned is not None and hole.end > owned.part.offset:
                owned.part.miss(hole.end, self._clock())
                begin, end = self._lost.get(hole.partition, hole[2:])
                self._lost[hole.partition] = min(begin, hole.begin), max(end, hole.end)

    def problems(
        self, parts: Parts, firsts: Mapping[aiokafka.TopicPartition, tuple[int, int] | None]
    ) -> dict[str, str | None]:
        """Return a sentence for each problem, by name; None for no problem.

        Args:
            parts: The partitions that are owned.
            firsts: Offset and timestamp of their first records.
        """
        now_ms = self._clock()
        ages_ms = [now_ms - first[1] for tp, first in firsts.items() if first and tp in parts]
        told = advise(
            self._topic, self.settings.found, self._spans.keep_ms, min(ages_ms, default=None)
        )
        needed_ms = now_ms - self._spans.longest_ms
        if not any(owned.part.known_from_ms > needed_ms for owned in parts.values()):
            self._lost.clear()
        told["dead_letters"] = self.settings.advice_on_letters
        told["removed"] = None
        if self._lost:
            places = (f"{n} (offsets {a} to {b - 1})" for n, (a, b) in sorted(self._lost.items()))
            told["removed"] = (
                f"topic {self._topic} has lost records from inside partition {', '.join(places)}: "
                "windows that need them are in doubt; set cleanup.policy=delete, and let nothing "
                "else delete records from inside the log"
            )
        return told
