"""`python -m chaos.rolling`: this checkout replaces an older commit, and is rolled back.

Instances of both run in one group on real servers while records and requests flow. The exit status
is 1 when a client notices the roll-out or the roll-back or a value differs from the log, and 2
when the older commit or the servers are not available.
"""

import argparse
import asyncio
import collections
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from cerberus import errors, stack
from chaos import cluster, compare, oracle, questions, releases, rollout, runs, stage, traffic

OLD = "5bac5f3"
_PAST_MS = 240_000
_RATE, _LAST_RATE = 30.0, 1_000.0
_SHOWN = 20
_BOTH = [("old", "new"), ("new", "old")]
# With these reasons for doubt, an answer is still exact, as of an earlier moment.
_BEHIND = {"replaying", "stale"}


async def run(group: rollout.Rollout, say: Callable[[str], None]) -> rollout.Told:
    """Carry out a plan, and compare.

    A timeout ends the run and counts as a difference.
    """
    plan, target, told = group.plan, group.target, group.told
    rng, began_s = random.Random(plan.seed), time.time()
    past = traffic.Publisher(target, rollout.USERS, plan.events // 4, rng, "b")
    publisher = traffic.Publisher(target, rollout.USERS, plan.events - past.total, rng)
    asker = questions.Asker(target, rollout.USERS, rng, publisher, _RATE)
    whole = False
    try:
        await group.start("old-0", "old-1")
        now = traffic.now_ms()
        await past.backlog(now - _PAST_MS, now)
        await cluster.until(target.drained, "the backlog is stored", plan.within_s)
        say(f"{'start':<14} {'old-0+old-1':<22} {past.total:,} records are stored")
        changes = 6 + 2 * plan.rounds + 4 * plan.back
        publisher.rate = publisher.total / (changes * (plan.hold_s + 5))
        async with (
            runs.beside(asker.run()),
            runs.beside(group.compare_doors(asker, rng)),
            runs.beside(group.watch()),
            runs.beside(publisher.run()) as publishing,
        ):
            await group.run(say)
            if plan.back:
                await group.back(say)
            publisher.rate = _LAST_RATE
            await asyncio.wait([publishing])
            await cluster.until(target.drained, "all is stored", plan.within_s)
        await cluster.until(target.kept, "what was answered last is stored", plan.within_s)
        whole = True
    except TimeoutError as error:
        told.wrong.append(str(error))
    _answered(group, asker.answers)
    log = await _inspected(group)
    if whole:
        query = "SELECT max(epoch) FROM log_epochs"
        acked_s = past.acked_s | publisher.acked_s
        life = questions.Life(log, acked_s, await target.pool.fetchval(query), began_s)
        await _compare(group, asker, life)
    return told


async def _inspected(group: rollout.Rollout) -> compare.Log:
    """Check assignments and logs, and return one oracle for each partition."""
    records = await group.target.log("transactions")
    log = {
        number: oracle.Partition(compare.RULES, ((r.offset, r.timestamp, r.value) for r in some))
        for number, some in records.items()
    }
    _assigned(group, log, {n: [r.timestamp for r in some] for n, some in records.items()})
    _logged(group)
    return log


def _answered(group: rollout.Rollout, answers: Sequence[questions.Answer]) -> None:
    """Look for failed requests; 409 is not a failure."""
    for answer in answers:
        group.told.counts[f"answers of {rollout.version(answer.instance.name)}"] += 1
        if answer.status not in (200, 409):
            told = answer.body.get("detail", "no answer")
            sentence = f"{answer.instance.name} answered {answer.status}: {told}"
            group.told.wrong.append(sentence)


def _assigned(
    group: rollout.Rollout, log: compare.Log, stamps_ms: Mapping[int, Sequence[int]]
) -> None:
    """Check where each owner began to read, and whether partitions moved in both directions."""
    told, found = group.told, releases.starts(list(group.fleet.values()))
    told.counts["partitions assigned"] = len(found)
    for start in found:
        if (sentence := releases.needless(start, log, stamps_ms)) is not None:
            told.wrong.append(sentence)
    if len(epochs := {start.epoch for start in found}) != 1:
        told.wrong.append(f"the topic has one life, but the epochs are {sorted(epochs)}")
    for before, start in releases.moves(found):
        when = "" if start.at_s < group.back_s else ", rolled back"
        told.counts[f"moved from {before.release} to {start.release}{when}"] += 1
    for one, other in _BOTH:
        for what in (f"moved from {one} to {other}", f"asked {one}, then {other}"):
            if not told.counts[what]:
                told.wrong.append(f"nothing was {what} in the mixed group: the run proves nothing")


def _logged(group: rollout.Rollout) -> None:
    """Look for errors in the logs; aiokafka's are left out, as it logs some before a retry."""
    for instance in group.fleet.values():
        for _, line in releases.told(instance):
            ours = not str(line.get("logger")).startswith("aiokafka")
            if ours and line.get("level") in ("ERROR", "CRITICAL"):
                what = f"{instance.name} logs: {line.get('task')}: {line.get('message')}"
                group.told.wrong.append(what)


async def _compare(group: rollout.Rollout, asker: questions.Asker, life: questions.Life) -> None:
    """Compare every store and every answer with the log, and topic `decisions` with the table."""
    target, told = group.target, group.told
    told.counts["records"] = sum(part.end for part in life.log.values())
    good = [answer for answer in asker.answers if answer.status in (200, 409)]
    outcomes, exact = questions.answers(target, good, [life])
    told.counts.update({f"answers {name}": count for name, count in outcomes.items()})
    for answer in good:
        if answer.degraded and _BEHIND.issuperset(answer.degraded) and answer.body["fence"]:
            expected, got = questions.held(answer, life)
            exact.equal("answer from an earlier moment", answer.body, expected[:2], got[:2])
    _, kept = await questions.kept(target, asker)
    told.findings = [
        await compare.stores(target, [life.log]),
        exact,
        kept,
        await compare.agree(target),
    ]


def table(told: rollout.Told) -> Iterator[str]:
    """Lay out what a run found."""
    for name, count in sorted(told.counts.items()):
        yield f"{name:<44}{count:>10,}"
    compared: collections.Counter[str] = collections.Counter()
    for found in told.findings:
        compared += found.compared
    for name, count in compared.items():
        yield f"{f'compared: {name}':<44}{count:>10,}"
    yield f"{'lost':<44}{sum(found.lost for found in told.findings):>10,}"
    yield f"{'double counted':<44}{sum(found.doubled for found in told.findings):>10,}"
    yield f"{'differences':<44}{len(told.differences):>10,}"
    for line, count in collections.Counter(told.differences).most_common(_SHOWN):
        yield f"  {count} x {line[:400]}"


def main() -> int:
    """Run once and return the exit status."""
    parser = argparse.ArgumentParser(prog="chaos.rolling", description=__doc__)
    parser.add_argument("--old", default=OLD, help=f"the commit to replace ({OLD})")
    parser.add_argument(
        "--events", type=int, default=20_000, help="how many records to publish (20000)"
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of all random choices (7)")
    chosen = parser.parse_args()
    if chosen.events < 1_000:
        parser.error("--events must be at least 1000")
    plan = rollout.Plan(chosen.events, rounds=3, hold_s=5.0, seed=chosen.seed)

    async def rolled(
        servers: stack.Stack, environ: Mapping[str, str], directory: pathlib.Path
    ) -> Sequence[str]:
        versions = releases.Release("old", tree), releases.Release("new", releases.HERE)
        async with rollout.opened(servers, environ, directory, versions, plan) as group:
            told = await run(group, lambda line: print(line, flush=True))
        print("\n".join(table(told)), flush=True)
        return told.differences

    try:
        with releases.checkout(chosen.old) as tree:
            return stage.on_servers("rolling", rolled)
    except errors.CerberusError as error:
        print(f"rolling: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
