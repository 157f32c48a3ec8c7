-- What a file held and how it was read, to say later what is known of it.
ALTER TABLE imports
    ADD COLUMN content text,
    ADD COLUMN reading text,
    ADD COLUMN differing bigint NOT NULL DEFAULT 0,
    ADD COLUMN left_out bigint NOT NULL DEFAULT 0;
CREATE INDEX imports_file ON imports (kind, file, finished_at);
