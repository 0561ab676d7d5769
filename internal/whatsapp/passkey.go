package whatsapp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/util/jsonbytes"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// maxPasskeyTimeout is the maximum for the time-out that WhatsApp sends, in milliseconds.
const maxPasskeyTimeout = int(24 * time.Hour / time.Millisecond)

// requestOptions is types.WebAuthnPublicKey without the fields that WhatsApp left out:
// browsers refuse null instead of a list.
type requestOptions struct {
	Challenge        jsonbytes.UnpaddedURLBytes `json:"challenge"`
	Timeout          int                        `json:"timeout,omitempty"`
	RelyingParty     string                     `json:"rpId,omitempty"`
	AllowCredentials []allowedCredential        `json:"allowCredentials,omitempty"`
	UserVerification string                     `json:"userVerification,omitempty"`
	Extensions       map[string]any             `json:"extensions,omitempty"`
}

type allowedCredential struct {
	ID         jsonbytes.UnpaddedURLBytes `json:"id"`
	Type       string                     `json:"type"`
	Transports []string                   `json:"transports,omitempty"`
}

// passkeyRequest turns WhatsApp's request for a passkey into an event.
func passkeyRequest(key *types.WebAuthnPublicKey, now time.Time) Event {
	if key == nil || len(key.Challenge) == 0 {
		return Event{Type: EventPasskeyFailed, Message: "WhatsApp's request for the passkey has no challenge"}
	}
	options := requestOptions{
		Challenge: key.Challenge, Timeout: min(max(key.Timeout, 0), maxPasskeyTimeout), RelyingParty: key.RelyingPartID,
		UserVerification: key.UserVerification, Extensions: key.Extensions,
	}
	for _, c := range key.AllowCredentials {
		options.AllowCredentials = append(options.AllowCredentials, allowedCredential{ID: c.ID, Type: c.Type, Transports: c.Transports})
	}
	text, err := json.Marshal(options)
	if err != nil || len(text) > session.MaxPasskeyJSON {
		return Event{Type: EventPasskeyFailed, Message: fmt.Sprintf("WhatsApp's request for the passkey has more than %d characters", session.MaxPasskeyJSON)}
	}
	e := Event{Type: EventPasskeyRequest, PasskeyOptions: string(text)}
	if options.Timeout > 0 {
		e.Until = now.Add(time.Duration(options.Timeout) * time.Millisecond)
	}
	return e
}

// AnswerPasskey sends WhatsApp the answer of the account's passkey to the request of
// EventPasskeyRequest: JSON, as PublicKeyCredential.toJSON writes it. The caller has
// checked it with session.CheckPasskeyResponse.
func (c *Connection) AnswerPasskey(ctx context.Context, response string) (err error) {
	defer c.guardPasskey(&err)
	var r types.WebAuthnResponse
	if err := json.Unmarshal([]byte(response), &r); err != nil {
		return errors.New("the answer of the passkey cannot be read")
	}
	if err := c.client.SendPasskeyResponse(ctx, &r); err != nil {
		return fmt.Errorf("sending the answer of the passkey: %w", err)
	}
	return nil
}

// ConfirmPasskey confirms that the code of EventPasskeyConfirmation is the one that the
// phone shows, or that WhatsApp wants no comparison.
func (c *Connection) ConfirmPasskey(ctx context.Context) (err error) {
	defer c.guardPasskey(&err)
	if err := c.client.SendPasskeyConfirmation(ctx); err != nil {
		return fmt.Errorf("confirming the passkey: %w", err)
	}
	return nil
}

// guardPasskey turns a panic of the library into an error.
func (c *Connection) guardPasskey(err *error) {
	if r := recover(); r != nil {
		c.panicked(r, "a step of a pairing with a passkey", true)
		*err = errors.New("whatsmeow failed")
	}
}
