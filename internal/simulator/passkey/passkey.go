// Package passkey implements the passkey of a simulated WhatsApp account: WhatsApp's
// requests, the answers of a browser, and WhatsApp's verification of the answers. The fields are those of WhatsApp's passkey_prologue_request (whatsmeow,
// types/passkey.go) and of Web Authentication Level 3.
package passkey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-webauthn/webauthn/protocol"
	"github.com/go-webauthn/webauthn/protocol/webauthncbor"
	"github.com/go-webauthn/webauthn/protocol/webauthncose"
)

const (
	// RelyingParty is the domain that the passkeys of WhatsApp are for.
	RelyingParty = "whatsapp.com"
	// Origin is the page that may request them.
	Origin = "https://web.whatsapp.com"
	// userPresent and userVerified are flags of the authenticator data.
	userPresent, userVerified = 0x01, 0x04
)

// Passkey is the passkey of one account, with its private key. It is safe for concurrent use.
type Passkey struct {
	// ID is the credential's id, UserHandle identifies the account.
	ID, UserHandle []byte
	// Key is on the P-256 curve.
	Key *ecdsa.PrivateKey

	uses atomic.Uint32
}

// New makes a passkey.
func New() (*Passkey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a passkey: %w", err)
	}
	p := &Passkey{ID: make([]byte, 16), UserHandle: make([]byte, 32), Key: key}
	// rand.Read never fails.
	_, _ = rand.Read(p.ID)
	_, _ = rand.Read(p.UserHandle)
	return p, nil
}

type descriptor struct {
	ID         string   `json:"id"`
	Type       string   `json:"type"`
	Transports []string `json:"transports"`
}

type request struct {
	Challenge        string         `json:"challenge"`
	Timeout          int64          `json:"timeout"`
	RelyingParty     string         `json:"rpId"`
	AllowCredentials []descriptor   `json:"allowCredentials"`
	UserVerification string         `json:"userVerification"`
	Extensions       map[string]any `json:"extensions"`
}

// Request returns the JSON of the options with which WhatsApp requests the passkey.
func (p *Passkey) Request(challenge []byte, timeout time.Duration) ([]byte, error) {
	options, err := json.Marshal(request{
		Challenge: encode(challenge), Timeout: timeout.Milliseconds(), RelyingParty: RelyingParty,
		AllowCredentials: []descriptor{{ID: encode(p.ID), Type: "public-key", Transports: []string{"hybrid", "internal"}}},
		UserVerification: "required", Extensions: map[string]any{},
	})
	if err != nil {
		return nil, fmt.Errorf("writing a passkey request: %w", err)
	}
	return options, nil
}

type assertion struct {
	ID       string            `json:"id"`
	RawID    string            `json:"rawId"`
	Type     string            `json:"type"`
	Response assertionResponse `json:"response"`
}

type assertionResponse struct {
	ClientDataJSON    string `json:"clientDataJSON"`
	AuthenticatorData string `json:"authenticatorData"`
	Signature         string `json:"signature"`
	UserHandle        string `json:"userHandle"`
}

// Answer returns the answer of a browser on that page to the request's options, in
// the format of PublicKeyCredential.toJSON.
func (p *Passkey) Answer(options []byte, origin string) ([]byte, error) {
	var r request
	if err := json.Unmarshal(options, &r); err != nil {
		return nil, fmt.Errorf("answering a passkey request: %w", err)
	}
	clientData, err := json.Marshal(map[string]any{"type": "webauthn.get", "challenge": r.Challenge, "origin": origin, "crossOrigin": false})
	if err != nil {
		return nil, fmt.Errorf("answering a passkey request: %w", err)
	}
	party := sha256.Sum256([]byte(r.RelyingParty))
	data := append(party[:], userPresent|userVerified)
	data = binary.BigEndian.AppendUint32(data, p.uses.Add(1))
	hash := sha256.Sum256(clientData)
	signed := sha256.Sum256(append(bytes.Clone(data), hash[:]...))
	signature, err := ecdsa.SignASN1(rand.Reader, p.Key, signed[:])
	if err != nil {
		return nil, fmt.Errorf("answering a passkey request: %w", err)
	}
	answer, err := json.Marshal(assertion{
		ID: encode(p.ID), RawID: encode(p.ID), Type: "public-key",
		Response: assertionResponse{
			ClientDataJSON: encode(clientData), AuthenticatorData: encode(data), Signature: encode(signature), UserHandle: encode(p.UserHandle),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("answering a passkey request: %w", err)
	}
	return answer, nil
}

// Verify verifies an answer as WhatsApp does: this passkey must have signed this
// challenge, for WhatsApp, on WhatsApp's page, after user verification.
func (p *Passkey) Verify(challenge, answer []byte) error {
	parsed, err := protocol.ParseCredentialRequestResponseBytes(answer)
	if err != nil {
		return fmt.Errorf("reading the answer of a passkey: %w", detailed(err))
	}
	if !bytes.Equal(parsed.RawID, p.ID) {
		return errors.New("verifying the answer of a passkey: another passkey has answered")
	}
	public, err := p.publicKey()
	if err != nil {
		return err
	}
	err = parsed.Verify(encode(challenge), RelyingParty, "", []string{Origin}, nil, nil, protocol.TopOriginExplicitVerificationMode,
		false, true, true, public, protocol.SignaturePolicy{})
	if err != nil {
		return fmt.Errorf("verifying the answer of a passkey: %w", detailed(err))
	}
	return nil
}

// publicKey returns the public key in COSE format.
func (p *Passkey) publicKey() ([]byte, error) {
	point, err := p.Key.PublicKey.Bytes() // 4, x, y
	if err != nil {
		return nil, fmt.Errorf("writing the key of a passkey: %w", err)
	}
	key, err := webauthncbor.Marshal(webauthncose.EC2PublicKeyData{
		PublicKeyData: webauthncose.PublicKeyData{KeyType: int64(webauthncose.EllipticKey), Algorithm: int64(webauthncose.AlgES256)},
		Curve:         int64(webauthncose.P256), XCoord: point[1:33], YCoord: point[33:],
	})
	if err != nil {
		return nil, fmt.Errorf("writing the key of a passkey: %w", err)
	}
	return key, nil
}

// detailed adds the library's DevInfo to an error's text.
func detailed(err error) error {
	if e := (*protocol.Error)(nil); errors.As(err, &e) && e.DevInfo != "" {
		return fmt.Errorf("%w (%s)", err, e.DevInfo)
	}
	return err
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
