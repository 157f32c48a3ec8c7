-- One decision a transaction, whichever door it came through first, with what it was taken from.
ALTER TABLE decisions
    ADD COLUMN currency text,
    ADD COLUMN merchant_id text,
    ADD COLUMN decision text,
    ADD COLUMN policy_sha256 text,
    ADD COLUMN fence_partition integer,
    ADD COLUMN latency_ms jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN trace_id text;
-- Before there was a policy, the prediction was the decision.
UPDATE decisions SET policy_sha256 = '',
    decision = CASE prediction WHEN 'FRAUD' THEN 'decline' ELSE 'approve' END;
ALTER TABLE decisions
    ALTER COLUMN decision SET NOT NULL,
    ALTER COLUMN policy_sha256 SET NOT NULL,
    ALTER COLUMN decided_at DROP DEFAULT;
DROP INDEX decisions_of_user;
CREATE INDEX decisions_of_user ON decisions (user_id, as_of_ms DESC, decision_id DESC);
CREATE INDEX decisions_of_transaction ON decisions (transaction_id)
    WHERE transaction_id IS NOT NULL;

-- Every model and policy that has decided, byte for byte, so that any decision can be repeated.
CREATE TABLE artifacts (
    sha256 text PRIMARY KEY,
    kind text NOT NULL,
    content bytea NOT NULL,
    manifest jsonb,
    first_used_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
