"""What must be true, computed from the records of one partition alone: plain, slow, exact.

Shares no code with the service: dicts and lists, the whole log looked at for every answer.
"""

import datetime
import json
from dataclasses import dataclass, field


def to_ms(text):
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return round(moment.timestamp() * 1000)


def once(pairs):
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


@dataclass
class Partition:
    """One partition's log: `add` records in order, then ask about any prefix."""

    span_ms: int = 600_000
    slack_ms: int = 120_000
    skew_ms: int = 60_000
    records: list = field(default_factory=list)
    accepted: list = field(default_factory=list)
    expired: list = field(default_factory=list)
    rejected: list = field(default_factory=list)
    frontier: int = 0

    def add(self, offset, timestamp_ms, value):
        self.records.append(offset)
        try:
            document = json.loads(value, object_pairs_hook=once)
            event = {
                "offset": offset,
                "user_id": document["user_id"],
                "id": document["transaction_id"],
                "cents": round(document["amount"] * 100),
                "at": to_ms(document["timestamp"]),
            }
            good = event["cents"] >= 0 and event["at"] <= timestamp_ms + self.skew_ms
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            self.rejected.append(offset)
            return
        self.frontier = max(self.frontier, event["at"])
        if event["at"] <= self.frontier - self.span_ms - self.slack_ms:
            self.expired.append(event)
            return
        lower = self.frontier - self.span_ms - self.slack_ms
        for other in self.accepted:
            same = all(other[k] == event[k] for k in ("user_id", "id", "at"))
            if same and other["at"] > lower:
                return
        self.accepted.append(event | {"lower": lower})

    def decided_on(self, event):
        """Return (count, cents) as of an accepted event, of the prefix that ends with it."""
        return self.stats(event["user_id"], event["at"], event["offset"] + 1, event["lower"])

    def stats(self, user_id, as_of_ms, until_offset=None, kept_after_ms=0):
        """Return (count, cents) in (as_of − span, as_of] of the prefix before `until_offset`."""
        cents = [
            e["cents"]
            for e in self.accepted
            if e["user_id"] == user_id
            and max(as_of_ms - self.span_ms, kept_after_ms) < e["at"] <= as_of_ms
            and (until_offset is None or e["offset"] < until_offset)
        ]
        return len(cents), sum(cents)
