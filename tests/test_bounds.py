"""The bounds on connections, heads and bodies, on a real uvicorn and real sockets."""

import contextlib
import socket
import time

import pytest
from wire import NEXT, Wire, ask, assert_refused, echo, request, started

SHORT = {"CERBERUS_HEAD_TIMEOUT_S": "1", "CERBERUS_BODY_TIMEOUT_S": "1"}
FEW_FILES = 256
HALF_OPEN = (b"", b"GET / HT", b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")


@pytest.fixture(scope="module")
def ours():
    with echo(**SHORT) as running:
        yield started(running)


@pytest.fixture
def small():
    with echo("--timeout-keep-alive", "2", CERBERUS_MAX_CONNECTIONS="8") as running:
        yield started(running)


def head(more):
    return b"GET /p HTTP/1.1\r\nHost: a\r\n" + more


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 8_200)], 414, "target_too_long"),
        ([head(b"X: %b\r\n\r\n" % (b"a" * 32_768))], 431, "head_too_large"),
        ([head(b"X: %b" % (b"a" * 20_000)), b"a" * 20_000], 431, "head_too_large"),
        ([head(b"X: b\r\n" * 6_000)], 431, "head_too_large"),
        ([b"GET /", *[b"a" * 4_000] * 10], 431, "head_too_large"),
        ([b"G" * 100_000], 400, "bad_request"),
    ],
)
def test_a_head_has_a_longest_size(ours, parts, status, code):
    with Wire(ours.port) as wire:
        answer = wire.send(*parts, pause_s=0.05).answer()
        assert (answer.status, answer.told["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert wire.answer() is None


def test_the_longest_head_is_served(ours):
    long = head(b"X: %b\r\n\r\n" % (b"a" * 32_700))
    assert [each.status for each in ask(ours.port, long * 3, quiet_s=0.5)] == [200] * 3
    after_a_body = request(body=b"a" * 60_000) + long
    assert [each.status for each in ask(ours.port, after_a_body, quiet_s=0.5)] == [200] * 2


def test_a_head_that_drips_is_refused(ours):
    with Wire(ours.port) as wire:
        wire.send(*[b"GET / HTTP/1.1\r\n"], *[b"X: y\r\n"] * 30, pause_s=0.05)
        assert wire.answer().told["code"] == "head_timeout"
        assert wire.answer() is None


def test_a_body_that_drips_is_refused(ours):
    with Wire(ours.port) as wire:
        sent = request(body=b"a" * 100)
        began_s = time.monotonic()
        wire.send(sent[:-99], *[b"a"] * 80, pause_s=0.1)
        assert wire.answer().told["code"] == "body_timeout"
        assert wire.answer() is None
        assert time.monotonic() - began_s < 15


def test_a_body_that_nobody_reads_does_not_hold_the_connection(ours):
    endless = b"POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
    with Wire(ours.port) as wire:
        assert wire.send(endless).answer().status == 200
        wire.send(*[b"a" * 65_536] * 200)
        assert wire.answer() is None
    with Wire(ours.port, seconds=15) as wire:
        assert wire.send(endless).answer().status == 200
        wire.send(*[b"a"] * 70, pause_s=0.1)
        assert wire.answer() is None


def test_what_was_not_read_can_be_followed_by_a_request(ours):
    unread = request(path=b"/unread", body=b"a" * 300_000)
    assert [each.status for each in ask(ours.port, unread + NEXT, quiet_s=0.5)] == [200, 200]


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_an_early_answer_is_not_lost_with_the_body_that_nobody_reads(ours, more):
    sent = request(path=b"/unread", body=b"a" * 1_000_000, more=more)
    for _ in range(8):
        assert [each.status for each in ask(ours.port, sent, quiet_s=0.5)] == [200]


def test_who_waits_to_be_told_to_continue_can_leave_the_body_out(ours):
    asked = request(path=b"/unread", more=b"Expect: 100-continue\r\n")
    cut = asked.index(b"\r\n\r\n") + 4
    with Wire(ours.port) as wire:
        assert wire.send(asked[:cut]).answer().status == 200
        assert wire.answer() is None


def test_idle_connections_are_closed_in_time_and_no_sooner(small):
    with Wire(small.port) as silent, Wire(small.port) as idle:
        assert idle.send(NEXT).answer().status == 200
        time.sleep(1)
        assert idle.send(NEXT).answer().status == 200
        for wire in (silent, idle):
            assert wire.answer() is None
    with echo() as running:
        started(running)
        with Wire(running.port) as idle:
            assert idle.send(NEXT).answer().status == 200
            time.sleep(7)  # uvicorn's own default is 5
            assert idle.send(NEXT).answer().status == 200


@pytest.mark.parametrize("sent", HALF_OPEN)
def test_a_connection_that_waits_for_its_client_makes_room(small, sent):
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Wire(small.port)).send(sent) for _ in range(20)]
        for _ in range(5):
            [answer] = ask(small.port, request(more=b"Connection: close\r\n"))
            assert answer.status == 200
        assert waiting[0].answer() is None


def test_if_all_are_busy_a_new_one_is_refused(small):
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(Wire(small.port)) for _ in range(8)]
        for wire in busy:
            wire.send(request(path=b"/slower"))
        time.sleep(0.5)
        for _ in range(3):
            answer = assert_refused(small.port, [NEXT], 503)
            assert (answer.told["code"], answer.headers["retry-after"]) == ("overloaded", "1")
        assert [wire.answer().status for wire in busy] == [200] * 8
        [answer] = ask(small.port, request(more=b"Connection: close\r\n"))
        assert answer.status == 200


@pytest.mark.parametrize("sent", HALF_OPEN)
def test_half_open_connections_leave_files_for_others(sent):
    with (
        echo("--loop", "asyncio", files=FEW_FILES) as on_asyncio,
        echo(files=FEW_FILES) as on_uvloop,
        contextlib.ExitStack() as stack,
    ):
        for running in (on_asyncio, on_uvloop):
            started(running)
            assert "connections fit, not 4096" in running.written()
            for n in range(300):
                stack.enter_context(Wire(running.port)).send(sent)
                if n % 30 == 0:
                    [answer] = ask(running.port, request(more=b"Connection: close\r\n"))
                    assert answer.status == 200
            assert "Too many open files" not in running.written()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_burst_of_connections_leaves_files_for_others(loop):
    with echo("--loop", loop, files=FEW_FILES) as running, contextlib.ExitStack() as stack:
        started(running)
        for _ in range(1_000):
            burst = stack.enter_context(socket.socket())
            burst.setblocking(False)
            burst.connect_ex(("127.0.0.1", running.port))
        for _ in range(3):
            [answer] = ask(running.port, request(more=b"Connection: close\r\n"))
            assert answer.status == 200
        assert "Too many open files" not in running.written()


def test_bodies_together_have_a_bound(ours):
    """Large bodies have a separate limit: small ones are accepted meanwhile."""
    with contextlib.ExitStack() as stack:
        large = [stack.enter_context(Wire(ours.port)) for _ in range(30)]
        for wire in large:
            wire.send(request(body=b"a" * 900_000)[:-1])
        assert ask(ours.port, request(), quiet_s=0.3)[0].status == 200
        statuses = [wire.send(b"a").answer().status for wire in large]
        assert statuses.count(200) <= 8 * 2**20 / 900_000
        assert set(statuses) == {200, 503}
    [answer] = ask(ours.port, request(body=b"a" * 900_000), quiet_s=0.5)
    assert answer.status == 200
