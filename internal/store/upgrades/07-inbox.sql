-- v6 -> v7 (compatible with v1+): The inbox: messages that wait for Laravel, and dead letters
-- docs/decisions/0002-inbox.md says why it is made like this. Times are Unix milliseconds of
-- the database's clock.
--
-- One row for each session that ever had a message. It does not refer to the session's record:
-- what waits is delivered also when the record is gone.
CREATE TABLE whatsapp_operator_inbox_head (
	session_id TEXT   NOT NULL PRIMARY KEY,
	namespace  TEXT   NOT NULL,
	-- A session's messages are numbered from 1. Those above head, up to tail, wait.
	tail       BIGINT NOT NULL,
	head       BIGINT NOT NULL,
	-- The sizes of all messages that were ever pushed, and of those that are gone.
	bytes_in   BIGINT NOT NULL,
	bytes_out  BIGINT NOT NULL,
	-- Since when messages wait that are in no batch. NULL: there are none, or a batch is open.
	due        BIGINT,
	-- The open batch, and the number of the session's last message in it.
	batch      TEXT,
	batch_end  BIGINT,
	-- The key of the last pushed message; of a placeholder, with a question mark.
	last_key   TEXT   NOT NULL
);
CREATE INDEX whatsapp_operator_inbox_due ON whatsapp_operator_inbox_head (due) WHERE due IS NOT NULL;

-- The messages. No row is ever updated.
CREATE TABLE whatsapp_operator_inbox (
	session_id TEXT   NOT NULL,
	n          BIGINT NOT NULL,
	key        TEXT   NOT NULL,
	epoch      BIGINT NOT NULL,
	seq        BIGINT NOT NULL,
	size       BIGINT NOT NULL,
	pushed_at  BIGINT NOT NULL,
	-- only: postgres
	payload    BYTEA  NOT NULL,
	-- only: sqlite
	payload    BLOB   NOT NULL,
	PRIMARY KEY (session_id, n)
);

-- The claimed batches, until they are acknowledged.
CREATE TABLE whatsapp_operator_inbox_batch (
	id             TEXT   NOT NULL PRIMARY KEY,
	-- Names the claim whose answer may have been lost; empty: the batch was released.
	token          TEXT   NOT NULL,
	-- How many times it was claimed.
	attempt        BIGINT NOT NULL,
	claimable_from BIGINT NOT NULL,
	-- How many sessions it has, and which messages: JSON, [{"s": session, "a": first, "b": last, "z": bytes}].
	sessions       BIGINT NOT NULL,
	ranges         TEXT   NOT NULL
);

CREATE TABLE whatsapp_operator_dead_letter (
	-- only: postgres
	id         BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	-- only: sqlite
	id         INTEGER PRIMARY KEY AUTOINCREMENT,
	namespace  TEXT   NOT NULL,
	session_id TEXT   NOT NULL,
	key        TEXT   NOT NULL,
	epoch      BIGINT NOT NULL,
	seq        BIGINT NOT NULL,
	size       BIGINT NOT NULL,
	batch_id   TEXT   NOT NULL,
	reason     TEXT   NOT NULL,
	answer     TEXT   NOT NULL,
	dead_since BIGINT NOT NULL,
	-- only: postgres
	payload    BYTEA  NOT NULL
	-- only: sqlite
	payload    BLOB   NOT NULL
);
CREATE INDEX whatsapp_operator_dead_letter_time ON whatsapp_operator_dead_letter (dead_since);

-- only: postgres until "end only"
-- A new session looks for messages that wait under its id: ids that differ only by case are one.
CREATE INDEX whatsapp_operator_inbox_head_folded ON whatsapp_operator_inbox_head (lower(session_id COLLATE "C"));
-- Room in each page for the next version of a row, so that a push changes no index.
ALTER TABLE whatsapp_operator_inbox_head SET (fillfactor = 50);
-- Not compressed: compression would cost each push more than it saves of a short stay.
ALTER TABLE whatsapp_operator_inbox ALTER COLUMN payload SET STORAGE EXTERNAL;
-- end only postgres
-- only: sqlite
CREATE INDEX whatsapp_operator_inbox_head_folded ON whatsapp_operator_inbox_head (lower(session_id));
