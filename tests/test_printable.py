"""What strangers wrote reaches a terminal or a log as text, never as a command."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service import service
from test_start import BASE

from cerberus import printable
from cerberus.telemetry import logs

CODES = "\x1b[2J\x07\r\n\t\x7f\x9b31m\u2028\u202e\u200b\ufeff\U000e0041"


@given(st.text(), st.text(st.sampled_from(CODES + "aé\\\"'")))
def test_escaped_text_is_printable_and_json_of_it_keeps_its_meaning(free, planted):
    text = free.encode(errors="ignore").decode() + planted
    assert printable.escaped(text).isprintable()
    assert all(line.isprintable() for line in printable.lines(text).split("\n"))
    assert printable.lines(text).count("\n") == text.count("\n")
    written = printable.dumps({text: [text]}).decode()
    assert written.isprintable()
    assert json.loads(written) == {text: [text]}


def test_text_that_can_be_printed_stays_as_it_is(capsys):
    plain = 'Zoë paid 5 € at "Łódź\\n" 支付'
    assert printable.escaped(plain) == plain
    printable.say(plain, f"a{CODES}b")
    told = capsys.readouterr().out
    assert told.startswith(f"{plain}\na")
    assert (told.count("\n"), told[-2:]) == (2, "b\n")


@pytest.mark.parametrize("text", [CODES, f"\ud800{CODES}"])
def test_a_log_line_is_one_line_whatever_is_logged(text):
    try:
        raise ValueError(text)
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "%s %r", "args": (text, error), "level": "INFO", "said": [text], "name": text}
        )
        record.exc_info = (ValueError, error, error.__traceback__)
    line = logs.JsonLines().format(record)
    assert line.isprintable()
    told = json.loads(line)
    assert CODES in told["message"]
    assert CODES in told["traceback"]


@pytest.mark.parametrize("options", [(), ("--http", "h11"), ("--log-level", "trace")])
def test_the_query_of_a_request_is_in_no_line_of_a_log(options):
    with service(BASE | {"CERBERUS_API_KEY": "sesame"}, *options) as running:
        running.wait(running.health, "it answers")
        for path in (
            "/health?api_key=sesame",
            "/metrics?key=open&key=sesame",
            "/x?sesame",
            "/%3f?",
        ):
            refused = running.http.get(path, headers={"Referer": f"http://elsewhere{path}"})
            assert refused.status_code == 401
        accepted = running.http.get("/openapi.json?y=sesame", headers={"X-API-Key": "sesame"})
        assert accepted.status_code == 200
        _, written = running.end()
    assert "GET /metrics HTTP" in written
    assert "GET /openapi.json HTTP" in written
    assert "sesame" not in written
