-- After a schema break consumers go on when this changes; what is refused below the ends is excused.
CREATE TABLE log_resumes (
    topic text PRIMARY KEY,
    number bigint NOT NULL DEFAULT 1,
    epoch bigint NOT NULL,
    ends bigint[] NOT NULL,
    resumed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
