import concurrent.futures
import contextlib
import datetime
import time

import feast_rig
import psycopg
import pytest
from feast_rig import CREDIT_TTL_MS, NOW_MS, stream_rows, utc

from cerberus import errors
from cerberus.features import declared
from cerberus.jobs import feast as feast_store
from cerberus.online import layout

DAY_MS = 86_400_000


@pytest.fixture
def rig(environ, tmp_path):
    with feast_rig.opened(environ, tmp_path) as opened:
        yield opened


def add_scores(rig, *rows):
    for row in rows:
        columns = "(user_id, event_timestamp, credit_score)"
        rig.sql(f"INSERT INTO credit_scores {columns} VALUES (%s, %s, %s)", *row)


def stamps(rig):
    return dict(rig.sql("SELECT credit_score, created_timestamp FROM credit_scores"))


def scores(rig, *user_ids):
    return rig.online(lambda store: store.credit_scores(user_ids, NOW_MS))[0]


def materialized_ms(rig):
    return rig.online(lambda store: store.materialized_ms())


def test_we_read_what_feast_loads_and_history_says_since_when(rig):
    add_scores(
        rig,
        (1, utc(NOW_MS - 2 * DAY_MS), 610),
        (1, utc(NOW_MS - DAY_MS), 611),
        (2, utc(NOW_MS - 29 * DAY_MS), 620),
        (3, utc(NOW_MS - 31 * DAY_MS), 630),  # expired
        (4, utc(NOW_MS + 1), 640),  # not yet
    )
    before = datetime.datetime.now(datetime.UTC)
    loaded = feast_store.materialize(rig.config, NOW_MS)
    assert loaded == feast_store.Loaded(full=True, new_rows=3)
    assert scores(rig, 1, 2, 3, 4) == {1: 611, 2: 620, 3: None, 4: None}
    assert rig.read(1).credit_score == 611
    assert rig.feast_reads([1, 2])["credit_score"] == [611, 620]
    assert rig.redis.hgetall(layout.entity_key(1, layout.PROJECT)) == {
        layout.field(declared.CREDIT_VIEW, "credit_score"): layout.encode_int64(611),
        layout.ts_field(declared.CREDIT_VIEW): layout.encode_timestamp((NOW_MS - DAY_MS) * 1000),
    }
    stamped = stamps(rig)
    assert stamped[630] is stamped[640] is None
    assert all(before <= stamped[score] for score in (610, 611, 620))
    assert materialized_ms(rig) == NOW_MS


def test_a_later_load_takes_what_is_new_wherever_it_lies(rig):
    add_scores(rig, (1, utc(NOW_MS - DAY_MS), 611), (4, utc(NOW_MS + 1), 640))
    feast_store.materialize(rig.config, NOW_MS)
    first = stamps(rig)[611]
    # One that comes late, one that is late and superseded, and one whose time has come.
    add_scores(rig, (5, utc(NOW_MS - 20 * DAY_MS), 650), (1, utc(NOW_MS - 3 * DAY_MS), 612))
    loaded = feast_store.materialize(rig.config, NOW_MS + 1)
    assert loaded == feast_store.Loaded(full=False, new_rows=3)
    assert scores(rig, 1, 4, 5) == {1: 611, 4: 640, 5: 650}
    assert stamps(rig)[611] == first < stamps(rig)[612]
    again = feast_store.materialize(rig.config, NOW_MS + 2)
    assert again == feast_store.Loaded(full=False, new_rows=0)
    assert materialized_ms(rig) == NOW_MS + 2


def test_what_redis_lost_is_loaded_again(rig):
    users = range(20)
    add_scores(rig, *((user_id, utc(NOW_MS - 1000), 600 + user_id) for user_id in users))
    feast_store.materialize(rig.config, NOW_MS)
    rig.redis.flushdb()
    assert scores(rig, 7) == {7: None}
    assert materialized_ms(rig) is None
    loaded = feast_store.materialize(rig.config, NOW_MS)
    assert loaded == feast_store.Loaded(full=True, new_rows=0)
    assert scores(rig, *users) == {user_id: 600 + user_id for user_id in users}


@contextlib.contextmanager
def load_held_up_by(rig, lock):
    """Yield a session that holds `lock` on the scores, and a load that waits for it."""
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,
        psycopg.connect(rig.config.postgres.url) as session,
    ):
        session.execute(f"LOCK TABLE credit_scores IN {lock} MODE")
        load = threads.submit(feast_store.materialize, rig.config, NOW_MS)
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
        deadline = time.monotonic() + 30
        while not rig.sql(waiting, session.info.dbname):
            assert time.monotonic() < deadline, "the load does not wait for the lock"
            assert not load.done(), load.exception()
            time.sleep(0.01)
        yield session, load


def test_a_row_that_comes_during_the_load_stays_new(rig):
    add_scores(rig, (1, utc(NOW_MS - 2), 610))
    with load_held_up_by(rig, "SHARE") as (session, load):  # which lets it read, not stamp
        session.execute("INSERT INTO credit_scores VALUES (2, %s, NULL, 620)", (utc(NOW_MS - 1),))
        session.commit()
        assert load.result(timeout=30).new_rows == 1
    assert stamps(rig)[610] is not None
    assert stamps(rig)[620] is None
    assert scores(rig, 2) == {2: None}
    feast_store.materialize(rig.config, NOW_MS)
    assert scores(rig, 2) == {2: 620}


def test_a_load_during_which_redis_was_emptied_does_not_count(rig):
    add_scores(rig, (1, utc(NOW_MS - 2), 610))
    with load_held_up_by(rig, "ACCESS EXCLUSIVE") as (session, load):
        rig.redis.flushdb()
        session.rollback()
        with pytest.raises(errors.StoreUnavailable, match="emptied"):
            load.result(timeout=30)
    assert stamps(rig) == {610: None}
    assert materialized_ms(rig) is None
    assert feast_store.materialize(rig.config, NOW_MS).full


def test_loading_every_view_by_hand_leaves_the_streamed_rows_alone(rig):
    (row,) = stream_rows(1, seed=5)
    rig.online(lambda store: store.write([row]))
    before = rig.hashes()
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    rig.store.materialize(utc(NOW_MS - CREDIT_TTL_MS), tomorrow)
    assert rig.hashes() == before
