-- v0 -> v1 (compatible with v1+): Sessions, marked devices, the installation
CREATE TABLE whatsapp_operator_session (
	session_id  TEXT   NOT NULL PRIMARY KEY,
	namespace   TEXT   NOT NULL,
	uid         TEXT   NOT NULL UNIQUE,
	-- The linked device; NULL: none. Two sessions never share one.
	jid         TEXT   UNIQUE REFERENCES whatsmeow_device(jid) ON UPDATE CASCADE ON DELETE SET NULL,
	epoch       BIGINT NOT NULL DEFAULT 0,
	starts      BIGINT NOT NULL DEFAULT 0,
	-- Times are Unix milliseconds. NULL: the session's resource exists, or its keys are kept on purpose.
	orphaned_at BIGINT,
	created_at  BIGINT NOT NULL,
	updated_at  BIGINT NOT NULL
);

CREATE TABLE whatsapp_operator_marked_device (
	-- The name under which the device's rows are kept.
	marked_jid TEXT   NOT NULL PRIMARY KEY REFERENCES whatsmeow_device(jid) ON DELETE CASCADE ON UPDATE CASCADE,
	-- The name that it had.
	jid        TEXT   NOT NULL,
	session_id TEXT,
	reason     TEXT   NOT NULL,
	marked_at  BIGINT NOT NULL
);
CREATE INDEX whatsapp_operator_marked_device_session ON whatsapp_operator_marked_device (session_id);
CREATE INDEX whatsapp_operator_marked_device_time ON whatsapp_operator_marked_device (marked_at);

CREATE TABLE whatsapp_operator_installation (
	one INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
	id  TEXT    NOT NULL
);

-- whatsmeow looks for old events without an index; the janitor's slices need one.
CREATE INDEX whatsapp_operator_event_buffer_time ON whatsmeow_event_buffer (insert_timestamp);
