"""The OpenAPI document: a generated client uses it, and generated requests test it."""

import datetime
import importlib
import os
import pathlib
import subprocess
import sys
import time
import uuid

import pytest
from service import service

from cerberus.api import openapi

pytestmark = pytest.mark.timeout(300)
KEY = "a-key-of-the-tests"
QUIET = {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": "2", "CERBERUS_API_KEY": KEY}
TESTS = pathlib.Path(__file__).parent
SCRIPTS = pathlib.Path(sys.executable).parent


@pytest.fixture
def running(environ):
    with service(environ | QUIET) as running:
        running.http.headers["X-API-Key"] = KEY
        running.wait_until_ready()
        yield running


def run(program, *arguments, cwd):
    """Run a program of the environment, which finds the others there, and return what it wrote."""
    environ = {k: v for k, v in os.environ.items() if k != "CI"}
    environ["SCHEMATHESIS_HOOKS"] = str(TESTS / "schemathesis_hooks.py")
    done = subprocess.run(
        [SCRIPTS / program, *arguments],
        cwd=cwd,
        env=environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_answer_to_generated_requests_keeps_the_document(running, tmp_path):
    run(
        "schemathesis",
        "--config-file",
        TESTS / "schemathesis.toml",
        "run",
        f"http://127.0.0.1:{running.port}/openapi.json",
        "--header",
        f"X-API-Key: {KEY}",
        "--seed",
        "1",
        "--report-dir",
        tmp_path,
        "--no-color",
        cwd=tmp_path,
    )


@pytest.fixture
def generated(running, tmp_path, monkeypatch):
    """Generate a client from the document and return its operations, its models, and the client."""
    document = tmp_path / "openapi.json"
    document.write_bytes(running.http.get("/openapi.json").content)
    made = ("generate", "--path", document, "--output-path", tmp_path / "made", "--meta", "none")
    run("openapi-python-client", *made, "--fail-on-warning", cwd=tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("made")
    address = f"http://127.0.0.1:{running.port}"
    keyed = package.AuthenticatedClient(
        base_url=address, token=KEY, raise_on_unexpected_status=True
    )
    asked = set()

    def ask(name, *arguments, **more):
        [path] = (tmp_path / "made" / "api").glob(f"*/{name}.py")
        module = importlib.import_module(f"made.api.{path.parent.name}.{name}")
        asked.add(name)
        return module.sync(*arguments, **({"client": keyed} | more))

    with keyed, package.Client(base_url=address) as keyless:
        yield ask, importlib.import_module("made.models"), keyless
    files = {path.stem for path in (tmp_path / "made" / "api").glob("*/*.py")} - {"__init__"}
    assert asked == files  # otherwise an operation was not tried
    for name in [name for name in sys.modules if name.split(".")[0] == "made"]:
        del sys.modules[name]


def stored(ask, *arguments, **more):
    """Ask until a decision is stored, which happens after the answer."""
    end_s = time.monotonic() + 20
    while not (page := ask(*arguments, limit=5, **more)).decisions:
        assert time.monotonic() < end_s
        time.sleep(0.1)
    return page


def test_a_generated_client_can_ask_everything(generated):
    ask, models, keyless = generated
    alone = ask("predict", body=models.Request(user_id=1005))
    assert isinstance(alone, models.Prediction)
    assert (alone.user_id, alone.features.txn_count_10m) == (1005, 0)
    moment = datetime.datetime.now(datetime.UTC)
    hand = models.Request(1005, "order-1", 42.5, moment, models.Currency.USD, merchant_id=7)
    paid = ask("predict", body=hand)
    assert paid.decision in models.Action
    assert paid.prediction in models.Verdict
    assert paid.transaction_id == "order-1"
    refused = ask("predict", body=models.Request(1005, "order-1", amount=42.505))
    assert isinstance(refused, models.Problem)
    assert (refused.code, refused.field) == (models.ProblemCode.INVALID, "amount")
    other = models.Request(1005, "order-1", 43, moment)
    assert ask("predict", body=other).code == models.ProblemCode.CONFLICT
    none = ask("predict", body=models.Request(1005, None, None, None, None, None))
    assert isinstance(none, models.Prediction)

    [made] = stored(ask, "list_decisions_of_transaction", transaction_id="order-1").decisions
    assert (made.decision_id, made.merchant_id, made.amount) == (paid.decision_id, "7", 42.5)
    assert (made.probability, made.fence) == (paid.probability, paid.fence)
    page = stored(ask, "list_decisions_of_user", 1005)
    assert made in page.decisions
    assert ask("list_decisions_of_user", 1005, limit=1, before=page.next_ or made.as_of.isoformat())
    assert ask("get_decision", made.decision_id) == made
    assert ask("get_decision", uuid.uuid4()).code == models.ProblemCode.UNKNOWN_DECISION
    user = ask("get_user", 1005)
    assert (user.user_id, made in user.decisions) == (1005, True)

    label = models.Label("order-1", models.Truth.FRAUD, 9, moment, user_id=1005)
    assert ask("send_labels", body=label).results == [models.LabelTaken(models.Taken.STORED)]
    wrong = models.Label("", models.Truth.FRAUD, "me", moment)
    told = ask("send_labels", body=models.LabelList([label, wrong])).results
    assert told[0] == models.LabelTaken(models.Taken.KNOWN)
    assert (told[1].result, told[1].field) == (models.Refused.INVALID, "transaction_id")
    assert isinstance(ask("get_accuracy", since="2026-01-31", model="a1"), models.Accuracy)
    assert ask("get_accuracy", since="yesterday").field == "since"

    assert ask("get_health").status == models.Status.READY
    assert ask("get_liveness").status == models.AliveStatus.ALIVE
    assert "cerberus_predictions_total" in ask("get_metrics")
    assert ask("get_open_api")["openapi"].startswith("3.1")
    assert "<!doctype html>" in ask("get_docs")
    for file in models.PageFile:
        assert len(ask("get_docs_file", file)) > 100_000
    assert ask("get_health", client=keyless).code == models.ProblemCode.UNAUTHORIZED


def nodes(found):
    yield found
    for inner in found.values() if isinstance(found, dict) else found:
        if isinstance(inner, dict | list):
            yield from nodes(inner)


def test_the_document_keeps_to_what_generators_of_clients_take():
    document = openapi.document(("10m", "90d"), "USD")
    found = [node for node in nodes(document) if isinstance(node, dict)]
    named = document["components"]["schemas"]
    operations = [each for path in document["paths"].values() for each in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) == len(operations)
    for node in found:
        assert not {"const", "prefixItems", "patternProperties"} & node.keys()
        kind = node.get("type")
        if isinstance(kind, list):
            kind, null = kind
            assert null == "null"
        if kind in ("integer", "number"):
            assert node["format"] in ("int32", "int64", "double")
        if "properties" in node and "type" in node:
            assert any(node is schema for schema in named.values())
        if isinstance(node.get("enum"), list):
            assert kind == "string"
        if node.keys() >= {"$ref"}:
            assert node.keys() == {"$ref"}
            assert node["$ref"].rpartition("/")[2] in named
    for operation in operations:
        for answer in operation["responses"].values():
            for content in answer["content"].values():
                assert content["schema"].keys() <= {"$ref", "type"}
