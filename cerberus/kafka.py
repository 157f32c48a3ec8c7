"""Kafka clients and topics: what consumer, producer and command line share."""

import asyncio
import contextlib
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IllegalStateError,
    KafkaError,
    for_code,
)

from cerberus import brokers, endpoints, errors, fetching, settings
from cerberus.telemetry import logs

log = logging.getLogger(__name__)

TRANSACTIONS, DEAD_LETTERS = "transactions", "transactions.dlq"
DECISIONS, LABELS, LABEL_DEAD_LETTERS = "decisions", "labels", "labels.dlq"
GROUP, LABEL_GROUP = "cerberus", "cerberus-labels"
METADATA_MS = 1_000
"""How long a new partition, or a topic that was created again, may go unnoticed."""
_TOPIC_EXISTS = 36
CALL_S = 15.0
"""Deadline of a request to the brokers, and of a batch that is published."""
_COMMIT_S = 5.0
_PAUSE_S = 0.1
_BATCH_BYTES = "1048588"
_stopping: set["asyncio.Task[None]"] = set()
_said = logs.Repeated(log)


def client_options(kafka: endpoints.Kafka) -> dict[str, Any]:
    """Return what every Kafka client is built with.

    Raises:
        ConfigError: The certificates cannot be read.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": list(kafka.bootstrap),
        "security_protocol": ("SASL_" if kafka.sasl_mechanism else "")
        + ("SSL" if kafka.tls else "PLAINTEXT"),
    }
    if kafka.tls:
        options["ssl_context"] = _ssl_context(kafka)
    if kafka.sasl_mechanism:
        options |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password,
        }
    return options


def _ssl_context(kafka: endpoints.Kafka) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=kafka.ca_pem or None)
        # A platform's own CA signs certificates that carry no host name.
        context.check_hostname = not kafka.ca_pem
        if kafka.client_pem and kafka.client_key_pem:
            with tempfile.NamedTemporaryFile("w") as file:  # created with mode 0600
                file.write(f"{kafka.client_pem}\n{kafka.client_key_pem}")
                file.flush()
                # A password, or OpenSSL would ask for one on the terminal.
                context.load_cert_chain(file.name, password="")
    except (OSError, TypeError, ValueError) as error:
        # From None, because the error may contain the key.
        raise errors.ConfigError(
            "KAFKA_TRUSTED_CERT, KAFKA_CLIENT_CERT or KAFKA_CLIENT_CERT_KEY is not PEM: "
            f"{getattr(error, 'reason', None) or 'it cannot be read'}"
        ) from None
    return context


@contextlib.asynccontextmanager
async def admin(kafka: endpoints.Kafka) -> AsyncIterator[Any]:
    """Open an admin client; start and close have deadlines.

    Raises:
        StoreUnavailable: No broker answered within 15 s.
        ConfigError: A broker answered that refuses the credentials.
    """
    client = AIOKafkaAdminClient(**client_options(kafka), request_timeout_ms=10_000)
    try:
        async with asyncio.timeout(CALL_S):
            try:
                await client.start()
            except KafkaError as error:
                if refused := await brokers.refusal(client_options(kafka)):
                    raise refused from error
                raise
        yield client
    except (TimeoutError, OSError, KafkaError) as error:
        raise errors.StoreUnavailable(
            f"no Kafka broker answered at {','.join(kafka.bootstrap)}: {error!r}"
        ) from error
    finally:
        with contextlib.suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(2.0):
                await client.close()


async def create_topics(config: settings.Settings) -> list[str]:
    """Create the topics that are missing and return their names. Idempotent: yes.

    Raises:
        StoreUnavailable: The broker did not answer.
        NeedsOperator: It refused; the message says what to do.
    """
    kafka = config.kafka
    wanted: dict[str, dict[str, str]] = {
        name: {"cleanup.policy": "delete"}
        for name in (DEAD_LETTERS, DECISIONS, LABELS, LABEL_DEAD_LETTERS, TRANSACTIONS)
    }
    # The broker refuses what a consumer would have to refuse at every replay.
    skew_ms = str(config.windows.max_future_skew_ms)
    wanted[TRANSACTIONS] |= {
        "message.timestamp.after.max.ms": skew_ms,
        "max.message.bytes": _BATCH_BYTES,
    }
    wanted[LABELS] |= {"max.message.bytes": _BATCH_BYTES}
    topics = [
        NewTopic(
            kafka.topic(name),
            config.stream.partitions,
            config.stream.replication,
            # aiokafka requires an assignment, even an empty one, with the broker's own replication.
            replica_assignments={} if config.stream.replication == -1 else None,
            topic_configs=configs,
        )
        for name, configs in wanted.items()
    ]
    async with admin(kafka) as client:
        present = set(await client.list_topics())
        missing = [topic for topic in topics if topic.name not in present]
        if not missing:
            return []
        answer = await client.create_topics(missing, timeout_ms=10_000)
        for name, code, *message in answer.topic_errors:
            if code not in (0, _TOPIC_EXISTS) and for_code(code).retriable:
                raise errors.StoreUnavailable(
                    f"Kafka cannot create topic {name} now ({for_code(code).__name__})"
                )
            if code not in (0, _TOPIC_EXISTS):
                raise errors.NeedsOperator(
                    f"Kafka refused to create topic {name} (error {code} {message}): "
                    "create it by hand, with the prefix in KAFKA_PREFIX"
                )
        await _coordinator(client, kafka.topic(GROUP))
        return [topic.name for topic in missing]


async def _coordinator(client: Any, group: str) -> None:
    """Wait until a group can be joined: new brokers first create the offsets topic."""
    async with asyncio.timeout(CALL_S):
        while True:
            with contextlib.suppress(GroupCoordinatorNotAvailableError):
                await client.find_coordinator(group)
                return
            await asyncio.sleep(0.1)


async def cluster_id(client: Any) -> str:
    """Return the name that the brokers give to their cluster."""
    return str((await client.describe_cluster())["cluster_id"])


async def partition_count(client: Any, topic: str) -> int:
    """Return how many partitions a topic has now.

    Raises:
        StoreUnavailable: The brokers do not know the topic.
    """
    [found] = await client.describe_topics([topic])
    if found["error_code"] != 0:
        raise errors.StoreUnavailable(
            f"Kafka does not show topic {topic} (error {found['error_code']})"
        )
    return len(found["partitions"])


async def topic_config(client: Any, topic: str) -> Mapping[str, str]:
    """Return the configuration of a topic; empty where the broker does not show it."""
    answers = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    return {
        entry[0]: entry[1]
        for answer in answers
        for _, _, _, _, entries in answer.resources
        for entry in entries
    }


def consumer(config: settings.Settings, group: str = GROUP) -> "aiokafka.AIOKafkaConsumer":
    """Build a group's consumer; nothing is committed automatically.

    Its `fetches` limits what it holds, and reports what the logs have lost.

    Args:
        config: Settings.
        group: Without the prefix.
    """
    client = aiokafka.AIOKafkaConsumer(
        **client_options(config.kafka),
        group_id=config.kafka.topic(group),
        enable_auto_commit=False,
        auto_offset_reset="none",  # each reader seeks to its own start
        isolation_level="read_committed",
        partition_assignment_strategy=(StickyPartitionAssignor,),
        session_timeout_ms=config.stream.session_timeout_ms,
        heartbeat_interval_ms=min(3_000, config.stream.session_timeout_ms // 3),
        rebalance_timeout_ms=30_000,
        max_poll_interval_ms=120_000,
        metadata_max_age_ms=METADATA_MS,
        request_timeout_ms=20_000,
    )
    _pause_between_questions(client._client)
    client.fetches = fetching.Fetches(client._client, lambda: len(client.assignment()))
    return client


@contextlib.asynccontextmanager
async def reader(
    config: settings.Settings, topic: str
) -> AsyncIterator[tuple[Any, list[aiokafka.TopicPartition]]]:
    """Open a client without a group, at a topic's start; also yield the topic's partitions.

    Raises:
        StoreUnavailable: No broker answered within 15 s, or the topic is missing.
    """
    client = aiokafka.AIOKafkaConsumer(
        **client_options(config.kafka),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    _pause_between_questions(client._client)
    try:
        async with asyncio.timeout(CALL_S), admin(config.kafka) as asked:
            count = await partition_count(asked, topic)
            await client.start()
        tps = [aiokafka.TopicPartition(topic, number) for number in range(count)]
        client.assign(tps)
        yield client, tps
    except (TimeoutError, OSError, KafkaError) as error:
        raise errors.StoreUnavailable(f"Kafka did not answer about {topic}: {error!r}") from error
    finally:
        await stop(client)


async def commit(client: Any, due: Mapping[aiokafka.TopicPartition, Any], action: str) -> bool:
    """Commit offsets within 5 s; when the brokers do not take them, log `action`, return False.

    Nothing is lost then: what was stored is read and stored again, with the same values.
    """
    try:
        async with asyncio.timeout(_COMMIT_S):
            await client.commit(due)
    except (TimeoutError, KafkaError, IllegalStateError) as error:
        _said.warn(f"commit failed: {error!r}", action)
        return False
    return True


def producer(config: settings.Settings, linger_ms: int = 5) -> "aiokafka.AIOKafkaProducer":
    """Build a producer that waits for all replicas. Build a new one after a send error.

    It is not idempotent: such a producer of aiokafka's never gives up a record while no broker
    answers, and fails its next send after one refused record. A record that is sent twice has one
    identity, or one name, and counts once.
    """
    client = aiokafka.AIOKafkaProducer(
        **client_options(config.kafka),
        acks="all",
        compression_type="lz4",
        linger_ms=linger_ms,
        request_timeout_ms=10_000,
    )
    _pause_between_questions(client.client)
    return client


def _pause_between_questions(inner: Any) -> None:
    """Make a client wait after a request for metadata that no broker has answered.

    aiokafka 0.14 repeats it thousands of times a second while a producer holds records whose
    partition has no leader, as when a broker has just gone.
    """
    ask = inner._metadata_update

    async def ask_patiently(*arguments: Any) -> bool:
        answered: bool = await ask(*arguments)
        if not answered:
            await asyncio.sleep(_PAUSE_S)
        return answered

    inner._metadata_update = ask_patiently


async def stop(client: Any) -> None:
    """Stop a client; after 5 s without a broker it continues to stop in the background.

    Cancelling aiokafka's own `stop` would leave tasks and connections behind.
    """
    stopping = asyncio.create_task(client.stop())
    _stopping.add(stopping)
    stopping.add_done_callback(_stopped)
    await asyncio.wait({stopping}, timeout=5.0)


def _stopped(stopping: "asyncio.Task[None]") -> None:
    _stopping.discard(stopping)
    if not stopping.cancelled() and (error := stopping.exception()) is not None:
        log.warning("a client stopped badly: %r", error, extra={"action": "client_stopped"})
