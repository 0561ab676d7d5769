-- v5 -> v6 (compatible with v1+): Trials of sessions that may end their process
-- The size of the group in which the session was last connected on trial. 0: none, or the process survived it.
ALTER TABLE whatsapp_operator_session ADD COLUMN trial BIGINT NOT NULL DEFAULT 0;
