package simulator

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/whatsmeow/types"
)

// The ledger is what really happened to each stanza that the server has queued for a device:
// how often it was delivered, and when and how the device acknowledged it. A test compares
// it with what the system under test delivered further.

// LedgerEntry is one stanza for one device.
type LedgerEntry struct {
	// Number orders the entries as the server queued them, over all devices.
	Number int64  `json:"number"`
	Device string `json:"device"`
	ID     string `json:"id"`
	// Stanza is message, receipt, notification, status or call.
	Stanza string `json:"stanza"`
	// Kind is the kind of a message ([Kinds]), else what the stanza is about.
	Kind string `json:"kind,omitempty"`
	// Chat is the group or the LID of the person, Sender the LID of the sender and Phone the
	// sender's number. A message of the own account has its account as the sender.
	Chat   string `json:"chat,omitempty"`
	Sender string `json:"sender,omitempty"`
	Phone  string `json:"phone,omitempty"`
	// Queued is when WhatsApp received it for the device.
	Queued time.Time `json:"queued"`
	// Delivered counts how often it was sent to the device, after a new encryption too.
	Delivered      int       `json:"delivered"`
	FirstDelivered time.Time `json:"first_delivered,omitzero"`
	LastDelivered  time.Time `json:"last_delivered,omitzero"`
	// Acknowledged is when the device acknowledged it; WhatsApp then forgets it.
	Acknowledged time.Time `json:"acknowledged,omitzero"`
	// By is how: the type of the receipt (delivered, inactive, sender, peer_msg, …), "ack", or
	// "nack" and the number of the error. A message that could not be decrypted has "ack" and
	// Retries above 0.
	By string `json:"by,omitempty"`
	// Retries counts the retry receipts, and Encrypted how often it was encrypted.
	Retries   int `json:"retries,omitempty"`
	Encrypted int `json:"encrypted,omitempty"`
	// PhoneRequests counts the requests to the own phone to send it again, PhoneAnswers its
	// answers, which are entries of their own.
	PhoneRequests int `json:"phone_requests,omitempty"`
	PhoneAnswers  int `json:"phone_answers,omitempty"`
}

// entry is a LedgerEntry in less memory. It is guarded by Server.mu.
type entry struct {
	number                      int64
	device                      *device
	id, stanza, kind            string
	sender                      *account
	group                       *group
	chat                        *account
	queued, first, last, acked  int64 // nanoseconds since 1970, or 0
	by                          string
	delivered, retries, encrypt int32
	asked, answered             int32
}

func (e *entry) deliver(at time.Time) {
	e.last = at.UnixNano()
	if e.delivered == 0 {
		e.first = e.last
	}
	e.delivered++
}

func (e *entry) acknowledge(at time.Time, how string) {
	if e.acked == 0 {
		e.acked, e.by = at.UnixNano(), how
	}
}

// maxLedger limits the ledger; half of it is forgotten at the limit, but nothing that waits.
const maxLedger = 1 << 20

// recordLocked adds a stanza to the ledger, unless it is an entry's message that was
// encrypted again. The caller holds s.mu.
func (s *Server) recordLocked(d *device, st *stanza) {
	if st.message != nil && st.message.entry != nil {
		st.entry = st.message.entry
		st.entry.encrypt++
		// What was acknowledged before was only the stanza that could not be decrypted.
		st.entry.acked, st.entry.by = 0, ""
		return
	}
	s.lastEntry++
	st.entry = &entry{number: s.lastEntry, device: d, id: st.id, stanza: st.tag, queued: s.clock.Now().UnixNano()}
	if m := st.message; m != nil {
		st.entry.kind, st.entry.sender, st.entry.group, st.entry.chat, st.entry.encrypt = m.kind, m.from.account, m.group, m.to, 1
		if m.group == nil && m.to == nil {
			st.entry.chat = m.from.account
		}
		m.entry = st.entry
	} else if kind := attribute(&st.node, "type"); kind != "" {
		st.entry.kind = kind
	} else if children := st.node.GetChildren(); len(children) > 0 {
		st.entry.kind = children[0].Tag
	}
	if st.entry.sender == nil {
		st.entry.sender = s.knownLocked(jidAttribute(&st.node, "participant"))
	}
	if from := jidAttribute(&st.node, "from"); st.entry.group == nil && from.Server == types.GroupServer {
		st.entry.group = s.groups[from.User]
	} else if st.entry.sender == nil {
		st.entry.sender = s.knownLocked(from)
	}
	s.ledger = append(s.ledger, st.entry)
	if len(s.ledger) >= maxLedger {
		kept := make([]*entry, 0, maxLedger)
		for i, e := range s.ledger {
			if i >= maxLedger/2 || e.acked == 0 {
				kept = append(kept, e)
			}
		}
		s.counts.forgotten += int64(len(s.ledger) - len(kept))
		s.ledger = kept
	}
}

// knownLocked returns the account of a JID, or nil. The caller holds s.mu.
func (s *Server) knownLocked(jid types.JID) *account {
	if jid.Server == types.HiddenUserServer {
		return s.byLID[jid.User]
	}
	return s.byPhone[jid.User]
}

// LedgerQuery selects entries of the ledger.
type LedgerQuery struct {
	// Device is a JID or a phone number; empty for all.
	Device string
	// After is the number of the last entry that is already known.
	After int64
	// Limit is the most entries of an answer (default 10,000).
	Limit int
	// Waiting selects the entries without an acknowledgement.
	Waiting bool
}

const defaultLedgerLimit = 10000

// Ledger lists what the server has queued for devices, the oldest first, and what became of
// it. It has at most the limit of entries; ask again with the number of the last one.
func (s *Server) Ledger(q LedgerQuery) ([]LedgerEntry, error) {
	if q.Limit < 0 || q.After < 0 {
		return nil, fmt.Errorf("%w: the limit and the number of an entry cannot be negative", ErrBadInput)
	}
	if q.Limit == 0 {
		q.Limit = defaultLedgerLimit
	}
	var target types.JID
	if q.Device != "" {
		var err error
		if target, err = parseDeviceName(q.Device); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []LedgerEntry{}
	first, _ := slices.BinarySearchFunc(s.ledger, q.After+1, func(e *entry, number int64) int { return cmp.Compare(e.number, number) })
	for _, e := range s.ledger[first:] {
		if q.Waiting && e.acked != 0 || !concerns(target, e.device) {
			continue
		}
		if len(out) == q.Limit {
			break
		}
		out = append(out, e.export())
	}
	return out, nil
}

func (e *entry) export() LedgerEntry {
	at := func(n int64) time.Time {
		if n == 0 {
			return time.Time{}
		}
		return time.Unix(0, n).UTC()
	}
	out := LedgerEntry{
		Number: e.number, Device: e.device.jid().String(), ID: e.id, Stanza: e.stanza, Kind: e.kind,
		Queued: at(e.queued), Delivered: int(e.delivered), FirstDelivered: at(e.first), LastDelivered: at(e.last),
		Acknowledged: at(e.acked), By: e.by, Retries: int(e.retries), Encrypted: int(e.encrypt),
		PhoneRequests: int(e.asked), PhoneAnswers: int(e.answered),
	}
	if e.sender != nil {
		out.Sender, out.Phone = e.sender.lidJID().String(), e.sender.phone
	}
	switch {
	case e.group != nil:
		out.Chat = e.group.jid().String()
	case e.chat != nil:
		out.Chat = e.chat.lidJID().String()
	case e.sender != nil:
		out.Chat = out.Sender
	}
	return out
}
