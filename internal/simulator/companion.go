package simulator

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"slices"
	"strings"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waCompanionReg"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

// Pairing with a passkey (FaultPasskey). After a scan, or after a code was typed, the
// server asks for the account's passkey. The client sends its answer together with a
// commitment to an ephemeral key (passkey_prologue). The phone answers with its own key
// (crsc_continuation), and the client opens its commitment (companion_nonce). Both
// now share a key and a code that a person can compare. Encrypted with that key, the
// client sends its keys and a new adv secret (encrypted_pairing_request). The remaining
// steps are those of a scan. The layouts are those of whatsmeow's pair-passkey.go.

const (
	passkeyTimeout = 10 * time.Minute
	handoffInfo    = "shortcake-passkey-handoff-v1"
	pairingInfo    = "Pairing Information Encryption Key"
	// confirmationBytes are encoded in the 8 characters that a person compares.
	confirmationBytes = 5
)

var confirmationEncoding = base32.NewEncoding(linkAlphabet).WithPadding(base32.NoPadding)

// companion is a client that WhatsApp has asked for a passkey. Guarded by Server.mu.
type companion struct {
	found     *scan
	adv       [32]byte // of the code that was scanned
	challenge []byte
	request   []byte

	ref        string
	identity   []byte // the client's CompanionEphemeralIdentity
	commitment []byte
	ephemeral  *ecdh.PrivateKey // the phone's
	nonce      []byte           // the phone's
	key        []byte
	code       string
}

// AnswerPasskey returns the answer of a browser on WhatsApp's page to a request for the
// passkey of the account with that phone number.
func (s *Server) AnswerPasskey(phone string, request []byte) ([]byte, error) {
	phone, err := parsePhone(phone)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	a, err := s.accountLocked(phone)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	answer, err := a.passkey.Answer(request, passkey.Origin)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadInput, err)
	}
	return answer, nil
}

// askPasskey asks a client for the passkey of the account that has scanned its code.
func (s *Server) askPasskey(adv [32]byte, p *pairing, found *scan) error {
	m := &companion{found: found, adv: adv, challenge: make([]byte, 32)}
	_, _ = rand.Read(m.challenge) // never fails
	var err error
	if m.request, err = found.account.passkey.Request(m.challenge, passkeyTimeout); err != nil {
		return err
	}
	s.mu.Lock()
	p.companion = m
	s.mu.Unlock()
	p.conn.closeAfter(passkeyTimeout)
	if err := p.conn.send(waBinary.Node{
		Tag:     "notification",
		Attrs:   fromServer(waBinary.Attrs{"type": "passkey_prologue_request", "id": newID(), "t": s.seconds()}),
		Content: []waBinary.Node{{Tag: "passkey_request_options", Content: m.request}},
	}); err != nil {
		return fmt.Errorf("%w: the client is gone: %w", ErrNotNow, err)
	}
	return nil
}

// answerPairingGet answers a client's requests while the server waits for its passkey.
func (c *conn) answerPairingGet(iq *waBinary.Node) (reply, bool) {
	m := c.companion()
	if m == nil {
		return reply{}, false
	}
	if _, ok := iq.GetOptionalChildByTag("passkey_request_options"); ok {
		return result(waBinary.Node{Tag: "passkey_request_options", Content: m.request}), true
	}
	if _, ok := iq.GetOptionalChildByTag("ref"); ok {
		ref := rand.Text()
		c.srv.mu.Lock()
		m.ref = ref
		c.srv.mu.Unlock()
		return result(waBinary.Node{Tag: "ref", Content: []byte(ref)}), true
	}
	return reply{}, false
}

// answerPairingSet handles the client's steps of a pairing by code or with a passkey.
func (c *conn) answerPairingSet(iq *waBinary.Node) (reply, bool) {
	m := c.companion()
	for tag, take := range map[string]func(*conn, *companion, *waBinary.Node) reply{
		"passkey_prologue":          (*conn).passkeyPrologue,
		"companion_nonce":           (*conn).companionNonce,
		"encrypted_pairing_request": (*conn).encryptedPairingRequest,
	} {
		if node, ok := iq.GetOptionalChildByTag(tag); ok && m != nil {
			return take(c, m, &node), true
		}
	}
	return c.answerLinkCode(iq)
}

func (c *conn) companion() *companion {
	if c.pairing == nil {
		return nil
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	return c.pairing.companion
}

// refusePasskey logs and refuses an answer that WhatsApp does not accept.
func (c *conn) refusePasskey(reason string) reply {
	c.srv.log.Info("Refused the answer of a passkey", "reason", reason)
	return reply{code: 401, text: "not-authorized"}
}

func (c *conn) passkeyPrologue(m *companion, node *waBinary.Node) reply {
	if err := m.found.account.passkey.Verify(m.challenge, content(node, "webauthn_assertion")); err != nil {
		return c.refusePasskey(err.Error())
	}
	if !slices.Equal(content(node, "credential_id"), m.found.account.passkey.ID) {
		return c.refusePasskey("credential_id does not match the passkey")
	}
	payload := content(node, "prologue_payload")
	if proof := content(node, "pairing_handoff_proof"); proof != nil {
		key, err := hkdf.Key(sha256.New, m.adv[:], nil, handoffInfo, 32)
		if err != nil {
			return badInput
		}
		mac := hmac.New(sha256.New, key)
		mac.Write(payload)
		if !hmac.Equal(proof, mac.Sum(nil)) {
			return c.refusePasskey("pairing_handoff_proof does not match the scanned code")
		}
	}
	var prologue waCompanionReg.ProloguePayload
	var identity waCompanionReg.CompanionEphemeralIdentity
	if proto.Unmarshal(payload, &prologue) != nil || proto.Unmarshal(prologue.GetCompanionEphemeralIdentity(), &identity) != nil ||
		len(identity.GetPublicKey()) != 32 || len(prologue.GetCommitment().GetHash()) != sha256.Size {
		return badInput
	}
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return badInput
	}
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // never fails
	continuation, err := proto.Marshal(&waCompanionReg.PrimaryEphemeralIdentity{PublicKey: ephemeral.PublicKey().Bytes(), Nonce: nonce})
	if err != nil {
		return badInput
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if m.ref == "" || identity.GetRef() != m.ref {
		return badInput
	}
	m.identity, m.commitment = prologue.GetCompanionEphemeralIdentity(), prologue.GetCommitment().GetHash()
	m.ephemeral, m.nonce = ephemeral, nonce
	proceed := func() error {
		return c.send(waBinary.Node{
			Tag:     "notification",
			Attrs:   fromServer(waBinary.Attrs{"type": "crsc_continuation", "id": newID(), "t": c.srv.seconds()}),
			Content: []waBinary.Node{{Tag: "primary_ephemeral_identity", Content: continuation}},
		})
	}
	if slow, ok := c.srv.activeLocked(FaultSlowPasskey, m.found.device); ok {
		return reply{after: func() error {
			c.srv.after(slow.Delay.Duration, func() { _ = proceed() }) // fails if the client is gone
			return nil
		}}
	}
	return reply{after: proceed}
}

func (c *conn) companionNonce(m *companion, node *waBinary.Node) reply {
	nonce, ok := node.Content.([]byte)
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	opened := sha256.Sum256(slices.Concat(m.identity, nonce))
	if !ok || m.ephemeral == nil || !hmac.Equal(opened[:], m.commitment) {
		return badInput
	}
	var identity waCompanionReg.CompanionEphemeralIdentity
	if proto.Unmarshal(m.identity, &identity) != nil {
		return badInput
	}
	public, err := ecdh.X25519().NewPublicKey(identity.GetPublicKey())
	if err != nil {
		return badInput
	}
	shared, err := m.ephemeral.ECDH(public)
	if err != nil {
		return badInput
	}
	salt := fmt.Sprintf("Companion Pairing %d with ref %s", identity.GetDeviceType(), m.ref)
	if m.key, err = hkdf.Key(sha256.New, shared, []byte(salt), pairingInfo, 32); err != nil {
		return badInput
	}
	digest := sha256.Sum256(slices.Concat(nonce, m.ephemeral.PublicKey().Bytes()))
	code := make([]byte, confirmationBytes)
	for i := range code {
		code[i] = m.nonce[i] ^ digest[i]
	}
	text := confirmationEncoding.EncodeToString(code)
	m.code = text[:4] + "-" + text[4:]
	return done
}

func (c *conn) encryptedPairingRequest(m *companion, node *waBinary.Node) reply {
	sealed, _ := node.Content.([]byte)
	var wrapped waCompanionReg.EncryptedPairingRequest
	if m.key == nil || proto.Unmarshal(sealed, &wrapped) != nil {
		return badInput
	}
	block, err := aes.NewCipher(m.key)
	if err != nil {
		return badInput
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil || len(wrapped.GetIV()) != gcm.NonceSize() {
		return badInput
	}
	plain, err := gcm.Open(nil, wrapped.GetIV(), wrapped.GetEncryptedPayload(), nil)
	var request waCompanionReg.PairingRequest
	if err != nil || proto.Unmarshal(plain, &request) != nil || len(request.GetAdvSecret()) != 32 {
		return badInput
	}
	if !slices.Equal(request.GetCompanionPublicKey(), c.static[:]) || !slices.Equal(request.GetCompanionIdentityKey(), c.pairing.identity[:]) {
		return notYours
	}
	return reply{after: func() error {
		pairSuccess, err := c.srv.sign([32]byte(request.GetAdvSecret()), c.pairing, m.found)
		if err != nil {
			return err
		}
		return c.send(pairSuccess)
	}}
}

// ConfirmationCode returns the code that the phone with that number shows while a device
// is linked with its passkey. It returns ErrNotNow if no exchange has reached that step.
func (s *Server) ConfirmationCode(phone string) (string, error) {
	phone, err := parsePhone(strings.TrimSpace(phone))
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	phone = s.numberLocked(phone)
	for _, p := range s.pairings {
		if m := p.companion; m != nil && m.found.account.phone == phone && m.code != "" {
			return m.code, nil
		}
	}
	return "", fmt.Errorf("%w: no device is being linked to this phone with a passkey", ErrNotNow)
}
