package simulator

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// Pairing by a code that is typed on the phone. The client makes the code and
// never sends it: it sends an ephemeral key that is encrypted with it
// (companion_hello), and shows the code. The phone on which it is typed decrypts
// that key and answers with its own key, encrypted in the same way
// (primary_hello). The client then sends a bundle under the secret that the two
// keys agree upon (companion_finish), which a phone opens only if the code was
// right. Both derive the adv secret from it, which a QR code would contain. The
// remaining steps are those of a scan. The layouts are those of whatsmeow's pair-code.go.

const (
	// linkAlphabet holds the characters of a code: base32 without 0, I, O and U.
	linkAlphabet   = "123456789ABCDEFGHJKLMNPQRSTVWXYZ"
	linkCodeLength = 8
	// linkIterations is the number of PBKDF2 iterations that derive a key from a code.
	linkIterations = 2 << 16
	// A wrapped key is a salt, an initial vector and the encrypted key.
	wrappedSalt, wrappedIV, wrappedLength = 32, 16, 80
	// A wrapped bundle is a salt, a nonce, and the sealed bundle: the client's identity
	// key, the phone's, and the randomness of the adv secret.
	bundleSalt, bundleNonce, bundleLength = 32, 12, 3 * 32
	// bundleInfo and advInfo are the HKDF info strings of the two keys.
	bundleInfo = "link_code_pairing_key_bundle_encryption_key"
	advInfo    = "adv_secret"
)

// browsers matches the display names that WhatsApp accepts from a client.
var browsers = regexp.MustCompile(`^(Chrome|Edge|Firefox|IE|Opera|Safari) \((Android|Linux|Mac OS|Ubuntu|Windows)\)$`)

// linkCode holds what the server knows of a code that a client shows; only the client
// knows the code.
type linkCode struct {
	phone   string
	ref     string
	wrapped []byte // the client's ephemeral key
	until   time.Time

	// Guarded by Server.mu. entry receives the client's answer while a phone waits for it.
	entry chan finish
}

// finish is a client's companion_finish.
type finish struct{ bundle, identity []byte }

// answerLinkCode handles the client's two steps of a pairing by code.
func (c *conn) answerLinkCode(iq *waBinary.Node) (reply, bool) {
	node, ok := iq.GetOptionalChildByTag("link_code_companion_reg")
	if !ok || c.pairing == nil {
		return reply{}, false
	}
	switch attribute(&node, "stage") {
	case "companion_hello":
		return c.companionHello(&node), true
	case "companion_finish":
		return c.companionFinish(&node), true
	default:
		return reply{}, false
	}
}

// companionHello records a code. A newer code for the same number replaces an older
// one, even if another client shows it.
func (c *conn) companionHello(node *waBinary.Node) reply {
	s := c.srv
	if f, ok := s.active(FaultRefuseCode, nil); ok {
		return reply{code: f.Reason, text: linkRefusals[f.Reason]}
	}
	jid := jidAttribute(node, "jid")
	wrapped := content(node, "link_code_pairing_wrapped_companion_ephemeral_pub")
	display := node.GetChildByTag("companion_platform_display")
	if jid.Server != types.DefaultUserServer || !validPhone(jid.User) || len(wrapped) != wrappedLength ||
		string(content(node, "companion_server_auth_key_pub")) != string(c.static[:]) || !browsers.MatchString(text(&display)) {
		return badInput
	}
	l := &linkCode{phone: jid.User, ref: rand.Text(), wrapped: slices.Clone(wrapped), until: s.clock.Now().Add(s.opts.CodeLifetime)}
	s.mu.Lock()
	s.forgetCodeLocked(c.pairing)
	l.phone = s.numberLocked(l.phone)
	c.pairing.link = l
	s.byCode[l.phone] = c.pairing
	s.mu.Unlock()
	return result(waBinary.Node{
		Tag: "link_code_companion_reg", Attrs: waBinary.Attrs{"stage": "companion_hello"},
		Content: []waBinary.Node{{Tag: "link_code_pairing_ref", Content: []byte(l.ref)}},
	})
}

// linkRefusals are WhatsApp's error texts for the codes of [FaultRefuseCode].
var linkRefusals = map[int]string{400: "bad-request", 403: "forbidden", 404: "item-not-found", 429: "rate-overlimit", 503: "service-unavailable"}

// companionFinish passes the client's bundle to the phone that waits for it.
func (c *conn) companionFinish(node *waBinary.Node) reply {
	f := finish{
		bundle:   slices.Clone(content(node, "link_code_pairing_wrapped_key_bundle")),
		identity: slices.Clone(content(node, "companion_identity_public")),
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	l := c.pairing.link
	if l == nil || l.entry == nil || string(content(node, "link_code_pairing_ref")) != l.ref {
		return badInput
	}
	select {
	case l.entry <- f:
		return done
	default: // it has answered already
		return badInput
	}
}

// forgetCodeLocked removes a client's code from the map. The caller holds s.mu.
func (s *Server) forgetCodeLocked(p *pairing) {
	if p.link != nil && s.byCode[p.link.phone] == p {
		delete(s.byCode, p.link.phone)
	}
}

// parseLinkCode reads a code as people type it: in either case, with or without
// the dash. Its error does not quote the code: anyone who has it can take over the
// account.
func parseLinkCode(typed string) (string, error) {
	typed = strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(typed))
	if len(typed) != linkCodeLength || strings.Trim(typed, linkAlphabet) != "" {
		return "", fmt.Errorf("%w: a pairing code is %d letters and digits, for example ABCD-1234", ErrBadInput, linkCodeLength)
	}
	return typed, nil
}

// EnterCode does what a person does on the phone with that number (Link with
// phone number instead): it types the code that a client shows, and returns the
// JID of the new device. As with [Server.Scan] it waits for the client until ctx
// ends.
//
// A malformed code, and a code other than the one shown, is ErrBadInput; the right
// one may be typed afterwards. A code that has expired or was used, and a number for
// which no client shows a code, is ErrNotNow: a code is valid only on the phone that
// the client named.
func (s *Server) EnterCode(ctx context.Context, phone, code string) (string, error) {
	phone, err := parsePhone(phone)
	if err != nil {
		return "", err
	}
	if code, err = parseLinkCode(code); err != nil {
		return "", err
	}
	p, l, a, err := s.beginEntry(phone)
	if err != nil {
		return "", err
	}
	defer s.endEntry(l)
	adv, err := s.agree(ctx, p, l, a, code)
	if err != nil {
		return "", err
	}
	found, err := s.finishEntry(p, a)
	if err != nil {
		return "", err
	}
	return s.complete(ctx, adv, p, found)
}

// beginEntry finds the client that shows a code for the number, and prevents a second
// entry of the code at the same time.
func (s *Server) beginEntry(phone string) (*pairing, *linkCode, *account, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byCode[s.numberLocked(phone)]
	switch {
	case p == nil || p.conn.ending:
		return nil, nil, nil, fmt.Errorf("%w: no client shows a code for this number", ErrNotNow)
	case p.scan != nil:
		return nil, nil, nil, fmt.Errorf("%w: this client is linked already", ErrNotNow)
	case !s.clock.Now().Before(p.link.until):
		return nil, nil, nil, fmt.Errorf("%w: this code has expired", ErrNotNow)
	case p.link.entry != nil:
		return nil, nil, nil, fmt.Errorf("%w: the code is being typed already", ErrNotNow)
	}
	a, err := s.accountLocked(phone)
	if err != nil {
		return nil, nil, nil, err
	}
	p.link.entry = make(chan finish, 1)
	return p, p.link, a, nil
}

func (s *Server) endEntry(l *linkCode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.entry = nil
}

// finishEntry assigns the client its device number, unless it was scanned meanwhile.
func (s *Server) finishEntry(p *pairing, a *account) (*scan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.scan != nil || p.conn.ending {
		return nil, fmt.Errorf("%w: this client is linked already, or gone", ErrNotNow)
	}
	return s.newScanLocked(p, a)
}

// agree exchanges keys with the client, encrypted with the code, and returns the adv
// secret that both then have.
func (s *Server) agree(ctx context.Context, p *pairing, l *linkCode, a *account, code string) (adv [32]byte, err error) {
	// With a wrong code these are 32 random bytes, which neither side can detect yet.
	theirs, err := wrapKey(code, l.wrapped[:wrappedSalt], l.wrapped[wrappedSalt:wrappedSalt+wrappedIV], l.wrapped[wrappedSalt+wrappedIV:])
	if err != nil {
		return adv, err
	}
	ours, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return adv, fmt.Errorf("make an ephemeral key: %w", err)
	}
	wrapped := make([]byte, wrappedSalt+wrappedIV, wrappedLength)
	_, _ = rand.Read(wrapped) // never fails
	encrypted, err := wrapKey(code, wrapped[:wrappedSalt], wrapped[wrappedSalt:], ours.PublicKey().Bytes())
	if err != nil {
		return adv, err
	}
	public := a.identity.PublicKey().PublicKey()
	s.mu.Lock()
	entry := l.entry
	s.mu.Unlock()
	if err := p.conn.send(waBinary.Node{
		Tag:   "notification",
		Attrs: fromServer(waBinary.Attrs{"type": "link_code_companion_reg", "id": newID(), "t": s.seconds()}),
		Content: []waBinary.Node{{
			Tag: "link_code_companion_reg", Attrs: waBinary.Attrs{"stage": "primary_hello"},
			Content: []waBinary.Node{
				{Tag: "link_code_pairing_wrapped_primary_ephemeral_pub", Content: append(wrapped, encrypted...)},
				{Tag: "primary_identity_pub", Content: public[:]},
				{Tag: "link_code_pairing_ref", Content: []byte(l.ref)},
			},
		}},
	}); err != nil {
		return adv, fmt.Errorf("%w: the client is gone: %w", ErrNotNow, err)
	}
	select {
	case answer := <-entry:
		return openBundle(answer, ours, theirs, a, p)
	case <-p.conn.closed:
		return adv, fmt.Errorf("%w: the client left during the pairing", ErrNotNow)
	case <-ctx.Done():
		return adv, fmt.Errorf("wait for the client's keys: %w", ctx.Err())
	}
}

// wrapKey encrypts a public key with a code, and decrypts it again.
func wrapKey(code string, salt, iv, key []byte) ([]byte, error) {
	secret, err := pbkdf2.Key(sha256.New, code, salt, linkIterations, 32)
	if err != nil {
		return nil, fmt.Errorf("derive a key from a code: %w", err)
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, fmt.Errorf("derive a key from a code: %w", err)
	}
	out := make([]byte, len(key))
	cipher.NewCTR(block, iv).XORKeyStream(out, key)
	return out, nil
}

// errWrongCode is the only information that a phone gets about a wrong code.
var errWrongCode = fmt.Errorf("%w: this is not the code that the client shows for this number", ErrBadInput)

// openBundle decrypts the client's bundle with the agreed secret, and derives the adv
// secret from it.
func openBundle(answer finish, ours *ecdh.PrivateKey, theirs []byte, a *account, p *pairing) (adv [32]byte, err error) {
	if len(answer.bundle) <= bundleSalt+bundleNonce || len(answer.identity) != len(p.identity) {
		return adv, fmt.Errorf("%w: the client's keys are malformed", ErrNotNow)
	}
	shared, err := agreeUpon(ours, theirs)
	if err != nil {
		return adv, errWrongCode // a point of low order, which no client makes
	}
	key, err := hkdf.Key(sha256.New, shared, answer.bundle[:bundleSalt], bundleInfo, 32)
	if err != nil {
		return adv, fmt.Errorf("derive the key of a bundle: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return adv, fmt.Errorf("derive the key of a bundle: %w", err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return adv, fmt.Errorf("derive the key of a bundle: %w", err)
	}
	plaintext, err := gcm.Open(nil, answer.bundle[bundleSalt:bundleSalt+bundleNonce], answer.bundle[bundleSalt+bundleNonce:], nil)
	if err != nil {
		return adv, errWrongCode
	}
	public := a.identity.PublicKey().PublicKey()
	promised := slices.Concat(p.identity[:], public[:])
	if len(plaintext) != bundleLength || subtle.ConstantTimeCompare(plaintext[:len(promised)], promised) == 0 || [32]byte(answer.identity) != p.identity {
		return adv, fmt.Errorf("%w: the client's keys are not those of its registration", ErrNotNow)
	}
	private := a.identity.PrivateKey().Serialize()
	mine, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		return adv, fmt.Errorf("use an account's key: %w", err)
	}
	identities, err := agreeUpon(mine, p.identity[:])
	if err != nil {
		return adv, fmt.Errorf("%w: the client's identity key is not valid: %w", ErrNotNow, err)
	}
	secret, err := hkdf.Key(sha256.New, slices.Concat(shared, identities, plaintext[len(promised):]), nil, advInfo, len(adv))
	if err != nil {
		return adv, fmt.Errorf("derive an adv secret: %w", err)
	}
	return [32]byte(secret), nil
}

// agreeUpon computes the X25519 shared secret.
func agreeUpon(private *ecdh.PrivateKey, public []byte) ([]byte, error) {
	key, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, errors.New("not a key")
	}
	return private.ECDH(key)
}

// text returns the text of a node. The encoding packs short or common texts, and the
// decoder returns those as a string instead of bytes.
func text(node *waBinary.Node) string {
	switch value := node.Content.(type) {
	case []byte:
		return string(value)
	case string:
		return value
	default:
		return ""
	}
}
