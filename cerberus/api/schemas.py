"""The JSON schemas of requests and answers.

They are written so that client generators understand them: each object and each enum has its own
name, numbers have formats (otherwise a generator picks 32 bits), and null is one of two types or
schemas.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cerberus import labels, transactions
from cerberus.api import codes, pages
from cerberus.features import declared, evaluation

INTEGER: Mapping[str, Any] = {"type": "integer", "format": "int64"}
COUNT: Mapping[str, Any] = {**INTEGER, "minimum": 0}
NUMBER: Mapping[str, Any] = {"type": "number", "format": "double"}
TEXT: Mapping[str, Any] = {"type": "string"}
USER_ID: Mapping[str, Any] = {**COUNT, "maximum": transactions.MAX_USER_ID}
UUID: Mapping[str, Any] = {"type": "string", "format": "uuid"}
TRANSACTION_ID: Mapping[str, Any] = {
    "type": "string",
    "minLength": 1,
    "maxLength": transactions.MAX_TEXT,
    "pattern": r"^[^\x00]*$",
}
_TIME: Mapping[str, Any] = {
    "type": "string",
    "format": "date-time",
    "examples": ["2026-01-31T12:00:00.000Z"],
}
_GIVEN_TIME: Mapping[str, Any] = {**_TIME, "pattern": "^(197[1-9]|19[89][0-9]|2[01][0-9]{2})-"}
_AMOUNT: Mapping[str, Any] = {
    **NUMBER,
    "minimum": 0,
    "maximum": transactions.MAX_AMOUNT_MINOR // 100,
    "multipleOf": 0.01,
}
_DAY = (
    "((19[7-9]|2[01][0-9])[0-9]-"
    "((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
    "|(19(7[26]|8[048]|9[26])|20([02468][048]|[13579][26])|21(0[48]|[2468][048]|[13579][26]))-02-29)"
)
_CLOCK = (
    "T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEX = "[0-9a-f]"
# Generated clients cannot send a union in a query, so a value with two forms is a text.
SINCE: Mapping[str, Any] = {"type": "string", "pattern": f"^{_DAY}({_CLOCK})?$"}
BEFORE: Mapping[str, Any] = {
    "type": "string",
    "pattern": f"^{_DAY}{_CLOCK}(_{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}})?$",
}
_AS_TEXT = "A whole number counts as its digits; write ids with leading zeros as strings."


def every(spans: Sequence[str], currency: str) -> dict[str, Any]:
    """Return all schemas by name, for a deployment with these windows and this currency."""
    return {
        **_ENUMS,
        **_requests(currency),
        **_decisions(spans),
        **_labels(),
        **_accuracy(),
        **_health(),
        "Problem": _problem(),
        "OpenApi": {"type": "object", "additionalProperties": True},
    }


def ref(name: str) -> dict[str, Any]:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object that has some properties and may have others."""
    properties = {**required, **optional}
    return {"type": "object", "required": list(required), "properties": properties}


def nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that also allows null."""
    if "type" not in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def list_of(items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **more}


def _says(meaning: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "description": meaning}


def _enum(meaning: str, *values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values), "description": meaning}


_ENUMS: Mapping[str, Any] = {
    "Action": _enum("By the policy.", "approve", "review", "decline"),
    "Verdict": _enum("By the model's own threshold.", "FRAUD", "LEGIT"),
    "Door": _enum("Where the transaction was first seen.", "http", "stream"),
    "Doubt": _enum("Why values may be wrong.", *evaluation.Doubt),
    "Truth": _enum("What a transaction turned out to be.", *labels.VOCABULARY),
    "Taken": _enum("Whether an accepted label was new.", "stored", "known"),
    "Refused": _enum("The result of a refused label.", "invalid"),
    "Status": _enum("The state of the service.", "ready", "degraded", "starting", "failed"),
    "PageFile": _enum("A file of the page at `/docs`.", *pages.FILES),
    "ProblemCode": _enum(
        "; ".join(f"`{code}`: {known.when}" for code, known in codes.PROBLEMS.items()),
        *codes.PROBLEMS,
    ),
}


def _no_id() -> str:
    """Return a pattern of texts that are not ids, in a form that every engine accepts."""
    spelled = "|".join(map(re.escape, transactions.NO_VALUE)).replace(r"\#", "#")
    letters = re.sub("[A-Za-z]", lambda found: f"[{found[0].upper()}{found[0].lower()}]", spelled)
    return f"^({transactions.ROUNDED.replace('(?:', '(')}|{letters})$"


def _text_or_number(least: int, **more: Any) -> dict[str, Any]:
    number = {**INTEGER, "minimum": -(2**63), "maximum": 2**63 - 1}
    return {
        "anyOf": [{**TRANSACTION_ID, "minLength": least, **more}, number],
        "description": _AS_TEXT,
    }


def _requests(currency: str) -> dict[str, Any]:
    in_hand = ("transaction_id", "amount", "currency", "merchant_id")
    filled = {name: {"properties": {name: {"not": {"type": "null"}}}} for name in in_hand}
    request = object_of(
        {"user_id": USER_ID},
        transaction_id=nullable(ref("TextId")),
        amount=_says("In major units, with at most two decimal places.", nullable(_AMOUNT)),
        timestamp=_says(
            "Now when absent. It may be a little ahead of the clock of the service, not more "
            "(CERBERUS_MAX_FUTURE_SKEW_S).",
            nullable(_GIVEN_TIME),
        ),
        currency=nullable(ref("Currency")),
        merchant_id=nullable(ref("MerchantId")),
    )
    return {
        "Currency": _enum("That of this deployment.", currency),
        "TextId": _text_or_number(1, **{"not": {"pattern": _no_id()}}),
        "MerchantId": _text_or_number(0, **{"not": {"pattern": _no_id()}}),
        "Source": _text_or_number(1),
        "Request": request
        | {
            "description": "A user alone, or a transaction in hand: then `transaction_id` and "
            "`amount` are needed. Null counts as absent; fields that are not listed are ignored.",
            "if": {"anyOf": [{"required": [name], **filled[name]} for name in in_hand]},
            "then": {
                "required": ["transaction_id", "amount"],
                "allOf": [filled["transaction_id"], filled["amount"]],
            },
        },
    }


def _served() -> dict[str, Any]:
    """Return what every evaluation of a user's window contains."""
    return {
        "user_id": USER_ID,
        "features": ref("Features"),
        "as_of": _TIME,
        "degraded": list_of(
            ref("Doubt"), description="why the values may be wrong; empty when they are exact"
        ),
        "approximate": {
            "type": "boolean",
            "description": "a window's edge lies inside a summed slice",
        },
        "fence": _says(
            "the prefix of the log that the values come from; null without a row",
            nullable(ref("Fence")),
        ),
    }


def _features(spans: Sequence[str]) -> dict[str, Any]:
    kinds = {"integer": INTEGER, "number": NUMBER}
    values: dict[str, Any] = {
        each.public: nullable({**kinds[each.kind.json], "minimum": 0})
        for each in declared.streamed(spans)
    }
    values |= {each.public: nullable(kinds[each.kind.json]) for each in declared.BATCH}
    return object_of(values) | {"description": "null: unavailable, never 0"}


_DECIDED: Mapping[str, Any] = {
    "decision_id": UUID,
    "decision": ref("Action"),
    "prediction": ref("Verdict"),
    "probability": {**NUMBER, "minimum": 0, "maximum": 1},
    "model_version": _says("sha256 of the model", TEXT),
    "policy_version": _says("sha256 of the policy", TEXT),
}


def _decisions(spans: Sequence[str]) -> dict[str, Any]:
    milliseconds = {**NUMBER, "minimum": 0}
    return {
        "Features": _features(spans),
        "Fence": object_of({"epoch": INTEGER, "offset": INTEGER, "partition": nullable(INTEGER)}),
        "Latency": object_of(
            {"feature_retrieval_ms": milliseconds, "total_latency_ms": milliseconds}
        ),
        "Prediction": object_of(
            {
                **_served(),
                **_DECIDED,
                "replayed": {
                    "type": "boolean",
                    "description": "the decision was made before this request",
                },
                "latency_stats": ref("Latency"),
            },
            transaction_id=TEXT,
        ),
        "Decision": object_of(
            {
                **_served(),
                **_DECIDED,
                "transaction_id": nullable(TEXT),
                "amount": nullable(NUMBER),
                "currency": nullable(TEXT),
                "merchant_id": nullable(TEXT),
                "door": ref("Door"),
                "score": _says("raw margin of the model", NUMBER),
                "latency_ms": _by_name(NUMBER),
                "trace_id": nullable(TEXT),
                "decided_at": _TIME,
            }
        ),
        "DecisionPage": object_of(
            {
                "decisions": list_of(ref("Decision")),
                "next": _says("pass it as `before`; null on the last page", nullable(TEXT)),
            }
        ),
        "Event": object_of({"at": _TIME, "amount": NUMBER}),
        "User": _user(),
    }


def _user() -> dict[str, Any]:
    return object_of(
        {
            **_served(),
            "partition": _says("the partition of the user's records", INTEGER),
            "events": list_of(
                ref("Event"), description="in the longest window, newest first, at most 50"
            ),
            "decisions": list_of(ref("Decision"), description="the last ten"),
        }
    )


def _labels() -> dict[str, Any]:
    one = object_of(
        {
            "transaction_id": ref("TextId"),
            "label": ref("Truth"),
            "source": ref("Source"),
            "labelled_at": _says("when the truth became known; not in the future", _GIVEN_TIME),
        },
        user_id=_says("null: every transaction with this id", nullable(USER_ID)),
    )
    refused = {"result": ref("Refused"), "field": TEXT, "detail": TEXT}
    by_result = {"stored": "LabelTaken", "known": "LabelTaken", "invalid": "LabelRefused"}
    items = list_of(ref("Label"), minItems=1, maxItems=labels.MAX_ITEMS)
    return {
        "Label": one | {"description": "What one `source` says about a transaction."},
        "LabelList": object_of({"labels": items}),
        "LabelTaken": object_of({"result": ref("Taken")}),
        "LabelRefused": object_of(refused),
        "LabelResult": {
            "oneOf": [ref("LabelTaken"), ref("LabelRefused")],
            "discriminator": {
                "propertyName": "result",
                "mapping": {key: ref(name)["$ref"] for key, name in by_result.items()},
            },
        },
        "LabelResults": object_of(
            {
                "results": list_of(ref("LabelResult"), description="in the order of `labels`"),
                "stored": COUNT,
                "known": COUNT,
                "invalid": COUNT,
            }
        ),
    }


def _accuracy() -> dict[str, Any]:
    share = nullable({**NUMBER, "minimum": 0, "maximum": 1})
    money = {**NUMBER, "minimum": 0}
    figures = {
        "matured": _says("decisions that can be judged", COUNT),
        "positives": _says("matured decisions on fraud", COUNT),
        "flagged": _says("matured decisions to review or decline", COUNT),
        "found": _says("matured decisions on fraud that were flagged", COUNT),
        "precision": share,
        "recall": share,
        "false_positive_rate": share,
        "money": ref("Money"),
        "excluded": _says("old enough, but declined and never labelled", COUNT),
        "immature": _says("not old enough to be judged", COUNT),
    }
    return {
        "Money": object_of(
            dict.fromkeys(("caught", "reviewed", "missed", "wrongly_declined"), money)
        ),
        "Figures": object_of(figures),
        "FiguresOfDay": object_of({"day": {"type": "string", "format": "date"}, **figures}),
        "FiguresOfModel": object_of(
            {
                "model_version": TEXT,
                "total": ref("Figures"),
                "days": list_of(ref("FiguresOfDay"), description="newest first, in UTC"),
            }
        ),
        "Accuracy": object_of(
            {
                "as_of": _TIME,
                "since": nullable(_TIME),
                "label_maturity_days": NUMBER,
                "friendly_fraud_is_fraud": {"type": "boolean"},
                "models": list_of(ref("FiguresOfModel")),
            }
        ),
    }


def _by_name(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


def _health() -> dict[str, Any]:
    reason = nullable(TEXT)
    parts = {
        "TaskHealth": object_of(
            {"state": TEXT, "since_s": NUMBER, "restarts": INTEGER, "last_error": reason}
        ),
        "ModelHealth": object_of({"sha256": TEXT, "threshold": NUMBER, "policy": TEXT}),
        "OutboxHealth": object_of(
            {"waiting": INTEGER, "oldest_s": NUMBER, "dropped": INTEGER, "problem": reason}
        ),
        "PartitionHealth": object_of(
            {
                "state": TEXT,
                "progress": NUMBER,
                "remaining_s": NUMBER,
                "lag": nullable(INTEGER),
                "epoch": INTEGER,
                "offset": INTEGER,
            }
        ),
        "ProducerHealth": object_of({"rate": NUMBER, "reason": TEXT}),
    }
    whole = object_of(
        {"status": ref("Status"), "reasons": list_of(TEXT)},
        tasks=_by_name(ref("TaskHealth")),
        model=ref("ModelHealth"),
        decisions=_says(
            "decisions on requests that wait for each store", _by_name(ref("OutboxHealth"))
        ),
        servers=_says("null: the server answers; otherwise why not", _by_name(reason)),
        partitions=_by_name(ref("PartitionHealth")),
        producer=ref("ProducerHealth"),
    )
    alive = {"type": "string", "enum": ["alive"]}
    return {**parts, "Health": whole, "Alive": object_of({"status": alive})}


def _problem() -> dict[str, Any]:
    return object_of(
        {
            "type": {"type": "string", "format": "uri-reference"},
            "title": TEXT,
            "status": {"type": "integer", "format": "int32"},
            "detail": TEXT,
            "code": ref("ProblemCode"),
        },
        field=_says("the field at fault, with `invalid` and `conflict`", TEXT),
    )
