package simulator

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"go.mau.fi/whatsmeow/util/keys"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
)

// testRoot is the root key of every test server: the client library keeps its root
// in a global variable.
var testRoot = [32]byte{1, 2, 3}

func TestMain(m *testing.M) {
	// The library's clients read these global variables in goroutines: set them once, before the first client.
	a, err := newAuthority(&testRoot, time.Now())
	if err != nil {
		panic(err)
	}
	whatsmeow.WACertPubKey = a.root
	whatsmeow.KeepAliveIntervalMin = 100 * time.Millisecond
	whatsmeow.KeepAliveIntervalMax = 200 * time.Millisecond
	whatsmeow.KeepAliveResponseDeadline = 400 * time.Millisecond
	// The library's socket reader blocks forever if a frame arrives after its
	// consumer was stopped (socket/framesocket.go, frameComplete).
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.mau.fi/whatsmeow/socket.(*FrameSocket).frameComplete"))
}

// waitTimeout is how long tests wait for an expected state.
const waitTimeout = time.Minute

func wait(t *testing.T) *WithT {
	t.Helper()
	g := NewWithT(t)
	g.SetDefaultEventuallyTimeout(waitTimeout)
	g.SetDefaultEventuallyPollingInterval(5 * time.Millisecond)
	return g
}

// serve runs a server until the end of the test, which fails if a client asked
// it for something that it does not know.
func serve(t *testing.T, change ...func(*Options)) *Server {
	t.Helper()
	g := wait(t)
	opts := Options{RootKey: &testRoot, CloseDelay: 100 * time.Millisecond}
	for _, f := range change {
		f(&opts)
	}
	s, err := New(opts)
	g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		g.Expect(s.Stats().Unknown).To(BeEmpty(), "requests that the simulator does not know")
		cancel()
		g.Eventually(ended).Should(Receive(BeNil()))
	})
	return s
}

// client is a bare whatsmeow client that records its events.
type client struct {
	*whatsmeow.Client
	mu     sync.Mutex
	events []any
	// noReceipts makes the handler refuse messages: then the client sends no receipt.
	noReceipts bool
}

// newClient makes a client of s with that device.
func newClient(t *testing.T, s *Server, device *store.Device) *client {
	t.Helper()
	c := &client{Client: whatsmeow.NewClient(device, nil)}
	c.SynchronousAck = true
	c.ManualHistorySyncDownload = true // the library's own download goes on for a minute after the test
	c.AddEventHandlerWithSuccessStatus(func(evt any) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.events = append(c.events, evt)
		_, message := evt.(*events.Message)
		return !message || !c.noReceipts
	})
	transport := &http.Transport{}
	if ca := s.CA(); ca != nil {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(ca)
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	endpoint, err := url.Parse(s.Endpoint())
	wait(t).Expect(err).NotTo(HaveOccurred())
	h := &http.Client{Transport: redirected{to: endpoint, media: s.MediaHost(), inner: transport}, Timeout: waitTimeout}
	c.SetPreLoginHTTPClient(h)
	c.SetWebsocketHTTPClient(h)
	c.SetMediaHTTPClient(h)
	t.Cleanup(func() {
		c.Disconnect()
		transport.CloseIdleConnections()
	})
	return c
}

// redirected sends requests for WhatsApp's page and websocket to another host, and those for
// the media host without TLS if the server has none.
type redirected struct {
	to    *url.URL
	media string
	inner http.RoundTripper
}

func (r redirected) RoundTrip(request *http.Request) (*http.Response, error) {
	request = request.Clone(request.Context())
	if request.URL.Host != r.media {
		request.Host = request.URL.Host
		request.URL.Host = r.to.Host
	}
	request.URL.Scheme = map[string]string{"ws": "http", "wss": "https"}[r.to.Scheme]
	return r.inner.RoundTrip(request)
}

// of returns the client's recorded events of one type.
func of[T any](c *client) []T {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []T
	for _, evt := range c.events {
		if e, ok := evt.(T); ok {
			out = append(out, e)
		}
	}
	return out
}

// first waits for an event of that type.
func first[T any](t *testing.T, c *client) T {
	t.Helper()
	wait(t).Eventually(func() []T { return of[T](c) }).ShouldNot(BeEmpty(), fmt.Sprintf("an event %T", *new(T)))
	return of[T](c)[0]
}

func (c *client) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = nil
}

func (c *client) setNoReceipts(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noReceipts = on
}

// codes connects a client that is not paired and waits for its QR codes.
func codes(t *testing.T, c *client) []string {
	t.Helper()
	wait(t).Expect(c.Connect()).To(Succeed())
	return first[*events.QR](t, c).Codes
}

// paired makes a client, pairs it with a phone and waits until it is connected.
func paired(t *testing.T, s *Server, phone string) *client {
	t.Helper()
	return pairedOn(t, s, newDevice(), phone)
}

func pairedOn(t *testing.T, s *Server, device *store.Device, phone string) *client {
	t.Helper()
	return pair(t, s, newClient(t, s, device), phone)
}

func pair(t *testing.T, s *Server, c *client, phone string) *client {
	t.Helper()
	g := wait(t)
	jid, err := s.Scan(t.Context(), codes(t, c)[0], phone)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.PairSuccess](t, c).ID.String()).To(Equal(jid))
	first[*events.Connected](t, c)
	return c
}

// texts returns the texts that the client received.
func texts(c *client) []string {
	var out []string
	for _, m := range of[*events.Message](c) {
		out = append(out, m.Message.GetConversation())
	}
	return out
}

func (c *client) jid() string { return c.Store.GetJID().String() }

// write sends a text from the client.
func (c *client) write(t *testing.T, to types.JID, text string) {
	t.Helper()
	_, err := c.SendMessage(t.Context(), to, &waE2E.Message{Conversation: proto.String(text)})
	wait(t).Expect(err).NotTo(HaveOccurred())
}

// memory is a device's store in memory. SQLite would take most of a test's time, and
// these tests are for the simulator only.
type memory struct {
	store.NoopStore
	mu       sync.Mutex
	sessions map[string][]byte
	preKeys  map[uint32]*keys.PreKey
	last     uint32
	uploaded map[uint32]bool
	lids     map[string]types.JID
	pns      map[string]types.JID
	tokens   map[types.JID]store.PrivacyToken
	salt     []byte
	keys     map[string][]byte // sender keys
	secrets  map[string][]byte // of messages
}

// newDevice is a device that is not paired.
func newDevice() *store.Device {
	d := &store.Device{
		Container:      &memory{},
		NoiseKey:       keys.NewKeyPair(),
		IdentityKey:    keys.NewKeyPair(),
		RegistrationID: rand.Uint32(),
		AdvSecretKey:   keys.NewKeyPair().Priv[:],
	}
	d.SignedPreKey = d.IdentityKey.CreateSignedPreKey(1)
	return d
}

func (m *memory) PutDevice(_ context.Context, d *store.Device) error {
	if d.Initialized {
		return nil
	}
	m.sessions, m.preKeys, m.uploaded = map[string][]byte{}, map[uint32]*keys.PreKey{}, map[uint32]bool{}
	m.lids, m.pns, m.tokens = map[string]types.JID{}, map[string]types.JID{}, map[types.JID]store.PrivacyToken{}
	m.keys, m.secrets = map[string][]byte{}, map[string][]byte{}
	d.Identities, d.Sessions, d.PreKeys, d.SenderKeys, d.AppStateKeys, d.AppState = m, m, m, m, m, m
	d.Contacts, d.ChatSettings, d.MsgSecrets, d.PrivacyTokens, d.NCTSalt, d.EventBuffer, d.LIDs = m, m, m, m, m, m, m
	d.Initialized = true
	return nil
}

func (m *memory) DeleteDevice(context.Context, *store.Device) error { return nil }

func (m *memory) IsTrustedIdentity(context.Context, string, [32]byte) (bool, error) { return true, nil }

func (m *memory) GetSession(_ context.Context, address string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sessions[address], nil
}

func (m *memory) HasSession(ctx context.Context, address string) (bool, error) {
	s, err := m.GetSession(ctx, address)
	return s != nil, err
}

func (m *memory) GetManySessions(ctx context.Context, addresses []string) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, a := range addresses {
		out[a], _ = m.GetSession(ctx, a)
	}
	return out, nil
}

func (m *memory) PutSession(ctx context.Context, address string, session []byte) error {
	return m.PutManySessions(ctx, map[string][]byte{address: session})
}

func (m *memory) PutManySessions(_ context.Context, sessions map[string][]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.Copy(m.sessions, sessions)
	return nil
}

func (m *memory) MigratePNToLID(_ context.Context, pn, lid types.JID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for address, session := range m.sessions {
		if rest, ok := strings.CutPrefix(address, pn.SignalAddressUser()+":"); ok {
			m.sessions[lid.SignalAddressUser()+":"+rest] = session
			delete(m.sessions, address)
		}
	}
	return nil
}

func (m *memory) PutSenderKey(_ context.Context, group, user string, key []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keys[group+user] = key
	return nil
}

func (m *memory) GetSenderKey(_ context.Context, group, user string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.keys[group+user], nil
}

func (m *memory) PutMessageSecret(_ context.Context, chat, sender types.JID, id types.MessageID, secret []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.secrets[chat.ToNonAD().String()+sender.ToNonAD().String()+id] = secret
	return nil
}

func (m *memory) GetMessageSecret(_ context.Context, chat, sender types.JID, id types.MessageID) ([]byte, types.JID, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.secrets[chat.ToNonAD().String()+sender.ToNonAD().String()+id], sender, nil
}

// dropSessions removes every Signal session, like a database restored from a backup.
func (m *memory) dropSessions() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.sessions)
}

// dropContacts removes the Signal sessions with contacts and their sender keys in groups, but
// not the session with the own phone.
func (m *memory) dropContacts(own types.JID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for address := range m.sessions {
		if !strings.HasPrefix(address, own.SignalAddressUser()+":") {
			delete(m.sessions, address)
		}
	}
	clear(m.keys)
}

func (m *memory) GetOrGenPreKeys(ctx context.Context, count uint32) ([]*keys.PreKey, error) {
	var out []*keys.PreKey
	for range min(count, 30) { // the client accepts fewer keys; 812 take a long time
		k, _ := m.GenOnePreKey(ctx)
		out = append(out, k)
	}
	return out, nil
}

func (m *memory) GenOnePreKey(context.Context) (*keys.PreKey, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last++
	m.preKeys[m.last] = keys.NewPreKey(m.last)
	return m.preKeys[m.last], nil
}

func (m *memory) GetPreKey(_ context.Context, id uint32) (*keys.PreKey, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.preKeys[id], nil
}

func (m *memory) RemovePreKey(_ context.Context, id uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.preKeys, id)
	return nil
}

func (m *memory) MarkPreKeysAsUploaded(_ context.Context, upTo uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.preKeys {
		if id <= upTo {
			m.uploaded[id] = true
		}
	}
	return nil
}

func (m *memory) UploadedPreKeyCount(context.Context) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for id := range m.uploaded {
		if m.preKeys[id] != nil {
			n++
		}
	}
	return n, nil
}

func (m *memory) DoDecryptionTxn(ctx context.Context, do func(context.Context) error) error {
	return do(ctx)
}

func (m *memory) PutLIDMapping(_ context.Context, lid, pn types.JID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lids[pn.User], m.pns[lid.User] = lid.ToNonAD(), pn.ToNonAD()
	return nil
}

func (m *memory) PutManyLIDMappings(ctx context.Context, mappings []store.LIDMapping) error {
	for _, x := range mappings {
		_ = m.PutLIDMapping(ctx, x.LID, x.PN)
	}
	return nil
}

func (m *memory) GetPNForLID(_ context.Context, lid types.JID) (types.JID, error) {
	return m.lookUp(m.pns, lid), nil
}

func (m *memory) GetLIDForPN(_ context.Context, pn types.JID) (types.JID, error) {
	return m.lookUp(m.lids, pn), nil
}

func (m *memory) GetManyLIDsForPNs(_ context.Context, pns []types.JID) (map[types.JID]types.JID, error) {
	out := map[types.JID]types.JID{}
	for _, pn := range slices.Clone(pns) {
		if lid := m.lookUp(m.lids, pn); !lid.IsEmpty() {
			out[pn] = lid
		}
	}
	return out, nil
}

func (m *memory) PutPrivacyTokens(_ context.Context, tokens ...store.PrivacyToken) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, token := range tokens {
		m.tokens[token.User] = token
	}
	return nil
}

func (m *memory) GetPrivacyToken(_ context.Context, user types.JID) (*store.PrivacyToken, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if token, ok := m.tokens[user]; ok {
		return &token, nil
	}
	return nil, nil
}

func (m *memory) PutNCTSalt(_ context.Context, salt []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.salt = salt
	return nil
}

func (m *memory) GetNCTSalt(context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.salt, nil
}

func (m *memory) lookUp(in map[string]types.JID, jid types.JID) types.JID {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := in[jid.User]
	if !out.IsEmpty() {
		out.Device = jid.Device
	}
	return out
}
