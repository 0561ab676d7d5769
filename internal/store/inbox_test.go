package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv/claimtest"
)

const lease = claimtest.Lease

// holders are sessions whose holders push messages.
type holders struct {
	store    *Store
	sessions []*holder
}

// holder is the process that holds a session. Its pushes follow each other.
type holder struct {
	mu       sync.Mutex
	id       string
	taking   *Taking
	lastSeq  int64
	lastItem delivery.Item
}

func newHolders(t *testing.T, s *Store, n int) *holders {
	t.Helper()
	h := &holders{store: s}
	for i := range n {
		id := claimtest.SessionName(i)
		h.sessions = append(h.sessions, &holder{id: id, taking: taken(t, s, id, "a", 1)})
	}
	return h
}

// taken claims a session id for a namespace and takes the session.
func taken(t *testing.T, s *Store, id, namespace string, epoch int64) *Taking {
	t.Helper()
	g := NewWithT(t)
	_, err := s.Claim(t.Context(), Claimant{SessionID: id, Namespace: namespace, UID: "uid-" + id}, never)
	g.Expect(err).NotTo(HaveOccurred())
	taking, err := s.Take(t.Context(), "uid-"+id, epoch)
	g.Expect(err).NotTo(HaveOccurred())
	return taking
}

// messageItem is a message of a session; its key follows from its number, and all have the same size.
func messageItem(sessionID string, seq int64) delivery.Item {
	payload, err := json.Marshal(map[string]any{"session_id": sessionID, "key": messageKey(sessionID, seq), "text": "hello"})
	if err != nil {
		panic(err)
	}
	return delivery.Item{SessionID: sessionID, Key: messageKey(sessionID, seq), Numbers: delivery.Numbers{Epoch: 1, Seq: seq}, Payload: payload}
}

func messageKey(sessionID string, seq int64) string { return fmt.Sprintf("%s-%06d", sessionID, seq) }

// writingInbox is the inbox of one process, whose Write pushes messages.
type writingInbox struct {
	*Inbox
	holders *holders
}

func (w writingInbox) Write(ctx context.Context, random *rand.Rand, m *claimtest.Model) error {
	h := w.holders.sessions[random.IntN(len(w.holders.sessions))]
	h.mu.Lock()
	defer h.mu.Unlock()
	if random.IntN(20) == 0 { // the session moves
		former := h.taking
		var err error
		if h.taking, err = w.holders.store.Take(ctx, "uid-"+h.id, former.Record.Epoch+1); err != nil {
			return err
		}
		// The former holder was paused, and pushes late: the message that is the last one
		// already, or a new one.
		for _, item := range []delivery.Item{h.lastItem, messageItem(h.id, h.lastSeq+1)} {
			if item.Key == "" {
				continue
			}
			if _, err := w.Push(ctx, former, item); !errors.Is(err, ErrFenced) && !errors.Is(err, claimtest.ErrLost) {
				return fmt.Errorf("a former holder's push was not refused: %w", err)
			}
		}
	}
	for range 1 + random.IntN(6) {
		item := messageItem(h.id, h.lastSeq+1)
		for {
			if _, err := w.Push(ctx, h.taking, item); err == nil {
				break
			} else if !errors.Is(err, claimtest.ErrLost) {
				return err
			}
		}
		h.lastSeq, h.lastItem = h.lastSeq+1, item
		m.Written(h.id, h.lastSeq)
	}
	return nil
}

// openInbox opens the inbox of one more process.
func openInbox(s *Store, now func() time.Time, opts InboxOptions) *Inbox {
	opts.Now = now
	b := NewInbox(s, opts)
	b.loseAnswer = func(ctx context.Context) error {
		if claimtest.Lost(ctx) {
			return claimtest.ErrLost
		}
		return nil
	}
	return b
}

// TestInboxInterleavings is the suite that the coalescing queue runs too (internal/batch).
func TestInboxInterleavings(t *testing.T) {
	for kind, rounds := range map[string]int{"PostgreSQL": 500, "PgBouncer": 100, "SQLite": 200} {
		t.Run(kind, func(t *testing.T) {
			s := open(t, kinds[kind](t))
			NewWithT(t).Expect(s.Migrate(t.Context())).To(Succeed())
			h := newHolders(t, s, 20)
			claimtest.Run(t, claimtest.Subject{Kind: delivery.KindMessage, Rounds: rounds, Open: func(now func() time.Time) claimtest.Process {
				return writingInbox{openInbox(s, now, InboxOptions{DeadLetters: 1 << 20}), h}
			}})
			var messages, heads int
			g := NewWithT(t)
			g.Expect(s.db.QueryRow(t.Context(), "SELECT COUNT(*) FROM whatsapp_operator_inbox").Scan(&messages)).To(Succeed())
			g.Expect(messages).To(BeZero())
			g.Expect(s.db.QueryRow(t.Context(), `SELECT COUNT(*) FROM whatsapp_operator_inbox_head
				WHERE tail<>head OR bytes_in<>bytes_out OR due IS NOT NULL OR batch IS NOT NULL`).Scan(&heads)).To(Succeed())
			g.Expect(heads).To(BeZero())
		})
	}
}
