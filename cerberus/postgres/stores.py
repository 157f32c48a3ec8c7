"""The parts of Postgres, put together on one pool."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from cerberus import labels
from cerberus.postgres import (
    credit_scores,
    expiry,
    facts,
    imports,
    judged,
    label_rows,
    ledger,
    lives,
    locks,
    persons,
    schema,
)


@dataclass(frozen=True, slots=True)
class Stores:
    """The parts of Postgres, on one pool; each is safe for concurrent use.

    Attributes:
        schema: Brings the tables up to date.
        lives: Epochs of the log, and where each life of it began.
        facts: Transactions and the history of windows.
        locks: Locks across instances.
        ledger: Decisions, and the models that made them.
        labels: The truth about transactions.
        judged: Decisions compared with labels.
        credit_scores: Credit scores, as Feast reads them.
        imports: Transactions, labels and scores from before the log.
        expiry: Removes rows older than the retention.
        persons: Finds and removes one user's rows.
    """

    schema: schema.Schema
    lives: lives.Lives
    facts: facts.Facts
    locks: locks.Locks
    ledger: ledger.Ledger
    labels: label_rows.LabelRows
    judged: judged.Judged
    credit_scores: credit_scores.CreditScores
    imports: imports.Imports
    expiry: expiry.Expiry
    persons: persons.Persons


def on(pool: asyncpg.Pool, spans: Sequence[str], label_rules: labels.Rules | None = None) -> Stores:
    """Put the parts on a pool; nothing is sent.

    Args:
        pool: The shared pool.
        spans: Names of the windows, such as ("10m",).
        label_rules: Rules that the first migration writes for the views; None leaves those there.
    """
    return Stores(
        schema=schema.Schema(pool, spans, label_rules),
        lives=lives.Lives(pool),
        facts=facts.Facts(pool, spans),
        locks=locks.Locks(pool),
        ledger=ledger.Ledger(pool),
        labels=label_rows.LabelRows(pool),
        judged=judged.Judged(pool),
        credit_scores=credit_scores.CreditScores(pool),
        imports=imports.Imports(pool, spans),
        expiry=expiry.Expiry(pool),
        persons=persons.Persons(pool),
    )
