"""Brokers that want certificates or passwords, as managed ones do."""

import asyncio
import io
import logging
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from pipeline import now_ms, payment, until
from service import free_port

from cerberus import errors, kafka, publishing, settings
from cerberus.stack import kafka as broker
from cerberus.stack import process
from cerberus.telemetry import logs

pytestmark = pytest.mark.anyio
STORES = {"REDIS_URL": "redis://127.0.0.1:1", "DATABASE_URL": "postgresql://127.0.0.1:1"}


def pkcs8(certificate):
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def listeners(ca, ports):
    """Return the properties of a broker with a listener for certificates and one for passwords."""
    ours = ca.issue_cert("broker.invalid")  # a platform's certificates carry no usable host name
    chain = "".join(part.bytes().decode() for part in ours.cert_chain_pems)
    addresses = ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    found = {
        "listeners": addresses,
        "advertised.listeners": addresses,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
        "CERTIFIED:SSL,SASL:SASL_PLAINTEXT",
        "listener.name.certified.ssl.client.auth": "required",
        "listener.name.certified.ssl.keystore.type": "PEM",
        "listener.name.certified.ssl.keystore.certificate.chain": chain,
        "listener.name.certified.ssl.keystore.key": pkcs8(ours),
        "listener.name.certified.ssl.truststore.type": "PEM",
        "listener.name.certified.ssl.truststore.certificates": ca.cert_pem.bytes().decode(),
        "listener.name.sasl.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl.plain.sasl.jaas.config": f'{login} user_cerberus="sesame";',
    }
    return {name: value.replace("\n", "\\n") for name, value in found.items()}


@pytest.fixture(scope="module")
def ca():
    return trustme.CA()


@pytest.fixture(scope="module")
def ports(servers, machine, new_directory, ca):
    names = ("PLAINTEXT", "CONTROLLER", "CERTIFIED", "SASL")
    ports = {name: free_port() for name in names}
    site = process.Site(new_directory(), machine, durable=False)
    server = broker.Kafka(broker.find(machine), site, listeners(ca, ports))
    server.settle({"kafka": ports["PLAINTEXT"], "controller": ports["CONTROLLER"]})
    try:
        server.start()
        yield ports
    finally:
        server.stop()


def certified(ca, ports):
    client = ca.issue_cert("cerberus.invalid")
    return STORES | {
        "KAFKA_URL": f"kafka+ssl://127.0.0.1:{ports['CERTIFIED']}",
        "KAFKA_PREFIX": "certified.",
        "KAFKA_TRUSTED_CERT": ca.cert_pem.bytes().decode(),
        "KAFKA_CLIENT_CERT": client.cert_chain_pems[0].bytes().decode(),
        "KAFKA_CLIENT_CERT_KEY": client.private_key_pem.bytes().decode(),
    }


def with_password(ca, ports):
    return STORES | {
        "KAFKA_BROKER": f"127.0.0.1:{ports['SASL']}",
        "KAFKA_PREFIX": "sasl.",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "cerberus",
        "KAFKA_SASL_PASSWORD": "sesame",
    }


@pytest.mark.parametrize("environ_of", [certified, with_password])
async def test_topics_are_made_written_and_read_by_the_group(ca, ports, environ_of):
    config = settings.load(environ_of(ca, ports))
    assert len(await kafka.create_topics(config)) == 5
    publisher = publishing.Publisher(config)
    topic = config.kafka.topic(kafka.TRANSACTIONS)
    await publisher.publish([publishing.Message(topic, b"1005", payment(1, 1005, now_ms()))])
    await publisher.close()
    client = kafka.consumer(config)
    client.subscribe([topic])
    try:
        async with asyncio.timeout(60):
            await client.start()
            await until(client.assignment, "the group has an assignment")
            await client.seek_to_beginning()
            assert await client.getone()
    finally:
        await kafka.stop(client)


async def test_the_password_is_not_logged_at_any_level(ca, ports):
    loggers = [logging.getLogger(name) for name in (None, "aiokafka.conn")]
    before = [(logger.level, logger.handlers) for logger in loggers]
    logs.configure("DEBUG")
    written = io.StringIO()
    handler: Any = loggers[0].handlers[-1]
    handler.setStream(written)
    try:
        async with kafka.admin(settings.load(with_password(ca, ports)).kafka) as client:
            await client.list_topics()
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers = handlers
    assert "DEBUG" in written.getvalue()
    assert "sesame" not in written.getvalue()


@pytest.mark.parametrize(
    ("environ_of", "changes", "kind", "said"),
    [
        (
            certified,
            {"KAFKA_CLIENT_CERT": "", "KAFKA_CLIENT_CERT_KEY": ""},
            errors.StoreUnavailable,
            "no Kafka broker answered",
        ),
        (
            certified,
            {"KAFKA_TRUSTED_CERT": trustme.CA().cert_pem.bytes().decode()},
            errors.ConfigError,
            "KAFKA_TRUSTED_CERT is not the CA",
        ),
        (
            with_password,
            {"KAFKA_SASL_PASSWORD": "wrong"},
            errors.ConfigError,
            "KAFKA_SASL_PASSWORD: broker .* refuses them",
        ),
        (
            with_password,
            {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-256"},
            errors.ConfigError,
            "KAFKA_SASL_MECHANISM: broker .* does not support SCRAM-SHA-256",
        ),
    ],
)
async def test_without_the_right_credentials_there_is_one_error(
    ca, ports, environ_of, changes, kind, said
):
    config = settings.load(environ_of(ca, ports) | changes)
    with pytest.raises(kind, match=said):
        await kafka.create_topics(config)
