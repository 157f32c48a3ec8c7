"""Whether a topic holds a file's records until they are consumed."""

import dataclasses
from collections.abc import Mapping, Sequence

from cerberus import errors, kafka, settings

RECORD_BYTES = 16
"""About what the log adds to a record's key and value."""
_CONSUMED_A_S = 1_000
"""Records a second that any consumer manages: a fifth of what one process was measured at."""
_PATIENCE_MS = 60_000  # a consumer may have to start first


@dataclasses.dataclass(frozen=True, slots=True)
class Topic:
    """The state of a topic.

    Attributes:
        name: With the prefix.
        partitions: How many it has.
        config: Its configuration; empty where the broker does not show it.
    """

    name: str
    partitions: int
    config: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is about to be sent.

    Attributes:
        records: How many.
        bytes_by_partition: Before compression.
        duration_ms: How long sending takes at least.
    """

    records: int
    bytes_by_partition: Sequence[int]
    duration_ms: int


async def ask(config: settings.Settings) -> Topic:
    """Ask the brokers about topic `transactions`; it is created if it is missing.

    Raises:
        StoreUnavailable: The brokers did not answer.
    """
    await kafka.create_topics(config)
    name = config.kafka.topic(kafka.TRANSACTIONS)
    async with kafka.admin(config.kafka) as client:
        partitions = await kafka.partition_count(client, name)
        return Topic(name, partitions, await kafka.topic_config(client, name))


def check(topic: Topic, load: Load) -> None:
    """Refuse a load if the topic may delete its records before they are consumed.

    Raises:
        InvalidInput: naming the topic's setting, and what to set.
    """
    if "compact" in topic.config.get("cleanup.policy", ""):
        _refuse("cleanup.policy", f"{topic.name} is compacted and loses payments", "to `delete`")
    slowly = f"send at a --rate of {_CONSUMED_A_S} or less, "
    consuming_ms = load.records * 1000 // _CONSUMED_A_S
    waiting_ms = max(0, consuming_ms - load.duration_ms)
    needed_ms, kept_ms = waiting_ms + _PATIENCE_MS, int(topic.config.get("retention.ms", -1))
    if 0 <= kept_ms < needed_ms:
        _refuse(
            "retention.ms",
            f"{topic.name} keeps records for {kept_ms} ms, and consuming these {load.records} may "
            f"take {needed_ms} ms",
            f"to {needed_ms} or more",
            slowly if kept_ms >= _PATIENCE_MS else "",
        )
    most_bytes = max(load.bytes_by_partition, default=0)
    unread_bytes = most_bytes * waiting_ms // max(1, consuming_ms)
    kept_bytes = int(topic.config.get("retention.bytes", -1))
    if 0 <= kept_bytes < unread_bytes:
        _refuse(
            "retention.bytes",
            f"{topic.name} keeps {kept_bytes} bytes of a partition, and {unread_bytes} bytes "
            "(before compression) may wait in one",
            f"to {unread_bytes} or more",
            slowly,
        )


def _refuse(setting: str, why: str, value: str, otherwise: str = "") -> None:
    raise errors.InvalidInput(
        setting,
        f"{why}: records would be deleted unread. Set it {value} on the topic, {otherwise}or give "
        "--anyway; nothing was sent",
    )
