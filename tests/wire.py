"""Send raw bytes to a server, and read the answers.

The server is the service, or an application that echoes its request (`echoing.py`).
"""

import contextlib
import dataclasses
import pathlib
import socket
import time

import orjson
from service import service

HERE = str(pathlib.Path(__file__).parent)
BODY = b'{"user_id": 1005}'
NEXT = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclasses.dataclass
class Answer:
    """One answer, as received."""

    status: int
    headers: dict
    body: bytes

    @property
    def told(self):
        return orjson.loads(self.body)


class Wire:
    """One connection to a server."""

    def __init__(self, port, seconds=10):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self._socket.close()

    def send(self, *parts, pause_s=0.0):
        """Send parts one by one; a server that has gone away is no failure here."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self._socket.sendall(part)
                time.sleep(pause_s)
        return self

    def end(self):
        """Close the writing side."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def reset(self):
        """Close the socket."""
        self._socket.close()

    def answer(self):
        """Return the next answer, or None at the end of the connection."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                assert not self._buffer, self._buffer
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        ends = "content-length" not in headers
        while ends and self._more():
            pass
        length = int(headers.get("content-length", len(self._buffer)))
        while len(self._buffer) < length:
            assert self._more(), "an answer is incomplete"
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Answer(int(status.split()[1]), headers, body)

    def answers(self, quiet_s=None):
        """Return all answers until the end, or until none has come for so long."""
        found = []
        self._socket.settimeout(quiet_s or self._socket.gettimeout())
        with contextlib.suppress(TimeoutError):
            while (answer := self.answer()) is not None:
                found.append(answer)
        return found

    def _more(self):
        try:
            data = self._socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        self.closed = not data
        return bool(data)


def ask(port, *parts, pause_s=0.0, quiet_s=None, seconds=10):
    """Send parts and return the answers."""
    with Wire(port, seconds) as wire:
        return wire.send(*parts, pause_s=pause_s).answers(quiet_s)


def bytewise(data):
    return [bytes([each]) for each in data]


def echo(*arguments, files=None, **environ):
    """Serve the application that echoes its request."""
    return service(
        {"ECHO_PROTOCOL": "ours", **environ},
        "--app-dir",
        HERE,
        *arguments,
        app="echoing:app",
        files=files,
    )


def started(running):
    """Wait until a service accepts connections."""
    running.wait(lambda: running.process.poll() is None and _answers(running), "it answers")
    return running


def _answers(running):
    try:
        return ask(running.port, NEXT, quiet_s=0.2)
    except OSError:
        return None


def request(upgrade=b"", body=BODY, *, chunked=False, path=b"/p", more=b""):
    """Return the bytes of a request with a body."""
    head = b"POST %b HTTP/1.1\r\nHost: a\r\n%b%b" % (path, upgrade, more)
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:]) if part)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def assert_refused(port, parts, status=400):
    """Assert that the parts get one problem as answer, and that the connection ends."""
    with Wire(port) as wire:
        *_, answer = found = wire.send(*parts).answers()
        assert wire.closed
    assert [each.status for each in found] == [status]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    assert answer.told["status"] == status
    return answer
