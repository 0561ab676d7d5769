package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waCompanionReg"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// explainTimeout is how long the end of a socket waits for an event that says why.
	explainTimeout = time.Second
	// deleteTimeout is how long a logout waits until the store has marked the device. The
	// store itself takes no longer than 5 s.
	deleteTimeout = 6 * time.Second
	// pairTimeout is how long the 515 after a scan waits until the library has handled the scan.
	pairTimeout = 5 * time.Second
	// readerTimeout is how long the reader of a closed socket takes to end.
	readerTimeout = time.Second
	// codeTimeout is how long WhatsApp may take to register a code that is typed on a phone.
	codeTimeout = 30 * time.Second
	// codeLifetime is how long such a code is valid. WhatsApp does not say; it ends
	// with the connection at the latest, whose six QR codes last 60 s and five times
	// 20 s (whatsmeow's pair-code.go and qrchan.go).
	codeLifetime = 160 * time.Second
	// codeClient is the client that the phone shows before it links it: a browser and a
	// system. WhatsApp refuses any other form (whatsmeow's pair-code.go). The device's name
	// appears when it is linked.
	codeClient = "Chrome (Linux)"
)

// Options are the options of one connection.
type Options struct {
	// Device is read for this connection alone. One without an ID offers codes to scan.
	Device *store.Device
	// DeviceName is the name that the phone shows; empty: the factory's.
	DeviceName string
	// PairPhone is the number, in E.164, of the phone on which a person types the code if
	// the device has no ID; empty: codes to scan are offered.
	PairPhone string
	// Proxy is the session's egress; nil: direct, or what HTTPS_PROXY names.
	Proxy *url.URL
	// Log makes the logger, which names the session, when there is something to log: the
	// loggers of a thousand connections would use some megabytes. nil: nothing is logged.
	Log func() logr.Logger
	// Allowed is called before every dial and every write to WhatsApp; an error closes the
	// socket. nil: always.
	Allowed func() error
	// Events is called with each event, one call at a time. It must return soon, and
	// must neither call Close nor wait for a goroutine that does.
	Events func(Event)
	// SessionID is the session's, for the items.
	SessionID string
	// Accept is called with each item, one after another; nil: every message that was decrypted
	// is acknowledged. WhatsApp gets the acknowledgement when Accept has returned nil or
	// [ErrBacklog]; another error refuses the item and ends the connection. ctx ends with the
	// connection, and after handOverTimeout at the latest.
	Accept func(ctx context.Context, item delivery.MessageItem) error
}

// Connection is one login, or one attempt at pairing. Its methods may be called
// from any goroutine, Connect only once.
type Connection struct {
	factory *Factory
	options Options
	client  *whatsmeow.Client
	// container deletes the device for the client.
	container *watchedContainer
	// jid and pushName are copied from the device at the beginning: the library empties
	// the fields of the device when it is logged out.
	jid      types.JID
	pushName string
	// lid is the device's, as WhatsApp said last.
	lid atomic.Pointer[types.JID]

	// ctx ends with the connection; Connect sets ctx and cancel.
	ctx    context.Context
	cancel context.CancelCauseFunc
	socket atomic.Pointer[monitoredConn]

	// websocket opens the websocket, stream is the byte stream under it. queue holds the
	// received nodes and tasks the handlers beside it, see receiver.go.
	websocket *http.Client
	stream    atomic.Pointer[stream]
	// handshaken is called when whatsmeow has read the last frame that it reads itself.
	handshaken func()
	// received counts the frames that were received; taken has one when it has grown.
	received  atomic.Int64
	taken     chan struct{}
	queue     nodeQueue
	tasks     atomic.Int32
	malformed atomic.Bool // a frame could not be decoded
	// asking is the id of the last request to the own phone, for whose acknowledgement nobody waits.
	asking atomic.Pointer[types.MessageID]
	taskMu sync.Mutex

	// codes are the codes to scan; only the library's events read and change them, one at a time
	// while a pairing is handled alone.
	codes []string
	// scanned is the secret in the codes that were on show when WhatsApp asked for the passkey;
	// nil: it has not asked since. It is used while a pairing is handled alone.
	scanned []byte

	// asked: a code to type was asked for.
	asked atomic.Bool

	// handedOver is the number of events that were handed over. full: the connection ends after the
	// node in hand. Only the goroutine that handles nodes uses them.
	handedOver int
	full       bool
	// translator makes items of the library's events, and translate is its method.
	translator *messageTranslator
	translate  func(ctx context.Context, evt any) ([]delivery.MessageItem, error)
	// retries counts the retry receipts; only the goroutine that handles nodes uses it.
	retries map[types.MessageID]int
	// deleting: the library has begun to delete the device; deleted is closed when it has ended.
	deleting    atomic.Bool
	deleted     chan struct{}
	deletedOnce sync.Once

	// pairEnded is closed when the library has ended a pairing, well or badly.
	pairEnded     chan struct{}
	pairEndedOnce sync.Once

	// gone is closed by Close and ends every wait.
	gone     chan struct{}
	goneOnce sync.Once

	// mu is held while Events runs and guards the rest.
	mu     sync.Mutex
	begun  bool // Connect was called
	opened bool // Connect has succeeded
	over   bool // the end was reported
	closed bool // Close was called
	// life looks for signs of life while the connection is opened, see life.go.
	life clock.Timer
}

// New prepares a connection. It does nothing on the network.
func (f *Factory) New(o Options) (*Connection, error) {
	if o.Device == nil || o.Events == nil {
		return nil, errors.New("a connection needs a device and a function for its events")
	}
	if o.Proxy != nil {
		if err := checkProxy(o.Proxy); err != nil {
			return nil, err
		}
	}
	if o.DeviceName == "" {
		o.DeviceName = f.deviceName
	}
	if o.Allowed == nil {
		o.Allowed = func() error { return nil }
	}
	if o.Log == nil {
		o.Log = logr.Discard
	}
	c := &Connection{factory: f, options: o, pushName: o.Device.PushName,
		taken: make(chan struct{}, 1), deleted: make(chan struct{}), pairEnded: make(chan struct{}), gone: make(chan struct{})}
	if o.Device.ID != nil {
		c.jid = *o.Device.ID
	}
	lid := o.Device.LID
	c.lid.Store(&lid)
	c.container = &watchedContainer{DeviceContainer: o.Device.Container, connection: c}
	o.Device.Container = c.container
	c.guardStores(o.Device)

	client := whatsmeow.NewClient(o.Device, newClientLog(o.Log()))
	websocket, media := f.clients(o.Proxy, c.dial)
	websocket.Transport = &streamed{inner: websocket.Transport, opened: c.openStream, compressed: !c.Paired()}
	c.websocket = websocket
	client.SetPreLoginHTTPClient(websocket)
	client.SetWebsocketHTTPClient(websocket)
	client.SetMediaHTTPClient(media)
	setCallbacks(client)
	client.GetClientPayload = c.payload
	// The supervisor decides when to connect again, and does it with a new client.
	client.EnableAutoReconnect, client.DisableLoginAutoReconnect = false, true
	// A message is acknowledged after the handler has taken it, and can be read again
	// from the buffer when it has not.
	client.SynchronousAck, client.EnableDecryptedEventBuffer = true, true
	// Linking a hundred phones must not need gigabytes.
	client.ManualHistorySyncDownload = true
	client.AddEventHandlerWithSuccessStatus(c.handle)
	c.client = client
	c.translator = &messageTranslator{
		sessionID: o.SessionID, lids: o.Device.LIDs, secrets: client, now: f.clock.Now,
		own: func() (pn, lid types.JID) { return c.jid, *c.lid.Load() },
	}
	c.translate = c.translator.translate
	return c, nil
}

// setCallbacks sets every callback of the client that is optional: whatsmeow calls
// RefreshCAT without a check for nil when a login is refused with 413 or 414.
func setCallbacks(client *whatsmeow.Client) {
	client.AutoReconnectHook = func(error) bool { return false }
	client.GetMessageForRetry = func(_, _ types.JID, _ types.MessageID) *waE2E.Message { return nil }
	client.PreRetryCallback = func(*events.Receipt, types.MessageID, int, *waE2E.Message) bool { return true }
	client.PrePairCallback = func(types.JID, string, string) bool { return true }
	client.RefreshCAT = func(context.Context) error {
		return errors.New("tokens of this kind belong to Messenger, which this client is not")
	}
}

// payload describes the client to WhatsApp. It is the library's payload, except for the
// version and the device's name, which the library keeps for the whole process.
func (c *Connection) payload() *waWa6.ClientPayload {
	if c.handshaken != nil {
		c.handshaken()
	}
	p := c.options.Device.GetClientPayload()
	version := c.factory.webVersion()
	p.UserAgent.AppVersion = version.ProtoAppVersion()
	if p.DevicePairingData != nil {
		props := proto.Clone(store.DeviceProps).(*waCompanionReg.DeviceProps)
		props.Os = proto.String(c.options.DeviceName)
		if encoded, err := proto.Marshal(props); err == nil {
			p.DevicePairingData.DeviceProps = encoded
		}
		hash := version.Hash()
		p.DevicePairingData.BuildHash = hash[:]
	}
	return p
}

// Connect opens the connection. When ctx ends, the socket is closed at once, also in
// the middle of Connect. A nil error means
// that the servers have been reached; whether they let the device in is an event,
// which may come before Connect returns.
// Connect takes at most 40 s. The error is a *ConnectError, or ctx's cause.
func (c *Connection) Connect(ctx context.Context) error {
	c.mu.Lock()
	if c.begun || c.closed {
		c.mu.Unlock()
		return errors.New("a connection is used once")
	}
	c.begun = true
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.client.BackgroundEventCtx = c.ctx
	c.mu.Unlock()

	// whatsmeow's handshake does not watch its context.
	done := make(chan error, 1)
	go func() { done <- c.open(c.ctx) }()
	var err error
	select {
	case err = <-done:
	case <-c.ctx.Done():
		err = c.ctx.Err()
	}
	if err != nil {
		cause := context.Cause(c.ctx)
		switch {
		case errors.Is(cause, errSocketEnded), errors.Is(cause, errRefused): // an event reports the end
			return nil
		case cause != nil:
			err = cause
		default:
			err = explain(err, attempt{proxy: c.options.Proxy, dialled: c.socket.Load() != nil, simulated: c.factory.endpoint != nil})
		}
		select {
		case <-c.gone: // Close ends the socket first, then the context
			err = context.Canceled
		default:
		}
		c.end(err)
		return err
	}

	c.mu.Lock()
	c.opened = true
	c.mu.Unlock()
	c.proveLife()
	context.AfterFunc(c.ctx, c.onEnd)
	if l := c.socket.Load(); l != nil && l.isClosed.Load() { // before it counted as opened
		go c.onEnd()
	}
	return nil
}

// dial opens the socket of the websocket.
func (c *Connection) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if err := c.options.Allowed(); err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l := newMonitoredConn(conn, c.factory.clock.Now, c.options.Allowed, func() { go c.onEnd() })
	c.socket.Store(l)
	if c.ctx.Err() != nil { // closed meanwhile
		return nil, errors.Join(context.Cause(c.ctx), l.Close())
	}
	return l, nil
}

// onEnd reports the end of a socket or of the context, unless an event explains it better.
func (c *Connection) onEnd() {
	c.mu.Lock()
	skip := !c.opened || c.over || c.closed
	c.mu.Unlock()
	if skip {
		return
	}
	c.pause(explainTimeout, nil)
	if c.deleting.Load() {
		c.pause(deleteTimeout, c.deleted)
		c.pause(explainTimeout, nil)
	}
	e := socketClosed
	switch cause := context.Cause(c.ctx); {
	case cause == nil, errors.Is(cause, errSocketEnded):
	case errors.Is(cause, errRefused):
		e = refusal()
	case errors.Is(cause, context.Canceled):
		e = over(EventDisconnected, session.EndCancelled, "the worker ended the connection")
		e.Ours = true
	default:
		c.options.Log().Error(cause, "Ended the connection because the store failed")
		e = over(EventDisconnected, session.EndStoreFailed, "the database failed or another process has taken the session: the connection was ended to keep its messages")
		e.Ours = true
	}
	c.report(e)
}

// errSocketEnded is the cause of a context that ended after its socket.
var errSocketEnded = errors.New("the socket has ended")

// pause waits for early, but no longer than d and not after Close.
func (c *Connection) pause(d time.Duration, early <-chan struct{}) {
	timer := c.factory.clock.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C():
	case <-early:
	case <-c.gone:
	}
}

// report passes on an event, but none after the end or after Close. At the end it
// closes the socket: the library would wait for the server to do it.
func (c *Connection) report(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			c.options.Log().Error(fmt.Errorf("%v", r), "Recovered from a panic in the handler of an event", "event", e.Type, "stack", string(debug.Stack()))
		}
	}()
	if c.over || c.closed {
		return
	}
	if c.over = e.Over(); c.over {
		c.forgetLife()
		go c.end(errSocketEnded)
	}
	c.options.Events(e)
}

// end closes the socket and everything that depends on it.
func (c *Connection) end(cause error) {
	c.closeSocket()
	c.cancel(cause)
}

func (c *Connection) closeSocket() {
	if l := c.socket.Load(); l != nil {
		_ = l.Close() // it may be closed already
	}
}

// Close ends the connection; its socket is closed when Close returns. No event comes after it. It may be called
// more than once.
func (c *Connection) Close() {
	c.mu.Lock()
	c.closed = true
	c.forgetLife()
	begun := c.begun
	c.mu.Unlock()
	c.goneOnce.Do(func() { close(c.gone) })
	if begun {
		c.end(context.Canceled)
	}
}

// LastSeen is when the last byte came from the server; zero: never.
func (c *Connection) LastSeen() time.Time {
	l := c.socket.Load()
	if l == nil {
		return time.Time{}
	}
	return l.lastSeen()
}

// Paired reports whether the connection logs in a device; the others offer codes.
func (c *Connection) Paired() bool { return !c.jid.IsEmpty() }

// Logout unlinks the device at WhatsApp and marks its keys. A device that is
// unlinked already is a success. No event comes after a success.
func (c *Connection) Logout(ctx context.Context) error {
	if !c.Paired() {
		return nil
	}
	// Client.Logout does the same, but then closes the socket in up to 5 s and empties
	// the device in a race with the stream error that WhatsApp sends after its answer.
	_, err := c.client.DangerousInternals().SendIQ( //nolint:staticcheck // "deprecated" only says that it is dangerous
		ctx, whatsmeow.DangerousInfoQuery{
			Namespace: "md", Type: "set", To: types.ServerJID, NoRetry: true,
			Content: []waBinary.Node{{Tag: "remove-companion-device", Attrs: waBinary.Attrs{"jid": c.jid, "reason": "user_initiated"}}},
		})
	if err != nil && !c.unlinked(err) {
		return fmt.Errorf("unlinking the device: %w", briefError{err})
	}
	c.mu.Lock()
	c.over = true
	c.forgetLife()
	c.mu.Unlock()
	if err := c.container.DeleteDevice(ctx, c.options.Device); !errors.Is(err, errMarked) && !errors.Is(err, errDeleting) {
		// The keys are useless now; they are deleted with the session.
		c.options.Log().Info("Failed to mark the keys of an unlinked device", "reason", err.Error())
	}
	return nil
}

// unlinked reports whether a logout failed because the device is unlinked already.
func (c *Connection) unlinked(err error) bool {
	if errors.Is(err, whatsmeow.ErrIQNotFound) {
		return true
	}
	// The library deletes the device only when WhatsApp has unlinked it. Its answer may
	// be overtaken by the end of the connection that follows it.
	c.pause(explainTimeout, c.deleted)
	return c.deleting.Load()
}

// handle is called with every event of the library. false: it was not accepted, so the
// node that brought it must not be acknowledged.
func (c *Connection) handle(evt any) (taken bool) {
	defer func() {
		if r := recover(); r != nil {
			c.options.Log().Error(fmt.Errorf("%v", r), "Recovered from a panic while handling an event of whatsmeow", "event", fmt.Sprintf("%T", evt), "stack", string(debug.Stack()))
			taken = c.ctx.Err() == nil
		}
	}()
	now := c.factory.clock.Now()
	switch e := evt.(type) {
	case *events.Message, *events.Receipt, *events.GroupInfo, *events.JoinedGroup:
		return c.accept(e)
	case *events.Picture:
		if e.JID.Server == types.GroupServer { // those of people are not forwarded
			return c.accept(e)
		}
	case *events.KeepAliveTimeout:
		if silent(e, c.LastSeen(), now) {
			c.report(over(EventDisconnected, session.EndKeepAliveTimeout, "WhatsApp has not answered since %s", e.LastSuccess.UTC().Format(time.RFC3339)))
		}
	case *events.LoggedOut:
		// The device is being deleted at this moment; the handler of the logout may read it.
		c.pause(deleteTimeout, c.deleted)
		c.reportEvent(e, now)
	case *events.Disconnected:
		if c.ctx.Err() == nil { // otherwise onEnd knows the reason
			c.reportEvent(e, now)
		}
	case *events.QR:
		// The connection is complete now, which a code to type needs too.
		if c.options.PairPhone == "" {
			c.codes = e.Codes
			c.reportEvent(e, now)
		} else if c.asked.CompareAndSwap(false, true) {
			go c.askForCode(now)
		}
	case *events.RotateADVSecret:
		if len(c.codes) > 0 {
			c.codes = withSecret(c.codes, e.OldSecret, e.NewSecret)
			if replaced, ok := Translate(&events.QR{Codes: c.codes}, now); ok {
				replaced.Type = EventCodesReplaced
				c.report(replaced)
			}
		}
	case *events.PairSuccess:
		c.reportEvent(e, now)
		c.pairEndedOnce.Do(func() { close(c.pairEnded) })
	case *events.PairError:
		c.pairEndedOnce.Do(func() { close(c.pairEnded) })
		c.reportEvent(e, now)
		c.report(over(EventDisconnected, session.EndPairingRefused, "the pairing was refused"))
	case *events.ManualLoginReconnect:
		if !c.Paired() {
			// The 515 can overtake the return of the write that it answers. If the socket
			// were closed now, the library would take that write for failed and delete the device.
			c.pause(pairTimeout, c.pairEnded)
		}
		c.reportEvent(e, now)
	default:
		c.reportEvent(e, now)
	}
	return c.ctx.Err() == nil
}

// withSecret replaces the secret in codes: it is the last part but one (whatsmeow's
// pair.go, makeQRData).
func withSecret(codes []string, before, after string) []string {
	replaced := make([]string, len(codes))
	for i, code := range codes {
		if at := strings.LastIndex(code, ","+before+","); at >= 0 {
			code = code[:at] + "," + after + code[at+1+len(before):]
		}
		replaced[i] = code
	}
	return replaced
}

func (c *Connection) reportEvent(evt any, now time.Time) {
	e, ok := Translate(evt, now)
	if !ok {
		return
	}
	if e.Type == EventConnected {
		e.JID, e.LID, e.PhoneNumber, e.PushName = address(c.jid), address(*c.lid.Load()), phoneNumber(c.jid), status.Clean(c.pushName, maxName)
	}
	c.report(e)
}

// askForCode asks for a code to type on the phone and reports it. It waits for
// WhatsApp's answer, so it must not delay the library's events; it ends with
// the connection.
func (c *Connection) askForCode(from time.Time) {
	defer func() {
		if r := recover(); r != nil { // the connection ends if no code comes
			c.options.Log().Error(fmt.Errorf("%v", r), "Recovered from a panic while asking for a pairing code", "stack", string(debug.Stack()))
		}
	}()
	ctx, cancel := context.WithTimeout(c.ctx, codeTimeout)
	defer cancel()
	code, err := c.client.PairPhone(ctx, c.options.PairPhone, true, whatsmeow.PairClientChrome, codeClient)
	switch {
	case c.ctx.Err() != nil: // onEnd reports why: the store may have failed
		return
	case err != nil:
		c.report(codeRefused(err))
		return
	}
	c.report(Event{Type: EventPairingCode, Code: code, Until: from.Add(codeLifetime)})
}

// silent: the proof of life has failed. Neither a byte nor the answer to a
// keep-alive has come for some periods, or no answer for as long as the library
// itself would wait before it connects again.
func silent(e *events.KeepAliveTimeout, seen, now time.Time) bool {
	if now.Sub(e.LastSuccess) > whatsmeow.KeepAliveMaxFailTime {
		return true
	}
	return e.ErrorCount >= silentPeriods && now.Sub(seen) >= silentPeriods*whatsmeow.KeepAliveIntervalMin
}

// errDeleting: the device is being deleted, or is deleted, by another goroutine.
var errDeleting = errors.New("the device is deleted already")

// errMarked: the device has been deleted, or marked, as requested. whatsmeow gets an error,
// because after a success it replaces the stores of the device, which other goroutines may
// be reading (its store/store.go, Device.Delete). It only logs the error.
var errMarked = errors.New("the device is deleted, and its stores stay in place until the connection has ended")

// errUndecided: the library deletes a device that it has just stored when it failed to write
// the answer to the scan (its pair.go, handlePair). WhatsApp may have received that answer
// and linked the device. Its keys are kept, and the next login shows whether it has.
var errUndecided = errors.New("the device is kept: the next login shows whether WhatsApp has linked it")

// watchedContainer records when the library deletes the device.
type watchedContainer struct {
	store.DeviceContainer
	connection *Connection
}

// PutDevice implements store.DeviceContainer.
func (w *watchedContainer) PutDevice(ctx context.Context, d *store.Device) error {
	err := w.DeviceContainer.PutDevice(ctx, d)
	if d.Container != w { // the inner container has set itself and its stores
		d.Container = w
	}
	w.connection.guardStores(d)
	return err
}

// DeleteDevice implements store.DeviceContainer. It always returns an error; errMarked is a
// success.
func (w *watchedContainer) DeleteDevice(ctx context.Context, d *store.Device) error {
	if !w.connection.Paired() {
		return errUndecided
	}
	if !w.connection.deleting.CompareAndSwap(false, true) {
		return errDeleting // the library would empty the device a second time
	}
	defer w.connection.deletedOnce.Do(func() { close(w.connection.deleted) })
	if err := w.DeviceContainer.DeleteDevice(ctx, d); err != nil {
		return err
	}
	return errMarked
}
