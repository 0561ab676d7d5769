-- v3 -> v4 (compatible with v1+): Session ids that differ only by case are one id, epochs have a maximum
-- True: another record has the same id but for upper and lower case and comes before this
-- one, which nobody may take.
ALTER TABLE whatsapp_operator_session ADD COLUMN duplicate BOOLEAN NOT NULL DEFAULT false;
-- The one that has a resource comes first, then the older one.
-- only: postgres until "end only"
UPDATE whatsapp_operator_session AS s SET duplicate=true WHERE EXISTS (
	SELECT 1 FROM whatsapp_operator_session AS o
	WHERE o.uid<>s.uid AND lower(o.session_id COLLATE "C")=lower(s.session_id COLLATE "C")
		AND (o.orphaned_at IS NOT NULL, o.created_at, o.uid) < (s.orphaned_at IS NOT NULL, s.created_at, s.uid)
);
CREATE UNIQUE INDEX whatsapp_operator_session_folded ON whatsapp_operator_session (lower(session_id COLLATE "C")) WHERE NOT duplicate;
-- end only postgres
-- only: sqlite until "end only"
UPDATE whatsapp_operator_session SET duplicate=true WHERE EXISTS (
	SELECT 1 FROM whatsapp_operator_session AS o
	WHERE o.uid<>whatsapp_operator_session.uid AND lower(o.session_id)=lower(whatsapp_operator_session.session_id)
		AND (o.orphaned_at IS NOT NULL, o.created_at, o.uid)
			< (whatsapp_operator_session.orphaned_at IS NOT NULL, whatsapp_operator_session.created_at, whatsapp_operator_session.uid)
);
CREATE UNIQUE INDEX whatsapp_operator_session_folded ON whatsapp_operator_session (lower(session_id)) WHERE NOT duplicate;
-- end only sqlite
-- Nobody could be placed above an epoch beyond the maximum (2^53 - 1).
UPDATE whatsapp_operator_session SET epoch=9007199254740991 WHERE epoch>9007199254740991;
UPDATE whatsapp_operator_session SET epoch=0 WHERE epoch<0;
