import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse

import pytest
import yaml
from starlette.routing import Route

from cerberus import environment, settings, shutdown
from cerberus.api import routes

ROOT = pathlib.Path(__file__).parent.parent
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
OURS = ("app", "init")
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
BIN = pathlib.Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
LOAD_BALANCERS_IDLE_S = 60
PLATFORM_KILLS_AFTER_S = 30


def environ_of(service):
    return {name: str(value) for name, value in SERVICES[service]["environment"].items()}


def script(service):
    """Return what a container runs, as its shell sees it."""
    return [word.replace("$$", "$") for word in SERVICES[service]["command"]]


def instruction(name):
    return re.findall(rf"^(?:HEALTHCHECK .*)?\b{name} (.+)$", DOCKERFILE, re.MULTILINE)


def commands():
    """Return each command of ours that some deployment runs."""
    [exec_form] = re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)
    lines = [shlex.join(json.loads(exec_form)), *(script(service)[-1] for service in OURS)]
    text = "\n".join([*lines, *PROCFILE.values()]).replace("&&", "\n")
    return sorted(
        set(re.findall(r"^ *(?:exec )?((?:python -m cerberus|uvicorn) .+?) *$", text, re.M))
    )


def let_in(path):
    """Judge a path as Docker does: by the last pattern that fits it or a directory above it."""
    verdict = True
    for line in IGNORED:
        if not line.strip() or line.startswith("#"):
            continue
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{pattern}(/.*)?", path):
            verdict = line.startswith("!")
    return verdict


def copied():
    """Return source, destination and owner of each COPY."""
    pattern = r"^COPY (?:--chown=(\S+) )?(\S+) (\S+)$"
    return [(m[2], m[3], m[1]) for m in re.finditer(pattern, DOCKERFILE, re.MULTILINE)]


def files(source):
    found = [ROOT / source] if (ROOT / source).is_file() else (ROOT / source).rglob("*")
    names = (file.relative_to(ROOT).as_posix() for file in found if file.is_file())
    return [name for name in names if let_in(name)]


@pytest.fixture
def image(tmp_path):
    """Lay out the files of the image, and only those."""
    for source, _, _ in copied():
        for name in files(source):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(command, cwd, environ, timeout=60):
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout
    )


def test_the_compose_file_follows_the_compose_specification():
    schema = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = run([sys.executable, "-m", *schema, "docker-compose.yml"], ROOT, os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dollar_is_the_shell_s_and_none_compose_s():
    assert "$" not in COMPOSE.replace("$$", "")


@pytest.mark.parametrize("service", OURS)
def test_the_settings_of_a_container_are_known_and_right(service):
    environ = environ_of(service)
    assert set(environ) <= {variable.name for variable in environment.declared(settings.Settings)}
    config = settings.load(environ)
    assert config.serving.api_keys == (), "a key in the file is a key in the repository"
    assert service == "init" or config.rate > 0


def test_the_addresses_are_those_of_the_servers():
    listeners = dict(
        listener.split("://")
        for listener in environ_of("kafka")["KAFKA_ADVERTISED_LISTENERS"].split(",")
    )
    bound = environ_of("kafka")["KAFKA_LISTENERS"]
    assert all(f"{name}://:{at.split(':')[1]}" in bound for name, at in listeners.items())
    assert f"127.0.0.1:9092:{listeners['EXTERNAL'].split(':')[1]}" in SERVICES["kafka"]["ports"]
    assert environ_of("kafka-ui")["KAFKA_BROKERCONNECT"] == listeners["INTERNAL"]
    server = environ_of("postgres")
    for service in OURS:
        environ = environ_of(service)
        assert environ["KAFKA_BROKER"] == listeners["INTERNAL"]
        postgres = urllib.parse.urlsplit(environ["DATABASE_URL"])
        assert (postgres.username, postgres.password, postgres.path[1:]) == (
            server["POSTGRES_USER"],
            server["POSTGRES_PASSWORD"],
            server["POSTGRES_DB"],
        )
        hosts = {postgres.hostname, urllib.parse.urlsplit(environ["REDIS_URL"]).hostname}
        assert hosts == {"postgres", "redis"} <= set(SERVICES)


def test_whoever_is_waited_for_tells_when_it_is_ready():
    waits = [
        wait for service in SERVICES.values() for wait in service.get("depends_on", {}).items()
    ]
    assert len(waits) == 5
    for name, wait in waits:
        tells = SERVICES[name].get("healthcheck", {}).get("test")
        ends = name == "init" and "restart" not in SERVICES[name]
        assert wait == {
            "condition": "service_completed_successfully" if ends else "service_healthy"
        }
        assert ends or tells


def test_ports_are_published_to_this_machine_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert sorted(ports) == sorted(f"127.0.0.1:{p}:{p}" for p in (8000, 9000, 9092, 6379, 5432))


def test_data_outlives_the_containers():
    mounted = {s: SERVICES[s].get("volumes", []) for s in ("app", "kafka", "redis", "postgres")}
    assert mounted == {
        "app": ["home:/home/cerberus"],
        "kafka": [f"kafka:{environ_of('kafka')['KAFKA_LOG_DIRS']}"],
        "redis": ["redis:/data"],
        "postgres": ["postgres:/var/lib/postgresql"],
    }
    assert {"--appendonly yes", "--maxmemory-policy noeviction"} <= {
        f"{option} {value}"
        for option, value in zip(*2 * [iter(SERVICES["redis"]["command"][1:])], strict=True)
    }


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_deployment_exists(command):
    program, *arguments = shlex.split(command.replace("$PORT", "8000"))
    done = run([BIN / program, *arguments, "--help"], ROOT, {"PATH": PATH})
    assert done.returncode == 0, done.stderr


def test_every_kind_of_deployment_is_looked_at():
    assert {word for command in commands() for word in command.split()} >= {
        "migrate",
        "apply",
        "materialize",
        "cerberus.app:app",
        "$PORT",
    }


def test_a_drain_ends_before_the_platform_kills():
    ends_s = inspect.signature(shutdown.Exit).parameters["deadline_s"].default
    served = [command for command in commands() if command.startswith("uvicorn")]
    for command in served:
        [connections_s] = re.findall(r"--timeout-graceful-shutdown (\d+)", command)
        assert int(connections_s) < ends_s < PLATFORM_KILLS_AFTER_S
        [idle_s] = re.findall(r"--timeout-keep-alive (\d+)", command)
        assert int(idle_s) > LOAD_BALANCERS_IDLE_S
    assert SERVICES["app"]["stop_grace_period"] == f"{PLATFORM_KILLS_AFTER_S}s"


def test_the_key_is_made_once_kept_private_and_shown_in_a_curl(tmp_path):
    started = tmp_path / "bin" / "uvicorn"
    started.parent.mkdir()
    started.write_text('#!/bin/sh\necho "$CERBERUS_API_KEY"\n')
    started.chmod(0o755)
    environ = {"PATH": f"{started.parent}{os.pathsep}{PATH}", "HOME": str(tmp_path)}
    said = [run(script("app"), tmp_path, environ).stdout for _ in range(2)]
    assert said[0] == said[1]
    *_, curl, _, key = said[0].splitlines()
    words = shlex.split(curl)
    assert len(key) >= 32
    assert words[:3] == ["curl", "-s", "localhost:8000/predict"]
    assert f"x-api-key: {key}" in words
    assert json.loads(words[-1]) == {"user_id": 1005}
    assert (tmp_path / "api-key").stat().st_mode & 0o077 == 0


def test_whatever_is_copied_is_there_and_let_in():
    assert {source for source, _, _ in copied()} == {
        "requirements.txt",
        "models",
        "feature_repo",
        "cerberus",
    }
    for source, destination, owner in copied():
        assert files(source), source
        assert destination in (source, ".")
        # The feature repository is rendered into at run time.
        assert owner == ("cerberus" if source == "feature_repo" else None)


@pytest.mark.parametrize(
    "secret",
    [
        ".env",
        ".git/config",
        ".cerberus/postgres/data",
        "feature_repo/feature_store.yaml",
        "cerberus/stack/__pycache__/kafka.pyc",
        "tests/test_deployment.py",
    ],
)
def test_what_is_ours_alone_stays_out_of_the_image(secret):
    assert not let_in(secret)


def test_the_image_serves_without_root(image):
    program = (
        "from cerberus import app, settings; from cerberus.decisions import models;"
        "from cerberus.jobs import feast;"
        "models.Model.load(settings.MODEL_PATH, ('10m',));"
        "print(app.__file__, feast.REPO, settings.MODEL_PATH)"
    )
    done = run([sys.executable, "-c", program], image, {"PATH": PATH})
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(image)) for path in done.stdout.split())
    assert instruction("USER") == ["cerberus"]


def test_the_health_check_asks_the_port_and_a_route_of_the_service():
    check, served = map(json.loads, instruction("CMD"))
    compile(check[2], "HEALTHCHECK", "exec")
    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", check[2])
    assert served[served.index("--port") + 1] == port
    assert path in {r.path for r in routes.build().routes if isinstance(r, Route)}


def test_each_pin_of_the_image_has_a_hash():
    assert all("--require-hashes" in line for line in instruction("RUN") if "pip" in line)
    lock = (ROOT / "requirements.txt").read_text().replace("\\\n", "")
    pins = [line for line in lock.splitlines() if line.strip() and not line.startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        assert re.match(r"[\w.-]+==\S+ (; .+? )? *--hash=sha256:[0-9a-f]{64}", pin), pin


def test_init_prepares_bare_servers_with_what_the_image_holds(image, environ):
    done = run(script("init"), image, {**environ, "PATH": PATH}, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"tables: 001.*\ntopics: .*transactions", done.stdout)
    assert "credit scores: 0 new, all loaded again" in done.stdout
