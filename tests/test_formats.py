"""What one process writes, the next release reads, and the one before.

`tests/formats` holds bytes as earlier releases wrote them. They are never written again.
"""

import json
import pathlib
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import records

from cerberus import partition, settings, window
from cerberus.decisions import models
from cerberus.decisions import records as decision_records
from cerberus.features import fences
from cerberus.features import packed as packed_windows
from cerberus.online import layout
from cerberus.stream import starts

FORMATS = pathlib.Path(__file__).parent / "formats"
CLUSTER = "kXk9VQ0"
PAID = decision_records.unpack((FORMATS / "claim-0.json").read_bytes())
COMMITS = st.builds(
    starts.Commit,
    offset=st.just(143),
    frontier_ms=st.integers(0, 2**62),
    moved=st.none()
    | st.builds(partition.Moved, st.integers(1, 2**62), st.none() | st.integers(1, 1000)),
    epoch=st.integers(0, 2**62),
    count=st.integers(1, 1000),
    first=st.none() | st.tuples(st.integers(0, 2**62), st.integers(-1, 2**62)),
    known_from_ms=st.none() | st.integers(0, 2**62),
    since_epoch=st.none() | st.integers(1, 2**62),
)


def test_a_claim_of_version_0_is_read():
    decision, row, paid = PAID.decision, PAID.decision.row, PAID.transaction
    assert str(PAID.decision_id) == "ecb08ecd-eb34-89b3-8333-730336cc463f"
    assert (decision.score, decision.probability) == (6.25, 0.9991771631021992)
    assert (decision.prediction, decision.action) == ("FRAUD", "decline")
    assert (decision.model_sha256, decision.policy_sha256) == ("ab" * 32, "cd" * 32)
    assert (paid.transaction_id, paid.amount_minor, paid.currency) == ("order-4711", 640000, "USD")
    assert (paid.user_id, paid.event_ms, paid.merchant_id) == (1005, 1795581617687, "shop-7")
    assert row.stats == (window.WindowStats(2, 647058), window.WindowStats(3, 650000))
    assert (row.credit_score, row.amount_minor, row.as_of_ms) == (632, 640000, 1795581617687)
    assert (row.fence, PAID.partition) == ((1795581211, 143, 1795581617000), 2)
    assert (row.degraded, row.approximate, PAID.spans) == (("stale",), True, ("10m", "1h"))
    assert (PAID.door, PAID.decided_ms) == ("http", 1795581617690)
    assert PAID.latency_ms == {"wait": 0.1, "features": 0.646}
    assert PAID.trace_id == "0af7651916cd43dd8448eb211c80319c"


def test_a_claim_without_a_transaction_is_read():
    alone = decision_records.unpack((FORMATS / "claim-0-user-alone.json").read_bytes())
    assert alone.decision_id == uuid.UUID("fe981caf-4a09-4ae8-86b2-1d3accf026b9")
    assert (alone.transaction, alone.partition, alone.trace_id) == (None, None, "")
    row = alone.decision.row
    assert (row.stats, row.credit_score, row.amount_minor, row.fence) == (None,) * 4
    assert row.degraded == ()


def test_version_0_of_a_claim_is_written_as_it_was():
    for name in ("claim-0.json", "claim-0-user-alone.json"):
        written = (FORMATS / name).read_bytes()
        assert decision_records.unpack(written).pack(version=0) == written


@given(records(), st.sampled_from([0, 1]))
def test_a_claim_is_read_back_in_every_version(record, version):
    assert decision_records.unpack(record.pack(version)) == record


@given(records())
def test_a_claim_says_its_version_and_what_is_not_known_in_it_is_ignored(record):
    told = json.loads(record.pack())
    assert told["version"] == 1
    assert decision_records.unpack(json.dumps({"kind": "refund", **told}).encode()) == record


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"null",
        b"17",
        b"{}",
        b"[]",
        b'{"version": 1}',
        PAID.pack().replace(b'"version":1', b'"version":2'),
        PAID.pack()[:-1],
        PAID.pack().replace(f'"{PAID.decision_id}"'.encode(), b"7"),
        b'[7, "http", null, 0, {}, "", [], [0, 0, "", ""], ["", ""], null, 1, 1, 0, 0, 0, [], 0]',
        PAID.pack(0)[:-1] + b",1]",
    ],
)
def test_bytes_that_are_no_claim_of_a_known_version_are_refused(damage):
    with pytest.raises(ValueError, match=r"^decision: "):
        decision_records.unpack(damage)


def test_the_metadata_of_a_commit_of_version_0_are_read():
    written = (FORMATS / "commit-0.txt").read_text()
    assert starts.Commit.read(143, written, CLUSTER) == starts.Commit(
        offset=143,
        frontier_ms=1795581617000,
        moved=partition.Moved(1795581000000, 5),
        epoch=1795581211,
        count=6,
        first=(7, 1795581212345),
        known_from_ms=1795581213000,
        since_epoch=1795581200,
    )
    empty = starts.Commit.read(0, (FORMATS / "commit-0-empty-log.txt").read_text(), CLUSTER)
    assert (empty.first, empty.known_from_ms, empty.frontier_ms) == (None, None, 0)


def test_version_0_of_a_commit_is_written_as_it_was():
    for name in ("commit-0.txt", "commit-0-empty-log.txt"):
        written = (FORMATS / name).read_text()
        assert starts.Commit.read(1, written, CLUSTER).metadata(CLUSTER, 0) == written


@given(COMMITS, st.sampled_from([0, 1]))
def test_a_commit_is_read_back_in_every_version_and_by_its_own_cluster_alone(commit, version):
    written = commit.metadata(CLUSTER, version)
    assert starts.Commit.read(143, written, CLUSTER) == commit
    assert starts.Commit.read(143, written, "another") == starts.Commit(143)


@given(COMMITS, st.data())
def test_of_a_commit_s_fields_the_unknown_are_ignored_and_a_missing_one_leaves_the_offset(
    commit, data
):
    told = json.loads(commit.metadata(CLUSTER))
    assert told["version"] == 1
    more = json.dumps({"outcomes": [1], **told})
    assert starts.Commit.read(143, more, CLUSTER) == commit
    del told[data.draw(st.sampled_from(sorted(told)))]
    assert starts.Commit.read(143, json.dumps(told), CLUSTER) == starts.Commit(143)
    later = json.dumps(json.loads(more) | {"version": 2})
    assert starts.Commit.read(143, later, CLUSTER) == starts.Commit(143)


def test_a_partition_state_without_a_version_is_read_as_version_0():
    state = fences.PartitionState.unpack((FORMATS / "partition-state-0.json").read_bytes())
    assert state == fences.PartitionState(
        epoch=1795581211,
        offset=143,
        state="live",
        caught_up_ms=1795581617690,
        known_from_ms=1795581213000,
        progress=0.5,
        moved_ms=1795581000000,
        former=5,
        count=6,
        version=0,
    )


def test_a_partition_state_of_a_later_release_is_read():
    told = json.loads(fences.PartitionState(1, 2, "live", 3, version=9).pack())
    state = fences.PartitionState.unpack(json.dumps({"outcomes": 1, **told}).encode())
    assert state == fences.PartitionState(1, 2, "live", 3, version=9)


@pytest.mark.parametrize("version", ["1", None, 1.5])
def test_a_partition_state_with_another_kind_of_version_is_refused(version):
    told = json.loads((FORMATS / "partition-state-0.json").read_bytes())
    with pytest.raises(TypeError, match="version"):
        fences.PartitionState.unpack(json.dumps({**told, "version": version}).encode())


def test_a_packed_window_of_version_1_is_read():
    spans = window.Spans(("10m", "1h"))
    packed = bytes.fromhex((FORMATS / "recent-1.hex").read_text())
    recent = packed_windows.unpack(packed, spans)
    assert recent.fence == (1795581211, 143, 1795581299000)
    assert (recent.partition, recent.complete) == (2, True)
    assert recent.lower_ms == 1795581299000 - spans.keep_ms
    assert (len(recent.events), int(recent.tiles["count"].sum())) == (256, 44)
    after_ms, until_ms = 1795581000000 - 1, 1795581299000
    stats, approximate, _ = recent.stats(after_ms, until_ms)
    assert (stats, approximate) == (window.WindowStats(300, sum(range(100, 400))), False)


def test_a_plan_and_a_manifest_of_a_later_release_are_read(tmp_path):
    plan_path = settings.MODEL_PATH.with_name("feature_plan.json")
    plan = layout.Plan.load(plan_path)
    later = tmp_path / "feature_plan.json"
    later.write_text(json.dumps({"views": 1, **json.loads(plan_path.read_text())}))
    assert layout.Plan.load(later) == plan
    manifest = json.loads(models.manifest_path(settings.MODEL_PATH).read_text())
    more = json.dumps({"role": "champion", **manifest}).encode()
    assert models.read_manifest(more) == models.read_manifest(json.dumps(manifest).encode())
    del manifest["threshold"]
    with pytest.raises(TypeError, match="threshold"):
        models.read_manifest(json.dumps(manifest).encode())
