"""How uvicorn's process starts, before any server is asked for."""

import os
import subprocess
import sys

import pytest
from service import ROOT

from cerberus.commands import run


def python(environ, *command):
    return subprocess.run(
        [sys.executable, *command],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def uvicorn(environ, *options):
    return python(environ, "-m", "uvicorn", "cerberus.app:app", "--port", "0", *options)


BASE = {
    "PATH": os.environ["PATH"],
    "KAFKA_BROKER": "127.0.0.1:1",
    "REDIS_URL": "redis://127.0.0.1:1",
    "DATABASE_URL": "postgres://127.0.0.1:1/x",
    "CERBERUS_OPEN": "loopback",
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"KAFKA_BROKER": ""}, "KAFKA_BROKER is not set"),
        ({"CERBERUS_RATE": "fast"}, "CERBERUS_RATE must be"),
        ({"CERBERUS_MODEL": "/nowhere/m.json"}, "cannot read /nowhere/m.json"),
        ({"CERBERUS_SPANS": "7m"}, "CERBERUS_SPANS says 7m"),
        ({"CERBERUS_SPAN": "7m"}, "did you mean CERBERUS_SPANS?"),
        ({"CERBERUS_OPEN": ""}, "CERBERUS_API_KEY is not set"),
        ({"CERBERUS_OPEN": "", "CERBERUS_API_KEY": " , "}, "CERBERUS_OPEN=loopback"),
        ({"CERBERUS_OPEN": "", "CERBERUS_TASKS": "consumer"}, "CERBERUS_API_KEY is not set"),
        ({"CERBERUS_OPEN": "all"}, "CERBERUS_OPEN must be loopback, or not set"),
        ({"CERBERUS_MODEL": "."}, "cannot read ."),
        ({"CERBERUS_POLICY": "."}, "CERBERUS_POLICY: cannot read ."),
        ({"CERBERUS_RATE": "１"}, "CERBERUS_RATE must be"),
        ({"DATABASE_URL": "postgres://u:12?qx7=zw9@h/d"}, "DATABASE_URL is not an address"),
        ({"REDIS_URL": "redis://u:12#qx7zw9@h/0"}, "REDIS_URL is not an address"),
        ({"KAFKA_BROKER": "kafka://u:12/qx7zw9@h:1"}, "KAFKA_BROKER: address 1 is not"),
        (
            {"KAFKA_BROKER": "kafka+ssl://h", "KAFKA_TRUSTED_CERT": "qx7zw9ü"},
            "KAFKA_TRUSTED_CERT",
        ),
        (
            {"DATABASE_URL": "postgres://h/d?sslmode=verify-full&sslrootcert=/nowhere"},
            "DATABASE_URL: sslrootcert is not",
        ),
        ({"REDIS_URL": "rediss://h?ssl_ca_certs=/nowhere"}, "REDIS_URL: ssl_ca_certs is not"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_sentence(changes, named):
    ended = uvicorn(BASE | changes)
    said = [line for line in ended.stderr.splitlines() if line.startswith("cerberus: ")]
    assert (ended.returncode, len(said)) == (78, 1)
    assert named in said[0]
    for word in ("Traceback", "qx7", "zw9"):
        assert word not in ended.stdout + ended.stderr


def test_a_wrong_setting_ends_uvicorn_s_workers_and_their_parent_too():
    ended = uvicorn(BASE | {"DATABASE_URL": ""}, "--workers", "2")
    assert "cerberus: DATABASE_URL is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "loopback"),
        ({"CERBERUS_OPEN": ""}, "loopback"),
        ({"CERBERUS_API_KEY": "k"}, ""),
    ],
)
def test_a_run_on_this_machine_is_open_to_it_unless_there_is_a_key(tmp_path, given, wanted):
    completed = run._completed(given, {k: v for k, v in given.items() if v}, tmp_path)
    assert completed.get("CERBERUS_OPEN", "") == wanted


def test_serving_never_imports_feast():
    code = "import cerberus.app, sys; print([m for m in sys.modules if m.split('.')[0] == 'feast'])"
    ended = python(BASE, "-c", code)
    assert (ended.stdout, ended.returncode) == ("[]\n", 0)
