-- The truth as it was told, one row a telling, never changed. seen_ms: when it first reached us.
CREATE TABLE labels (
    transaction_id text NOT NULL,
    user_id bigint,
    label text COLLATE "C" NOT NULL CHECK (label IN ('fraud', 'chargeback', 'account_takeover',
        'friendly_fraud', 'legitimate', 'false_positive')),
    source text COLLATE "C" NOT NULL,
    labelled_ms bigint NOT NULL,
    seen_ms bigint NOT NULL,
    -- Its order is also that of labels_as_of.
    UNIQUE NULLS NOT DISTINCT (transaction_id, user_id, labelled_ms, label, source)
);

-- What the views need of the settings.
CREATE TABLE label_rules (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    maturity_ms bigint NOT NULL,
    friendly_fraud_positive boolean NOT NULL
);
INSERT INTO label_rules (maturity_ms, friendly_fraud_positive) VALUES (30 * 86400000::bigint, false);

-- The label that was known of each transaction at t: the newest of those that had reached us. One
-- without user_id speaks of every transaction of that id.
CREATE FUNCTION labels_as_of(t_ms bigint) RETURNS SETOF labels
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT DISTINCT ON (transaction_id, user_id) * FROM labels WHERE seen_ms <= t_ms
    ORDER BY transaction_id, user_id, labelled_ms DESC, seen_ms DESC, label DESC, source DESC
$$;

-- Each decision on a transaction as it stood at t: features as served, the label as known, whether
-- it is mature, and the truth (null: nobody knows).
CREATE FUNCTION training_rows_as_of(t_ms bigint) RETURNS TABLE (
    decision_id uuid, transaction_id text, user_id bigint, as_of_ms bigint, amount_minor bigint,
    currency text, merchant_id text, door text, features jsonb, degraded text[],
    approximate boolean, score double precision, probability double precision, prediction text,
    decision text, model_sha256 text, policy_sha256 text, decided_at timestamptz, label text,
    label_source text, labelled_ms bigint, label_seen_ms bigint, matured boolean, truth boolean)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT d.decision_id, d.transaction_id, d.user_id, d.as_of_ms, d.amount_minor, d.currency,
        d.merchant_id, d.door, d.features, d.degraded, d.approximate, d.score, d.probability,
        d.prediction, d.decision, d.model_sha256, d.policy_sha256, d.decided_at,
        (known.told).label, (known.told).source, (known.told).labelled_ms, (known.told).seen_ms,
        old.enough,
        CASE
            WHEN (known.told).label IN ('fraud', 'chargeback', 'account_takeover') THEN true
            WHEN (known.told).label = 'friendly_fraud' THEN rules.friendly_fraud_positive
            WHEN (known.told).label IS NOT NULL THEN false
            WHEN old.enough AND d.decision <> 'decline' THEN false
        END
    FROM decisions AS d
    CROSS JOIN label_rules AS rules
    LEFT JOIN labels_as_of(t_ms) AS own
        ON own.transaction_id = d.transaction_id AND own.user_id = d.user_id
    LEFT JOIN labels_as_of(t_ms) AS shared
        ON shared.transaction_id = d.transaction_id AND shared.user_id IS NULL
    CROSS JOIN LATERAL (SELECT CASE
        WHEN own.label IS NULL
            OR (shared.labelled_ms, shared.seen_ms, shared.label, shared.source)
            > (own.labelled_ms, own.seen_ms, own.label, own.source) THEN shared
        ELSE own
    END) AS known (told)
    CROSS JOIN LATERAL (SELECT d.as_of_ms <= t_ms - rules.maturity_ms
        AND d.decided_at <= timestamptz 'epoch'
            + (t_ms - rules.maturity_ms) * interval '1 millisecond') AS old (enough)
    WHERE d.transaction_id IS NOT NULL
        AND d.decided_at <= timestamptz 'epoch' + t_ms * interval '1 millisecond'
$$;
CREATE VIEW training_rows AS
    SELECT * FROM training_rows_as_of((extract(epoch FROM now()) * 1000)::bigint);
CREATE VIEW matured_decisions AS SELECT * FROM training_rows WHERE matured;

-- What the synthetic population's frauds are, and when that will be found out.
CREATE TABLE synthetic_truth (
    transaction_id text PRIMARY KEY,
    user_id bigint NOT NULL,
    label text NOT NULL,
    due_ms bigint NOT NULL
);
CREATE INDEX synthetic_truth_due ON synthetic_truth (due_ms);
