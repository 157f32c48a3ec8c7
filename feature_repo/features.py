"""The Feast definitions: one entity, three views, one service.

`feast apply` reads this file in this directory. Names and TTLs follow the window definition in
`feature_store.yaml`, which `python -m cerberus features render` writes together with the addresses.
"""

import datetime
import pathlib
import sys

import yaml
from feast import Entity, FeatureService, FeatureView, Field, PushSource, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
)
from feast.types import Bytes, Float64, Int64

REPO = pathlib.Path(__file__).parent
sys.path.append(str(REPO.parent))  # `feast apply` runs here, where the package is not on the path

from cerberus import window  # noqa: E402
from cerberus.features import declared  # noqa: E402

spans = window.Spans(**yaml.safe_load((REPO / "feature_store.yaml").read_text())["window"])
stream_ttl = datetime.timedelta(milliseconds=spans.keep_ms)
types = {declared.INTEGER: Int64, declared.NUMBER: Float64}

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
user_id = Field(name="user_id", dtype=Int64)


def field(feature: declared.Feature) -> Field:
    """Translate a declared feature into Feast's terms."""
    return Field(name=feature.name, dtype=types[feature.kind])


user_transaction_stats = FeatureView(
    name=declared.STATS_VIEW,
    description="Count and total of each window as of the user's last transaction, itself included",
    entities=[user],
    ttl=stream_ttl,
    schema=[user_id, *map(field, declared.streamed(spans.names))],
    source=PushSource(
        name="user_transaction_stats_stream",
        batch_source=PostgreSQLSource(
            name="user_transaction_stats_history",
            table="user_transaction_stats",
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
    ),
)

user_window = FeatureView(
    name=declared.WINDOW_VIEW,
    description="The packed window that decisions are computed from; it has no history",
    entities=[user],
    ttl=stream_ttl,
    schema=[user_id, Field(name="recent", dtype=Bytes)],
    source=PushSource(
        name="user_window_stream",
        # Feast requires a table behind every stream; this one is empty, so loading it does nothing.
        batch_source=PostgreSQLSource(
            name="user_window_nowhere",
            query=(
                "SELECT 0::bigint AS user_id, ''::bytea AS recent, now() AS event_timestamp "
                "WHERE false"
            ),
            timestamp_field="event_timestamp",
        ),
    ),
)

user_credit = FeatureView(
    name=declared.CREDIT_VIEW,
    description="The credit score, 300 to 850, loaded by `python -m cerberus materialize`",
    entities=[user],
    ttl=datetime.timedelta(days=30),
    schema=[user_id, *map(field, declared.BATCH)],
    source=PostgreSQLSource(
        name="credit_scores",
        table="credit_scores",
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    ),
)

fraud_model = FeatureService(name="fraud_model", features=[user_transaction_stats, user_credit])
