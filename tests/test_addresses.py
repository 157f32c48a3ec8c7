"""The addresses of the servers: what is accepted and refused, and that no secret shows."""

import getpass
import ssl
import traceback

import psycopg.conninfo
import pytest
import sqlalchemy
import trustme

from cerberus import __main__ as commands
from cerberus import endpoints, environment, errors, settings
from cerberus.addresses import postgres as addresses
from cerberus.jobs import feast
from cerberus.online import pool as redis_pool
from cerberus.postgres import connecting

BASE = {
    "KAFKA_BROKER": "127.0.0.1:9092",
    "REDIS_URL": "redis://127.0.0.1:6379",
    "DATABASE_URL": "postgres://u:p@db:5432/x",
}
SECRET = ("qx7", "zw9", "kv3", "jy8")


def refusal(name, told):
    """Return why a value is refused."""
    with pytest.raises(errors.ConfigError) as caught:
        settings.load(BASE | {name: told})
    said = str(caught.value)
    assert said.startswith(name)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "special", ["?", "#", "/", "@", "%", " ", "\n", "\t", "\0", "\udcff", ":/"]
)
@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "KAFKA_BROKER", "KAFKA_URL"])
@pytest.mark.parametrize(
    "password", ["{s1}{x}{s2}", "12{x}{s2}={s3}", "{s1}{x}{s2}{x}{s3}={s4}", "5432{x}sslmode={s4}"]
)
def test_a_special_character_in_a_password_shows_no_part_of_it(name, special, password):
    parts = {f"s{i}": part for i, part in enumerate(SECRET, 1)}
    scheme = {"DATABASE_URL": "postgres", "REDIS_URL": "redis"}.get(name, "kafka")
    told = f"{scheme}://u:{password.format(x=special, **parts)}@h:1/0"
    environ = {k: v for k, v in BASE.items() if k != "KAFKA_BROKER" or "KAFKA" not in name}
    with pytest.raises(errors.ConfigError, match=name) as caught:
        settings.load(environ | {name: told})
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    assert not any(part in shown for part in SECRET)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [  # the forms that hosting platforms document
        ("postgres://u:p@ec2-1.compute-1.amazonaws.com:5432/d5", {"sslmode": "prefer"}),
        (
            "postgresql://alex:AbC123@ep-cool-pooler.us-east-2.aws.neon.tech/db?sslmode=require"
            "&options=endpoint%3Dep-cool",
            {"sslmode": "require", "options": "endpoint=ep-cool", "port": "5432"},
        ),
        (
            "postgresql://postgres.abcd:p%40ss@aws-0-eu-west-1.pooler.supabase.com:5432/postgres",
            {"user": "postgres.abcd", "password": "p@ss"},
        ),
        ("postgresql://u:p@dpg-c1-a.oregon-postgres.render.com/db_x", {"dbname": "db_x"}),
        (
            "postgresql://u:p@mydb.abc.eu-west-1.rds.amazonaws.com:5432/d?connect_timeout=30"
            "&application_name=my%20app&target_session_attrs=read-write",
            {
                "connect_timeout": "30",
                "application_name": "my app",
                "target_session_attrs": "read-write",
            },
        ),
        (
            "postgres://avnadmin:p@pg-1.aivencloud.com:12691/defaultdb?sslmode=require"
            "&channel_binding=prefer&gssencmode=disable",
            {"port": "12691", "sslmode": "require"},
        ),
        (
            "postgresql://u:p@%2Fvar%2Frun%2Fpostgresql/d",
            {"host": "/var/run/postgresql", "port": "5432"},
        ),
        ("postgresql:///d?host=/run/pg&user=u&port=6000", {"host": "/run/pg", "port": "6000"}),
        ("postgresql://u@[::1]:5433/d", {"host": "::1", "port": "5433"}),
        ("postgresql://h", {"user": getpass.getuser(), "dbname": getpass.getuser()}),
        ("POSTGRES://u:a:b@my_db/d", {"password": "a:b", "host": "my_db"}),
        ("postgres://u:p%C3%A4ß@h/d", {"password": "päß"}),
        ("postgres://u:a[b]c@h/d", {"password": "a[b]c"}),
        ("postgres://u%40server:p@h/", {"user": "u@server", "dbname": "u@server"}),
    ],
)
def test_every_client_of_postgres_is_told_the_same(told, wanted):
    config = settings.load(BASE | {"DATABASE_URL": told})
    address = config.postgres.address
    parts = address.libpq()
    assert parts.items() >= wanted.items()
    assert psycopg.conninfo.conninfo_to_dict(config.postgres.url) == parts

    ours = connecting.options(address)
    shared = {"host": "host", "port": "port", "user": "user", "database": "dbname"}
    assert {theirs: str(ours[name]) for name, theirs in shared.items()} == {
        theirs: parts[theirs] for theirs in shared.values()
    }
    assert ours["password"] == parts.get("password", "")
    assert ours["server_settings"] == {
        name: parts[name] for name in ("application_name", "options") if name in parts
    }
    assert isinstance(ours["ssl"], ssl.SSLContext) == (parts["sslmode"] == "require")

    rendered = feast.repo_config(config)
    url = sqlalchemy.make_url(rendered["registry"]["path"])
    _, arguments = url.get_dialect()().create_connect_args(url)
    assert {k: str(v) for k, v in arguments.items()} == {"connect_timeout": "10"} | parts
    offline = rendered["offline_store"]
    assert (offline["host"], offline["password"]) == (parts["host"], parts.get("password", ""))
    assert parts.get("options", "") in offline["db_schema"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("postgres://u:p@a,b/d", "several hosts"),
        ("postgres://u:p@a:1,b:2/d", "several hosts"),
        ("postgres://u:p@/d?host=a,b", "several hosts"),
        ("postgres://u:p@h:0/d", "from 1 to 65535"),
        ("postgres://u:p@h:５４/d", "from 1 to 65535"),
        ("postgres://u:p@h:/d", "from 1 to 65535"),
        ("postgres://u:p@h..x/d", "names no host"),
        (f"postgres://u:p@{'a' * 64}.com/d", "names no host"),
        ("postgres://u:p@bücher.example/d", "names no host"),
        ("postgres://u:p@[::1/d", "names no host"),
        ("postgres://u:p@h/d#x", "percent-encode"),
        ("postgres://u:p%00@h/d", "%00"),
        ("postgres://u:p%ff@h/d", "UTF-8"),
        ("postgres://u:p@h/d?sslmode=verify-ful", "sslmode must be disable or allow or"),
        ("postgres://u:p@h/d?sslmode", "option 1 is not NAME=VALUE"),
        ("postgres://u:p@h/d?sslmode=", "option 1 is not NAME=VALUE"),
        ("postgres://u:p@h/d?sslmode=require&sslmode=require", "option 2 repeats an earlier one"),
        ("postgres://u:p@h/d?sslmod=require", "did you mean sslmode?"),
        ("postgres://u:p@h/d?channel_binding=require", "channel_binding must be prefer or disable"),
        ("postgres://u:p@h/d?gssencmode=require", "gssencmode must be"),
        ("postgres://u:p@h/d?service=x", "service is not supported"),
        ("postgres://u:p@h/d?passfile=/x", "passfile is not supported"),
        ("postgres://u:p@h/d?ssl=true", "ssl is not supported: write sslmode=require"),
        ("postgres://u:p@h/d?pgbouncer=true", "pgbouncer is not supported"),
        ("postgres://u:p@h/d?connect_timeout=1.5", "connect_timeout must be a whole number"),
        ("postgres://u:p@h/d?connect_timeout=-1", "connect_timeout must be a whole number"),
        ("postgres://u:p@h/d?target_session_attrs=standby", "target_session_attrs must be any"),
        ("postgres://u:p@h/d?host=x", "gives host twice"),
        ("postgres://u:p@h/d?password=x", "gives password twice"),
        ("postgres://u:p@h/d?sslmode=verify-full", "needs sslrootcert"),
        ("postgres://u:p@h/d?sslrootcert=/x", "needs sslmode=require"),
        ("postgres://u:p@h/d?sslmode=require&sslcert=/x", "sslcert and sslkey go together"),
        ("postgres://u:p@h/d?sslmode=require&sslrootcert=system", "needs sslmode=verify-full"),
        ("postgresql+asyncpg://u:p@h/d", "must begin with postgres://"),
        ("host=h dbname=d", "must begin with postgres://"),
    ],
)
def test_a_wrong_address_of_postgres_is_one_sentence(told, said, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = refusal("DATABASE_URL", told)
    assert said in shown


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("redis://h/abc", "database"),
        ("redis://h/-1", "database"),
        ("redis://h/1/2", "database"),
        ("redis://h/1?db=2", "twice"),
        ("redis://h?db=x", "db must be"),
        ("redis://h?bogus=1", "option 1 is unknown"),
        ("redis://h?ssl_cert_reqs=none", "needs a rediss:// address"),
        ("rediss://h?ssl_cert_reqs=never", "ssl_cert_reqs must be none, optional or required"),
        ("rediss://h?ssl_certfile=/x", "go together"),
        ("redis://h?decode_responses=1", "decode_responses is not supported"),
        ("redis://h?ssl=true", "write rediss://"),
        ("redis://sesame@h", "no password"),
        ("redis://a:1,b:2", "several hosts"),
        ("redis://h:0", "from 1 to 65535"),
        ("unix:///run/redis.sock", "must begin with redis://"),
    ],
)
def test_a_wrong_address_of_redis_is_one_sentence(told, said):
    shown = refusal("REDIS_URL", told)
    assert said in shown
    assert "sesame" not in shown


def test_the_forms_of_platforms_reach_redis():
    for told, wanted in (
        ("redis://red-c1:6379", {"host": "red-c1", "port": 6379, "db": 0}),
        ("rediss://h:p%40@ec2.compute.amazonaws.com:6380", {"password": "p@", "ssl": True}),
        ("redis://default:p@us1.upstash.io:6379/0", {"username": "default"}),
        (
            "rediss://:p@h/3?ssl_cert_reqs=CERT_NONE&socket_timeout=1.5",
            {
                "db": 3,
                "ssl_cert_reqs": ssl.CERT_NONE,
                "ssl_check_hostname": False,
                "socket_timeout": 1.5,
            },
        ),
        ("redis://[::1]:7000", {"host": "::1", "port": 7000}),
    ):
        found = redis_pool.options(settings.load(BASE | {"REDIS_URL": told}))
        assert found.items() >= wanted.items()


def test_a_redis_cluster_has_one_database():
    with pytest.raises(errors.ConfigError, match="REDIS_URL: a Redis Cluster has only"):
        settings.load(BASE | {"REDIS_URL": "redis://h/1", "REDIS_CLUSTER": "1"})


@pytest.fixture
def files(tmp_path):
    """Return a CA, a client's certificate, its key, and files that are none of these."""
    ca = trustme.CA()
    client = ca.issue_cert("cerberus.invalid")
    made = {"ca": ca.cert_pem.bytes(), "cert": client.cert_chain_pems[0].bytes()}
    made |= {"key": client.private_key_pem.bytes(), "junk": b"junk", "empty": b""}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in (*made, "none")} | {"folder": str(tmp_path)}


POSTGRES = "postgres://u:p@h/d?sslmode=verify-full&sslrootcert={}"
REDIS = "rediss://:p@h?ssl_ca_certs={}"


@pytest.mark.parametrize("wrong", ["junk", "empty", "none", "folder", "key"])
def test_a_file_that_holds_no_certificates_is_one_sentence(wrong, files):
    postgres = settings.load(BASE | {"DATABASE_URL": POSTGRES.format(files[wrong])})
    with pytest.raises(errors.ConfigError, match="DATABASE_URL: sslrootcert is not a file"):
        connecting.options(postgres.postgres.address)
    redis = settings.load(BASE | {"REDIS_URL": REDIS.format(files[wrong])})
    with pytest.raises(errors.ConfigError, match="REDIS_URL: ssl_ca_certs is not a file"):
        redis_pool.connect(redis)
    pair = f"&sslcert={files['cert']}&sslkey={files[wrong]}"
    if wrong != "key":
        client = settings.load(BASE | {"DATABASE_URL": POSTGRES.format(files["ca"]) + pair})
        with pytest.raises(errors.ConfigError, match="DATABASE_URL: sslcert and sslkey are not"):
            connecting.options(client.postgres.address)


def test_files_of_certificates_are_used(files):
    told = POSTGRES.format(files["ca"]) + f"&sslcert={files['cert']}&sslkey={files['key']}"
    address = settings.load(BASE | {"DATABASE_URL": told}).postgres.address
    context = connecting.options(address)["ssl"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(context.get_ca_certs()) == 1
    loose = addresses.read("DATABASE_URL", "postgres://h/d?sslmode=require").tls()
    assert loose is not None
    assert not loose.check_hostname


def test_the_variables_of_libpq_do_not_count(monkeypatch):
    for name in ("PGPASSWORD", "PGHOST", "PGUSER", "PGDATABASE", "PGPORT", "PGOPTIONS"):
        monkeypatch.setenv(name, "another")
    address = addresses.read("DATABASE_URL", "postgres://u@h/d")
    assert (address.host, address.port, address.user) == ("h", 5432, "u")
    assert connecting.options(address)["password"] == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["migrate"],
        ["features", "apply"],
        ["features", "compile"],
        ["features", "render"],
        ["materialize"],
        ["inspect", "1"],
        ["replay", "--verify"],
        ["accuracy"],
        ["import", "--transactions", "none.csv"],
        ["send", "none.csv"],
        ["forget", "1", "--yes"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "KAFKA_BROKER"])
def test_every_command_ends_with_one_sentence_without_the_secret(
    arguments, name, monkeypatch, capfd
):
    scheme = {"DATABASE_URL": "postgres", "REDIS_URL": "redis"}.get(name, "kafka")
    for variable, value in (BASE | {name: f"{scheme}://u:12?qx7=zw9@h/0"}).items():
        monkeypatch.setenv(variable, value)
    assert commands.main(arguments) == 78
    said = capfd.readouterr()
    [line] = (said.out + said.err).splitlines()
    assert line.startswith(f"cerberus {arguments[0]}: {name}")
    assert not any(part in line for part in SECRET)


def test_no_address_shows_its_password():
    told = {"REDIS_URL": "redis://:sesame@r", "DATABASE_URL": "postgres://u:sesame@db/x"}
    config = environment.read(endpoints.Postgres, told), environment.read(endpoints.Redis, told)
    assert all("sesame" in each.url for each in config)
    for each in config:
        assert "sesame" not in repr(each)
        assert "sesame" not in repr(each.address)
