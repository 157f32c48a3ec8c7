"""JSON from outside: a repeated name is refused at every door, and nothing else is."""

import json
import pathlib

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from served import NOW_MS
from test_transactions import GOOD as PAYMENT

from cerberus import documents, errors, labels, settings, transactions
from cerberus.decisions import models, policy
from cerberus.files import layouts
from cerberus.online import layout

LABEL = {
    "transaction_id": "order-1",
    "label": "fraud",
    "source": "bank",
    "labelled_at": transactions.format_ms(NOW_MS),
    "user_id": 1005,
}
NAMES = st.sampled_from(["a", "b", '"', "\\", ":", 'a":', "é", "😀", ""])


class Pairs(list):
    """An object with its names in order, repeated or not."""


documents_of = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e9, 1e9) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(NAMES, inner)).map(Pairs),
    max_leaves=12,
)


def text(value, written):
    """Write a value as JSON; `written` chooses a form for each text."""
    if isinstance(value, Pairs):
        pairs = (f"{written(name)} : {text(inner, written)}" for name, inner in value)
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(text(inner, written) for inner in value)}]"
    return written(value) if isinstance(value, str) else json.dumps(value)


def as_escapes(name):
    units = name.encode("utf-16-be").hex("-", 2)
    return '"' + "".join(rf"\u{unit}" for unit in units.split("-") if unit) + '"'


WAYS = (json.dumps, as_escapes, lambda name: json.dumps(name, ensure_ascii=False))


def repeated(value):
    names = [name for name, _ in value] if isinstance(value, Pairs) else []
    inner = [each for _, each in value] if isinstance(value, Pairs) else value
    below = map(repeated, inner) if isinstance(inner, list) else ()
    return {n for n in names if names.count(n) > 1}.union(*below)


@given(documents_of, st.randoms(use_true_random=False))
def test_a_repeated_name_is_refused_at_any_depth_however_it_is_written(value, rng):
    raw = text(value, lambda name: rng.choice(WAYS)(name))
    for each in (raw, raw.encode()):
        if names := repeated(value):
            with pytest.raises(documents.Repeated) as caught:
                documents.read(each)
            assert caught.value.field in names
        else:
            assert documents.read(each) == orjson.loads(raw)


@given(st.binary(max_size=40) | st.text(max_size=40))
@example(b"")
@example(b'{"a": NaN}')
@example(b'\xef\xbb\xbf{"a": 1}')
@example('{"a": "\\ud800"}')
def test_what_orjson_does_not_read_is_no_json(raw):
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        with pytest.raises(orjson.JSONDecodeError):
            documents.read(raw)
    else:
        assert documents.read(raw) == value


@pytest.mark.parametrize("wrap", ["[{}]", '{{"a":{}}}', '[{{"a":{}}},"\\""]'])
def test_how_deep_it_may_be_is_said_by_its_bytes_alone(wrap):
    def nested(levels):
        raw = "1"
        for _ in range(levels):
            raw = wrap.format(raw)
        return raw

    def deep_in_the_stack(frames):
        return deep_in_the_stack(frames - 1) if frames else documents.read(fits)

    levels = wrap.count("{") - wrap.count("{}") + wrap.count("[") - wrap.count("{{")
    fits, too_deep = nested(100 // levels), nested(100 // levels + 1)
    assert documents.read(fits) == orjson.loads(fits)
    assert deep_in_the_stack(600) == orjson.loads(fits)
    with pytest.raises(orjson.JSONDecodeError, match="100 levels"):
        documents.read(too_deep)


def test_a_hostile_text_costs_no_more_than_its_length():
    documents.read(b"[0." + b"9" * 900_000 + b', "\\""]')
    documents.read(b'{"a":"' + b'\\"' * 400_000 + b'"}')
    names = b",".join(b'"%d":1' % i for i in range(100_000))
    with pytest.raises(documents.Repeated, match="99999: "):
        documents.read(b"{" + names + b',"99999":1}')
    with pytest.raises(documents.Repeated) as caught:
        documents.read(b'{"%s":1,"%s":1}' % (2 * (b"n" * 100_000,)))
    assert len(caught.value.field) < 1_000


def doubled(document, name, first='"x"'):
    """Write a valid document that gives a name twice, the second time by escapes."""
    written = json.dumps(document)
    assert f'"{name}": ' in written
    twice = f'"{name}": {first}, {as_escapes(name)}: '
    return written.replace(f'"{name}": ', twice, 1).encode()


@pytest.mark.parametrize("name", PAYMENT)
def test_a_transaction_that_says_something_twice_is_refused(name):
    with pytest.raises(errors.InvalidInput, match="is given more than once") as caught:
        transactions.decode(doubled(PAYMENT, name), "USD")
    assert caught.value.field == name
    same = doubled(PAYMENT | {"note": {"a": 1}}, "a", first="1")
    with pytest.raises(errors.InvalidInput, match="is given more than once"):
        transactions.decode(same, "USD")


@pytest.mark.parametrize("name", LABEL)
def test_a_label_that_says_something_twice_is_refused(name):
    with pytest.raises(errors.InvalidInput, match="is given more than once") as caught:
        labels.decode(doubled(LABEL, name), NOW_MS)
    assert caught.value.field == name


def test_a_line_that_says_something_twice_is_one_refused_row(tmp_path):
    (path := tmp_path / "x.jsonl").write_bytes(
        b"\n".join([json.dumps(PAYMENT).encode(), doubled(PAYMENT, "amount", "1.0"), b"{}"])
    )
    file = layouts.Layout().open(path, layouts.REQUIRED, layouts.OPTIONAL)
    rows = [row for piece, _ in file.pieces(10) for row in piece]
    assert [row.broken for row in rows] == ["", "amount: is given more than once", ""]


def test_a_file_of_ours_that_says_something_twice_is_named(tmp_path):
    path = tmp_path / "file.json"
    for name, load, error in (
        ("policy.json", policy.Policy.load, errors.ConfigError),
        ("feature_plan.json", layout.Plan.load, errors.ModelMismatch),
    ):
        told = orjson.loads(settings.MODEL_PATH.with_name(name).read_bytes())
        path.write_text(json.dumps(told))
        load(path)
        path.write_bytes(doubled(told, first := next(iter(told))))
        with pytest.raises(error, match=f"{first}: is given more than once"):
            load(path)


def test_a_manifest_that_says_something_twice_is_none():
    [manifest] = settings.MODEL_PATH.parent.glob("*manifest*.json")
    told = orjson.loads(pathlib.Path(manifest).read_bytes())
    with pytest.raises(ValueError, match="sha256: is given more than once"):
        models.read_manifest(doubled(told, "sha256"))


@pytest.mark.anyio
async def test_a_request_that_says_something_twice_is_refused_and_nothing_is_stored(served, http):
    hand = {"user_id": 1005, "transaction_id": "b", "amount": 1.0}
    refused = await http.post("/predict", content=doubled(hand, "amount", "9000.0"))
    assert (refused.status_code, refused.json()["field"]) == (422, "amount")
    assert refused.json()["detail"] == "is given more than once"
    for name in ("label", "transaction_id"):
        body = doubled({"labels": [LABEL | {"transaction_id": "c"}, LABEL]}, name)
        refused = await http.post("/labels", content=body)
        assert (refused.status_code, refused.json()["field"]) == (422, name)
    assert not await served.pool.fetchval("SELECT count(*) FROM labels")
    deep = b'{"user_id": 1, "x": ' + b"[" * 101 + b"]" * 101 + b"}"
    assert (await http.post("/predict", content=deep)).json()["code"] == "not_json"
