package simulator

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// refCount is how many codes WhatsApp offers on one connection.
const refCount = 6

// A ref is "2@" and the base64 of 66 bytes, as long as WhatsApp's own: the
// pairing's id, the ref's index, and a proof that this server made it. So the server
// stores nothing for each ref.
const (
	refPrefix = "2@"
	refLength = 66
	proofAt   = len(pairingID{}) + 1
)

type pairingID [16]byte

// pairing is a connection that waits for its code to be scanned.
type pairing struct {
	id           pairingID
	conn         *conn
	started      time.Time
	identity     [32]byte
	registration uint32
	signed       preKey

	// Guarded by Server.mu.
	scan *scan
	// retired is the secret of the code that was scanned and retired.
	retired [32]byte
	link    *linkCode // nil unless the client shows a code to type
	// companion is the exchange about the account's passkey, or nil.
	companion *companion
}

// scan is a code that was scanned (or typed), until the client has answered.
type scan struct {
	id      string // of the iq
	account *account
	device  *device
	signed  []byte // the ADVDeviceIdentity that the account has signed
	result  chan error
}

func (s *Server) ref(id pairingID, index byte) string {
	raw := slices.Concat(id[:], []byte{index})
	proof := hmac.New(sha512.New, s.refKey[:])
	proof.Write(raw)
	return refPrefix + base64.StdEncoding.EncodeToString(proof.Sum(raw)[:refLength])
}

// refParts is the reverse of ref. It returns false if ref did not make the text.
func (s *Server) refParts(ref string) (id pairingID, index byte, ok bool) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(ref, refPrefix))
	if err != nil || len(raw) != refLength {
		return id, 0, false
	}
	copy(id[:], raw)
	index = raw[proofAt-1]
	return id, index, hmac.Equal([]byte(ref), []byte(s.ref(id, index)))
}

// expiry returns the time from which the ref with that index is no longer accepted.
func (s *Server) expiry(p *pairing, index byte) time.Time {
	return p.started.Add(time.Duration(3+int(index)) * s.opts.RefLifetime)
}

// offerCodes sends a client that is not paired its refs.
func (c *conn) offerCodes(data *waWa6.ClientPayload_DevicePairingRegistrationData) error {
	p := &pairing{conn: c, started: c.srv.clock.Now()}
	if len(data.GetEIdent()) != 32 || len(data.GetERegid()) != 4 || len(data.GetESkeyID()) != 3 ||
		len(data.GetESkeyVal()) != 32 || len(data.GetESkeySig()) != 64 {
		return errors.New("the registration of a device is malformed")
	}
	_, _ = rand.Read(p.id[:]) // never fails
	copy(p.identity[:], data.GetEIdent())
	p.registration = binary.BigEndian.Uint32(data.GetERegid())
	p.signed.id = binary.BigEndian.Uint32(append([]byte{0}, data.GetESkeyID()...))
	copy(p.signed.public[:], data.GetESkeyVal())
	copy(p.signed.signature[:], data.GetESkeySig())
	if !ecc.VerifySignature(ecc.NewDjbECPublicKey(p.identity), ecc.NewDjbECPublicKey(p.signed.public).Serialize(), p.signed.signature) {
		return errors.New("the signature of the device's signed prekey is not valid")
	}
	c.srv.mu.Lock()
	c.pairing = p
	c.srv.pairings[p.id] = p
	c.srv.mu.Unlock()

	refs := make([]waBinary.Node, refCount)
	for i := range refs {
		refs[i] = waBinary.Node{Tag: "ref", Content: []byte(c.srv.ref(p.id, byte(i)))}
	}
	c.closeAfter(c.srv.expiry(p, refCount-1).Sub(p.started))
	return c.send(waBinary.Node{
		Tag:     "iq",
		Attrs:   waBinary.Attrs{"from": types.ServerJID, "type": "set", "xmlns": "md", "id": newID()},
		Content: []waBinary.Node{{Tag: "pair-device", Content: refs}},
	})
}

// code is the content of a QR code.
type code struct {
	ref                  string
	noise, identity, adv [32]byte
}

// codePrefix begins a code: a phone's camera opens it as a link. Clients until 2025 showed
// the code without this prefix and without the client's type at the end.
const codePrefix = "https://wa.me/settings/linked_devices#"

// parseCode reads "PREFIXref,noise,identity,adv,type", or "ref,noise,identity,adv" of older
// clients, the keys in base64. Its errors never quote the code: anyone who has it can take
// over the account.
func parseCode(qr string) (code, error) {
	text, today := strings.CutPrefix(strings.TrimSpace(qr), codePrefix)
	parts := strings.Split(text, ",")
	wanted := 4
	if today {
		wanted = 5
	}
	if len(parts) != wanted || slices.Contains(parts, "") {
		return code{}, fmt.Errorf("%w: this is not a WhatsApp QR code (%sref,noise key,identity key,adv secret,client type)", ErrBadInput, codePrefix)
	}
	c := code{ref: parts[0]}
	for i, key := range []*[32]byte{&c.noise, &c.identity, &c.adv} {
		raw, err := base64.StdEncoding.Strict().DecodeString(parts[i+1])
		if err != nil || len(raw) != len(key) {
			return code{}, fmt.Errorf("%w: this is not a WhatsApp QR code: its part %d is not a key of 32 bytes in base64", ErrBadInput, i+2)
		}
		copy(key[:], raw)
	}
	return c, nil
}

// Scan does what a phone does with a client's QR code: it links the client to
// the account with that phone number (digits with the country code; if it is
// empty, the server chooses one), and returns the JID of the new device. It waits for
// the client's own signature, until ctx ends. Each code of a client is valid from the
// time when the client receives it until it expires. With FaultPasskey, Scan returns
// when the server has asked for the account's passkey.
//
// A malformed code is ErrBadInput. A code that has expired, was scanned before or
// belongs to a client that has disconnected is ErrNotNow, as is a client that refuses
// the pairing.
func (s *Server) Scan(ctx context.Context, qr, phone string) (string, error) {
	c, err := parseCode(qr)
	if err != nil {
		return "", err
	}
	id, index, ok := s.refParts(c.ref)
	if !ok {
		return "", fmt.Errorf("%w: this QR code was not made by this server", ErrBadInput)
	}
	if phone != "" {
		if phone, err = parsePhone(phone); err != nil {
			return "", err
		}
	}
	if err := s.retire(c, id, phone); err != nil {
		return "", err
	}
	p, found, err := s.beginScan(c, id, index, phone)
	if err != nil {
		return "", err
	}
	return s.complete(ctx, c.adv, p, found)
}

// retire applies FaultRetireCode to a scanned code, once for each pairing: the code
// that the client shows next is accepted.
func (s *Server) retire(c code, id pairingID, phone string) error {
	s.mu.Lock()
	var scanned *device // nil if the server will choose the account
	if phone != "" {
		a, err := s.accountLocked(phone)
		if err != nil {
			s.mu.Unlock()
			return err
		}
		scanned = &device{account: a}
	}
	_, wanted := s.activeLocked(FaultRetireCode, scanned)
	p := s.pairings[id]
	if p == nil {
		s.mu.Unlock()
		return nil
	}
	again, first := p.retired == c.adv, p.retired == [32]byte{}
	if wanted && first {
		p.retired = c.adv
	}
	s.mu.Unlock()
	switch {
	case again:
		return fmt.Errorf("%w: this QR code was retired: scan the one that the client shows now", ErrNotNow)
	case !wanted || !first:
		return nil
	}
	notification := newID()
	if err := p.conn.send(waBinary.Node{
		Tag:     "notification",
		Attrs:   fromServer(waBinary.Attrs{"type": "companion_reg_refresh", "id": notification, "t": s.seconds()}),
		Content: []waBinary.Node{{Tag: "companion_reg_refresh"}},
	}); err != nil {
		return fmt.Errorf("%w: the client is gone: %w", ErrNotNow, err)
	}
	return fmt.Errorf("%w: this QR code is retired: scan the one that the client shows next", ErrNotNow)
}

// complete sends a client its identity, and waits until the client has accepted it. If the
// server asks for the account's passkey, it does not wait, because a person has to answer.
func (s *Server) complete(ctx context.Context, adv [32]byte, p *pairing, found *scan) (string, error) {
	if _, wanted := s.active(FaultPasskey, found.device); wanted {
		if err := s.askPasskey(adv, p, found); err != nil {
			return "", err
		}
		return found.device.jid().String(), nil
	}
	pairSuccess, err := s.sign(adv, p, found)
	if err != nil {
		return "", err
	}
	if err := p.conn.send(pairSuccess); err != nil {
		return "", fmt.Errorf("%w: the client is gone: %w", ErrNotNow, err)
	}
	select {
	case err := <-found.result:
		if err != nil {
			return "", err
		}
		return found.device.jid().String(), nil
	case <-p.conn.closed:
		select {
		case err := <-found.result: // it answered and left
			if err == nil {
				return found.device.jid().String(), nil
			}
			return "", err
		default:
			return "", fmt.Errorf("%w: the client left during the pairing", ErrNotNow)
		}
	case <-ctx.Done():
		return "", fmt.Errorf("wait for the client's signature: %w", ctx.Err())
	}
}

// beginScan finds the client that showed the code and assigns it an account and a device number.
func (s *Server) beginScan(c code, id pairingID, index byte, phone string) (*pairing, *scan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pairings[id]
	switch {
	case p == nil || p.conn.ending:
		return nil, nil, fmt.Errorf("%w: the client that showed this QR code is gone", ErrNotNow)
	case c.noise != p.conn.static || c.identity != p.identity:
		return nil, nil, fmt.Errorf("%w: the keys in this QR code are not those of the client that showed it", ErrBadInput)
	case p.scan != nil:
		return nil, nil, fmt.Errorf("%w: this client has been scanned already", ErrNotNow)
	case !s.clock.Now().Before(s.expiry(p, index)):
		return nil, nil, fmt.Errorf("%w: this QR code has expired", ErrNotNow)
	}
	a, err := s.accountLocked(phone)
	if err != nil {
		return nil, nil, err
	}
	found, err := s.newScanLocked(p, a)
	return p, found, err
}

// newScanLocked assigns a client the next device number of an account. The caller holds s.mu.
func (s *Server) newScanLocked(p *pairing, a *account) (*scan, error) {
	number, err := a.newIndexLocked()
	if err != nil {
		return nil, err
	}
	p.scan = &scan{
		id:      newID(),
		account: a,
		device: &device{
			account: a, index: number, noise: p.conn.static, identity: p.identity,
			registration: p.registration, signed: p.signed, linked: s.clock.Now(),
		},
		result: make(chan error, 1),
	}
	return p.scan, nil
}

// sign makes the phone's answer to a code: the device's identity, signed by the
// account, under an HMAC with the adv secret that only the code holds. The layout is
// the one that whatsmeow verifies (pair.go, handlePair).
func (s *Server) sign(adv [32]byte, p *pairing, found *scan) (waBinary.Node, error) {
	private := found.account.identity.PrivateKey()
	public := found.account.identity.PublicKey().PublicKey()
	details, err := proto.Marshal(&waAdv.ADVDeviceIdentity{
		RawID:       proto.Uint32(p.registration),
		Timestamp:   proto.Uint64(uint64(s.clock.Now().Unix())),
		KeyIndex:    proto.Uint32(uint32(found.device.index)),
		AccountType: waAdv.ADVEncryptionType_E2EE.Enum(),
		DeviceType:  waAdv.ADVEncryptionType_E2EE.Enum(),
	})
	if err != nil {
		return waBinary.Node{}, fmt.Errorf("encode a device identity: %w", err)
	}
	signature := ecc.CalculateSignature(private, slices.Concat(whatsmeow.AdvAccountSignaturePrefix, details, p.identity[:]))
	if _, ok := s.active(FaultBadSignature, nil); ok {
		signature[0] ^= 1
	}
	signed, err := proto.Marshal(&waAdv.ADVSignedDeviceIdentity{
		Details: details, AccountSignatureKey: public[:], AccountSignature: signature[:],
	})
	if err != nil {
		return waBinary.Node{}, fmt.Errorf("encode a signed device identity: %w", err)
	}
	mac := hmac.New(sha256.New, adv[:])
	mac.Write(signed)
	sum := mac.Sum(nil)
	if _, ok := s.active(FaultBadHMAC, nil); ok {
		sum[0] ^= 1
	}
	container, err := proto.Marshal(&waAdv.ADVSignedDeviceIdentityHMAC{
		Details: signed, HMAC: sum, AccountType: waAdv.ADVEncryptionType_E2EE.Enum(),
	})
	if err != nil {
		return waBinary.Node{}, fmt.Errorf("encode a device identity: %w", err)
	}
	s.mu.Lock()
	found.signed = details
	s.mu.Unlock()
	return waBinary.Node{
		Tag:   "iq",
		Attrs: waBinary.Attrs{"from": types.ServerJID, "type": "set", "xmlns": "md", "id": found.id},
		Content: []waBinary.Node{{Tag: "pair-success", Content: []waBinary.Node{
			{Tag: "device-identity", Content: container},
			{Tag: "device", Attrs: waBinary.Attrs{"jid": found.device.jid(), "lid": found.device.lidJID()}},
			{Tag: "platform", Attrs: waBinary.Attrs{"name": "android"}},
		}}},
	}, nil
}

// finishScan handles the client's answer to pair-success. If the answer is valid, the
// device is linked, and the server ends the connection so that the client logs in.
func (c *conn) finishScan(iq *waBinary.Node, found *scan) {
	if attribute(iq, "type") != "result" {
		problem := iq.GetChildByTag("error")
		c.srv.mu.Lock()
		c.pairing.scan = nil // the next code may be scanned
		c.srv.mu.Unlock()
		found.result <- fmt.Errorf("%w: the client refuses the pairing: %s %s", ErrNotNow, attribute(&problem, "code"), attribute(&problem, "text"))
		return
	}
	var answer waAdv.ADVSignedDeviceIdentity
	public := found.account.identity.PublicKey().PublicKey()
	err := proto.Unmarshal(content(iq, "pair-device-sign", "device-identity"), &answer)
	if err == nil && len(answer.GetDeviceSignature()) != 64 {
		err = errors.New("it is not 64 bytes long")
	}
	if err == nil && !ecc.VerifySignature(ecc.NewDjbECPublicKey(found.device.identity),
		slices.Concat(whatsmeow.AdvDeviceSignaturePrefix, found.signed, found.device.identity[:], public[:]),
		[64]byte(answer.GetDeviceSignature())) {
		err = errors.New("it does not match the device's key")
	}
	if err != nil {
		found.result <- fmt.Errorf("%w: the client's signature is not valid: %w", ErrNotNow, err)
		c.end(nil)
		return
	}
	if _, lost := c.srv.active(FaultLosePairing, found.device); lost {
		found.result <- fmt.Errorf("%w: a fault has lost the client's answer", ErrNotNow)
		c.close()
		return
	}
	c.srv.mu.Lock()
	found.account.devices[found.device.index] = found.device
	c.srv.counts.pairings++
	c.srv.mu.Unlock()
	c.srv.publishDevices(found.device, "add")
	c.srv.log.V(1).Info("Linked a device", "device", found.device.jid().String())
	found.result <- nil
	// "Restart required": the client reconnects and logs in.
	c.end(&waBinary.Node{Tag: "stream:error", Attrs: waBinary.Attrs{"code": "515"}})
}
