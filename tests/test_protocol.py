"""The HTTP protocol on real sockets: one answer per request, however its bytes are split."""

import itertools
import random
import signal

import pytest
from wire import BODY, NEXT, Wire, ask, assert_refused, bytewise, echo, request, started

UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    b"Upgrade: TLS/1.0\r\nConnection: Upgrade\r\n",
    b"Upgrade: h2c\r\n",
    b"Upgrade: a, b/2\r\nUpgrade: \xff!\r\nConnection: keep-alive\r\nConnection: UPGRADE\r\n",
    b"Upgrade:\r\nConnection: upgrade\r\n",
)
SMUGGLED = (
    b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"Content-Length: 3, 3\r\n\r\nabc",
    b"Content-Length: +3\r\n\r\nabc",
    b"Content-Length: \r\n\r\n",
    b"Content-Length: 99999999999999999999999\r\n\r\n",
    b"X: a\r\n b\r\n\r\n",
    b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    b"X: a\nY: b\r\n\r\n",
    b"X: a\rY: b\r\n\r\n",
    b"X: a\x00b\r\n\r\n",
    b"X : a\r\n\r\n",
    b": a\r\n\r\n",
    b"abc\r\n\r\n",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: gzip\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n",
    b"Host: b\r\n\r\n",
)
STRANGE = (
    b"GET /p\r\n\r\n",
    b"GET /p HTTP/0.9\r\nHost: a\r\n\r\n",
    b"GET /p HTTP/1.2\r\nHost: a\r\n\r\n",
    b"GET /p HTTP/2.0\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 3\r\n\r\nabc",
    b"GET /p HTTP/1.1\r\n\r\n",
    b"POST /p HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /p HTTP/1.1\nHost: a\n\n",
    b"FOO /p HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://b/p HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a@b/p HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://b?a/p HTTP/1.0\r\nHost: a\r\n\r\n",
)
ENDLESS = {
    "trailers": b"3\r\nabc\r\n0\r\n" + b"a: b\r\n" * 100_000,
    "a trailer": b"3\r\nabc\r\n0\r\nX: " + b"a" * 600_000,
    "an extension": b"3;" + b"a" * 600_000,
    "extensions": b"1;a=b;c=d;e=f;g=h\r\na\r\n" * 30_000,
}


@pytest.fixture(scope="module")
def ours():
    with echo() as running:
        yield started(running)


@pytest.fixture(scope="module")
def h11s():
    with echo("--http", "h11", "--ws", "none", ECHO_PROTOCOL="uvicorn's") as running:
        yield started(running)


def seen(found):
    return [(each.status, each.status == 200 and each.told) for each in found]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_is_ignored_however_the_bytes_arrive(ours, upgrade, chunked):
    whole = request(upgrade, chunked=chunked)
    head = whole.index(b"\r\n\r\n") + 4
    for parts in (
        [whole],
        bytewise(whole),
        [whole[:head], whole[head:]],
        [whole[: head - 1], whole[head - 1 :]],
        [whole[: head + 3], whole[head + 3 :]],
        [whole[:20], whole[20:]],
    ):
        with Wire(ours.port) as wire:
            answer = wire.send(*parts, pause_s=0.02 if len(parts) == 2 else 0).answer()
            assert (answer.status, answer.told["body"]) == (200, BODY.decode())
            wire.send(request(body=b"second"))
            assert wire.answer().told["body"] == "second"
            assert not wire.answers(0.05)


def test_upgrades_can_be_pipelined(ours):
    sent = [request(upgrade, body=b"%d" % n) for n, upgrade in enumerate(UPGRADES * 2)]
    for parts in ([b"".join(sent)], bytewise(b"".join(sent))):
        found = ask(ours.port, *parts, quiet_s=0.5)
        assert [each.told["body"] for each in found] == [str(n) for n in range(len(sent))]


def test_a_body_after_an_upgrade_is_no_request(ours):
    """In a second packet, it would run as one."""
    whole = request(UPGRADES[0], body=NEXT)
    [answer] = ask(ours.port, whole[: -len(NEXT)], NEXT, pause_s=0.05, quiet_s=0.3)
    assert (answer.told["path"], answer.told["body"]) == ("/p", NEXT.decode())


@pytest.mark.parametrize(
    "arguments",
    [("--http", "httptools"), ("--http", "h11"), ("--workers", "2"), ("--loop", "asyncio")],
    ids=" ".join,
)
def test_every_start_line_speaks_this_protocol(arguments):
    with echo(*arguments) as running:
        started(running)
        for upgrade in UPGRADES:
            [answer] = ask(running.port, *bytewise(request(upgrade)), quiet_s=0.3)
            assert (answer.status, answer.told["body"]) == (200, BODY.decode())
        for parts in ([b"POST /p HTTP/1.1\r\nHost: a\r\n" + SMUGGLED[0] + NEXT], [STRANGE[0]]):
            assert_refused(running.port, parts)


@pytest.mark.parametrize("rest", SMUGGLED)
def test_what_can_be_read_in_two_ways_is_refused_and_ends_the_connection(ours, rest):
    whole = b"POST /p HTTP/1.1\r\nHost: a\r\n" + rest + NEXT
    upgraded = b"POST /p HTTP/1.1\r\nHost: a\r\n" + UPGRADES[0] + rest + NEXT
    for parts in ([whole], bytewise(whole), [upgraded], bytewise(upgraded)):
        assert_refused(ours.port, parts)


@pytest.mark.parametrize("whole", STRANGE)
def test_no_other_protocol_is_spoken(ours, whole):
    for parts in ([whole + NEXT], bytewise(whole)):
        assert_refused(ours.port, parts)


def test_answers_that_are_owed_come_before_a_refusal(ours):
    slow = request(path=b"/slow")
    found = ask(ours.port, slow + request(body=b"2") + STRANGE[1])
    assert [each.status for each in found] == [200, 200, 400]
    broken = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"
    found = ask(ours.port, slow + broken + NEXT)
    assert [each.status for each in found] == [200, 400]
    [only] = ask(ours.port, request(path=b"/slow", more=b"Connection: close\r\n") + STRANGE[1])
    assert only.status == 200


@pytest.mark.parametrize("cut", [None, -3], ids=["whole", "half"])
def test_nothing_is_done_after_the_request_that_closes_the_connection(ours, cut):
    first = request(path=b"/slow", more=b"Connection: close\r\n")
    with Wire(ours.port) as wire:
        [only] = wire.send(first + request()[:cut], request()).answers()
        assert (only.status, wire.closed) == (200, True)


def test_trailers_are_no_headers(ours):
    whole = request(chunked=True)[:-2] + b"X-API-Key: k\r\n\r\n"
    [answer] = ask(ours.port, whole, quiet_s=0.3)
    assert (answer.status, answer.told["key"]) == (200, None)


@pytest.mark.parametrize("endless", ENDLESS.values(), ids=ENDLESS)
def test_what_frames_a_body_has_an_end(ours, endless):
    head = request(b"", b"", chunked=True)[:-5]
    assert_refused(ours.port, [head, endless], 431)
    with Wire(ours.port) as wire:
        assert wire.send(head.replace(b"/p", b"/unread")).answer().status == 200
        assert wire.send(endless).answers() == []
        assert wire.closed


def test_a_body_in_chunks_of_a_byte_is_taken(ours):
    parts = b"".join(b"1\r\na\r\n" for _ in range(60_000)) + b"0\r\n\r\n"
    [answer] = ask(ours.port, request(b"", b"", chunked=True)[:-5] + parts, quiet_s=1)
    assert (answer.status, len(answer.told["body"])) == (200, 60_000)


def test_a_target_that_names_the_server_is_taken(ours):
    [answer] = ask(ours.port, b"GET http://A/p?q HTTP/1.1\r\nHost: a\r\n\r\n", quiet_s=0.3)
    assert (answer.status, answer.told["path"], answer.told["query"]) == (200, "/p", "q")


@pytest.mark.parametrize("path", [b"/p", b"/slow"])
def test_a_client_that_closed_its_writing_side_gets_all_answers(ours, path):
    for sent, count in (
        (request(path=path), 1),
        (request(UPGRADES[0], path=path, chunked=True), 1),
        (request(path=path) + request(path=path, body=b"2"), 2),
    ):
        with Wire(ours.port) as wire:
            found = wire.send(sent).end().answers()
            assert [each.status for each in found] == [200] * count
            assert wire.closed


def test_half_a_request_at_the_end_is_refused_after_the_answers_that_are_owed(ours):
    whole = request()
    for first, cut in itertools.product((b"", request(path=b"/slow")), (10, len(whole) - 3)):
        with Wire(ours.port) as wire:
            *answered, refused = wire.send(first + whole[:cut]).end().answers()
            assert [each.status for each in answered] == [200] * bool(first)
            assert (refused.status, refused.told["code"]) == (400, "bad_request")


def test_pipelined_requests_beyond_what_may_wait_are_answered_in_order(ours):
    sent = b"".join(request(body=b"%d" % n) for n in range(3_000))
    found = ask(ours.port, sent, quiet_s=2)
    assert [each.told["body"] for each in found] == [str(n) for n in range(3_000)]


def streams(rng):
    """Yield byte streams in which each request is unambiguous, or is refused."""
    while True:
        made = []
        for n in range(rng.randrange(1, 5)):
            upgrade = rng.choice((b"", b"", *UPGRADES[:2], UPGRADES[3]))
            body = bytes(rng.choice(b"abc\r\n:{}0") for _ in range(rng.randrange(1, 40)))
            path = rng.choice((b"/p", b"/p?q=%d" % n, b"/slow", b"/a/%20b"))
            expect = rng.choice((b"", b"", b"Connection: keep-alive\r\n", b"X: \xe9\r\n"))
            made.append(request(upgrade, body, chunked=rng.random() < 0.5, path=path, more=expect))
        made.append(rng.choice((request(more=b"Connection: close\r\n"), b"X\r\n\r\n")))
        yield b"".join(made)


def test_it_answers_as_h11_does(ours, h11s):
    rng = random.Random(20)
    for stream in itertools.islice(streams(rng), 100):
        told = []
        for port in (h11s.port, ours.port):
            cuts = sorted(rng.randrange(len(stream)) for _ in range(rng.randrange(4)))
            parts = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
            told.append(seen(ask(port, *parts, pause_s=0.002)))
        assert told[0] == told[1], stream


def test_a_stop_waits_for_no_connection_that_says_nothing():
    with echo() as running:
        started(running)
        with (
            Wire(running.port),
            Wire(running.port).send(b"GET / HT"),
            Wire(running.port).send(request()) as idle,
        ):
            assert idle.answer().status == 200
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(timeout=20) is not None
