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
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// maxPasskeyTimeout is the maximum for the time-out that WhatsApp sends, in milliseconds.
const maxPasskeyTimeout = int(24 * time.Hour / time.Millisecond)

// maxExtensionDepth is how deep the extensions of a request may be nested; real ones are two
// deep. Laravel reads a whole batch with PHP's json_decode, which refuses more than 512.
const maxExtensionDepth = 8

// answerable are the sites of requests that a browser takes on the page where a person asks
// the passkey: the page's own (also where the request names none) and the domain above it
// (Web Authentication Level 3, section 5.1.4.1). No other request is shown: a person who
// answered it elsewhere would give away the passkey of another site.
var answerable = map[string]bool{"": true, "whatsapp.com": true, session.WhatsAppPage: true}

// depth returns how deep a value of encoding/json is nested.
func depth(value any) (deepest int) {
	switch v := value.(type) {
	case map[string]any:
		for _, inner := range v {
			deepest = max(deepest, 1+depth(inner))
		}
	case []any:
		for _, inner := range v {
			deepest = max(deepest, 1+depth(inner))
		}
	}
	return deepest
}

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
	if !answerable[key.RelyingPartID] {
		return Event{Type: EventPasskeyFailed, Message: "WhatsApp's request for the passkey is for another site than WhatsApp, and no page of WhatsApp can ask it"}
	}
	options := requestOptions{
		Challenge: key.Challenge, Timeout: min(max(key.Timeout, 0), maxPasskeyTimeout), RelyingParty: key.RelyingPartID,
		UserVerification: key.UserVerification, Extensions: key.Extensions,
	}
	if depth(key.Extensions) > maxExtensionDepth {
		return Event{Type: EventPasskeyFailed, Message: fmt.Sprintf("WhatsApp's request for the passkey has extensions that are nested more than %d deep", maxExtensionDepth)}
	}
	for _, c := range key.AllowCredentials {
		options.AllowCredentials = append(options.AllowCredentials, allowedCredential{ID: c.ID, Type: c.Type, Transports: c.Transports})
	}
	text, err := json.Marshal(options)
	switch {
	case err != nil || len(text) > session.MaxPasskeyJSON:
		return Event{Type: EventPasskeyFailed, Message: fmt.Sprintf("WhatsApp's request for the passkey has more than %d characters", session.MaxPasskeyJSON)}
	case status.Clean(string(text), session.MaxPasskeyJSON) != string(text):
		return Event{Type: EventPasskeyFailed, Message: "WhatsApp's request for the passkey has control characters"}
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
		return fmt.Errorf("sending the answer of the passkey: %w", briefError{err})
	}
	return nil
}

// ConfirmPasskey confirms that the code of EventPasskeyConfirmation is the one that the
// phone shows, or that WhatsApp wants no comparison.
func (c *Connection) ConfirmPasskey(ctx context.Context) (err error) {
	defer c.guardPasskey(&err)
	c.taskMu.Lock() // another continuation or request changes what is sent
	defer c.taskMu.Unlock()
	if err := c.client.SendPasskeyConfirmation(ctx); err != nil {
		return fmt.Errorf("confirming the passkey: %w", briefError{err})
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
