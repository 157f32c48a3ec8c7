-- What a replay does not reach is the end of a table in the order of time: a few kB find it.
CREATE INDEX transactions_event_ms ON transactions USING brin (event_ms)
    WITH (autosummarize = on);
