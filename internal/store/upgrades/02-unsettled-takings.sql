-- v1 -> v2 (compatible with v1+): Takings that nothing has settled
-- How many takings in a row, each by another process, nothing has settled.
ALTER TABLE whatsapp_operator_session ADD COLUMN unsettled BIGINT NOT NULL DEFAULT 0;
-- The process of the last taking. NULL: nobody has taken the session since this column exists.
ALTER TABLE whatsapp_operator_session ADD COLUMN taken_by TEXT;
