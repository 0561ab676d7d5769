package simulator

import "maps"

// counts are the counters of Stats; guarded by Server.mu.
type counts struct {
	logins, pairings, logouts, refused, replaced, doubled int64
	compressed                                            int64
	sent, redelivered, received, retries, undecryptable   int64
	nacks, tokens, badTokens, locked                      int64
	unacknowledged, forgotten                             int64
}

// Stats are the server's counters. The fields from Logins on count since the start.
type Stats struct {
	// Connected counts the connections that are logged in, Pairing those that
	// show a code.
	Connected int `json:"connected"`
	Pairing   int `json:"pairing"`
	// Devices counts the linked devices.
	Devices int `json:"devices"`
	// Unacknowledged counts the messages to devices that have no receipt yet.
	Unacknowledged int `json:"unacknowledged"`
	// UnacknowledgedOther counts the notifications, statuses, calls and receipts to devices
	// that have no acknowledgement yet.
	UnacknowledgedOther int `json:"unacknowledged_other"`

	Logins   int64 `json:"logins"`
	Pairings int64 `json:"pairings"`
	Logouts  int64 `json:"logouts"`
	// Refused counts upgrades and logins that were refused.
	Refused int64 `json:"refused"`
	// Replaced counts connections that ended because their device logged in
	// again, Doubled those among them that were alive.
	Replaced int64 `json:"replaced"`
	Doubled  int64 `json:"doubled"`
	// Compressed counts connections with compressed messages, see [Options.Compression].
	Compressed int64 `json:"compressed"`
	// Sent counts messages to devices, Redelivered those sent again at a login,
	// Retries the requests to encrypt one again.
	Sent        int64 `json:"sent"`
	Redelivered int64 `json:"redelivered"`
	Retries     int64 `json:"retries"`
	// Received counts messages from devices, Undecryptable copies of them that a
	// phone could not read.
	Received      int64 `json:"received"`
	Undecryptable int64 `json:"undecryptable"`
	// Nacks counts acknowledgements with an error: stanzas that a client could not handle.
	Nacks int64 `json:"nacks"`
	// Tokens counts the privacy tokens that accounts gave to contacts, BadTokens the tokens
	// in messages and requests that their recipient had not given.
	Tokens    int64 `json:"tokens"`
	BadTokens int64 `json:"bad_tokens"`
	// ReachOutLocked counts the messages that [FaultReachOutLock] refused.
	ReachOutLocked int64 `json:"reach_out_locked"`
	// Overdue counts the connections that ended because their client left more than
	// [Options.MaxUnacknowledged] stanzas unacknowledged.
	Overdue int64 `json:"overdue"`
	// Forgotten counts the entries that the ledger has forgotten because it was full.
	Forgotten int64 `json:"forgotten"`
	// Unknown counts what clients sent and the simulator does not know, by name: stanzas,
	// requests, and their attributes and children.
	Unknown map[string]int64 `json:"unknown"`
}

// Stats returns the server's counters.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Stats{
		Pairing: len(s.pairings),
		Logins:  s.counts.logins, Pairings: s.counts.pairings, Logouts: s.counts.logouts,
		Refused: s.counts.refused, Replaced: s.counts.replaced, Doubled: s.counts.doubled,
		Compressed: s.counts.compressed,
		Sent:       s.counts.sent, Redelivered: s.counts.redelivered, Retries: s.counts.retries,
		Received: s.counts.received, Undecryptable: s.counts.undecryptable,
		Nacks: s.counts.nacks, Tokens: s.counts.tokens, BadTokens: s.counts.badTokens, ReachOutLocked: s.counts.locked,
		Overdue: s.counts.unacknowledged, Forgotten: s.counts.forgotten,
		Unknown: maps.Clone(s.unknown),
	}
	for c := range s.conns {
		if c.device != nil {
			out.Connected++
		}
	}
	for _, a := range s.byPhone {
		out.Devices += len(a.devices)
		for _, d := range a.devices {
			messages := d.queue.messages()
			out.Unacknowledged += messages
			out.UnacknowledgedOther += len(d.queue.waiting) - messages
		}
	}
	return out
}

func (s *Server) count(add func(*counts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	add(&s.counts)
}

// maxUnknown and maxName limit how much a client can make the server store.
const (
	maxUnknown = 1000
	maxName    = 100
)

func (s *Server) countUnknown(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name = name[:min(len(name), maxName)]
	if _, ok := s.unknown[name]; !ok && len(s.unknown) >= maxUnknown {
		name = "others"
	}
	s.unknown[name]++
	s.log.V(1).Info("Received an unknown request", "name", name)
}
