"""Outside text reaches a terminal or a log as text, never as a command."""

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service import service
from test_start import BASE, python

from cerberus import __main__, printable
from cerberus.commands import inspect, run
from cerberus.stack import service as running
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


@pytest.fixture
def nowhere(monkeypatch):
    """Set addresses without a server."""
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)


NAME = f"x{CODES}\udcff"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"{NAME}.xlsx", b""),
        (f"{NAME}.csv", b"a,b\n1,2\n"),
        ("x.csv", f'transaction_id,user_id,amount,timestamp{{"{CODES}"}}\n1,2,3,4'.encode()),
        ("absent.jsonl", None),
    ],
)
def test_a_command_quotes_files_in_one_line_without_codes(nowhere, capsys, tmp_path, name, content):
    quoted(capsys, tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", f'transaction_id,user_id,amount,timestamp\n1,"{CODES}",3,4'.encode()),
        ("x.jsonl", json.dumps({"transaction_id": CODES, CODES: CODES}).encode()),
        ("x.jsonl", f"{CODES}".encode()),
    ],
)
def test_a_command_quotes_rows_in_one_line_without_codes(
    environ, monkeypatch, capsys, tmp_path, name, content
):
    for each, value in environ.items():
        monkeypatch.setenv(each, value)
    quoted(capsys, tmp_path / name, content)


def quoted(capsys, file, content):
    if content is not None:
        file.write_bytes(content)
    assert __main__.main(["send", str(file)]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err[:-1].isprintable()


@pytest.mark.parametrize("arguments", [[CODES], ["send", "x", CODES], ["inspect", CODES]])
def test_a_wrong_argument_is_quoted_without_codes(nowhere, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        sys.exit(__main__.main(arguments))
    assert ended.value.code == 2
    *_, last, end = capsys.readouterr().err.split("\n")
    assert last.startswith("cerberus")
    assert (last.isprintable(), end) == (True, "")


def test_what_a_library_logs_under_a_command_has_no_codes():
    code = (
        "import logging; from cerberus import __main__; __main__.main(['settings']);"
        f"logging.getLogger('library').warning('no topic %s', {CODES!r})"
    )
    told = python(BASE, "-c", code).stderr
    assert told.startswith("no topic")
    assert told[:-1].replace("\n", "").isprintable()


def test_what_the_log_of_the_service_says_is_repeated_without_codes(capsys):
    record = logging.makeLogRecord({"msg": f"a{CODES}b", "levelname": "WARNING"})
    run._say(running._alarm(logs.JsonLines().format(record)))
    run._say(f"two{CODES.replace(chr(10), '')}\nlines")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3
    assert all(line.isprintable() for line in told)


def test_the_transactions_of_a_user_are_a_line_each(capsys):
    decided = {"as_of": "2026", "decision": "approve", "probability": 0.5, "door": "http"}
    told = {
        **{"user_id": 1, "as_of": "2026", "partition": 0, "fence": None, "degraded": []},
        **{"features": {}, "events": []},
        "decisions": [decided | {"decision_id": "d", "transaction_id": CODES}],
    }
    printable.say(*inspect.describe(told).split("\n"))
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 7
    assert all(line.isprintable() for line in lines)


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
