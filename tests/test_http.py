"""The HTTP contract, through the real routes on a real Redis."""

import asyncio
import datetime
import json
import uuid

import jsonschema
import orjson
import pytest
from asking import LOCAL, client, is_problem, validate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import NOW_MS, Served, redis_only, transaction
from starlette.routing import Route

from cerberus import errors, transactions
from cerberus.api import bodies, codes, openapi, routes
from cerberus.telemetry import metrics

pytestmark = pytest.mark.anyio
OF_API = ("/predict", "/decisions?user_id=1", "/decisions/1", "/users/1", "/openapi.json", "/docs")
ALL = (*OF_API, "/health", "/metrics", "/nowhere")


@pytest.fixture
def environ(servers):
    return redis_only(servers)


@pytest.fixture
async def served(environ):
    seen = transaction("a", user_id=1005, amount_minor=12_750, at_ms=NOW_MS - 5_000)
    async with Served(environ) as served:
        await served.stream(seen)
        yield served


async def test_a_user_is_answered_with_the_keys_of_the_contract(http, served):
    await served.credit(1005, 720)
    response = await http.post("/predict", json={"user_id": 1005})
    body = response.json()
    assert response.status_code == 200
    assert body["features"] == {
        "txn_count_10m": 1,
        "total_amount_10m": 127.5,
        "credit_score": 720,
    }
    assert (body["user_id"], body["degraded"], body["approximate"]) == (1005, [], False)
    assert body["prediction"] == ("FRAUD" if body["probability"] >= 0.5 else "LEGIT")
    assert body["as_of"] == transactions.format_ms(NOW_MS)
    assert body["fence"] == {"epoch": 1, "offset": 1, "partition": 0}
    assert (body["decision"], body["replayed"]) == ("approve", False)
    assert (body["model_version"], body["policy_version"]) == (
        served.model.sha256,
        served.model.policy.sha256,
    )
    assert uuid.UUID(body["decision_id"]).version == 4  # without a transaction, one of its own
    waiting = (await http.get("/health")).json()["decisions"]
    assert [waiting[store]["waiting"] for store in ("postgres", "kafka")] == [1, 1]
    stats = body["latency_stats"]
    assert 0 < stats["feature_retrieval_ms"] <= stats["total_latency_ms"]
    validate((await http.get("/openapi.json")).json(), "Prediction", body)


async def test_an_unknown_user_has_true_zeros_and_a_score(http):
    body = (await http.post("/predict", json={"user_id": 9})).json()
    assert body["features"] == {"txn_count_10m": 0, "total_amount_10m": 0.0, "credit_score": None}
    assert (body["fence"], body["degraded"]) == (None, [])
    assert 0 <= body["probability"] <= 1
    validate((await http.get("/openapi.json")).json(), "Prediction", body)


async def test_a_transaction_in_hand_is_answered_for_by_its_id(http):
    hand = {"user_id": 1005, "transaction_id": "b", "amount": 9_000.01}
    body = (await http.post("/predict", json=hand)).json()
    assert body["transaction_id"] == "b"
    assert body["features"]["txn_count_10m"] == 2
    assert body["features"]["total_amount_10m"] == 9_127.51
    assert body["decision_id"] == str(transactions.decision_id(1005, "b", NOW_MS))
    validate((await http.get("/openapi.json")).json(), "Prediction", body)


async def test_a_transaction_that_is_asked_about_again_has_its_first_answer(http, served):
    hand = {"user_id": 1005, "transaction_id": "b", "amount": 9, "merchant_id": "m"}
    hand["timestamp"] = transactions.format_ms(NOW_MS - 1)
    first = (await http.post("/predict", json=hand)).json()
    await served.stream(transaction("c", user_id=1005))
    await served.credit(1005, 500)
    again = (await http.post("/predict", json=hand)).json()
    assert (first.pop("replayed"), again.pop("replayed")) == (False, True)
    assert first.pop("latency_stats").keys() == again.pop("latency_stats").keys()
    assert again == first
    other = hand | {"timestamp": transactions.format_ms(NOW_MS)}
    assert (await http.post("/predict", json=other)).json()["decision_id"] != first["decision_id"]


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"{TRACE}-00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ([f"00-{PARENT}-01"], True),
        ([f"00-{PARENT}-ff"], True),
        ([f"cc-{PARENT}-01"], True),
        ([f"cc-{PARENT}-01-what-comes-later"], True),
        ([f"cc-{PARENT}-01what-comes-later"], False),
        ([f"00-{PARENT}-01-what-comes-later"], False),
        ([f"00-{PARENT}-01-"], False),
        ([f"ff-{PARENT}-01"], False),
        ([f"ff-{PARENT}-01-what-comes-later"], False),
        ([f"00-{'0' * 32}-00f067aa0ba902b7-01"], False),
        ([f"00-{TRACE}-{'0' * 16}-01"], False),
        ([f"00-{PARENT.upper()}-01"], False),
        ([f"0-{PARENT}-01"], False),
        ([f"00-{PARENT}-1"], False),
        ([f"00-{PARENT}0-01"], False),
        ([f"00-0{PARENT}-01"], False),
        ([f"00-{PARENT}"], False),
        ([f"00-{PARENT}-01", f"00-{PARENT}-01"], False),
        ([], False),
    ],
)
async def test_the_trace_is_the_caller_s_if_the_w3c_says_that_it_is_one(
    http, served, headers, kept
):
    hand = {"user_id": 1005, "transaction_id": "b", "amount": 9}
    sent = [("traceparent", header) for header in headers]
    assert (await http.post("/predict", json=hand, headers=sent)).status_code == 200
    traced = (await served.ask(**hand)).record.trace_id
    assert (traced == TRACE) == kept
    assert len(traced) == 32
    assert set(traced) - {"0"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount": 9.01}, "amount"),
        ({"merchant_id": "n"}, "merchant_id"),
        ({"amount": 8, "merchant_id": "n"}, "amount"),
    ],
)
async def test_a_transaction_with_other_content_than_the_decided_one_is_a_conflict(
    http, change, field
):
    hand = {"user_id": 1005, "transaction_id": "b", "amount": 9, "merchant_id": "m"}
    hand["timestamp"] = transactions.format_ms(NOW_MS)
    first = await http.post("/predict", json=hand)
    is_problem(await http.post("/predict", json=hand | change), "conflict", field)
    again = await http.post("/predict", json=hand | {"merchant_id": None})
    assert again.json()["decision_id"] == first.json()["decision_id"]
    counted = (await http.get("/metrics")).text.splitlines()
    shares = [line for line in counted if line.startswith("cerberus_predictions_total{")]
    assert sum(float(line.split()[-1]) for line in shares) == 2  # a conflict is no decision


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "nonsense", None])
async def test_any_content_type_is_taken(http, kind):
    headers = {"content-type": kind} if kind else {}
    response = await http.post("/predict", content=b'{"user_id": 1005}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b'{"user_id": NaN}', b"\xff", b"[" * 5_000]
)
async def test_what_is_not_a_json_object_is_refused(http, body):
    is_problem(await http.post("/predict", content=body), "not_json")


async def test_an_invalid_field_is_named(http):
    told = is_problem(await http.post("/predict", json={"user_id": "x"}), "invalid", "user_id")
    assert told["detail"] == "must be an integer"
    hand = {"user_id": 1, "amount": 5}
    is_problem(await http.post("/predict", json=hand), "invalid", "transaction_id")
    ahead = {"user_id": 1, "timestamp": transactions.format_ms(NOW_MS + 60_001)}
    is_problem(await http.post("/predict", json=ahead), "invalid", "timestamp")


async def test_a_body_above_the_bound_is_refused_and_one_at_it_is_not(http):
    room = bodies.MAX_BYTES - len(b'{"user_id":1,"x":""}')
    fits = orjson.dumps({"user_id": 1, "x": "y" * room})
    assert len(fits) == bodies.MAX_BYTES
    assert (await http.post("/predict", content=fits)).status_code == 200
    is_problem(await http.post("/predict", content=fits + b" "), "too_large")

    async def chunks():
        while True:
            yield b" " * 1_000

    is_problem(await http.post("/predict", content=chunks()), "too_large")


async def test_a_body_that_never_ends_is_given_up_on(environ):
    served = Served(environ, body_s=0.1)
    await served.live()

    async def stalls():
        yield b"{"
        await asyncio.sleep(30)

    async with client(served.app()) as http:
        is_problem(await http.post("/predict", content=stalls()), "body_timeout")
    await served.close()


async def test_other_methods_and_paths_are_problems_too(http):
    refused = await http.get("/predict")
    is_problem(refused, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    is_problem(await http.post("/health"), "method_not_allowed")
    for path in ("/nowhere", "/predict/", "/", "/docs/../x"):
        is_problem(await http.post(path), "not_found")


async def test_overload_says_when_to_come_back(environ):
    served = Served(environ, max_in_flight=1, read_timeout_ms=5_000)
    await served.live()
    async with client(served.app()) as http:
        await http.post("/predict", json={"user_id": 1})
        await served.client.execute_command("CLIENT", "PAUSE", "300")
        first, second = await asyncio.gather(
            *(http.post("/predict", json={"user_id": i}) for i in (1, 2))
        )
    assert first.status_code == 200
    is_problem(second, "overloaded")
    assert second.headers["retry-after"] == "1"
    await served.close()


async def test_a_request_beyond_the_bound_is_refused_before_its_body_is_read(environ):
    served = Served(environ, max_in_flight=1, read_timeout_ms=5_000)
    await served.live()

    async def unread():
        raise AssertionError("the body is read")
        yield b""

    app = served.app()
    served.predictor = app.state.parts.service.predictor
    async with client(app) as http:
        await http.post("/predict", json={"user_id": 1})
        await served.client.execute_command("CLIENT", "PAUSE", "500")
        first = asyncio.create_task(http.post("/predict", json={"user_id": 1}))
        await served.reading()
        is_problem(await http.post("/predict", content=unread()), "overloaded")
        assert (await first).status_code == 200
    declared = {"content-length": "1048577"}
    async with client(served.app()) as http:
        refused = await http.post("/labels", content=unread(), headers=declared)
        is_problem(refused, "too_large")
    await served.close()


async def test_unreachable_features_are_no_score_and_tell_nothing_of_the_server(environ):
    served = Served(environ | {"REDIS_URL": "redis://:secret@127.0.0.1:1/0"}, read_timeout_ms=50)
    async with client(served.app()) as http:
        refused = await http.post("/predict", json={"user_id": 1})
        told = is_problem(refused, "features_unavailable")
        assert refused.headers["retry-after"] == "1"
        assert told["detail"] == errors.FeaturesUnavailable.__doc__
        health = await http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "secret" not in health.text
    await served.close()


async def test_a_fault_of_ours_tells_nothing_of_its_cause(served):
    app = served.app()

    async def breaks(request):
        raise RuntimeError("the secret cause")

    app.router.routes.append(Route("/breaks", breaks))
    async with client(app) as http:
        response = await http.get("/breaks")
    is_problem(response, "internal")
    assert "secret" not in response.text


async def test_before_the_parts_are_there_only_health_answers(served):
    async with client(routes.build(), peer="10.0.0.9") as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert (await http.get("/health/live")).status_code == 200
        for path in ("/predict", "/metrics", "/openapi.json", "/docs"):
            is_problem(await http.get(path), "starting")


async def test_without_api_only_health_and_metrics_are_served(environ):
    served = Served(environ, tasks=frozenset({"consumer"}))
    async with client(served.app()) as http:
        for path in OF_API:
            is_problem(await http.get(path), "api_disabled")
        for path in ("/health", "/health/live", "/metrics"):
            assert (await http.get(path)).status_code == 200
    await served.close()


# Who may call.


async def test_with_a_key_every_route_but_live_wants_it(environ):
    served = Served(environ, api_keys=("first-key", "schlüssel"))
    app = served.app()
    async with client(app) as http:
        for path in ALL:
            for headers in (
                {},
                {"X-API-Key": "first-kez"},
                {"X-API-Key": ""},
                {"Authorization": "Basic first-key"},
                {"Authorization": "Bearer"},
                {"X-API-Key": "first -key"},
                {"X-API-Key": "\x0bfirst-key"},
                {"Authorization": "Bearer first-key\x0c"},
            ):
                refused = await http.get(path, headers=headers)
                is_problem(refused, "unauthorized")
                assert refused.headers["www-authenticate"] == "Bearer"
        refused = await http.get("/metrics?api_key=first-key&key=first-key")
        assert "in the URL is ignored" in is_problem(refused, "unauthorized")["detail"]
        assert (await http.get("/health/live")).status_code == 200
    for accepted in (
        {"X-API-Key": "first-key"},
        {"Authorization": "bearer first-key"},
        [(b"X-API-Key", "schlüssel".encode())],
        [(b"X-API-Key", b"old"), (b"X-API-Key", b"first-key")],
        {"X-API-Key": "\t first-key "},
    ):
        far = client(app, peer="203.0.113.9", base_url="https://fraud.example", headers=accepted)
        async with far as http:
            assert (await http.get("/openapi.json")).status_code == 200
    await served.close()


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
async def test_without_a_key_a_direct_local_caller_is_served(served, peer, host):
    async with client(served.app(), peer=peer, headers={"Host": host}) as http:
        assert (await http.get("/openapi.json")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin", "Origin": LOCAL}],
)
async def test_without_a_key_a_browser_reads_the_page_and_tries_a_request(served, headers):
    async with client(served.app(), headers=headers) as http:
        assert (await http.get("/docs")).status_code == 200
        assert (await http.post("/predict", json={"user_id": 1})).status_code == 200


async def test_whoever_has_not_chosen_to_be_open_serves_nobody_without_a_key(environ):
    served = Served(environ | {"CERBERUS_OPEN": ""})
    async with client(served.app()) as http:
        for path in ALL:
            is_problem(await http.get(path), "forbidden")
        assert (await http.get("/health/live")).status_code == 200
    await served.close()


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("10.0.0.9", {}),
        ("::ffff:10.0.0.9", {}),
        ("unknown", {}),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}),
        ("127.0.0.1", {"X-Forwarded-Proto": "https"}),
        ("127.0.0.1", {"Forwarded": "for=127.0.0.1"}),
        ("127.0.0.1", {"Via": "1.1 proxy"}),
        ("127.0.0.1", {"X-Real-IP": "127.0.0.1"}),
        ("127.0.0.1", {"CF-Connecting-IP": "127.0.0.1"}),
        ("127.0.0.1", {"Host": "rebound.example:8000"}),
        ("127.0.0.1", {"Host": "127.0.0.1.rebound.example"}),
        ("127.0.0.1", {"Host": "localhost@rebound.example"}),
        ("127.0.0.1", {"Host": ""}),
        ("127.0.0.1", {"Host": "[::1"}),
        ("127.0.0.1", {"Origin": "https://elsewhere.example"}),
        ("127.0.0.1", {"Host": "local\thost:8000"}),
        ("127.0.0.1", {"Host": "local host"}),
        ("127.0.0.1", {"Host": "localhost?"}),
        ("127.0.0.1", {"Host": "rebound.example@localhost"}),
        ("127.0.0.1", {"Host": "[::ffff:10.0.0.9]"}),
        ("127.0.0.1", {"Origin": "null"}),
        ("127.0.0.1", {"Origin": "http://127.0.0.1:3000"}),
        ("127.0.0.1", {"Origin": "http://localhost:8000"}),
        ("127.0.0.1", {"Origin": "https://127.0.0.1:8000"}),
        ("127.0.0.1", {"Origin": "http://127.0.0.1:8000@elsewhere.example"}),
        ("127.0.0.1", {"Sec-Fetch-Site": "cross-site"}),
        ("127.0.0.1", {"Sec-Fetch-Site": "same-site"}),
        ("127.0.0.1", {"Sec-Fetch-Site": ""}),
    ],
)
async def test_without_a_key_nobody_else_is(served, peer, headers):
    async with client(served.app(), peer=peer, headers=headers) as http:
        for path in ALL:
            told = is_problem(await http.get(path), "forbidden")
            assert "CERBERUS_API_KEY" in told["detail"]
        assert (await http.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("changes", "admitted"),
    [
        ({}, True),
        ({"http_version": "1.0"}, False),
        ({"client": None}, False),
        ({"headers": []}, False),
        ({"headers": [(b"host", b"localhost"), (b"host", b"rebound.example")]}, False),
        ({"headers": [(b"host", b"LocalHost:1"), (b"origin", b"http://localhost:1")]}, True),
        ({"headers": [(b"host", b"localhost"), (b"origin", b"http://localhost:8000")]}, False),
        (
            {
                "headers": [
                    (b"host", b"localhost"),
                    (b"origin", b"http://localhost"),
                    (b"origin", b"http://elsewhere.example"),
                ]
            },
            False,
        ),
    ],
)
async def test_what_no_client_library_sends_is_judged_too(served, changes, admitted):
    scope = {
        "type": "http",
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
        "method": "GET",
        "path": "/openapi.json",
        "query_string": b"",
        "headers": [(b"host", b"localhost:8000")],
    } | changes
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    await served.app()(scope, receive, send)
    assert sent[0]["status"] == (200 if admitted else 403)


# What is counted, and what is told about it all.


async def test_metrics_count_what_was_answered(http, served):
    await http.post("/predict", json={"user_id": 1005})
    await http.post("/predict", json={})
    await http.get("/%6eowhere")
    await served.live(caught_up_ms=NOW_MS - 5_001)
    await http.post("/predict", json={"user_id": 1005})
    lines = (await http.get("/metrics")).text.splitlines()
    for line in (
        'cerberus_requests_total{route="/predict",status="200"} 2.0',
        'cerberus_requests_total{route="/predict",status="422"} 1.0',
        'cerberus_requests_total{route="other",status="404"} 1.0',
        "cerberus_requests_in_flight 0.0",
        'cerberus_stage_seconds_count{stage="features"} 2.0',
        'cerberus_stage_seconds_count{stage="wait"} 2.0',
    ):
        assert line in lines
    shares = [line for line in lines if line.startswith("cerberus_predictions_total{")]
    assert sorted(line.split("degraded=")[1].split(",")[0] for line in shares) == ['""', '"stale"']


async def test_every_metric_is_documented_where_it_is_made(http):
    text = (await http.get("/metrics")).text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE cerberus_")}
    names -= {name for name in names if name.endswith("_created")}
    documented = {
        line[3:].split("`")[0].split("{")[0]
        for line in metrics.__doc__.splitlines()
        if line.startswith("- `")
    }
    assert names == documented


async def test_the_document_is_openapi_and_describes_every_route_and_code(http, served):
    document = (await http.get("/openapi.json")).json()
    served_paths = {r.path: r.methods - {"HEAD"} for r in served.app().routes}
    told = {p: {m.upper() for m in methods} for p, methods in document["paths"].items()}
    assert told == served_paths
    text = orjson.dumps(document).decode()
    for code in codes.PROBLEMS:
        assert f"`{code}`" in text
    jsonschema.Draft202012Validator.check_schema({"components": document["components"]})
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for example in document["paths"]["/predict"]["post"]["requestBody"]["content"][
        "application/json"
    ]["examples"].values():
        validate(document, "Request", example["value"])


async def test_the_document_says_whether_a_key_is_needed(environ):
    for keys, wanted in (((), []), (("key",), [{"ApiKey": []}, {"Bearer": []}])):
        async with Served(environ, api_keys=keys) as served, client(served.app()) as http:
            document = await http.get("/openapi.json", headers={"X-API-Key": "key"})
            assert document.json()["security"] == wanted


async def test_the_page_needs_no_other_host_and_has_an_anchor_for_every_problem(http):
    response = await http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in response.text
    assert "https://" not in response.text
    for code in codes.PROBLEMS:
        assert f'id="{code}"' in response.text


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
stamps = st.datetimes(timezones=st.just(datetime.UTC)).map(datetime.datetime.isoformat)
requests = st.fixed_dictionaries(
    {"user_id": st.integers(0, 2**63 - 1) | anything},
    optional={
        "transaction_id": st.text(max_size=130) | anything,
        "amount": st.floats(0, 1e11) | st.integers() | st.integers(0, 10**9).map(lambda n: n / 100),
        "timestamp": stamps | st.text() | st.just(transactions.format_ms(NOW_MS)),
        "currency": st.just("USD") | anything,
        "merchant_id": st.text(max_size=130) | anything,
        "later": anything,
    },
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(document=requests | anything)
async def test_any_json_gets_an_answer_or_a_problem_of_the_caller(environ, database, document):
    served = Served(environ | {"DATABASE_URL": database})
    told = openapi.document(("10m",), "USD")
    try:
        await served.live()
        await served.migrated()  # an old transaction is looked up
        async with client(served.app()) as http:
            body = json.dumps(document)  # with NaN, lone surrogates and integers of any size
            response = await http.post("/predict", content=body)
        if response.status_code == 200:
            validate(told, "Prediction", response.json())
            known = {k: v for k, v in orjson.loads(body).items() if v is not None}
            validate(told, "Request", known)
        else:
            assert response.status_code in (400, 409, 422)  # 409: drawn again with another amount
            code = response.json()["code"]
            is_problem(response, code, response.json().get("field"))
    finally:
        await served.close()


# Outside text reaches terminals and logs only escaped.


def carries_no_codes(text):
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("path", ["*", "", "?", "//", "///docs", "nowhere", "/\x1b[31m\x9b\u202e"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
async def test_any_path_and_host_is_answered_counted_and_told_without_codes(served, path, method):
    scope = {
        "type": "http",
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    app = served.app()
    await app(scope | {"headers": [(b"host", b"elsewhere.example")]}, receive, send)
    await app(scope | {"headers": [(b"host", b"localhost:1")]}, receive, send)
    app.state.parts.guard.check = lambda scope: None  # as with the right key
    await app(scope | {"headers": [(b"host", b"[\x1b")]}, receive, send)
    answers = [message for message in sent if message["type"] == "http.response.start"]
    assert [answer["status"] for answer in answers] == [403, 404, 404]
    for body in (message["body"] for message in sent if "body" in message):
        assert carries_no_codes(body.decode())
        assert method in body.decode() or b"CERBERUS_API_KEY" in body
    counted = app.state.parts.service.meter.render().decode()
    assert 'cerberus_requests_total{route="other",status="404"} 2.0' in counted


async def test_no_answer_can_be_read_by_a_page_of_another_origin(served):
    app = served.app()

    async def breaks(request):
        raise RuntimeError

    app.router.routes.append(Route("/breaks", breaks))
    async with client(app) as http:
        answers = [await http.get(path) for path in (*ALL, "/health/live", "/breaks")]
        answers.append(await http.post("/predict", json={"user_id": 1005}))
        answers.append(await http.get("/docs", headers={"Origin": "https://elsewhere.example"}))
    assert {answer.status_code for answer in answers} >= {200, 403, 404, 500}
    for answer in answers:
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert answer.headers.get_list("cross-origin-resource-policy") == ["same-origin"]


async def test_what_a_stranger_named_is_answered_without_codes_and_with_the_same_meaning(http):
    name = "t\x7f\x9b31m\u2028\u202e\U000e0041é"
    hand = {"user_id": 1005, "transaction_id": name, "amount": 9}
    answer = await http.post("/predict", json=hand)
    assert carries_no_codes(answer.text)
    assert answer.json()["transaction_id"] == name
    refused = await http.get("/decisions", params={name: "x"})
    assert carries_no_codes(refused.text)
    is_problem(refused, "invalid", name)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(body=st.binary(max_size=200))
async def test_any_bytes_get_an_answer_or_a_problem_of_the_caller(environ, body):
    served = Served(environ)
    try:
        async with client(served.app()) as http:
            assert (await http.post("/predict", content=body)).status_code in (200, 400, 422)
    finally:
        await served.close()
