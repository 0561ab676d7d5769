package simulator

import (
	"maps"
	"slices"
	"strconv"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// A device must acknowledge each message, receipt, notification, status and call. What it
// has not acknowledged stays in its queue and is sent again, in the same order, at each
// login. As at WhatsApp, what waits at a login is sent in windows: the next stanza is sent
// when the device has acknowledged enough of the earlier ones, and new stanzas follow when
// it has acknowledged all of them. WhatsApp Web asks for larger windows (offline_batch).

// stanza is a node that a device must acknowledge.
type stanza struct {
	tag, id string
	node    waBinary.Node
	// message is nil for stanzas that are not messages of contacts or of the own phone.
	message *sentMessage
	entry   *entry
	// ignore counts acknowledgements that belong to an earlier stanza with the same id.
	ignore int

	// Guarded by Server.mu.
	position int64 // in the queue, since the device was linked
	sent     bool
}

// queue holds the stanzas that a device has not acknowledged, the oldest first. It is
// guarded by Server.mu.
type queue struct {
	waiting []*stanza
	// next is the index of the first stanza not yet sent on the present connection. All
	// before it were sent on this connection and not acknowledged.
	next int
	// last is the position of the newest stanza.
	last int64
	// sent are the newest messages, acknowledged or not, see sentMessage.
	sent []*sentMessage
	// delivering is true while a goroutine sends stanzas of this queue.
	delivering bool
}

// backlog is what waited for a device at a login, and how much of it was sent. It is guarded
// by Server.mu.
type backlog struct {
	// count is the number of stanzas that waited, last is the position of the last of them.
	count int
	last  int64
	// sent counts the stanzas sent since the login.
	sent int
	// requested is how many more stanzas the client has asked for (offline_batch).
	requested int
	// over is true when the client has acknowledged all of them and was informed.
	over bool
}

// maxSent limits the acknowledged messages that are kept for a device; a client asks for a
// message again immediately or never.
const maxSent = 32

// messages counts the messages among the waiting stanzas.
func (q *queue) messages() int { return q.count("message") }

// count counts the waiting stanzas with that tag.
func (q *queue) count(tag string) int {
	n := 0
	for _, s := range q.waiting {
		if s.tag == tag {
			n++
		}
	}
	return n
}

// find returns the index of the first waiting stanza with that tag and id. It prefers one that
// fits: messages with the same id can wait under both addresses of a contact, and receipts of
// several types for the same message. It returns -1 if there is none.
func (q *queue) find(tag, id string, fits func(*waBinary.Node) bool) int {
	found := -1
	for i, s := range q.waiting {
		if s.tag != tag || s.id != id {
			continue
		}
		if fits(&s.node) {
			return i
		}
		if found < 0 {
			found = i
		}
	}
	return found
}

// isFrom returns the condition that a stanza is from that sender.
func isFrom(sender types.JID) func(*waBinary.Node) bool {
	return func(node *waBinary.Node) bool { return jidAttribute(node, "from") == sender }
}

// remove removes the stanza with that index.
func (q *queue) remove(i int) {
	if i == 0 {
		q.waiting[0] = nil
		q.waiting = q.waiting[1:] // the usual case: acknowledged in order
	} else {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	}
	if i < q.next {
		q.next--
	}
}

// remember keeps a message for a while after its acknowledgement.
func (q *queue) remember(m *sentMessage) {
	if len(q.sent) >= 2*maxSent {
		q.sent = append([]*sentMessage(nil), q.sent[len(q.sent)-maxSent:]...)
	}
	q.sent = append(q.sent, m)
}

// message returns a message that waits or was sent not long ago, by its id, or nil.
func (q *queue) message(id string) *sentMessage {
	for _, m := range slices.Backward(q.sent) {
		if m.id == id {
			return m
		}
	}
	for _, s := range q.waiting {
		if s.id == id && s.message != nil {
			return s.message
		}
	}
	return nil
}

// acknowledgeLocked removes a stanza that a device has acknowledged, and notes in the ledger
// how. With force it also ends the wait for the
// acknowledgement of an earlier stanza with the same id. The caller holds s.mu.
func (s *Server) acknowledgeLocked(d *device, i int, how string, force bool) {
	st := d.queue.waiting[i]
	if st.ignore > 0 && !force {
		st.ignore--
		return
	}
	if how != "" {
		st.entry.acknowledge(s.clock.Now(), how)
	}
	d.queue.remove(i)
}

// enqueue adds a stanza for a device and starts to send it if the device is connected.
func (s *Server) enqueue(d *device, st *stanza) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addLocked(d, st)
	s.deliverLocked(d)
}

// addLocked adds a stanza to the queue of a device and to the ledger. The caller holds s.mu.
func (s *Server) addLocked(d *device, st *stanza) {
	d.queue.last++
	st.position = d.queue.last
	d.queue.waiting = append(d.queue.waiting, st)
	if st.message != nil && st.message.entry == nil { // not encrypted again
		d.queue.remember(st.message)
	}
	s.recordLocked(d, st)
}

// deliver sends a device, in order, the stanzas that have not been sent on its present
// connection, in a goroutine of its own. One goroutine at a time does this for a device.
func (s *Server) deliver(d *device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deliverLocked(d)
}

// deliverLocked is deliver for a caller that holds s.mu.
func (s *Server) deliverLocked(d *device) {
	if d.queue.delivering || !s.readyLocked(d) || !s.startLocked() {
		return
	}
	d.queue.delivering = true
	go func() {
		defer s.wg.Done()
		for s.deliverNext(d) {
		}
	}()
}

// readyLocked reports whether something can be sent to a device now. The caller holds s.mu.
func (s *Server) readyLocked(d *device) bool {
	c, q := d.conn, &d.queue
	if c == nil || !c.active || c.ending {
		return false
	}
	if c.backlog.over {
		return q.next < len(q.waiting)
	}
	if len(q.waiting) == 0 || q.waiting[0].position > c.backlog.last {
		return true // the end of the backlog
	}
	return q.next < len(q.waiting) && (s.opts.OfflineWindow < 0 || q.next < s.opts.OfflineWindow || c.backlog.requested > 0)
}

// deliverNext sends the next stanza. It returns false if there is nothing to send now.
func (s *Server) deliverNext(d *device) bool {
	s.mu.Lock()
	if !s.readyLocked(d) {
		d.queue.delivering = false
		s.mu.Unlock()
		return false
	}
	c, q := d.conn, &d.queue
	b := &c.backlog
	if !b.over && (len(q.waiting) == 0 || q.waiting[0].position > b.last) {
		b.over = true
		count := b.count
		s.mu.Unlock()
		c.delivered(c.send(information(waBinary.Node{Tag: "offline", Attrs: waBinary.Attrs{"count": count}})))
		return true
	}
	if b.over && s.opts.MaxUnacknowledged > 0 && q.next >= s.opts.MaxUnacknowledged {
		oldest := q.waiting[0]
		q.delivering = false
		s.counts.unacknowledged++
		s.mu.Unlock()
		c.end(ackError(oldest.tag, oldest.id))
		return false
	}
	st := q.waiting[q.next]
	q.next++
	node := st.node
	if !b.over {
		b.sent++
		b.requested = max(0, b.requested-1)
		if st.position <= b.last {
			node.Attrs = maps.Clone(node.Attrs)
			node.Attrs["offline"] = strconv.Itoa(b.sent)
		}
	}
	if st.sent && st.tag == "message" {
		s.counts.redelivered++
	}
	st.sent = true
	st.entry.deliver(s.clock.Now())
	s.mu.Unlock()
	c.delivered(c.send(node))
	return true
}

// delivered ends the delivery on a connection that failed: the reader sees the failure too
// and ends the connection.
func (c *conn) delivered(err error) {
	if err == nil {
		return
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	c.ending = true
}

// activate starts the delivery of messages to a connection, which a client requests
// after its login.
func (c *conn) activate() error {
	d := c.device
	c.srv.mu.Lock()
	waiting, messages, receipts := len(d.queue.waiting), d.queue.messages(), d.queue.count("receipt")
	c.srv.mu.Unlock()
	if waiting > 0 {
		if err := c.send(information(waBinary.Node{
			Tag: "offline_preview", Attrs: waBinary.Attrs{
				"count": waiting, "message": messages, "receipt": receipts, "appdata": 0, "notification": waiting - messages - receipts,
			},
		})); err != nil {
			return err
		}
	}
	c.srv.mu.Lock()
	if !c.active {
		c.active = true
		c.backlog = backlog{count: len(d.queue.waiting), last: d.queue.last}
	}
	c.srv.mu.Unlock()
	c.srv.deliver(d)
	return nil
}

// handleInformation handles what a client sends without an answer: a request for more of the
// stanzas that waited at the login.
func (c *conn) handleInformation(node *waBinary.Node) {
	batch, ok := node.GetOptionalChildByTag("offline_batch")
	if !ok || c.device == nil {
		return
	}
	count, err := strconv.Atoi(attribute(&batch, "count"))
	if err != nil || count < 1 {
		c.srv.countUnknown("ib/offline_batch@count")
		return
	}
	c.srv.mu.Lock()
	c.backlog.requested = count
	c.srv.mu.Unlock()
	c.srv.deliver(c.device)
}

// information is a node about the connection itself.
func information(child waBinary.Node) waBinary.Node {
	return waBinary.Node{Tag: "ib", Attrs: fromServer(waBinary.Attrs{}), Content: []waBinary.Node{child}}
}

// ackError is the last node of a connection on which a client has not acknowledged
// that stanza.
func ackError(class, id string) *waBinary.Node {
	return &waBinary.Node{Tag: "stream:error", Content: []waBinary.Node{{Tag: "ack", Attrs: waBinary.Attrs{"class": class, "id": id}}}}
}
