package simulator

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/libsignal/keys/identity"
	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/util/optional"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

// The kinds of errors. An error of this package wraps one of them, or says that
// the server or a context ended.
var (
	// ErrBadInput is input that is never valid, for example a malformed QR code.
	ErrBadInput = errors.New("bad input")
	// ErrNotFound is a device that does not exist.
	ErrNotFound = errors.New("not found")
	// ErrNotNow is a request that is not possible in the present state, for example
	// with a code that has expired.
	ErrNotNow = errors.New("not possible now")
)

// account is a phone and its number: the main device of a person. Accounts without
// linked devices are the contacts that write to the others.
type account struct {
	phone    string // digits only
	lid      string // the number that WhatsApp shows instead of the phone number
	identity *ecc.ECKeyPair
	handset  *handset
	passkey  *passkey.Passkey

	// Guarded by Server.mu.
	name      string // the name that recipients see
	devices   map[uint16]*device
	lastIndex uint16
	// watchers are the devices of others that have asked for the list of its devices.
	watchers map[*device]struct{}
	// contacts is what it has given to others and received from them, by their LID.
	contacts map[string]*contact
	// salt makes the tokens for contacts that have given it none; nil until a device got it.
	salt []byte
	// companions are the phone's simulated linked devices, by their number; a client that is
	// linked is in devices instead.
	companions map[uint16]*handset
}

func (a *account) jid() types.JID    { return types.NewJID(a.phone, types.DefaultUserServer) }
func (a *account) lidJID() types.JID { return types.NewJID(a.lid, types.HiddenUserServer) }

// handsetLocked returns the Signal part of the phone (0) or of a simulated linked device,
// which it makes if there is none. The caller holds Server.mu.
func (a *account) handsetLocked(device uint16) (*handset, error) {
	if device == 0 {
		return a.handset, nil
	}
	if a.devices[device] != nil {
		return nil, fmt.Errorf("%w: %s is a client that is linked, and writes its own messages", ErrBadInput, a.devices[device].jid())
	}
	if h := a.companions[device]; h != nil {
		return h, nil
	}
	identity, err := ecc.GenerateKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make a device's key: %w", err)
	}
	if a.companions == nil {
		a.companions = map[uint16]*handset{}
	}
	a.companions[device] = newHandset(identity)
	return a.companions[device], nil
}

// device is a linked device: a client that was paired. It outlives its connections.
type device struct {
	account      *account
	index        uint16
	noise        [32]byte
	identity     [32]byte
	registration uint32
	linked       time.Time

	// Guarded by Server.mu.
	signed   preKey
	preKeys  []preKey
	conn     *conn // the newest connection; nil without one
	logins   int64
	loggedIn time.Time     // the last login
	lost     time.Time     // when the last connection ended; zero while there is one
	away     time.Duration // the time between connections
	queue    queue
	received []Message
}

// maxReceived limits how many messages of a device are kept.
const maxReceived = 1000

func (d *device) jid() types.JID {
	return types.JID{User: d.account.phone, Device: d.index, Server: types.DefaultUserServer}
}

func (d *device) lidJID() types.JID {
	return types.JID{User: d.account.lid, Device: d.index, Server: types.HiddenUserServer}
}

// preKey is the public half of a key that a client uploads; only signed ones
// have a signature.
type preKey struct {
	id        uint32
	public    [32]byte
	signature [64]byte
}

const (
	// maxPreKeys is how many one-time keys of a device are kept. A client uploads
	// 812 at first (30 KB), which is too much memory to hold for thousands.
	maxPreKeys = 64
	// lowPreKeys is the number of keys left at which a client is asked for more;
	// whatsmeow checks for fewer than 5.
	lowPreKeys = 4
	// maxDevice is the highest device number that the wire's JIDs can hold.
	maxDevice = 255
)

// Device is a linked device as [Server.Devices] and GET /devices show it.
type Device struct {
	JID string `json:"jid"`
	LID string `json:"lid"`
	// Connected is true if the device has a connection that is logged in.
	Connected bool `json:"connected"`
	// Remote is the client's address of that connection.
	Remote string `json:"remote,omitempty"`
	Logins int64  `json:"logins"`
	// LoggedIn is the last login.
	LoggedIn time.Time `json:"logged_in"`
	// Away is how long it has been without a connection since its first login, in
	// nanoseconds.
	Away time.Duration `json:"away"`
	// Waiting counts the messages without a receipt.
	Waiting int       `json:"waiting"`
	Linked  time.Time `json:"linked"`
}

// Devices lists the linked devices, by JID.
func (s *Server) Devices() []Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []Device{}
	for _, a := range s.byPhone {
		for _, d := range a.devices {
			device := Device{
				JID: d.jid().String(), LID: d.lidJID().String(), Connected: d.conn != nil,
				Logins: d.logins, LoggedIn: d.loggedIn, Away: d.away, Waiting: d.queue.messages(), Linked: d.linked,
			}
			if !d.lost.IsZero() {
				device.Away += s.clock.Since(d.lost)
			}
			if d.conn != nil {
				device.Remote = d.conn.remote
			}
			out = append(out, device)
		}
	}
	slices.SortFunc(out, func(a, b Device) int { return strings.Compare(a.JID, b.JID) })
	return out
}

// parsePhone returns the digits of an international number, with or without the
// plus sign.
func parsePhone(phone string) (string, error) {
	digits := strings.TrimPrefix(phone, "+")
	if !validPhone(digits) {
		return "", fmt.Errorf("%w: a phone number is 7 to 15 digits with the country code first, for example +15551234567", ErrBadInput)
	}
	return digits, nil
}

// validPhone reports whether the digits can be a number: no country code begins
// with a zero (ITU-T E.164). Clients see exactly these numbers as on WhatsApp.
func validPhone(digits string) bool {
	if len(digits) < 7 || len(digits) > 15 || digits[0] == '0' {
		return false
	}
	return !strings.ContainsFunc(digits, func(r rune) bool { return r < '0' || r > '9' })
}

// SetAlias makes alias another way to write the number of the account with that
// phone; the account is created if it does not exist. WhatsApp has such aliases: it
// knows Brazilian numbers by eight digits, which people write with a ninth, and Mexican
// ones with a 1 after the country code, which people leave out. When a client looks up
// the alias, the server returns the account's own number. An alias that is an
// account's own number is ErrNotNow.
func (s *Server) SetAlias(phone, alias string) error {
	phone, err := parsePhone(phone)
	if err != nil {
		return err
	}
	if alias, err = parsePhone(alias); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byPhone[alias] != nil {
		return fmt.Errorf("%w: an account has this number already", ErrNotNow)
	}
	a, err := s.accountLocked(phone)
	if err != nil {
		return err
	}
	s.aliases[alias] = a.phone
	return nil
}

// numberLocked replaces an alias by the account's own number. The caller holds s.mu.
func (s *Server) numberLocked(phone string) string {
	if own, ok := s.aliases[phone]; ok {
		return own
	}
	return phone
}

// accountLocked returns the account with that number or alias, and creates it if it
// does not exist. For an empty number it chooses a new one. The caller holds s.mu.
func (s *Server) accountLocked(phone string) (*account, error) {
	phone = s.numberLocked(phone)
	for phone == "" {
		s.lastPhone++
		made := "1555" + strconv.Itoa(1000000+s.lastPhone)
		if s.byPhone[made] == nil {
			phone = made
		}
	}
	if a := s.byPhone[phone]; a != nil {
		return a, nil
	}
	identity, err := ecc.GenerateKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make an account's key: %w", err)
	}
	a := &account{phone: phone, identity: identity, name: "Contact " + phone, handset: newHandset(identity),
		devices: map[uint16]*device{}, watchers: map[*device]struct{}{}, contacts: map[string]*contact{}}
	if a.passkey, err = passkey.New(); err != nil {
		return nil, err
	}
	for a.lid == "" || s.byLID[a.lid] != nil {
		n, err := rand.Int(rand.Reader, big.NewInt(9e14))
		if err != nil {
			return nil, fmt.Errorf("make an account's number: %w", err)
		}
		a.lid = strconv.FormatInt(1e14+n.Int64(), 10)
	}
	s.byPhone[phone], s.byLID[a.lid] = a, a
	return a, nil
}

// accountOfLocked returns the account of a JID of either kind. It creates the account
// of a valid phone number, and returns nil otherwise. The caller holds s.mu.
func (s *Server) accountOfLocked(jid types.JID) *account {
	switch jid.Server {
	case types.HiddenUserServer:
		return s.byLID[jid.User]
	case types.DefaultUserServer, types.LegacyUserServer:
		phone := strings.TrimPrefix(jid.User, "+")
		if !validPhone(phone) {
			return nil
		}
		a, _ := s.accountLocked(phone) // fails only if the source of randomness fails
		return a
	default:
		return nil
	}
}

// deviceLocked finds a device by its JID, or the newest of a phone number. The
// caller holds s.mu.
func (s *Server) deviceLocked(name string) (*device, error) {
	jid, err := parseDeviceName(name)
	if err != nil {
		return nil, err
	}
	a := s.byPhone[s.numberLocked(jid.User)]
	if jid.Server == types.HiddenUserServer {
		a = s.byLID[jid.User]
	}
	if a == nil {
		return nil, fmt.Errorf("%w: no device of %s is linked", ErrNotFound, jid.User)
	}
	if jid.Device != 0 {
		if d := a.devices[jid.Device]; d != nil {
			return d, nil
		}
		return nil, fmt.Errorf("%w: the device %s is not linked", ErrNotFound, jid)
	}
	var newest *device
	for _, d := range a.devices {
		if newest == nil || d.index > newest.index {
			newest = d
		}
	}
	if newest == nil {
		return nil, fmt.Errorf("%w: no device of %s is linked", ErrNotFound, jid.User)
	}
	return newest, nil
}

// LID returns the JID under which WhatsApp addresses the account with that phone number
// instead of its number. The account is created if it does not exist.
func (s *Server) LID(phone string) (string, error) {
	phone, err := parsePhone(phone)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a, err := s.accountLocked(phone)
	if err != nil {
		return "", err
	}
	return a.lidJID().String(), nil
}

// parseDeviceName reads a device's JID, or a phone number.
func parseDeviceName(name string) (types.JID, error) {
	if !strings.Contains(name, "@") {
		phone, err := parsePhone(name)
		return types.NewJID(phone, types.DefaultUserServer), err
	}
	jid, err := types.ParseJID(name)
	if err != nil || jid.User == "" || (jid.Server != types.DefaultUserServer && jid.Server != types.HiddenUserServer) {
		return types.JID{}, fmt.Errorf("%w: a device is named by its JID (15551234567:1@s.whatsapp.net) or its phone number", ErrBadInput)
	}
	return jid, nil
}

// newIndexLocked returns the number of a new device. It reuses the numbers of
// unlinked devices only after all have been used. The caller holds s.mu.
func (a *account) newIndexLocked() (uint16, error) {
	for range maxDevice {
		a.lastIndex = a.lastIndex%maxDevice + 1
		if a.devices[a.lastIndex] == nil {
			return a.lastIndex, nil
		}
	}
	return 0, fmt.Errorf("%w: %d devices are linked to this phone, which is all it can have", ErrNotNow, maxDevice)
}

// unlink forgets a device: its next login is refused with 401.
func (s *Server) unlink(d *device) {
	s.mu.Lock()
	linked := d.account.devices[d.index] == d
	if linked {
		delete(d.account.devices, d.index)
	}
	s.mu.Unlock()
	if linked {
		s.publishDevices(d, "remove")
	}
}

// bundleLocked returns the keys that a sender needs to write to the device for the
// first time. It uses up a one-time key, if one is left. The caller holds Server.mu.
func (d *device) bundleLocked() *prekey.Bundle {
	key := ecc.NewDjbECPublicKey(d.signed.public)
	id := identity.NewKey(ecc.NewDjbECPublicKey(d.identity))
	if len(d.preKeys) == 0 {
		return prekey.NewBundle(d.registration, uint32(d.index), optional.NewEmptyUint32(), d.signed.id, nil, key, d.signed.signature, id)
	}
	once := d.preKeys[0]
	d.preKeys = d.preKeys[1:]
	return prekey.NewBundle(d.registration, uint32(d.index), optional.NewOptionalUint32(once.id), d.signed.id,
		ecc.NewDjbECPublicKey(once.public), key, d.signed.signature, id)
}

// bundleNodesLocked returns the same keys as the nodes of an answer to another
// client. The caller holds Server.mu.
func (d *device) bundleNodesLocked() []waBinary.Node {
	nodes := bundleNodes(d.registration, d.identity[:])
	if len(d.preKeys) > 0 {
		nodes = append(nodes, preKeyNode("key", d.preKeys[0]))
		d.preKeys = d.preKeys[1:]
	}
	return append(nodes, preKeyNode("skey", d.signed))
}

func bundleNodes(registration uint32, identity []byte) []waBinary.Node {
	return []waBinary.Node{
		{Tag: "registration", Content: binary.BigEndian.AppendUint32(nil, registration)},
		{Tag: "type", Content: []byte{ecc.DjbType}},
		{Tag: "identity", Content: slices.Clone(identity)},
	}
}

func preKeyNode(tag string, k preKey) waBinary.Node {
	children := []waBinary.Node{
		{Tag: "id", Content: []byte{byte(k.id >> 16), byte(k.id >> 8), byte(k.id)}},
		{Tag: "value", Content: slices.Clone(k.public[:])},
	}
	if tag == "skey" {
		children = append(children, waBinary.Node{Tag: "signature", Content: slices.Clone(k.signature[:])})
	}
	return waBinary.Node{Tag: tag, Content: children}
}

// readPreKey decodes a node of preKeyNode.
func readPreKey(node waBinary.Node) (preKey, bool) {
	var k preKey
	id, public := content(&node, "id"), content(&node, "value")
	if len(id) != 3 || len(public) != len(k.public) {
		return k, false
	}
	k.id = uint32(id[0])<<16 | uint32(id[1])<<8 | uint32(id[2])
	copy(k.public[:], public)
	if node.Tag == "skey" {
		signature := content(&node, "signature")
		if len(signature) != len(k.signature) {
			return k, false
		}
		copy(k.signature[:], signature)
	}
	return k, true
}
