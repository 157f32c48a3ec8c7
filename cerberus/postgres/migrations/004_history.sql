-- Files that are imported, and how far: a restart goes on behind these rows.
CREATE TABLE imports (
    fingerprint text PRIMARY KEY,
    kind text NOT NULL,
    file text NOT NULL,
    size_bytes bigint NOT NULL,
    rows_done bigint NOT NULL DEFAULT 0,
    lines_done bigint NOT NULL DEFAULT 0,
    bytes_done bigint NOT NULL DEFAULT 0,
    added bigint NOT NULL DEFAULT 0,
    rejected bigint NOT NULL DEFAULT 0,
    rejects_bytes bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);

-- Whose history is still to be computed from imported transactions, and of which time.
CREATE TABLE history_due (
    user_id bigint PRIMARY KEY,
    low_ms bigint NOT NULL,
    high_ms bigint NOT NULL
);

-- Where each life of a log began when it was first read: what was imported of later times is not
-- counted by its windows, for the log tells it.
CREATE TABLE log_begins (
    topic text NOT NULL,
    epoch bigint NOT NULL,
    partition integer NOT NULL,
    begin_ms bigint NOT NULL,
    PRIMARY KEY (topic, epoch, partition)
);
CREATE INDEX transactions_imported ON transactions (event_ms) WHERE topic = 'import';

-- Up to when (exclusive) each table was cleared of what is older than is kept.
CREATE TABLE retention (
    table_name text PRIMARY KEY,
    kept_from_ms bigint NOT NULL
);
