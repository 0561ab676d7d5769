-- v7 -> v8 (compatible with v1+): The secrets of messages, with the time at which they were stored
-- Edits, poll votes and the like of a message can only be read with its secret, and phones send
-- one with most messages. The table whatsmeow_message_secrets has no time, so nothing could ever
-- be deleted from it: the janitor moves its rows here, in slices.
CREATE TABLE whatsapp_operator_message_secret (
	our_jid    TEXT   NOT NULL REFERENCES whatsmeow_device(jid) ON UPDATE CASCADE ON DELETE CASCADE,
	chat_jid   TEXT   NOT NULL,
	sender_jid TEXT   NOT NULL,
	message_id TEXT   NOT NULL,
	-- only: postgres
	secret     BYTEA  NOT NULL,
	-- only: sqlite
	secret     BLOB   NOT NULL,
	-- Unix milliseconds.
	stored_at  BIGINT NOT NULL,
	PRIMARY KEY (our_jid, chat_jid, sender_jid, message_id)
);
CREATE INDEX whatsapp_operator_message_secret_time ON whatsapp_operator_message_secret (stored_at);
