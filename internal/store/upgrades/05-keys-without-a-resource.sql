-- v4 -> v5 (compatible with v1+): Keys whose resource has gone in any way
-- Since when no resource has been found for the record.
ALTER TABLE whatsapp_operator_session ADD COLUMN missing_since BIGINT;
-- Since when the keys have been kept on purpose, without a resource.
ALTER TABLE whatsapp_operator_session ADD COLUMN retained_at BIGINT;
-- Which of the records are kept on purpose was not written down before. All count as such
-- until their resource is found, so that none is deleted by mistake.
UPDATE whatsapp_operator_session SET retained_at=updated_at WHERE orphaned_at IS NULL;
