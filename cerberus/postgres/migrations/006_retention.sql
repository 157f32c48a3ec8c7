-- What lies in no month's partition is found by its time, also when it arrives late.
CREATE INDEX transactions_default_event_ms ON transactions_default (event_ms);
CREATE INDEX decisions_default_as_of_ms ON decisions_default (as_of_ms);
CREATE INDEX labels_labelled_ms ON labels (labelled_ms);
