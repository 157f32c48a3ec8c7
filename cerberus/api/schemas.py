"""The JSON schemas of requests and answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from cerberus import labels, transactions
from cerberus.features import declared, evaluation

TIME: dict[str, Any] = {
    "type": "string",
    "format": "date-time",
    "examples": ["2026-01-31T12:00:00.000Z"],
}


def every(spans: Sequence[str], currency: str) -> dict[str, Any]:
    """Return all schemas by name, for a deployment with these windows and this currency."""
    return {
        "Request": _request(currency),
        "Prediction": _prediction(spans),
        "Decision": _decision(spans),
        "User": _user(spans),
        "Label": _label(),
        "Accuracy": _accuracy(),
        "Health": _health(),
    }


def _text_or_number(least: int) -> dict[str, Any]:
    text = {"type": "string", "minLength": least, "maxLength": transactions.MAX_TEXT}
    return {"anyOf": [text, {"type": "integer"}], "description": "a number counts as its digits"}


def _request(currency: str) -> dict[str, Any]:
    amount = {"type": "number", "minimum": 0, "description": "at most two decimal places"}
    return {
        "type": "object",
        "description": "Null counts as absent; fields that are not listed are ignored.",
        "required": ["user_id"],
        "properties": {
            "user_id": {"type": "integer", "minimum": 0, "maximum": transactions.MAX_USER_ID},
            "transaction_id": _text_or_number(1),
            "amount": amount | {"maximum": transactions.MAX_AMOUNT_MINOR // 100},
            "timestamp": TIME | {"description": "now when absent"},
            "currency": {"const": currency},
            "merchant_id": _text_or_number(0),
        },
        "dependentRequired": {
            "transaction_id": ["amount"],
            "amount": ["transaction_id"],
            "currency": ["transaction_id"],
            "merchant_id": ["transaction_id"],
        },
    }


def object_of(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object that has some properties and may have others."""
    properties = {**required, **optional}
    return {"type": "object", "required": list(required), "properties": properties}


def _features(spans: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        each.public: {"type": [each.kind.json, "null"], "minimum": 0}
        for each in declared.streamed(spans)
    }
    values |= {each.public: {"type": [each.kind.json, "null"]} for each in declared.BATCH}
    return object_of(values) | {"description": "null: unavailable, never 0"}


def _served(spans: Sequence[str]) -> dict[str, Any]:
    """Return what every evaluation of a user's window contains."""
    fence = object_of({name: {"type": "integer"} for name in ("epoch", "offset", "partition")})
    return {
        "user_id": {"type": "integer"},
        "features": _features(spans),
        "as_of": TIME,
        "degraded": {
            "type": "array",
            "items": {"enum": list(evaluation.Doubt)},
            "description": "why the values may be wrong; empty when they are exact",
        },
        "approximate": {
            "type": "boolean",
            "description": "a window's edge lies inside a summed slice",
        },
        "fence": {
            "oneOf": [fence, {"type": "null"}],
            "description": "the prefix of the log that the values come from; null without a row",
        },
    }


_DECIDED: Mapping[str, Any] = {
    "decision_id": {"type": "string", "format": "uuid"},
    "decision": {"enum": ["approve", "review", "decline"], "description": "by the policy"},
    "prediction": {"enum": ["FRAUD", "LEGIT"], "description": "by the model's own threshold"},
    "probability": {"type": "number", "minimum": 0, "maximum": 1},
    "model_version": {"type": "string", "description": "sha256 of the model"},
    "policy_version": {"type": "string", "description": "sha256 of the policy"},
}


def _prediction(spans: Sequence[str]) -> dict[str, Any]:
    milliseconds = {"type": "number", "minimum": 0}
    return object_of(
        {
            **_served(spans),
            **_DECIDED,
            "replayed": {
                "type": "boolean",
                "description": "the decision was made before this request",
            },
            "latency_stats": object_of(
                {"feature_retrieval_ms": milliseconds, "total_latency_ms": milliseconds}
            ),
        },
        transaction_id={"type": "string"},
    )


def _decision(spans: Sequence[str]) -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    return object_of(
        {
            **_served(spans),
            **_DECIDED,
            "transaction_id": text,
            "amount": {"type": ["number", "null"]},
            "currency": text,
            "merchant_id": text,
            "door": {"enum": ["http", "stream"]},
            "score": {"type": "number", "description": "raw margin of the model"},
            "latency_ms": {"type": "object", "additionalProperties": {"type": "number"}},
            "trace_id": text,
            "decided_at": TIME,
        }
    )


def _user(spans: Sequence[str]) -> dict[str, Any]:
    return object_of(
        {
            **_served(spans),
            "partition": {"type": "integer", "description": "the partition of the user's records"},
            "events": {
                "type": "array",
                "items": object_of({"at": TIME, "amount": {"type": "number"}}),
                "description": "in the longest window, newest first, at most 50",
            },
            "decisions": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/Decision"},
                "description": "the last ten",
            },
        }
    )


def _label() -> dict[str, Any]:
    text = _text_or_number(1)
    number = {"type": ["integer", "null"], "minimum": 0, "maximum": transactions.MAX_USER_ID}
    return object_of(
        {
            "transaction_id": text,
            "label": {"enum": list(labels.VOCABULARY)},
            "source": text | {"description": "who made the label"},
            "labelled_at": TIME | {"description": "when the truth became known"},
        },
        user_id=number | {"description": "null: every transaction with this id"},
    )


def _accuracy() -> dict[str, Any]:
    count, money = {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}
    share = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
    figures = {
        "matured": count | {"description": "decisions that can be judged"},
        "positives": count | {"description": "matured decisions on fraud"},
        "flagged": count | {"description": "matured decisions to review or decline"},
        "found": count | {"description": "matured decisions on fraud that were flagged"},
        "precision": share,
        "recall": share,
        "false_positive_rate": share,
        "money": object_of(
            dict.fromkeys(("caught", "reviewed", "missed", "wrongly_declined"), money)
        ),
        "excluded": count | {"description": "old enough, but declined and never labelled"},
        "immature": count | {"description": "not old enough to be judged"},
    }
    day = object_of({"day": {"type": "string", "format": "date"}, **figures})
    model = object_of(
        {
            "model_version": {"type": "string"},
            "total": object_of(figures),
            "days": {"type": "array", "items": day, "description": "newest first, in UTC"},
        }
    )
    return object_of(
        {
            "as_of": TIME,
            "since": {"type": ["string", "null"]},
            "label_maturity_days": {"type": "number"},
            "friendly_fraud_is_fraud": {"type": "boolean"},
            "models": {"type": "array", "items": model},
        }
    )


_REASON: Mapping[str, Any] = {"type": ["string", "null"]}


def _health() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "number"}
    return object_of(
        {
            "status": {"enum": ["ready", "degraded", "starting", "failed"]},
            "reasons": {"type": "array", "items": text},
        },
        tasks=_by_name(_task_health()),
        model=object_of({"sha256": text, "threshold": number, "policy": text}),
        decisions=_by_name(_outbox_health())
        | {"description": "decisions on requests that wait for each store"},
        servers=_by_name(_REASON) | {"description": "null: the server answers; otherwise why not"},
        partitions=_by_name(_partition_health()),
        producer=object_of({"rate": number, "reason": text}),
    )


def _by_name(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


def _task_health() -> dict[str, Any]:
    return object_of(
        {
            "state": {"type": "string"},
            "since_s": {"type": "number"},
            "restarts": {"type": "integer"},
            "last_error": _REASON,
        }
    )


def _outbox_health() -> dict[str, Any]:
    return object_of(
        {
            "waiting": {"type": "integer"},
            "oldest_s": {"type": "number"},
            "dropped": {"type": "integer"},
            "problem": _REASON,
        }
    )


def _partition_health() -> dict[str, Any]:
    return object_of(
        {
            "state": {"type": "string"},
            "progress": {"type": "number"},
            "remaining_s": {"type": "number"},
            "lag": {"type": ["integer", "null"]},
            "epoch": {"type": "integer"},
            "offset": {"type": "integer"},
        }
    )
