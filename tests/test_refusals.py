"""A server that answers and refuses: one sentence and status 78, in the service and in commands."""

import asyncio
import json
import secrets
import urllib.parse

import asyncpg
import pytest
import redis
from service import service

from cerberus import __main__ as commands

PAYMENT = {"transaction_id": "t1", "user_id": 1005, "amount": 1.25, "currency": "USD"}


def sql(url, *statements):
    async def run():
        connection = await asyncpg.connect(url, timeout=10)
        for statement in statements:
            await connection.execute(statement, timeout=30)
        await connection.close()

    asyncio.run(run())


@pytest.fixture
def role(servers, database):
    """Create a role, and return its name and the database's address for it."""
    name = f"r{secrets.token_hex(6)}"
    sql(servers.postgres.url, f"CREATE ROLE {name} LOGIN")
    parts = urllib.parse.urlsplit(database)
    yield name, parts._replace(netloc=f"{name}:sesame@127.0.0.1:{parts.port}").geturl()
    sql(database, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(PAYMENT | {"merchant_id": "m", "timestamp": "2026-11-01T10:00:00Z"}))
    return path


def all_commands(file):
    return (
        ["migrate"],
        ["features", "apply"],
        ["features", "compile"],
        ["materialize"],
        ["inspect", "1005"],
        ["replay", "--verify"],
        ["accuracy"],
        ["import", "--transactions", str(file)],
        ["forget", "1005", "--yes"],
    )


def ends_with_one_sentence(environ, arguments, monkeypatch, capfd):
    """Run a command and return the sentence with which it ends."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    status = commands.main(arguments)
    said = capfd.readouterr().err
    [line] = said.splitlines()
    assert (status, line[:9]) == (78, "cerberus "), said
    assert "sesame" not in said
    return line


def refused_at_the_start(environ):
    """Start the service and return the sentence with which it ends."""
    with service(environ) as running:
        assert running.process.wait(timeout=60) == 78, running.written()
        written = running.written()
    [line] = [each for each in written.splitlines() if each.startswith("cerberus: ")]
    assert "Traceback" not in written, written
    assert "sesame" not in written
    return line


def test_without_connect_every_command_and_the_service_name_the_grant(
    environ, role, file, monkeypatch, capfd
):
    name = environ["DATABASE_URL"].rpartition("/")[2]
    sql(environ["DATABASE_URL"], f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
    wrong = environ | {"DATABASE_URL": role[1]}
    for arguments in all_commands(file):
        line = ends_with_one_sentence(wrong, arguments, monkeypatch, capfd)
        assert f"GRANT CONNECT ON DATABASE {name} TO" in line, arguments
    assert "GRANT CONNECT" in refused_at_the_start(wrong)


def test_without_create_the_grant_is_named(environ, role, file, monkeypatch, capfd):
    wrong = environ | {"DATABASE_URL": role[1]}
    for arguments in (["migrate"], ["features", "apply"], ["import", "--transactions", str(file)]):
        line = ends_with_one_sentence(wrong, arguments, monkeypatch, capfd)
        assert "GRANT USAGE, CREATE ON SCHEMA public TO" in line, arguments
    assert "GRANT USAGE, CREATE ON SCHEMA public TO" in refused_at_the_start(wrong)
    sql(environ["DATABASE_URL"], "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    assert "GRANT USAGE" in ends_with_one_sentence(wrong, ["migrate"], monkeypatch, capfd)
    assert "GRANT USAGE" in ends_with_one_sentence(wrong, ["features", "apply"], monkeypatch, capfd)


def test_tables_of_another_role_are_named_with_what_to_do(environ, role, file, monkeypatch, capfd):
    name, url = role
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert commands.main(["migrate"]) == 0
    assert commands.main(["features", "apply"]) == 0
    sql(environ["DATABASE_URL"], f"GRANT USAGE, CREATE ON SCHEMA public TO {name}")
    wrong = environ | {"DATABASE_URL": url}
    for arguments in (["migrate"], ["accuracy"]):
        line = ends_with_one_sentence(wrong, arguments, monkeypatch, capfd)
        assert "GRANT ALL ON" in line or "OWNER TO" in line, arguments
    assert "as the owner, run: " in refused_at_the_start(wrong)


def test_a_database_or_a_role_that_is_not_there_is_named(environ, monkeypatch, capfd):
    missing = environ["DATABASE_URL"] + "_none"
    for arguments in (["migrate"], ["features", "apply"], ["accuracy"], ["materialize"]):
        wrong = environ | {"DATABASE_URL": missing}
        line = ends_with_one_sentence(wrong, arguments, monkeypatch, capfd)
        assert "does not exist" in line, arguments
    nobody = environ["DATABASE_URL"].replace("//cerberus@", "//nobody:sesame@")
    for url in (missing, nobody):
        assert "does not exist" in refused_at_the_start(environ | {"DATABASE_URL": url})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("options=-cbogus%3D1", "unrecognized configuration parameter"),
        ("options=-cstatement_timeout%3Dsoon", "invalid value for parameter"),
        ("options=endpoint%3Dx", "options: invalid command-line argument"),
        ("options=-csearch_path%3Dnowhere", "GRANT USAGE, CREATE"),
        ("sslmode=require", "does not support TLS"),
    ],
)
def test_an_option_that_postgres_does_not_take_is_named(environ, option, said, monkeypatch, capfd):
    wrong = environ | {"DATABASE_URL": f"{environ['DATABASE_URL']}?{option}"}
    assert said in ends_with_one_sentence(wrong, ["migrate"], monkeypatch, capfd)
    assert said in refused_at_the_start(wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "/99"}, "no database with this number"),
        ({"login": "nobody:sesame@"}, "refuses the user or password"),
        ({"login": ":sesame@"}, "refuses the user or password"),
        ({"cluster": "1"}, "REDIS_CLUSTER is 1"),
    ],
)
def test_what_redis_refuses_is_one_sentence(environ, file, changes, said, monkeypatch, capfd):
    parts = urllib.parse.urlsplit(environ["REDIS_URL"])
    place = f"{changes.get('login', '')}127.0.0.1:{parts.port}"
    path = "" if "cluster" in changes else changes.get("path", parts.path)
    wrong = environ | {
        "REDIS_URL": parts._replace(netloc=place, path=path).geturl(),
        "REDIS_CLUSTER": changes.get("cluster", "0"),
    }
    for arguments in (["inspect", "1005"], ["materialize"], ["forget", "1005", "--yes"]):
        assert said in ends_with_one_sentence(wrong, arguments, monkeypatch, capfd), arguments
    line = ends_with_one_sentence(
        wrong, ["import", "--transactions", str(file)], monkeypatch, capfd
    )
    assert said in line
    assert said in refused_at_the_start(wrong)


def test_what_libpq_reads_besides_the_address_does_not_reach_feast(environ, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for name in ("PGSERVICE", "PGCONNECT_TIMEOUT", "PGCHANNELBINDING", "PGSSLROOTCERT"):
        monkeypatch.setenv(name, "nonsense")
    assert commands.main(["migrate"]) == 0
    assert commands.main(["features", "apply"]) == 0
    assert commands.main(["materialize"]) == 0


@pytest.mark.parametrize("away", ["KAFKA_BROKER", "REDIS_URL", "DATABASE_URL"])
def test_a_server_that_is_down_is_waited_for(environ, away):
    scheme = {"REDIS_URL": "redis://", "DATABASE_URL": "postgresql://x@"}.get(away, "")
    with service(environ | {away: f"{scheme}127.0.0.1:1"}) as running:
        told = running.wait(running.health, "the service answers")
        assert told["status"] != "ready"


def test_no_secret_shows_while_no_server_answers():
    secret = "qx7zw9"
    away = {
        "KAFKA_BROKER": "127.0.0.1:1",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "u",
        "KAFKA_SASL_PASSWORD": secret,
        "REDIS_URL": f"redis://u:{secret}%40%3F@127.0.0.1:1/0",
        "DATABASE_URL": f"postgres://u:{secret}%3F%23%40@127.0.0.1:1/x",
        "CERBERUS_LOG_LEVEL": "DEBUG",
        "CERBERUS_OPEN": "loopback",
    }
    with service(away) as running:
        for name in ("consumer", "producer", "materializer", "labels", "retention"):
            running.wait(lambda n=name: f'"task":"{n}"' in running.written(), f"{name} waits")
        shown = [running.http.get(path).text for path in ("/health", "/metrics")]
        assert running.predict(1).status_code == 503
        _, written = running.end()
    assert not any(secret in text for text in (*shown, written))


def test_a_right_that_is_taken_away_ends_the_service_with_78(environ, role):
    name, url = role
    sql(environ["DATABASE_URL"], f"GRANT USAGE, CREATE ON SCHEMA public TO {name}")
    with service(environ | {"DATABASE_URL": url, "CERBERUS_RATE": "20"}) as running:
        running.wait_until_ready()
        sql(environ["DATABASE_URL"], f"REVOKE ALL ON transactions FROM {name}")
        assert running.process.wait(timeout=60) == 78, running.written()
        lines = [x for x in running.written().splitlines() if x.startswith("cerberus: ")]
    assert len(lines) == 1
    assert "GRANT ALL ON" in lines[0]


def test_a_redis_that_begins_to_refuse_is_named_in_answers_and_health(environ):
    parts = urllib.parse.urlsplit(environ["REDIS_URL"])
    later = parts._replace(netloc=f":sesame@127.0.0.1:{parts.port}").geturl()
    with service(environ | {"CERBERUS_TASKS": "api"}) as running:
        running.wait(running.health, "the service answers")
        with redis.Redis.from_url(environ["REDIS_URL"]) as client:
            client.config_set("requirepass", "sesame")
            client.client_kill_filter(_type="normal", skipme=True)
        try:
            answer = running.wait(
                lambda: (
                    (told := running.predict(1).json()) and "REDIS_URL" in told["detail"] and told
                ),
                "the answer names the setting",
            )
            assert answer["code"] == "features_unavailable"
            running.wait(
                lambda: "Redis refuses the user or password" in running.http.get("/health").text,
                "the state names it",
            )
        finally:
            with redis.Redis.from_url(later) as client:
                client.config_set("requirepass", "")
        running.wait(lambda: running.predict(1).status_code == 200, "it answers again")
