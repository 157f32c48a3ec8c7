import datetime
import importlib
import random
import struct

import feast_rig
import psycopg
import pytest
from feast_rig import CREDIT_TTL_MS, NOW_MS, SPANS, frame, stream_rows, utc
from hypothesis import given
from hypothesis import strategies as st

from cerberus.features import declared, packed
from cerberus.online import layout

int64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module", autouse=True)
def _feast_is_imported():
    importlib.import_module("feast")  # seconds that belong to no single test


@pytest.fixture
def rig(environ, tmp_path):
    with feast_rig.opened(environ, tmp_path) as opened:
        yield opened


@given(int64, st.floats(), st.binary(max_size=300))
def test_scalars_are_written_and_read_as_feast_does(whole, real, raw):
    from feast.protos.feast.types.Value_pb2 import Value

    for theirs, ours in (
        (Value(int64_val=whole), layout.encode_int64(whole)),
        (Value(double_val=real), layout.encode_double(real)),
        (Value(bytes_val=raw), layout.encode_bytes(raw)),
    ):
        assert theirs.SerializeToString() == ours
        kind = theirs.WhichOneof("val")
        assert kind is not None
        value, wanted = layout.decode(ours), getattr(theirs, kind)
        assert type(value) is type(wanted)
        if isinstance(value, float):
            value, wanted = struct.pack("<d", value), struct.pack("<d", wanted)
        assert value == wanted
    assert Value().SerializeToString() == layout.encode_int64(None)


@given(st.integers(-(10**15), 10**16))
def test_timestamps_are_written_and_read_as_feast_does(us):
    from google.protobuf.timestamp_pb2 import Timestamp

    stamp = Timestamp()
    stamp.FromMicroseconds(us)
    assert stamp.SerializeToString() == layout.encode_timestamp(us)
    assert layout.decode_timestamp(stamp.SerializeToString()) == us


@given(int64, st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,20}", fullmatch=True))
def test_keys_are_written_as_feast_does(user_id, project):
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    key = EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user_id)])
    assert layout.entity_key(user_id, project) == _redis_key(project, key)


@given(st.text(max_size=30), st.text(max_size=30))
def test_fields_are_hashed_as_feast_does(view, feature):
    from feast.infra.online_stores.helpers import _mmh3

    assert layout.field(view, feature) == _mmh3(f"{view}:{feature}")


def stream_frames(rows):
    at = [{"user_id": row.user_id, "event_timestamp": utc()} for row in rows]
    stats = [
        {
            "transaction_count_10m": row.stats[0].count,
            "total_amount_10m": row.stats[0].total_minor / 100,
            "created_timestamp": utc(),
        }
        for row in rows
    ]
    recent = [{"recent": row.recent} for row in rows]
    return {
        declared.STATS_VIEW: frame([a | b for a, b in zip(at, stats, strict=True)]),
        declared.WINDOW_VIEW: frame([a | b for a, b in zip(at, recent, strict=True)]),
    }


def test_feast_reads_what_we_write(rig):
    rows = stream_rows(50, seed=1)
    assert not rig.online(lambda store: store.write(rows))
    answer = rig.feast_reads([row.user_id for row in rows])
    assert answer == {
        "user_id": [row.user_id for row in rows],
        "transaction_count_10m": [row.stats[0].count for row in rows],
        "total_amount_10m": [row.stats[0].total_minor / 100 for row in rows],
        "recent": [row.recent for row in rows],
        "credit_score": [None] * len(rows),
    }
    types = {name: {type(value) for value in values} for name, values in answer.items()}
    assert types["transaction_count_10m"] == {int}
    assert types["total_amount_10m"] == {float}


def test_we_read_what_feast_is_pushed(rig):
    rows = stream_rows(12, seed=2)
    frames = stream_frames(rows)
    rig.store.push("user_window_stream", frames[declared.WINDOW_VIEW])
    rig.store.push("user_transaction_stats_stream", frames[declared.STATS_VIEW])
    count = layout.field(declared.STATS_VIEW, "transaction_count_10m")
    for row in rows:
        recent, wanted = rig.read(row.user_id).recent, packed.unpack(row.recent, SPANS)
        assert recent.fence == row.fence
        assert (recent.partition, recent.complete) == (row.partition, wanted.complete)
        assert (recent.lower_ms, recent.tile_ms) == (wanted.lower_ms, wanted.tile_ms)
        assert recent.events.tobytes() == wanted.events.tobytes()
        assert recent.tiles.tobytes() == wanted.tiles.tobytes()
        key = layout.entity_key(row.user_id, layout.PROJECT)
        assert layout.decode(rig.redis.hget(key, count)) == row.stats[0].count


def test_our_hashes_equal_feasts_to_the_byte(rig):
    rows = stream_rows(50, seed=3)
    rig.online(lambda store: store.write(rows))
    ours = rig.hashes()
    rig.redis.flushdb()
    for view, table in stream_frames(rows).items():
        rig.store.write_to_online_store(view, table)
    assert len(ours) == len(rows)
    assert rig.hashes() == ours


def test_feast_serves_what_has_expired_and_we_do_not(rig):
    (row,) = stream_rows(1, seed=4)
    rig.online(lambda store: store.write([row]))
    score = {"credit_score": 700, "event_timestamp": utc(), "created_timestamp": utc()}
    rig.store.write_to_online_store(declared.CREDIT_VIEW, frame([{"user_id": row.user_id} | score]))
    for ttl_ms, part in ((SPANS.keep_ms, "recent"), (CREDIT_TTL_MS, "credit_score")):
        assert getattr(rig.read(row.user_id, NOW_MS + ttl_ms), part) is not None
        assert getattr(rig.read(row.user_id, NOW_MS + ttl_ms + 1), part) is None
    assert utc(NOW_MS + CREDIT_TTL_MS) < datetime.datetime.now(datetime.UTC)  # all is expired
    answer = rig.feast_reads([row.user_id])
    assert (answer["recent"], answer["credit_score"]) == ([row.recent], [700])


def history(rig, asked):
    """Ask Feast for the service's features of (user, moment) pairs; None where there is none."""
    table = frame(
        [{"asked": i, "user_id": u, "event_timestamp": t} for i, (u, t) in enumerate(asked)]
    )
    service = rig.store.get_feature_service("fraud_model")
    job = rig.store.get_historical_features(table, service, filter_by_created_timestamp=True)
    answer = job.to_df().sort_values("asked").astype(object)
    answer = answer.where(answer.notna(), None)
    names = ["transaction_count_10m", "total_amount_10m", "credit_score"]
    return [tuple(row) for row in answer[names].itertuples(index=False)]


def insert_history(rig, stats, credit):
    with psycopg.connect(rig.config.postgres.url) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO user_transaction_stats (user_id, event_timestamp, created_timestamp, "
            "epoch, log_offset, transaction_count_10m, total_amount_10m) "
            "VALUES (%s, %s, %s, 1, 1, %s, %s)",
            [(*row, row[-1] / 4) for row in stats],
        )
        cursor.executemany(
            "INSERT INTO credit_scores (user_id, event_timestamp, created_timestamp, credit_score) "
            "VALUES (%s, %s, %s, %s)",
            credit,
        )


def test_history_is_point_in_time(rig):
    ttl, hour = SPANS.keep_ms, 3_600_000
    stats = [  # user, when it happened, when it was known, value
        (1, utc(NOW_MS - ttl), utc(NOW_MS - ttl), 11),  # exactly as old as may be
        (2, utc(NOW_MS - ttl, us=-1), utc(NOW_MS - ttl), 12),  # one µs older
        (3, utc(NOW_MS), utc(NOW_MS), 13),  # this very moment
        (4, utc(NOW_MS, us=1), utc(NOW_MS), 14),  # one µs in the future
        (5, utc(NOW_MS - 9), utc(NOW_MS, us=1), 15),  # happened before, known after
        (6, utc(NOW_MS - 9), utc(NOW_MS - 9), 16),
        (6, utc(NOW_MS - 9, us=1), utc(NOW_MS), 17),  # the second event of one ms
        (6, utc(NOW_MS - 5), utc(NOW_MS + hour), 18),  # newest, but known an hour later
    ]
    credit = [
        (1, utc(NOW_MS - CREDIT_TTL_MS), utc(NOW_MS), 610),
        (2, utc(NOW_MS - CREDIT_TTL_MS, us=-1), utc(NOW_MS), 620),
        (3, utc(NOW_MS - 1), None, 630),  # never loaded
        (6, utc(NOW_MS - hour), utc(NOW_MS), 660),
        (6, utc(NOW_MS - 1), utc(NOW_MS, us=1), 661),
    ]
    insert_history(rig, stats, credit)
    assert history(rig, [(user_id, utc()) for user_id in range(1, 8)]) == [
        (11, 11 / 4, 610),
        (None, None, None),
        (13, 13 / 4, None),
        (None, None, None),
        (None, None, None),
        (17, 17 / 4, 660),
        (None, None, None),
    ]


def latest(rows, user_id, moment, ttl_ms):
    """Return what was known at a moment, by looking at every row."""
    oldest = moment - datetime.timedelta(milliseconds=ttl_ms)
    known = [
        (event, value)
        for owner, event, created, value in rows
        if owner == user_id and created <= moment and oldest <= event <= moment
    ]
    return max(known, default=(None, None))[1]


def test_history_equals_a_search_through_all_rows(rig):
    rng = random.Random(6)
    steps = (SPANS.keep_ms // 4, CREDIT_TTL_MS // 4)

    def moment(step_ms):
        return utc(NOW_MS - rng.randrange(40) * step_ms, us=rng.choice((-1, 0, 0, 1)))

    def rows(step_ms):
        late = datetime.timedelta(milliseconds=step_ms)
        made = {(rng.randrange(8), moment(step_ms)): value for value in range(80)}
        return [(u, t, t + rng.randrange(2) * late, value) for (u, t), value in made.items()]

    stats, credit = map(rows, steps)
    insert_history(rig, stats, credit)
    asked = [(rng.randrange(9), moment(rng.choice(steps))) for _ in range(400)]
    wanted = []
    for user_id, at in asked:
        count = latest(stats, user_id, at, SPANS.keep_ms)
        total = None if count is None else count / 4
        wanted.append((count, total, latest(credit, user_id, at, CREDIT_TTL_MS)))
    assert {row[0] is None for row in wanted} == {row[2] is None for row in wanted} == {True, False}
    assert history(rig, asked) == wanted


def test_feasts_sessions_do_without_nested_loops(rig):
    from feast.infra.utils.postgres.connection_utils import _get_conn

    with _get_conn(rig.store.config.offline_store) as connection:
        query = "SELECT current_setting('enable_nestloop'), current_schema()"
        assert connection.execute(query).fetchone() == ("off", "public")
