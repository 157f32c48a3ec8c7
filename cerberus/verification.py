"""Decide stored decisions again: the same inputs and versions must give the same bits."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cerberus import decisions, ledger, scoring

_SHOWN = 20


@dataclass(slots=True)
class Verified:
    """What came of it.

    Attributes:
        repeated: Decisions that were taken again.
        differing: How many came out differently.
        unknown: How many cannot be: their model or policy is not kept, or cannot be read.
        examples: The first that differ, a sentence each.
    """

    repeated: int = 0
    differing: int = 0
    unknown: int = 0
    examples: list[str] = field(default_factory=list)


async def verify(kept: ledger.Ledger, since_ms: int, seen: Callable[[int], None]) -> Verified:
    """Take every decision as of `since_ms` or later again. Cost: about 20,000 a second.

    Args:
        kept: Where they are, with the models and policies that took them.
        since_ms: Since the Unix epoch.
        seen: Told how many were looked at, page by page.

    Raises:
        StoreUnavailable: Postgres did not answer.
    """
    found = Verified()
    models: dict[tuple[str, str], scoring.Model | None] = {}
    async for page in kept.since(since_ms):
        groups: dict[tuple[str, str], list[decisions.Record]] = {}
        for record in page:
            decided = record.decision
            groups.setdefault((decided.model_sha256, decided.policy_sha256), []).append(record)
        for versions, records in groups.items():
            if versions not in models:
                models[versions] = await kept.model(*versions)
            if (model := models[versions]) is None:
                found.unknown += len(records)
            else:
                _repeat(model, records, found)
        seen(len(page))
    return found


def _repeat(model: scoring.Model, records: list[decisions.Record], found: Verified) -> None:
    fitting = [record for record in records if record.spans == model.manifest.spans]
    again = dict(
        zip(
            (record.decision_id for record in fitting),
            model.decide([record.decision.row for record in fitting]),
            strict=True,
        )
    )
    for record in records:
        found.repeated += 1
        stored, now = record.decision, again.get(record.decision_id)
        if stored != now:
            found.differing += 1
            if len(found.examples) < _SHOWN:
                got = now and (now.score, now.probability, now.prediction, now.action)
                was = (stored.score, stored.probability, stored.prediction, stored.action)
                found.examples.append(f"{record.decision_id}: stored {was}, repeated {got}")
