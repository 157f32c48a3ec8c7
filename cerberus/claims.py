"""One decision per transaction: the first one is claimed in Redis before it is returned.

Whichever door comes first wins; the other door, repeats and concurrent requests get that decision.
Redis vouches for recent claims: those made within `claim_ms` and since it was last emptied or
restarted. What may have been decided earlier is looked up in Postgres first, once the decisions of
that moment are stored there. A claim takes about 1 kB.
"""

import asyncio
import hashlib
import logging
import math
import re
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis.exceptions

from cerberus import clock, errors, settings, transactions
from cerberus.decisions import records as decision_records
from cerberus.online import pool as redis_pool
from cerberus.postgres import ledger

log = logging.getLogger(__name__)

_BUCKETS = 64
# Longer than may pass between judging a transaction young, or looking it up, and claiming it; or an
# earlier claim could expire in between. A write to Postgres has ended by then, too.
_MARGIN_MS = 30_000
_RENEWED = 50
_WRITING_MS = 200
_SURE = 2**62

_DOUBT = """
local since = redis.call('GET', KEYS[1])
if not since or tonumber(since) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""

# KEYS[1] is the bucket's mark: the time, ms, since which all its claims are here; the other keys
# are claims. ARGV: now in ms, then for each claim its life in ms, what must be later than the mark,
# and its value. Returns for each claim 1 if it was taken, the value that stands already, or minus
# the mark if that is too young.
_CLAIM = """
local since = redis.call('GET', KEYS[1])
if not since then
  since = ARGV[1]
  redis.call('SET', KEYS[1], since)
end
local found = {}
for i = 2, #KEYS do
  local at = 3 * i - 4
  local stands = redis.call('GET', KEYS[i])
  if stands then
    found[i - 1] = stands
    if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[at]) then
      redis.call('PEXPIRE', KEYS[i], ARGV[at])
    end
  elseif tonumber(ARGV[at + 1]) > tonumber(since) then
    redis.call('SET', KEYS[i], ARGV[at + 2], 'PX', ARGV[at])
    found[i - 1] = 1
  else
    found[i - 1] = -tonumber(since)
  end
end
return found
"""


# ARGV: now in ms, the server's run, the marks' prefix, the number of buckets, a token. A cluster's
# node leaves the others' marks alone. The token gives a run that is set again another value.
_RECOGNISE = """
for bucket = 0, tonumber(ARGV[4]) - 1 do
  local mark = ARGV[3] .. '{' .. bucket .. '}'
  local run = redis.pcall('GET', mark .. ':run')
  if type(run) == 'table' then
    if string.find(run.err, 'cluster is down') then
      return redis.error_reply('CLUSTERDOWN cannot tell its run yet')
    end
  elseif not run or string.match(run, '^%w*') ~= ARGV[2] then
    redis.call('SET', mark, ARGV[1])
    redis.call('SET', mark .. ':run', ARGV[2] .. '#' .. ARGV[5])
  end
end
return 1
"""


def recognise(config: settings.Settings, clock: clock.Clock = clock.now_ms) -> redis_pool.Connected:
    """Return a hook that checks, at each new connection, whether this server was restarted.

    A server that was restarted or has taken over may have lost the latest claims, so it vouches
    only for claims from now on. A replica is refused. Where INFO is forbidden, both go unnoticed.
    """
    prefix, clustered = _prefix(config), config.redis.cluster

    async def connected(connection: Any) -> None:
        try:
            await connection.on_connect()
            await recognised(connection)
        except redis.exceptions.AuthenticationError as error:
            # The client would repeat what is refused until the deadline hides why.
            raise redis.exceptions.ResponseError(str(error)) from error

    async def recognised(connection: Any) -> None:
        try:
            await connection.send_command("INFO", check_health=False)
            told = await connection.read_response()
            if b"role:slave" in told and not clustered:  # a replica in a cluster redirects writes
                raise redis.exceptions.ReadOnlyError("a replica", status_code="READONLY")
            run = re.search(rb"run_id:(\w+)", told)
            if run is not None:
                arguments = (clock(), run[1], prefix, _BUCKETS, secrets.token_hex(8))
                await connection.send_command("EVAL", _RECOGNISE, 0, *arguments, check_health=False)
                await connection.read_response()
        except redis.exceptions.ResponseError as error:
            if redis_pool.refusal(error) is not None:
                raise  # it may be another run; it is checked when it takes writes again
            log.debug("Redis does not say which run it is: %s", error)

    return connected


def key(config: settings.Settings, decision_id: uuid.UUID) -> str:
    """Return the key of a decision's claim."""
    return f"{_mark(config, decision_id.int % _BUCKETS)}:{decision_id.hex}"


def _prefix(config: settings.Settings) -> str:
    return f"cerberus:claim:{config.kafka.prefix}"


def _mark(config: settings.Settings, bucket: int) -> str:
    return f"{_prefix(config)}{{{bucket}}}"  # a cluster places keys by what is in braces


class Claims:
    """Decides who was first; safe for concurrent use, on a Redis Cluster too.

    Args:
        config: Settings.
        client: The shared pool of Redis.
        kept: Where decisions are looked up.
        spoken: Returns the version to write claims in.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        config: settings.Settings,
        client: Any,
        kept: ledger.Ledger,
        spoken: Callable[[], int],
        clock: clock.Clock = clock.now_ms,
    ) -> None:
        self._claim_ms = config.decisions.claim_ms
        self._skew_ms = config.windows.max_future_skew_ms
        self._config = config
        # After this long, Postgres has what was answered when Redis lost its claims.
        self._settling_ms = 2 * config.decisions.flush_ms + _WRITING_MS
        self._since_ms, self._learned_s = 0, -math.inf
        self._runs = [b""] * _BUCKETS
        self._client = client
        self._ledger = kept
        self._spoken = spoken
        self._clock = clock

    def old(self, transaction: transactions.Transaction, now_ms: int) -> bool:
        """Return whether a claim may have expired, so that Postgres must be asked first."""
        return transaction.event_ms - self._skew_ms <= now_ms - self._claim_ms

    async def look_up(
        self, wanted: Sequence[transactions.Transaction]
    ) -> dict[uuid.UUID, decision_records.Record]:
        """Return the decisions on transactions that Postgres has, by their names.

        Within a second after Redis has lost claims, it first waits for what was decided then.

        Raises:
            StoreUnavailable: Postgres did not answer.
        """
        # A mark from a fast clock is waited for once, not until the time that it names.
        learned_ms = (time.monotonic() - self._learned_s) * 1000
        wait_ms = self._settling_ms - max(self._clock() - self._since_ms, learned_ms)
        if wanted and wait_ms > 0:
            await asyncio.sleep(wait_ms / 1000)
        return await self._ledger.find(wanted)

    async def doubt(self, now_ms: int) -> None:
        """Note that Redis may have lost claims: from now on it vouches for new ones only.

        Raises:
            FeaturesUnavailable: Redis did not answer; call again.
        """
        marks = [_mark(self._config, bucket) for bucket in range(_BUCKETS)]
        await redis_pool.evaluate(self._client, [(_DOUBT, [mark], [now_ms]) for mark in marks])

    async def witness(self) -> str:
        """Return what changes when a node of a Redis Cluster is emptied, restarts or takes over.

        It is made of the runs of all buckets' servers, read in one round trip; a missing run is
        set again.

        Raises:
            FeaturesUnavailable: Not every node answered within 2 s.
        """
        token = secrets.token_hex(8).encode()
        pipe = self._client.pipeline(transaction=False)
        for bucket, run in enumerate(self._runs):
            name = f"{_mark(self._config, bucket)}:run"
            pipe.set(name, b"%b#%b" % (run, token), nx=True)
            pipe.get(name)
        _, *found = await redis_pool.answers(self._client, pipe.execute())
        runs: list[bytes] = found[::2]
        # A server that was only emptied is the same one: claims need not be doubted twice.
        self._runs = [run.partition(b"#")[0] for run in runs]
        return hashlib.sha256(b" ".join(runs)).hexdigest()[:16]

    async def claim(
        self,
        records: Sequence[decision_records.Record],
        now_ms: int,
        looked_up: Collection[uuid.UUID],
        timeout_s: float = redis_pool.CALL_S,
        *,
        brief: bool = False,
    ) -> list[decision_records.Record | None]:
        """Return for each record the decision that stands on its transaction, in one round trip.

        Args:
            records: Decided, not yet returned to anyone; each has a transaction.
            now_ms: Wall clock.
            looked_up: Names of those that Postgres does not have.
            timeout_s: To wait for Redis.
            brief: Whether those looked up will be in Postgres soon.

        Returns:
            The record itself where it was first, else the earlier one; None where Redis cannot
            vouch for it: look it up, then claim again.

        Raises:
            FeaturesUnavailable: Redis did not answer in time; claim again.
        """
        buckets: dict[int, list[decision_records.Record]] = {}
        for record in records:
            buckets.setdefault(record.decision_id.int % _BUCKETS, []).append(record)
        calls = [self._call(n, some, now_ms, looked_up, brief) for n, some in buckets.items()]
        answers = await redis_pool.evaluate(self._client, calls, timeout_s)
        standing: dict[uuid.UUID, decision_records.Record | None] = {}
        for some, found in zip(buckets.values(), answers, strict=True):
            for record, answer in zip(some, found, strict=True):
                standing.setdefault(record.decision_id, self._standing(record, answer))
        if self._since_ms == now_ms:
            await self.doubt(now_ms)  # one mark was just made: the others will be missing too
        return [standing[record.decision_id] for record in records]

    async def settle(
        self,
        records: Sequence[decision_records.Record],
        now_ms: int,
        looked_up: Collection[uuid.UUID],
    ) -> list[decision_records.Record]:
        """Claim, looking up what Redis cannot vouch for, and return the decisions that stand.

        For callers that store them at once: what was looked up is claimed briefly, or a backlog's
        claims would fill Redis.

        Raises:
            FeaturesUnavailable: Redis did not answer; settle again.
            StoreUnavailable: Postgres did not answer; settle again.
        """
        found = await self.claim(records, now_ms, looked_up, brief=True)
        unsure = [r for r, stands in zip(records, found, strict=True) if stands is None]
        if unsure:
            known = await self.look_up([r.transaction for r in unsure if r.transaction])
            names = {record.decision_id for record in unsure}
            left = [record for record in unsure if record.decision_id not in known]
            claimed = await self.claim(left, now_ms, names, brief=True)
            for record, stands in zip(left, claimed, strict=True):
                if stands is None:
                    raise errors.NeedsOperator(
                        f"Redis key {key(self._config, record.decision_id)} holds a claim of a "
                        "later version, or a broken one: update this process, or delete the key"
                    )
            known |= {r.decision_id: r for r in claimed if r is not None}
            found = [
                stands or known[r.decision_id] for r, stands in zip(records, found, strict=True)
            ]
        return [stands for stands in found if stands is not None]

    async def renew(self, records: Sequence[decision_records.Record]) -> None:
        """Extend the claims of answers that Postgres does not have yet; set missing ones again.

        Raises:
            FeaturesUnavailable: Redis did not answer; renew again.
        """
        now_ms = self._clock()
        paid = [record for record in records if record.transaction is not None]
        for at in range(0, len(paid), _RENEWED):
            some = paid[at : at + _RENEWED]
            await self.claim(some, now_ms, {record.decision_id for record in some})

    def _call(
        self,
        bucket: int,
        records: Sequence[decision_records.Record],
        now_ms: int,
        looked_up: Collection[uuid.UUID],
        brief: bool,
    ) -> redis_pool.Call:
        keys = [_mark(self._config, bucket)]
        arguments: list[bytes | int | str] = [now_ms]
        for record in records:
            keys.append(key(self._config, record.decision_id))
            sure = record.decision_id in looked_up
            arguments += (
                _MARGIN_MS if sure and brief else self._claim_ms + _MARGIN_MS,
                _SURE if sure else record.decision.row.as_of_ms - self._skew_ms,
                record.pack(self._spoken()),
            )
        return _CLAIM, keys, arguments

    def _standing(
        self, record: decision_records.Record, answer: bytes | int
    ) -> decision_records.Record | None:
        if isinstance(answer, bytes):
            try:
                return decision_records.unpack(answer)
            except ValueError as error:
                # Do not decide again: somebody may have been answered.
                log.error("claim unreadable: %s", error, extra={"action": "claim_unreadable"})
                return None
        if answer == 1:
            return record
        if -answer > self._since_ms:
            self._since_ms, self._learned_s = -answer, time.monotonic()
        return None
