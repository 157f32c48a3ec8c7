-- In the order of pages, so that one is read without a sort.
DROP INDEX decisions_of_transaction;
CREATE INDEX decisions_of_transaction ON decisions (transaction_id, as_of_ms DESC, decision_id DESC)
    WHERE transaction_id IS NOT NULL;
