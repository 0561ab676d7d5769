-- v2 -> v3 (compatible with v1+): Former installations
-- The installations from which a person took this store over: the manager takes over the
-- sessions whose status names one of them.
CREATE TABLE whatsapp_operator_former_installation (
	id      TEXT   NOT NULL PRIMARY KEY,
	left_at BIGINT NOT NULL
);
