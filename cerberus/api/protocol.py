"""HTTP/1.1 as this service speaks it: uvicorn's own protocol, made strict and bounded.

uvicorn's parser stops at a head with `Upgrade`: it drops the body, and reads what comes later as a
request. Here an upgrade is ignored, as RFC 9110 (7.8) allows: the parser gets the same head
again without it, so that other requests pay nothing for it. A request that is refused before it
reaches a route is answered with a problem of RFC 9457, after the pending answers, and ends the
connection.
"""

import functools
import socket
from collections.abc import Iterable
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http import h11_impl, httptools_impl

from cerberus.api import connections, heads, problems
from cerberus.api.connections import Phase

_UVICORNS_KEEP_ALIVE_S = 5
_ACCEPTED_AT_ONCE = 8
_PIPELINED, _SLICE_BYTES = 32, 8 * 1024
_DRAINED_BYTES = 2 * 2**20
_FRAME_BYTES = 16  # for each byte of a body: a chunk of one byte takes 6


class Protocol(httptools_impl.HttpToolsProtocol):
    """One connection; `app_state["connections"]` limits it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._all: connections.Connections = self.app_state["connections"]
        self._limits = self._all.limits
        self.phase: Phase | None = None
        self._reading: Phase | None = None
        self._head_bytes = self._beside = 0
        self._answering: httptools_impl.RequestResponseCycle | None = None
        self._again = self._unparsed = b""
        self._last_words: bytes | None = None
        self._over = self._ended = False
        self._held = self._drained = 0
        self._large = False

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or answer 503 if all others are busy."""
        super().connection_made(transport)
        if not self._all.admit(self):
            detail = f"{self._all.most} connections are busy; try again in a second."
            self._refuse("overloaded", detail)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that the connection held."""
        self._all.leave(self)
        self._abandon()
        self._let_go()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: httptools_impl.RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _abandon(self) -> None:
        """Keep the request being answered from writing; uvicorn does so for the last one only."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._over:
            self._drop(len(data))
            return
        if self._unparsed or len(self.pipeline) >= _PIPELINED:
            self._unparsed += data
            self.flow.pause_reading()
            return
        self._unset_keepalive_if_required()
        reading, cycle = self._reading, self.cycle
        try:
            if len(data) <= _SLICE_BYTES:
                self._parse(data)
            else:
                self._feed(data)
            if self._reading is Phase.HEAD and reading is not Phase.BODY and cycle is self.cycle:
                self._head_bytes += len(data)
                if self._head_bytes > self._limits.head_bytes:
                    raise heads.too_large(self._limits)
        except (httptools.HttpParserError, heads.Refused) as error:
            # What a callback raises is the context of the parser's own error.
            for each in (error, error.__context__):
                if isinstance(each, heads.Refused):
                    self._refuse(each.code, each.detail)
                    break
            else:
                self._refuse("bad_request", f"This is no valid HTTP/1.1 request: {error}.")
        else:
            self._all.enter(self, self._phase())

    def _feed(self, data: bytes) -> None:
        """Parse in slices, and stop when as many requests wait as may."""
        for start in range(0, len(data), _SLICE_BYTES):
            end = start + _SLICE_BYTES
            self._parse(data[start:end])
            if len(self.pipeline) >= _PIPELINED:
                self._unparsed = data[end:]
                return

    def _parse(self, data: bytes) -> None:
        self._beside += len(data)
        while True:
            try:
                self.parser.feed_data(data)
                if self._beside > 2 * self._limits.head_bytes and self._unread():
                    detail = "The trailers or the chunks' extensions of a body are too long."
                    raise heads.Refused("head_too_large", detail)
                return
            except httptools.HttpParserUpgrade as stopped:
                head, self._again = self._again, b""
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
                data = data[stopped.args[0] :]
                if not data:
                    return

    def _phase(self) -> Phase:
        cycle, reading = self.cycle, self._reading
        if cycle is None:
            return reading or Phase.NEW
        if self.pipeline or not (cycle.response_complete or reading is Phase.BODY):
            return Phase.ANSWER
        return reading or Phase.IDLE

    def _unread(self) -> bool:
        return self._reading is Phase.BODY

    def _should_upgrade(self) -> bool:
        return False

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._reading, self._head_bytes, self._beside = Phase.HEAD, 0, 0

    def on_headers_complete(self) -> None:
        """Check a head, and start to answer it."""
        length = heads.check(self.parser, self.url, self.headers, self._limits)
        if self.parser.should_upgrade():
            self._again = self._head_without_upgrade()
            return
        self._reading = Phase.BODY
        if not self._held:
            self._large = length > connections.SMALL_BODY
        self._drained = 0
        super().on_headers_complete()
        self.headers = []  # the next ones are trailers, which must not pass as headers
        if not self.cycle.keep_alive:
            self.cycle.transport = _Closing(self)  # type: ignore[assignment]

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % each for each in self.headers if each[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, within the limit of all bodies together."""
        self._beside -= _FRAME_BYTES * len(body)
        if self.cycle.response_complete:
            self._drained += len(body)
            if self._drained > _DRAINED_BYTES:
                raise heads.Refused("overloaded", "")
            return
        if not self._hold(len(body)):
            detail = "Too many bodies are being read; send it again in a second."
            raise heads.Refused("overloaded", detail)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless its head is about to be parsed again."""
        if not self._again:
            self._reading = None
            if not self.cycle.response_complete:
                self.cycle.more_body = False
                self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Continue with the next request, or send the final refusal."""
        more = bool(self.pipeline)
        # A client that got no 100 Continue may or may not send its body; a parser cannot know.
        unsure = self._unread() and self.expect_100_continue and not (self._held or more)
        if not more:
            self._let_go()
        super().on_response_complete()
        if self._last_words is not None and not more:
            self._say(self._last_words)
        elif unsure and not self.transport.is_closing():
            self.leave()
        elif not self._over and not self.transport.is_closing():
            self._go_on()

    def _go_on(self) -> None:
        # The request that is answered now may need the rest for its body.
        if self._unparsed and not self.pipeline:
            data, self._unparsed = self._unparsed, b""
            self.data_received(data)
            return
        if self._unparsed:
            self.flow.pause_reading()
        self._all.enter(self, self._phase())

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer pending requests: a client may close its writing side and wait."""
        self._ended = True
        if self.scheme == "https" or self.transport.is_closing():
            return None
        if self._over:
            return self._last_words is not None
        if self._reading is not None:
            self._refuse("bad_request", "The connection ended before the request was complete.")
            return True
        if self.cycle is None or self.cycle.response_complete:
            return None
        self.cycle.keep_alive = False
        self._over = True
        return True

    def overdue(self, phase: Phase) -> None:
        """Answer and close: the phase took too long."""
        if phase in (Phase.ANSWER, Phase.LEAVING):
            self.drop()
        elif phase is Phase.HEAD:
            self._refuse(
                "head_timeout", f"The head did not arrive within {self._limits.head_s:g} s."
            )
        elif phase is Phase.BODY:
            self._refuse(
                "body_timeout", f"The body did not arrive within {self._limits.body_s:g} s."
            )
        else:
            self._all.enter(self, Phase.LEAVING)
            self.transport.close()

    def drop(self) -> None:
        """Close at once, without an answer."""
        self._over = True
        self._abandon()
        self.transport.abort()

    def _refuse(self, code: str, detail: str) -> None:
        """Refuse a request once those before it are answered, and close."""
        self._over = True
        self._all.refused[code] += 1
        words, owed = _bytes(code, detail, self.server_state.default_headers), False
        if self._reading is Phase.BODY:
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
                owed = True
            else:
                if self.cycle.response_started:
                    words = b""
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        elif self.cycle is not None:
            owed = not self.cycle.response_complete
        if owed:
            self._last_words = words
        else:
            self._say(words)

    def _say(self, words: bytes) -> None:
        self._last_words = None
        if not self.transport.is_closing():
            self.transport.write(words)
            self.leave()

    def leave(self) -> None:
        """Close the connection, once the client has had time to read the last answer.

        If bytes are unread, the kernel resets the connection, and the client may lose the answer.
        """
        self._over = True
        self.pipeline.clear()
        if self._ended or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._drained = 0
        self.flow.resume_reading()
        self.transport.write_eof()
        self._all.enter(self, Phase.LEAVING)

    def finish(self) -> None:
        """Close after an answer that ends the connection."""
        if self._unread():
            self.leave()
        else:
            self.transport.close()

    def _drop(self, count: int) -> None:
        self._drained += count
        if self._drained > _DRAINED_BYTES:
            self.drop()

    def _hold(self, count: int) -> bool:
        if not self._large and self._held + count > connections.SMALL_BODY:
            self._all.let_go(self._held, large=False)
            count, self._held, self._large = count + self._held, 0, True
        if not self._all.hold(count, large=self._large):
            return False
        self._held += count
        return True

    def _let_go(self) -> None:
        self._all.let_go(self._held, large=self._large)
        self._held = 0


class _Closing:
    """The transport of an answer that ends its connection."""

    def __init__(self, protocol: Protocol) -> None:
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing
        self.close = protocol.finish


def _bytes(code: str, detail: str, default: Iterable[tuple[bytes, bytes]]) -> bytes:
    told = problems.problem(code, detail)
    headers = (*default, *told.raw_headers, (b"connection", b"close"))
    lines = [b"%b: %b" % each for each in headers]
    return httptools_impl.STATUS_LINE[told.status_code] + b"\r\n".join((*lines, b"", told.body))


def _listen(server: uvicorn.Server, backlog: int) -> None:
    """Let the kernel queue as many new connections as uvicorn's backlog says.

    asyncio accepts a whole backlog at once, before any of it can be refused, and so would use up
    all files.
    """
    for listening in (each for one in server.servers for each in one.sockets):
        with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
            same.listen(backlog)


def install() -> None:
    """Make uvicorn use this protocol, whatever its options say, except `--lifespan off`.

    uvicorn chooses its protocol before it imports the application, so the choice is replaced when
    its server starts. Keep-alive becomes 75 s unless `--timeout-keep-alive` differs from uvicorn's
    default of 5 s.
    """
    startup = uvicorn.Server.startup
    if getattr(startup, "__wrapped__", None):
        return

    @functools.wraps(startup)
    async def bounded(self: uvicorn.Server, *arguments: Any, **named: Any) -> None:
        config = self.config
        ours = config.lifespan != "off" and config.http_protocol_class in (
            httptools_impl.HttpToolsProtocol,
            h11_impl.H11Protocol,
        )
        if ours:
            config.http_protocol_class = Protocol
            if config.timeout_keep_alive == _UVICORNS_KEEP_ALIVE_S:
                config.timeout_keep_alive = connections.KEEP_ALIVE_S
            backlog, config.backlog = config.backlog, min(config.backlog, _ACCEPTED_AT_ONCE)
        await startup(self, *arguments, **named)
        if ours:
            _listen(self, backlog)
            known: connections.Connections = self.lifespan.state["connections"]
            for phase in (Phase.NEW, Phase.IDLE):
                known.seconds[phase] = float(config.timeout_keep_alive)

    uvicorn.Server.startup = bounded  # type: ignore[method-assign]
