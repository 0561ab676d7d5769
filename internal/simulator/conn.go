package simulator

import (
	"bytes"
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/socket"
	"go.mau.fi/whatsmeow/types"
	"k8s.io/utils/clock"
)

// conn is one connection of a client, from the upgrade to its end.
//
// One goroutine reads it, decodes the nodes and answers. Other goroutines send
// through it, and end it.
type conn struct {
	srv    *Server
	ws     *websocket.Conn
	socket *pausableConn
	remote string

	once   sync.Once
	closed chan struct{}

	// Used only by the reader.
	greeted     bool   // the header has arrived
	rest        []byte // the beginning of an incomplete frame
	readKey     cipher.AEAD
	readCounter uint32
	static      [32]byte // the client's noise key
	device      *device  // nil before the login; set once
	pairing     *pairing // nil unless the client is not paired; set once

	sendMu       sync.Mutex
	writeKey     cipher.AEAD
	writeCounter uint32

	// Guarded by srv.mu.
	active  bool // the client has asked for its messages
	backlog backlog
	ending  bool // the last node has been sent
	timer   clock.Timer
}

// buffers hold a websocket message while it is decoded; nothing decoded may
// keep a slice of it.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// maxPooled is the size up to which a buffer is reused.
const maxPooled = 64 << 10

// serve handles the connection from the handshake to its end.
func (c *conn) serve() {
	defer c.srv.wg.Done()
	defer c.close()
	payload, err := c.handshake()
	if err != nil {
		c.srv.log.V(1).Info("Handshake failed", "remote", c.remote, "reason", err.Error())
		return
	}
	switch {
	case payload.GetDevicePairingData() == nil:
		err = c.login(payload)
	case c.srv.outdated(payload, nil):
		err = c.fail(Fault{Reason: 405})
	default:
		err = c.offerCodes(payload.GetDevicePairingData())
	}
	for err == nil {
		err = c.next(c.handle)
	}
	c.srv.log.V(1).Info("Connection ended", "remote", c.remote, "reason", err.Error())
}

// handshake does the server's part of the noise handshake.
func (c *conn) handshake() (*waWa6.ClientPayload, error) {
	if f, ok := c.srv.active(FaultSlowHandshake, nil); ok && !c.wait(f.Delay.Duration) {
		return nil, errEnded
	}
	c.closeAfter(handshakeTimeout)
	defer c.stopTimer()
	noise := newResponder()
	var hello []byte
	if err := c.next(func(frame []byte) (err error) {
		hello, err = noise.hello(c.srv.authority, frame)
		return err
	}); err != nil {
		return nil, err
	}
	if err := c.write(hello); err != nil {
		return nil, err
	}
	var payload *waWa6.ClientPayload
	err := c.next(func(frame []byte) (err error) {
		c.static, payload, c.readKey, c.writeKey, err = noise.finish(frame)
		return err
	})
	return payload, err
}

var errEnded = errors.New("the connection was ended")

// next waits for a websocket message that completes a frame, and passes the frames
// to use one after another. use must not keep the frame.
func (c *conn) next(use func(frame []byte) error) error {
	for {
		// A context that cannot end costs the library nothing; close ends the read.
		kind, r, err := c.ws.Reader(context.Background())
		if err != nil {
			return err
		}
		if kind != websocket.MessageBinary {
			return errors.New("the message is not binary")
		}
		if used, err := c.frames(r, use); err != nil || used {
			return err
		}
	}
}

// frames reads one websocket message, and reports whether a frame ended in it.
func (c *conn) frames(r io.Reader, use func(frame []byte) error) (used bool, err error) {
	buffer := buffers.Get().(*bytes.Buffer)
	buffer.Reset()
	defer func() {
		if buffer.Cap() <= maxPooled {
			buffers.Put(buffer)
		}
	}()
	buffer.Write(c.rest)
	c.rest = nil
	if _, err := buffer.ReadFrom(r); err != nil {
		return false, err
	}
	left := buffer.Bytes()
	if !c.greeted {
		if !bytes.HasPrefix(left, socket.WAConnHeader) {
			return false, fmt.Errorf("%w: the header is not %x", errHandshake, socket.WAConnHeader)
		}
		left, c.greeted = left[len(socket.WAConnHeader):], true
	}
	for frame, rest, ok := cutFrame(left); ok; frame, rest, ok = cutFrame(left) {
		used, left = true, rest
		if err := use(frame); err != nil {
			return true, err
		}
	}
	if len(left) > 0 {
		c.rest = bytes.Clone(left)
	}
	return used, nil
}

// cutFrame takes a frame with its three-byte length off the front of data.
func cutFrame(data []byte) (frame, rest []byte, ok bool) {
	if len(data) < socket.FrameLengthSize {
		return nil, nil, false
	}
	length := int(data[0])<<16 | int(data[1])<<8 | int(data[2])
	data = data[socket.FrameLengthSize:]
	if len(data) < length {
		return nil, nil, false
	}
	return data[:length], data[length:], true
}

// handle decrypts, decodes and answers one frame.
func (c *conn) handle(frame []byte) error {
	plaintext, err := c.readKey.Open(frame[:0], nonce(c.readCounter), frame, nil)
	if err != nil {
		return fmt.Errorf("decrypt a frame: %w", err)
	}
	c.readCounter++
	node, err := decode(plaintext)
	if err != nil {
		return fmt.Errorf("decode a node: %w", err)
	}
	if node.Tag == "iq" {
		return c.handleIQ(node)
	}
	if !c.srv.checkKnown(node.Tag, node) {
		c.srv.countUnknown(node.Tag)
		return nil
	}
	switch node.Tag {
	case "message":
		return c.handleMessage(node)
	case "receipt":
		return c.handleReceipt(node)
	case "ack":
		c.handleAck(node)
	case "presence":
		c.handlePresence(node)
	case "ib":
		c.handleInformation(node)
	case "call":
		return c.send(waBinary.Node{Tag: "ack", Attrs: waBinary.Attrs{"class": "call", "id": attribute(node, "id"), "from": node.Attrs["to"]}})
	}
	return nil
}

// handlePresence stores the name that a device shows, and checks the token with which it
// subscribes to the presence of a contact.
func (c *conn) handlePresence(node *waBinary.Node) {
	if c.device == nil {
		return
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if name := attribute(node, "name"); name != "" {
		c.device.account.name = name
	}
	c.srv.checkTokenLocked(c.device.account, jidAttribute(node, "to"), node)
}

// decode turns the plaintext of a frame into a node. The library's decoder
// asserts types without checks, so malformed input can make it panic.
func decode(plaintext []byte) (node *waBinary.Node, err error) {
	defer func() {
		if r := recover(); r != nil {
			node, err = nil, fmt.Errorf("malformed: %v", r)
		}
	}()
	// The first byte says whether the rest is compressed, which clients never do.
	if len(plaintext) == 0 || plaintext[0] != 0 {
		return nil, errors.New("the frame is empty or compressed")
	}
	return waBinary.Unmarshal(plaintext[1:])
}

// send encrypts a node and sends it.
func (c *conn) send(node waBinary.Node) error {
	payload, err := waBinary.Marshal(node)
	if err != nil {
		return fmt.Errorf("encode a node: %w", err)
	}
	return c.sendPlaintext(payload)
}

// sendPlaintext encrypts the plaintext of a frame and sends it.
func (c *conn) sendPlaintext(payload []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	frame := make([]byte, socket.FrameLengthSize, socket.FrameLengthSize+len(payload)+c.writeKey.Overhead())
	frame = c.writeKey.Seal(frame, nonce(c.writeCounter), payload, nil)
	c.writeCounter++
	return c.writeFrame(frame)
}

// write sends data as one unencrypted frame. Only the handshake uses it.
func (c *conn) write(data []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.writeFrame(append(make([]byte, socket.FrameLengthSize), data...))
}

// writeFrame fills in the length and sends the frame in one websocket message:
// whatsmeow reassembles a frame that is split over two messages wrongly.
func (c *conn) writeFrame(frame []byte) error {
	length := len(frame) - socket.FrameLengthSize
	frame[0], frame[1], frame[2] = byte(length>>16), byte(length>>8), byte(length)
	ctx, cancel := context.WithTimeout(context.Background(), writeTimeout)
	defer cancel()
	if err := c.ws.Write(ctx, websocket.MessageBinary, frame); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// end sends the last node of the connection (nil for none) and closes it after
// the delay that the options and the faults set.
func (c *conn) end(last *waBinary.Node) {
	c.srv.mu.Lock()
	c.ending = true
	d := c.device
	if d == nil && c.pairing != nil && c.pairing.scan != nil {
		d = c.pairing.scan.device
	}
	_, atOnce := c.srv.activeLocked(FaultCloseAtOnce, d)
	_, lost := c.srv.activeLocked(FaultLoseEnd, d)
	slow, isSlow := c.srv.activeLocked(FaultSlowEnd, d)
	c.srv.mu.Unlock()
	finish := func() {
		if last != nil && !lost {
			_ = c.send(*last)
		}
		if lost || atOnce {
			c.close()
			return
		}
		c.closeAfter(c.srv.opts.CloseDelay)
	}
	if isSlow {
		c.srv.after(slow.Delay.Duration, finish)
		return
	}
	finish()
}

// closeAfter closes the connection after d, unless stopTimer or closeAfter is
// called before.
func (c *conn) closeAfter(d time.Duration) {
	timer := c.srv.after(d, c.close)
	c.srv.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.timer = timer
	c.srv.mu.Unlock()
}

func (c *conn) stopTimer() {
	c.srv.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	c.srv.mu.Unlock()
}

// wait waits for d. It returns false if the connection or the server ends before.
func (c *conn) wait(d time.Duration) bool {
	timer := c.srv.clock.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C():
		return true
	case <-c.closed:
		return false
	case <-c.srv.done:
		return false
	}
}

// close ends the connection at once and forgets it. It does not wait for the
// reader.
func (c *conn) close() {
	c.once.Do(func() {
		close(c.closed)
		c.srv.forget(c)
		if c.socket != nil && c.socket.paused() {
			// Otherwise TLS waits to send its close message through the paused connection.
			_ = c.socket.Close()
		}
		_ = c.ws.CloseNow()
	})
}

// forget removes a closed connection from the server's maps.
func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if c.device != nil && c.device.conn == c {
		c.device.conn = nil
		c.device.lost = s.clock.Now()
	}
	if c.pairing != nil {
		delete(s.pairings, c.pairing.id)
		s.forgetCodeLocked(c.pairing)
	}
}

// attribute returns a string attribute of a node, empty if the node does not have it.
func attribute(node *waBinary.Node, name string) string {
	value, _ := node.Attrs[name].(string)
	return value
}

// jidAttribute returns an attribute that holds a JID, empty if the node does not have it.
func jidAttribute(node *waBinary.Node, name string) types.JID {
	switch value := node.Attrs[name].(type) {
	case types.JID:
		return value
	case string:
		jid, _ := types.ParseJID(value)
		return jid
	default:
		return types.JID{}
	}
}

// content returns the bytes in a child of a node, or nil. They are valid only until
// the frame has been handled.
func content(node *waBinary.Node, tags ...string) []byte {
	child := node.GetChildByTag(tags...)
	data, _ := child.Content.([]byte)
	return data
}

// seconds is the present time as WhatsApp writes it.
func (s *Server) seconds() string { return strconv.FormatInt(s.clock.Now().Unix(), 10) }

// fromServer adds the server as the sender to the attributes of a node.
func fromServer(attrs waBinary.Attrs) waBinary.Attrs {
	attrs["from"] = types.ServerJID
	return attrs
}
