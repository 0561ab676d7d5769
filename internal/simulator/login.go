package simulator

import (
	"context"
	"errors"
	"strconv"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waWa6"
)

// doubledTimeout is how long the older connection of a device may take to answer a
// ping and still count as alive.
const doubledTimeout = time.Second

// maxDoubled limits how many doubled connections are kept; Stats counts all of them.
const maxDoubled = 1000

// Doubled is a login of a device while its older connection was alive: the older one
// still answered a websocket ping within a second, so a process was reading it. An
// older connection that was ending, stopped, unreachable or frozen does not count.
type Doubled struct {
	Device string    `json:"device"`
	At     time.Time `json:"at"`
	// Older and Newer are the client addresses of the two connections.
	Older string `json:"older"`
	Newer string `json:"newer"`
}

// Doubled lists the doubled connections, the oldest first, the newest 1,000.
func (s *Server) Doubled() []Doubled {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Doubled{}, s.doubled...)
}

// login accepts the login of a paired client, or refuses it with a reason.
func (c *conn) login(payload *waWa6.ClientPayload) error {
	s := c.srv
	s.mu.Lock()
	var d *device
	if a := s.byPhone[strconv.FormatUint(payload.GetUsername(), 10)]; a != nil && payload.GetDevice() <= maxDevice {
		d = a.devices[uint16(payload.GetDevice())]
	}
	if d != nil && d.noise != c.static {
		d = nil // another client with the same JID, or an earlier device with this number
	}
	slow, isSlow := s.activeLocked(FaultSlowHandshake, d)
	_, refuse := s.activeLocked(FaultRefuse, d)
	s.mu.Unlock()

	if isSlow && slow.Device != "" && !c.wait(slow.Delay.Duration) {
		return errEnded
	}
	if refuse {
		s.count(func(c *counts) { c.refused++ })
		// Send a frame before the end: the library cannot handle a socket that closes
		// right after the handshake (it sets its callbacks without a lock).
		_ = c.send(waBinary.Node{Tag: "xmlstreamend"})
		return errors.New("a fault refuses the login")
	}
	if d == nil {
		return c.fail(Fault{Reason: 401})
	}
	if f, ok := s.active(FaultFailure, d); ok {
		return c.fail(f)
	}
	if s.outdated(payload, d) {
		return c.fail(Fault{Reason: 405})
	}

	s.mu.Lock()
	if d.account.devices[d.index] != d { // unlinked meanwhile
		s.mu.Unlock()
		return c.fail(Fault{Reason: 401})
	}
	older := d.conn
	if older != nil && (older.ending || !s.startLocked()) {
		older = nil
	}
	c.device, d.conn = d, c
	d.logins++
	d.loggedIn = s.clock.Now()
	if !d.lost.IsZero() {
		d.away, d.lost = d.away+d.loggedIn.Sub(d.lost), time.Time{}
	}
	d.queue.next = 0 // stanzas without a receipt are sent again
	s.counts.logins++
	s.mu.Unlock()
	if older != nil {
		go older.displace(c)
	}
	s.log.V(1).Info("Logged in a device", "device", d.jid().String(), "remote", c.remote)
	return c.send(waBinary.Node{Tag: "success", Attrs: waBinary.Attrs{
		"t": s.seconds(), "lid": d.lidJID(), "location": "sim", "props": "2",
		"creation": strconv.FormatInt(d.linked.Unix(), 10),
	}})
}

// fail refuses a login with the fault's reason; see events.ConnectFailureReason
// in whatsmeow for the meaning of each reason.
func (c *conn) fail(f Fault) error {
	attrs := waBinary.Attrs{"reason": strconv.Itoa(f.Reason), "location": "sim"}
	if f.Reason == 402 {
		attrs["code"] = "101" // too many messages to strangers
		attrs["expire"] = strconv.FormatInt(int64(f.Expire.Duration/time.Second), 10)
	}
	c.srv.count(func(c *counts) { c.refused++ })
	c.end(&waBinary.Node{Tag: "failure", Attrs: attrs})
	for {
		if err := c.next(func([]byte) error { return nil }); err != nil { // until the connection ends
			return err
		}
	}
}

// displace ends a connection after its device has logged in again. Before that it
// checks whether a process still reads the connection.
func (c *conn) displace(newer *conn) {
	s := c.srv
	defer s.wg.Done()
	ctx, cancel := context.WithCancel(context.Background())
	timer := s.clock.AfterFunc(doubledTimeout, cancel)
	err := c.ws.Ping(ctx)
	timer.Stop()
	cancel()
	if err == nil {
		s.mu.Lock()
		s.counts.doubled++
		s.doubled = append(s.doubled, Doubled{
			Device: newer.device.jid().String(), At: s.clock.Now(), Older: c.remote, Newer: newer.remote,
		})
		s.doubled = s.doubled[max(0, len(s.doubled)-maxDoubled):]
		s.mu.Unlock()
		s.log.Info("Detected a doubled connection", "device", newer.device.jid().String(), "older", c.remote, "newer", newer.remote)
	}
	s.count(func(c *counts) { c.replaced++ })
	c.end(streamError("replaced"))
}

// streamError returns the last node of a connection for a code of FaultStreamError.
func streamError(code string) *waBinary.Node {
	node := &waBinary.Node{Tag: "stream:error", Attrs: waBinary.Attrs{"code": code}}
	switch code {
	case "replaced":
		node.Attrs = nil
		node.Content = []waBinary.Node{{Tag: "conflict", Attrs: waBinary.Attrs{"type": code}}}
	case "unacknowledged":
		return ackError("status", newID())
	case "device_removed":
		node.Attrs["code"] = "401"
		node.Content = []waBinary.Node{{Tag: "conflict", Attrs: waBinary.Attrs{"type": code}}}
	}
	return node
}
