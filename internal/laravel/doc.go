// Package laravel sends batches of updates to the tenant's web application, and says what
// each answer means (docs/architecture.md, "Delivery to Laravel").
//
// A request is
//
//	POST <base URL>/qr/batch or /whatsapp/status/batch
//	Authorization: Bearer <token>
//	webhook-id: <batch id>              the idempotency key, the same at each repeat
//	webhook-timestamp: <Unix seconds>   the time of this attempt
//	webhook-signature: v1,<base64>      one for each signing secret, separated by spaces
//	{"batch_id": …, "sent_at": …, "items": […]}
//
// signed as the Standard Webhooks specification says
// (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
// Classify is the table that gives each answer its result; it is pure. Client does the
// I/O: it never follows a redirect, reads a bounded part of the answer, and
// reads its secrets again when their files change. The details that it reports of an
// answer contain no secret and at most 512 bytes of the answer's text.
package laravel
