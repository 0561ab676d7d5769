package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/socket"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"go.mau.fi/whatsmeow/util/keys"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// whatsmeow decodes and handles received nodes in goroutines without a recover, so one
// node with a missing attribute would end the process with all its sessions. Here the
// connector receives instead: it opens the connection like whatsmeow's
// Client.ConnectContext, but reads, decodes and queues the nodes itself and passes each
// to whatsmeow's handler under a recover. Only whatsmeow sends.

const (
	// maxQueued and maxQueuedBytes are the limits for received nodes that are not yet handled.
	// Beyond them the connector stops reading, so that the server waits too.
	maxQueued      = 2048
	maxQueuedBytes = 2 * maxFrame
	// roomTimeout is how long reading waits for room while nothing is handled. A handler may wait
	// for an answer of the server, which cannot come meanwhile.
	roomTimeout = time.Minute
	// handlerTimeout is how long a handler may take for one node: longer than anything
	// that it waits for, the answer to a request (75 s) and the store.
	handlerTimeout = 5 * time.Minute
	// maxTasks is the maximum number of handlers beside the queue.
	maxTasks = 32
	// nackUnhandled reports to the server that a node could not be handled, so that it is not
	// delivered again (whatsmeow's receipt.go).
	nackUnhandled = whatsmeow.NackUnhandledError
)

// nodeQueue holds the nodes that wait to be handled, in the order of their arrival. One
// goroutine puts, another takes, and the second runs only while there are nodes: a
// thousand silent connections need no such goroutine.
type nodeQueue struct {
	mu      sync.Mutex
	nodes   []queuedNode
	bytes   int
	running bool
	// held: nothing is put, because a hand-over waits.
	held bool
	// changed is closed and replaced when a node was taken, all are handled or held has ended.
	changed chan struct{}
}

type queuedNode struct {
	node *waBinary.Node
	size int
}

// put adds a node. full: there is no room; it is closed at the next change. start: a taker must be
// started.
func (q *nodeQueue) put(node *waBinary.Node, size int) (full <-chan struct{}, start bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.held || len(q.nodes) >= maxQueued || len(q.nodes) > 0 && q.bytes+size > maxQueuedBytes {
		return q.next(), false
	}
	q.nodes = append(q.nodes, queuedNode{node, size})
	q.bytes += size
	start, q.running = !q.running, true
	return nil, start
}

// hold makes put refuse nodes until it is called again.
func (q *nodeQueue) hold(held bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.held = held
	if !held {
		q.change()
	}
}

// next is closed at the next change. The caller holds q.mu.
func (q *nodeQueue) next() <-chan struct{} {
	if q.changed == nil {
		q.changed = make(chan struct{})
	}
	return q.changed
}

// change wakes those who wait. The caller holds q.mu.
func (q *nodeQueue) change() {
	if q.changed != nil {
		close(q.changed)
		q.changed = nil
	}
}

// take removes the oldest node; nil: there is none, and the taker ends.
func (q *nodeQueue) take() *waBinary.Node {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.change()
	if len(q.nodes) == 0 {
		q.running, q.nodes = false, nil
		return nil
	}
	first := q.nodes[0]
	q.nodes[0] = queuedNode{}
	q.nodes = q.nodes[1:]
	q.bytes -= first.size
	return first.node
}

// wait returns a channel that is closed at the next change; nil: no node is queued or being
// handled.
func (q *nodeQueue) wait() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.running {
		return nil
	}
	return q.next()
}

// internals are the parts of whatsmeow's client that it uses itself.
func (c *Connection) internals() *whatsmeow.DangerousInternalClient {
	return c.client.DangerousInternals() //nolint:staticcheck // "deprecated" only says that it is dangerous
}

// open opens the connection, as whatsmeow's Client.unlockedConnect does.
func (c *Connection) open(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r, "the handshake", false)
			err = fmt.Errorf("%w: %v", errMalformedStream, r)
		}
	}()
	internals := c.internals()
	internals.ResetExpectedDisconnect()
	frames := socket.NewFrameSocket(newClientLog(c.options.Log()), c.websocket)
	// The connection's context ends the dialling, and later closes the socket. It must not be
	// the context of the frames: their receiver ends with that one, and the reader of the
	// socket would wait for ever to pass a frame on.
	reading, stop := context.WithCancel(context.WithoutCancel(ctx))
	dialled := context.AfterFunc(ctx, stop)
	if err := frames.Connect(reading); err != nil {
		stop()
		frames.Close(0)
		return err
	}
	dialled()
	context.AfterFunc(ctx, c.closeSocket)
	s := c.stream.Load()
	defer s.release()
	if err := c.shakeHands(internals, frames, s, stop); err != nil {
		if frames.Frames == nil {
			frames.Frames = make(chan []byte)
		}
		s.release()
		frames.Close(0)
		go func() {
			c.drain(frames.Frames)
			stop()
		}()
		return fmt.Errorf("noise handshake failed: %w", err)
	}
	go func() {
		defer c.recovered("the keep-alives", true)
		internals.KeepAliveLoop(ctx, frames.Context())
	}()
	return nil
}

// drain takes the remaining frames of an abandoned connection: otherwise whatsmeow's reader
// would wait for ever to pass on a frame.
func (c *Connection) drain(frames <-chan []byte) {
	timer := c.factory.clock.NewTimer(readerTimeout)
	defer timer.Stop()
	for {
		select {
		case <-frames:
		case <-timer.C():
			return
		}
	}
}

// shakeHands lets whatsmeow do the handshake, and derives the keys again for receiving.
// ended is called when the socket's reader has ended.
func (c *Connection) shakeHands(internals *whatsmeow.DangerousInternalClient, frames *socket.FrameSocket, s *stream, ended func()) error {
	ephemeral := keys.NewKeyPair()
	// After the handshake whatsmeow starts a goroutine that takes the frames from the channel
	// that is set then (socket/noisesocket.go). It gets no frames, and waits until the socket is
	// closed. The last frame that whatsmeow reads itself has come when it asks for the payload,
	// and the stream holds back the following bytes.
	c.handshaken = func() { frames.Frames = nil }
	if _, err := internals.DoHandshake(frames, *ephemeral); err != nil {
		return err
	}
	frames.Frames = make(chan []byte)
	handshake, err := replay(s.takeFirstFrame(), ephemeral, c.options.Device.NoiseKey)
	if err != nil {
		return err
	}
	disconnected := frames.OnDisconnect
	_, err = handshake.Finish(frames, c.receive, func(ctx context.Context, _ *socket.NoiseSocket, remote bool) {
		c.settle(s)
		ended()
		disconnected(ctx, remote)
	})
	return err
}

// replay does the client's part of a handshake (Noise_XX) again as far as the keys
// depend on it. whatsmeow has checked the identity of the server.
func replay(hello []byte, ephemeral, static *keys.KeyPair) (*socket.NoiseHandshake, error) {
	var message waWa6.HandshakeMessage
	if err := proto.Unmarshal(hello, &message); err != nil {
		return nil, fmt.Errorf("reading the server's hello: %w", err)
	}
	theirs := message.GetServerHello().GetEphemeral()
	if len(theirs) != 32 {
		return nil, errors.New("the server's hello has no key")
	}
	h := socket.NewNoiseHandshake()
	h.Start(socket.NoiseStartPattern, socket.WAConnHeader)
	h.Authenticate(ephemeral.Pub[:])
	h.Authenticate(theirs)
	if err := h.MixSharedSecretIntoKey(*ephemeral.Priv, [32]byte(theirs)); err != nil {
		return nil, err
	}
	server, err := h.Decrypt(message.GetServerHello().GetStatic())
	if err != nil || len(server) != 32 {
		return nil, errors.Join(errors.New("the server's key cannot be read"), err)
	}
	if err := h.MixSharedSecretIntoKey(*ephemeral.Priv, [32]byte(server)); err != nil {
		return nil, err
	}
	err = h.MixSharedSecretIntoKey(*static.Priv, [32]byte(theirs))
	return h, err
}

// openStream is called with the socket of an opened websocket.
func (c *Connection) openStream(body io.ReadWriteCloser) *stream {
	s := newStream(body, func(err error) {
		c.report(over(EventDisconnected, session.EndMalformedFrame, "%v: another version of the operator may know them", err))
	})
	c.stream.Store(s)
	return s
}

// receive is called with the plaintext of each frame, one after another.
func (c *Connection) receive(_ context.Context, plaintext []byte) {
	defer func() {
		c.received.Add(1)
		select {
		case c.taken <- struct{}{}:
		default:
		}
	}()
	defer c.recovered("a frame", true)
	if c.ctx.Err() != nil {
		return
	}
	node, err := decodeNode(plaintext)
	if err != nil {
		if !c.malformed.Swap(true) { // log one line only: a server could send millions
			c.options.Log().Info("Ignored a malformed frame", "reason", err.Error())
		}
		return
	}
	if id := c.asking.Load(); id != nil && node.Tag == "ack" && node.Attrs["id"] == *id {
		return // whatsmeow closes the channel for it while it would put it there
	}
	if c.internals().ReceiveResponse(c.ctx, node) || handlers[node.Tag] == nil {
		return
	}
	c.enqueue(node, len(plaintext))
}

// enqueue queues a node and makes sure that it is handled. While there is no room, it waits, and
// nothing more is read.
func (c *Connection) enqueue(node *waBinary.Node, size int) {
	full := c.tryEnqueue(node, size)
	if full == nil {
		return
	}
	timer := c.factory.clock.NewTimer(roomTimeout)
	defer timer.Stop()
	for full != nil {
		select {
		case <-full:
			timer.Reset(roomTimeout)
		case <-c.ctx.Done():
			return
		case <-timer.C():
			c.report(over(EventDisconnected, session.EndOverloaded, "WhatsApp sends faster than it can be handled: it sends the rest again on the next connection"))
			return
		}
		full = c.tryEnqueue(node, size)
	}
}

// tryEnqueue is enqueue without the wait. full: there is no room; it is closed when it is worth
// another try.
func (c *Connection) tryEnqueue(node *waBinary.Node, size int) (full <-chan struct{}) {
	full, start := c.queue.put(node, size)
	if start {
		go c.handleQueued()
	}
	return full
}

// handleQueued handles nodes until none is left.
func (c *Connection) handleQueued() {
	for node := c.queue.take(); node != nil; node = c.queue.take() {
		c.handleNode(node)
	}
}

// settle waits a short time until the nodes received before the end have been handled:
// the last node says why the connection ended.
func (c *Connection) settle(s *stream) {
	timer := c.factory.clock.NewTimer(explainTimeout)
	defer timer.Stop()
	wait := func(changed <-chan struct{}) bool {
		select {
		case <-changed:
			return true
		case <-timer.C():
		case <-c.ctx.Done():
		}
		return false
	}
	// A frame that cannot be decrypted is never received: the timer ends the wait for it.
	for c.received.Load() < s.framed.Load() {
		if !wait(c.taken) {
			return
		}
	}
	for changed := c.queue.wait(); changed != nil; changed = c.queue.wait() {
		if !wait(changed) {
			return
		}
	}
}

// handlers are whatsmeow's, by the node's tag; see the nodeHandlers in its client.go.
// explains: the node says why the connection ends, so it is handled after the end too.
// ends: without the node the connection cannot go on. inbox: what the node says is handed over.
var handlers = map[string]*struct {
	handle         func(*Connection, *waBinary.Node)
	explains, ends bool
	inbox          func(*waBinary.Node) bool
}{
	"message":      {handle: (*Connection).handleMessage, inbox: always},
	"status":       {handle: (*Connection).handleStatus, inbox: always},
	"appdata":      {handle: (*Connection).handleMessage, inbox: always},
	"receipt":      {handle: (*Connection).handleReceipt, inbox: always},
	"call":         {handle: (*Connection).handleCall, inbox: always},
	"chatstate":    {handle: inner((*whatsmeow.DangerousInternalClient).HandleChatState)},
	"presence":     {handle: inner((*whatsmeow.DangerousInternalClient).HandlePresence)},
	"notification": {handle: (*Connection).handleNotification, inbox: isChange},
	"success":      {handle: (*Connection).handleSuccess, ends: true},
	"failure":      {handle: (*Connection).handleFailure, explains: true, ends: true},
	"stream:error": {handle: (*Connection).handleStreamError, explains: true, ends: true},
	"iq":           {handle: (*Connection).handleIQ, ends: true},
	"ib":           {handle: inner((*whatsmeow.DangerousInternalClient).HandleIB)},
}

func always(*waBinary.Node) bool { return true }

// inner is a handler of whatsmeow that needs no changes.
func inner(handle func(*whatsmeow.DangerousInternalClient, context.Context, *waBinary.Node)) func(*Connection, *waBinary.Node) {
	return func(c *Connection, node *waBinary.Node) { handle(c.internals(), c.ctx, node) }
}

// handleNode handles one node. If whatsmeow panics, the node is refused, and the
// connection continues unless it needs the node.
func (c *Connection) handleNode(node *waBinary.Node) {
	h := handlers[node.Tag]
	if c.ctx.Err() != nil || c.full {
		return
	}
	if l := c.socket.Load(); l != nil && l.isClosed.Load() && !h.explains {
		return // it cannot be acknowledged any more, and comes again
	}
	stuck := c.factory.clock.AfterFunc(handlerTimeout, func() {
		go c.report(over(EventDisconnected, session.EndHandlerStuck, "what WhatsApp sent could not be handled within %s", handlerTimeout))
	})
	defer stuck.Stop()
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r, "<"+node.Tag+">", h.ends)
			if h.inbox != nil && h.inbox(node) {
				c.handOverUnread(node)
			}
		}
		c.endIfFull()
	}()
	h.handle(c, node)
}

// recovered is deferred around calls in which whatsmeow may panic.
func (c *Connection) recovered(what string, ends bool) {
	if r := recover(); r != nil {
		c.panicked(r, what, ends)
	}
}

// panicked logs that whatsmeow has panicked, and ends the connection if it cannot continue.
func (c *Connection) panicked(cause any, what string, ends bool) {
	c.options.Log().Error(fmt.Errorf("%v", cause), "Recovered from a panic of whatsmeow", "in", what, "stack", string(debug.Stack()))
	if ends {
		go c.report(over(EventDisconnected, session.EndMalformedStanza, "WhatsApp sent something that this version of the client cannot handle (%s)", what))
	}
}

// task runs a handler beside the queue, as whatsmeow does for handlers that send a request
// to the server; but one after another, because some change the same data. If there are too
// many, the queue waits.
func (c *Connection) task(what string, ends bool, f func()) {
	if !c.tryTask(what, ends, f) {
		c.exclusive(what, ends, f)
	}
}

// tryTask is task, but if there are too many, it does nothing and returns false.
func (c *Connection) tryTask(what string, ends bool, f func()) bool {
	if c.tasks.Add(1) > maxTasks {
		c.tasks.Add(-1)
		return false
	}
	go func() {
		defer c.tasks.Add(-1)
		c.exclusive(what, ends, f)
	}()
	return true
}

// exclusive runs a handler while no task runs.
func (c *Connection) exclusive(what string, ends bool, f func()) {
	c.taskMu.Lock()
	defer c.taskMu.Unlock()
	defer c.recovered(what, ends)
	if c.ctx.Err() == nil {
		f()
	}
}

// handleReceipt is whatsmeow's handleReceipt (receipt.go) without its goroutines.
func (c *Connection) handleReceipt(node *waBinary.Node) {
	internals := c.internals()
	receipt, groups, err := internals.ParseReceipt(node)
	if err != nil {
		internals.SendAck(c.ctx, node, whatsmeow.NackParsingError)
		return
	}
	if groups == nil && receipt.Type == types.ReceiptTypeRetry {
		// The receipt is acknowledged when the message was sent again.
		c.task("a retry receipt", false, func() { internals.TryHandleRetryReceipt(c.ctx, receipt, node) })
		internals.DispatchEvent(receipt)
		return
	}
	if groups == nil {
		internals.DispatchEvent(receipt)
	}
	for i := range groups {
		internals.HandleGroupedReceipt(*receipt, &groups[i])
	}
	c.acknowledge(node)
}

// notifications are the kinds that whatsmeow handles beside the queue (notification.go,
// handleNotification). Without the answer of a phone a pairing code is useless.
var notifications = map[string]*struct {
	handle func(*whatsmeow.DangerousInternalClient, context.Context, *waBinary.Node)
	ends   bool
}{
	"encrypt":                 {handle: (*whatsmeow.DangerousInternalClient).HandleEncryptNotification},
	"server_sync":             {handle: (*whatsmeow.DangerousInternalClient).HandleAppStateNotification},
	"account_sync":            {handle: (*whatsmeow.DangerousInternalClient).HandleAccountSyncNotification},
	"link_code_companion_reg": {handle: (*whatsmeow.DangerousInternalClient).TryHandleCodePairNotification, ends: true},
	"crsc_continuation":       {handle: (*whatsmeow.DangerousInternalClient).TryHandlePasskeyContinuationNotification, ends: true},
}

// renewals are the notifications that replace the secret of a pairing. They are handled in
// the queue, before the next nodes, and never while a task reads the secret. Only WhatsApp
// itself may send them, and not to a linked device, whose secret whatsmeow would replace too.
var renewals = map[string]func(*Connection, *waBinary.Node){
	"companion_reg_refresh":    (*Connection).handleRefresh,
	"passkey_prologue_request": (*Connection).handlePasskeyRequest,
}

// handleSuccess remembers the device's LID before whatsmeow, which writes it into the device
// while another goroutine reports the login.
func (c *Connection) handleSuccess(node *waBinary.Node) {
	if lid := node.AttrGetter().OptionalJIDOrEmpty("lid"); !lid.IsEmpty() {
		c.lid.Store(&lid)
	}
	c.internals().HandleConnectSuccess(c.ctx, node)
}

func (c *Connection) handleNotification(node *waBinary.Node) {
	internals := c.internals()
	kind, _ := node.Attrs["type"].(string)
	n := notifications[kind]
	switch {
	case isGroupChange(node):
		c.handleGroupChange(node)
		return
	case renewals[kind] != nil && (c.Paired() || node.Attrs["from"] != types.ServerJID):
		defer internals.MaybeDeferredAck(c.ctx, node)()
		return
	case renewals[kind] != nil:
		c.exclusive("a notification of the type "+kind, true, func() { renewals[kind](c, node) })
		return
	case n == nil:
		internals.HandleNotification(c.ctx, node)
		return
	}
	defer internals.MaybeDeferredAck(c.ctx, node)()
	c.task("a notification of the type "+kind, n.ends, func() { n.handle(internals, c.ctx, node) })
}

// handleRefresh handles the replacement of the secret in the codes on show.
func (c *Connection) handleRefresh(node *waBinary.Node) {
	c.scanned = nil
	c.internals().HandleNotification(c.ctx, node)
}

// handlePasskeyRequest handles a request for the account's passkey. whatsmeow replaces the
// secret at each request and proves with the former one that it showed the code that was
// scanned. So the secret of that code is restored before a request that repeats another:
// WhatsApp and the phone know no other.
func (c *Connection) handlePasskeyRequest(node *waBinary.Node) {
	if c.scanned == nil {
		c.scanned = c.options.Device.AdvSecretKey
	}
	c.options.Device.AdvSecretKey = c.scanned
	c.internals().HandleNotification(c.ctx, node)
}

// handleFailure handles a refused login. whatsmeow reports no event for refusals that it
// considers temporary, and waits until the server closes the socket.
func (c *Connection) handleFailure(node *waBinary.Node) {
	c.internals().HandleConnectFailure(c.ctx, node)
	attrs := node.AttrGetter()
	reason := events.ConnectFailureReason(attrs.OptionalInt("reason"))
	if reason == events.ConnectFailureInternalServerError || reason == events.ConnectFailureServiceUnavailable {
		c.internals().DispatchEvent(&events.ConnectFailure{Reason: reason, Message: attrs.OptionalString("message")})
	}
}

// handleStreamError handles the end of the connection, for the same reason.
func (c *Connection) handleStreamError(node *waBinary.Node) {
	c.internals().HandleStreamError(c.ctx, node)
	// The event of this error must not race with that of the socket's end.
	c.internals().ExpectDisconnect()
	if code, _ := node.Attrs["code"].(string); code == "503" {
		c.internals().DispatchEvent(&events.StreamError{Code: code, Raw: node})
	}
}

// handleIQ is whatsmeow's handleIQ (pair.go) without its goroutine, and with a check for
// a pairing without all its parts.
func (c *Connection) handleIQ(node *waBinary.Node) {
	children, internals := node.GetChildren(), c.internals()
	if len(children) != 1 || node.Attrs["from"] != types.ServerJID || c.Paired() { // a linked device is not linked again
		return
	}
	switch children[0].Tag {
	case "pair-device":
		c.exclusive("the codes of a pairing", true, func() {
			c.scanned = nil
			internals.HandlePairDevice(c.ctx, node)
		})
	case "pair-success":
		id, _ := node.Attrs["id"].(string)
		device := children[0].GetChildByTag("device")
		identity, _ := children[0].GetChildByTag("device-identity").Content.([]byte)
		business, _ := children[0].GetChildByTag("biz").Attrs["name"].(string)
		platform, _ := children[0].GetChildByTag("platform").Attrs["name"].(string)
		jid, _ := device.Attrs["jid"].(types.JID)
		lid, _ := device.Attrs["lid"].(types.JID)
		c.task("a pairing", true, func() {
			err := errors.New("it names no device")
			if id != "" && jid.User != "" {
				err = internals.HandlePair(c.ctx, identity, id, business, platform, jid, lid)
			}
			if err != nil {
				internals.DispatchEvent(&events.PairError{ID: jid, LID: lid, BusinessName: business, Platform: platform, Error: err})
				return
			}
			internals.SendUnifiedSession()
			internals.DispatchEvent(&events.PairSuccess{ID: jid, LID: lid, BusinessName: business, Platform: platform})
		})
	}
}
