-- Which life of a topic its offsets belong to: every change draws a greater number.
CREATE SEQUENCE log_epoch;

CREATE TABLE log_epochs (
    topic text PRIMARY KEY,
    cluster text NOT NULL,
    partitions integer NOT NULL,
    epoch bigint NOT NULL DEFAULT nextval('log_epoch')
);

-- How far the effects of a partition are stored (exclusive), one row a life.
CREATE TABLE log_positions (
    topic text NOT NULL,
    epoch bigint NOT NULL,
    partition integer NOT NULL,
    log_offset bigint NOT NULL,
    PRIMARY KEY (topic, epoch, partition)
);

-- What happened, one row an identity; the lowest offset of the newest epoch stands.
CREATE TABLE transactions (
    user_id bigint NOT NULL,
    event_ms bigint NOT NULL,
    transaction_id text NOT NULL,
    amount_minor bigint NOT NULL,
    currency text NOT NULL,
    merchant_id text NOT NULL,
    topic text NOT NULL,
    epoch bigint NOT NULL,
    partition integer NOT NULL,
    log_offset bigint NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, event_ms, transaction_id)
) PARTITION BY RANGE (event_ms);
CREATE TABLE transactions_default PARTITION OF transactions DEFAULT;

-- The streamed view's history, one row an event, own event included. A source of Feast. The
-- columns of each window (transaction_count_10m, …) are added from the window definition.
CREATE TABLE user_transaction_stats (
    user_id bigint NOT NULL,
    event_timestamp timestamptz NOT NULL,
    created_timestamp timestamptz NOT NULL DEFAULT clock_timestamp(),
    epoch bigint NOT NULL,
    log_offset bigint NOT NULL,
    PRIMARY KEY (user_id, event_timestamp)
);

-- A source of Feast. created_timestamp is when the row was loaded to the online store, null until
-- then: history knows a score from when it could be served on, never before.
CREATE TABLE credit_scores (
    user_id bigint NOT NULL,
    event_timestamp timestamptz NOT NULL,
    created_timestamp timestamptz,
    credit_score bigint NOT NULL,
    PRIMARY KEY (user_id, event_timestamp)
);

-- What was decided and from which values. Fence: the prefix of the log that the values describe.
CREATE TABLE decisions (
    decision_id uuid NOT NULL,
    as_of_ms bigint NOT NULL,
    user_id bigint NOT NULL,
    transaction_id text,
    amount_minor bigint,
    door text NOT NULL,
    features jsonb NOT NULL,
    degraded text[] NOT NULL,
    approximate boolean NOT NULL,
    score double precision NOT NULL,
    probability double precision NOT NULL,
    prediction text NOT NULL,
    model_sha256 text NOT NULL,
    fence_epoch bigint,
    fence_offset bigint,
    fence_as_of_ms bigint,
    decided_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (decision_id, as_of_ms)
) PARTITION BY RANGE (as_of_ms);
CREATE TABLE decisions_default PARTITION OF decisions DEFAULT;
CREATE INDEX decisions_of_user ON decisions (user_id, as_of_ms);
