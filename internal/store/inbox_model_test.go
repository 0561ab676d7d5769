package store

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv/claimtest"
)

// modelSession is a session of the model.
type modelSession struct {
	taking, former *Taking
	// waiting are the keys of its messages, in their order; the first inBatch of them are in batch.
	waiting []string
	inBatch int
	batch   string
	// due is since when messages wait outside of a batch, in milliseconds; 0: none do.
	due     int64
	lastKey string
	seq     int64
	// holed: of a batch only rejected messages were left, so there may be numbers without messages.
	holed bool
}

// modelBatch is a stored batch of the model.
type modelBatch struct {
	items         []string
	attempt       int
	claimableFrom int64
	holder        int // the process whose claim is the newest; -1: released
}

// inboxModel is what must be true of the inbox after every operation.
type inboxModel struct {
	t        *testing.T
	g        *WithT
	ctx      context.Context
	random   *rand.Rand
	store    *Store
	inboxes  []*Inbox
	now      int64
	sessions map[string]*modelSession
	batches  map[string]*modelBatch
	letters  []string
	// claims are the batches that a process has claimed once, some of them long ago.
	claims []*delivery.Batch
	size   int
	log    []string
	// seen counts what has happened, so that the test shows what it covers.
	seen map[string]int
}

const modelLetters = 4

// TestInboxModel makes random operations of several processes on one inbox, one after the
// other, and compares each answer and all tables with a model.
func TestInboxModel(t *testing.T) {
	for kind, operations := range map[string]int{"PostgreSQL": 1500, "SQLite": 1500} {
		t.Run(kind, func(t *testing.T) {
			s := open(t, kinds[kind](t))
			m := &inboxModel{t: t, g: NewWithT(t), ctx: t.Context(), store: s, now: claimtest.Start.UnixMilli(),
				sessions: map[string]*modelSession{}, batches: map[string]*modelBatch{}, seen: map[string]int{}}
			m.g.Expect(s.Migrate(m.ctx)).To(Succeed())
			m.random = rand.New(rand.NewPCG(testenv.Seed(t), 0))
			for range 3 {
				b := openInbox(s, func() time.Time { return time.UnixMilli(m.now) }, InboxOptions{DeadLetters: modelLetters})
				m.inboxes = append(m.inboxes, b)
			}
			for i := range 5 {
				id := claimtest.SessionName(i)
				m.sessions[id] = &modelSession{taking: taken(t, s, id, "a", 1)}
			}
			m.size = len(messageItem(claimtest.SessionName(0), 1).Payload)
			for range operations {
				m.operate()
				m.check()
				if t.Failed() {
					t.Fatalf("the last operations:\n%s", strings.Join(m.log[max(0, len(m.log)-15):], "\n"))
				}
			}
			t.Logf("%d batches, %d dead letters, %d waiting at the end; %v", len(m.batches), len(m.letters), len(m.waiting()), m.seen)
			for _, what := range []string{"late push", "lost push", "lost claim", "repeated batch", "new batch", "nothing to claim", "claim lost", "split", "dead letters full", "rejected messages stay", "replay"} {
				m.g.Expect(m.seen[what]).To(BeNumerically(">", 0), what)
			}
		})
	}
}

func (m *inboxModel) logf(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *inboxModel) waiting() (all []string) {
	for _, s := range m.sessions {
		all = append(all, s.waiting...)
	}
	return all
}

func (m *inboxModel) session() (id string, s *modelSession) {
	id = claimtest.SessionName(m.random.IntN(len(m.sessions)))
	return id, m.sessions[id]
}

func sessionOf(key string) string { return key[:3] }

func (m *inboxModel) operate() {
	m.now += 1 + m.random.Int64N(50)
	process := m.random.IntN(len(m.inboxes))
	b := m.inboxes[process]
	switch dice := m.random.IntN(100); {
	case dice < 18:
		m.push(b)
	case dice < 21:
		m.move()
	case dice < 45:
		m.claim(b, process)
	case dice < 88:
		m.finish(b)
	case dice < 92:
		m.replay(b)
	case dice < 97:
		m.now += claimtest.Lease.Milliseconds() // claims end
		m.logf("claims end")
	default: // a process is replaced
		m.inboxes[process] = openInbox(m.store, func() time.Time { return time.UnixMilli(m.now) }, InboxOptions{DeadLetters: modelLetters})
		for _, batch := range m.batches {
			if batch.holder == process {
				batch.holder = -1
			}
		}
		m.claims = slices.DeleteFunc(m.claims, func(*delivery.Batch) bool { return m.random.IntN(3) == 0 })
		m.logf("process %d is replaced", process)
	}
}

func (m *inboxModel) push(b *Inbox) {
	id, s := m.session()
	if s.former != nil && m.random.IntN(3) == 0 {
		_, err := b.Push(m.ctx, s.former, messageItem(id, s.seq+1))
		m.logf("late push of %s: %v", id, err)
		m.seen["late push"]++
		m.g.Expect(err).To(MatchError(ErrFenced))
		return
	}
	for range 1 + m.random.IntN(5) {
		if s.seq > 0 && m.random.IntN(4) == 0 { // the answer to the last push was lost
			r, err := b.Push(m.ctx, s.taking, messageItem(id, s.seq))
			m.g.Expect(err).NotTo(HaveOccurred())
			m.g.Expect(r.Repeated).To(BeTrue())
			m.seen["lost push"]++
		}
		s.seq++
		item := messageItem(id, s.seq)
		r, err := b.Push(m.ctx, s.taking, item)
		m.logf("push %s: %v", item.Key, err)
		m.g.Expect(err).NotTo(HaveOccurred())
		m.g.Expect(r.Repeated).To(BeFalse())
		s.lastKey = item.Key
		m.append(id, item.Key)
		if !s.holed {
			m.g.Expect(r.Waiting).To(BeEquivalentTo(len(s.waiting)))
		}
		m.g.Expect(r.Bytes).To(BeEquivalentTo(len(s.waiting) * m.size))
	}
}

// append makes a message wait.
func (m *inboxModel) append(sessionID, key string) {
	s := m.sessions[sessionID]
	s.waiting = append(s.waiting, key)
	if s.batch == "" && s.due == 0 {
		s.due = m.now
	}
}

func (m *inboxModel) move() {
	id, s := m.session()
	var err error
	s.former = s.taking
	s.taking, err = m.store.Take(m.ctx, "uid-"+id, s.taking.Record.Epoch+1)
	m.logf("%s moves", id)
	m.g.Expect(err).NotTo(HaveOccurred())
}

func (m *inboxModel) claim(b *Inbox, process int) {
	limit := m.random.IntN(20)
	ctx := m.ctx
	if m.random.IntN(5) == 0 { // its answer is lost; the next claim of the process gets the same batch
		lose := true
		b.loseAnswer = func(context.Context) error {
			if lose {
				lose = false
				return claimtest.ErrLost
			}
			return nil
		}
		_, err := b.Claim(ctx, delivery.KindMessage, limit, claimtest.Lease)
		m.g.Expect(err).To(MatchError(claimtest.ErrLost))
		m.now++
		m.seen["lost claim"]++
	}
	batch, err := b.Claim(ctx, delivery.KindMessage, limit, claimtest.Lease)
	m.g.Expect(err).NotTo(HaveOccurred())
	if batch == nil {
		m.logf("process %d claims %d: nothing", process, limit)
		m.seen["nothing to claim"]++
		for id, known := range m.batches {
			m.g.Expect(known.claimableFrom).To(BeNumerically(">", m.now), "batch %s could be claimed", id)
		}
		if limit > 0 {
			for id, s := range m.sessions {
				m.g.Expect(s.due).To(BeZero(), "%s waits", id)
			}
		}
		return
	}
	keys := keysOf(batch)
	m.logf("process %d claims %d: %s attempt %d %v", process, limit, batch.ID, batch.Attempt, keys)
	m.claims = append(m.claims, batch)
	if known, repeated := m.batches[batch.ID]; repeated {
		m.g.Expect(keys).To(Equal(known.items), "a batch id means the same messages")
		m.seen["repeated batch"]++
		if known.claimableFrom > m.now {
			m.g.Expect(known.holder).To(Equal(process), "only the process whose answer was lost gets it again")
			m.g.Expect(batch.Attempt).To(Equal(known.attempt))
			return
		}
		known.attempt++
		m.g.Expect(batch.Attempt).To(Equal(known.attempt))
		known.claimableFrom, known.holder = batch.Deadline.UnixMilli(), process
		m.g.Expect(m.now+claimtest.Lease.Milliseconds()-known.claimableFrom).To(BeElementOf(int64(0), int64(1)), "the lost answer was a millisecond ago")
		return
	}
	m.g.Expect(batch.Attempt).To(Equal(1))
	m.seen["new batch"]++
	m.g.Expect(len(keys)).To(BeNumerically("<=", limit))
	m.batches[batch.ID] = &modelBatch{items: keys, attempt: 1, claimableFrom: batch.Deadline.UnixMilli(), holder: process}
	newest := int64(0)
	for _, key := range keys {
		s := m.sessions[sessionOf(key)]
		if s.batch == "" {
			newest = max(newest, s.due)
			s.batch, s.inBatch, s.due = batch.ID, 0, 0
		}
		m.g.Expect(s.batch).To(Equal(batch.ID), "a session has one open batch")
		m.g.Expect(key).To(Equal(s.waiting[s.inBatch]), "the first messages of the session")
		s.inBatch++
	}
	holed := false // then a claim expects more messages of a session than there are
	for _, s := range m.sessions {
		holed = holed || s.holed
	}
	for id, s := range m.sessions {
		if s.due > 0 {
			if !holed {
				m.g.Expect(len(keys)).To(Equal(limit), "%s could have been in the batch", id)
			}
			m.g.Expect(s.due).To(BeNumerically(">=", newest), "%s has waited longer", id)
		}
	}
}

func keysOf(b *delivery.Batch) (keys []string) {
	for _, item := range b.Items {
		keys = append(keys, item.Key)
	}
	return keys
}

// finish ends a claim, which may have been lost long ago.
func (m *inboxModel) finish(b *Inbox) {
	if len(m.claims) == 0 {
		return
	}
	batch := m.claims[m.random.IntN(len(m.claims))]
	late := m.random.IntN(4) == 0
	if late || m.random.IntN(3) > 0 { // mostly a batch that still exists
		for _, c := range m.claims {
			if known := m.batches[c.ID]; known != nil && (known.attempt == c.Attempt) != late {
				batch = c
			}
		}
	}
	known := m.batches[batch.ID]
	var want error
	if known != nil && known.attempt != batch.Attempt {
		want = delivery.ErrClaimLost
		m.seen["claim lost"]++
	}
	held := known != nil && want == nil
	expect := func(err error) {
		if want == nil {
			m.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		} else {
			m.g.ExpectWithOffset(1, err).To(MatchError(want))
		}
	}
	switch dice := m.random.IntN(10); {
	case dice < 5:
		expect(b.Ack(m.ctx, batch))
		m.logf("ack %s attempt %d: held %t", batch.ID, batch.Attempt, held)
		if held {
			m.remove(batch.ID, known.items, nil)
		}
	case dice < 7:
		pause := m.random.Int64N(3000)
		expect(b.Release(m.ctx, batch, time.UnixMilli(m.now+pause)))
		m.logf("release %s attempt %d: held %t", batch.ID, batch.Attempt, held)
		if held {
			known.claimableFrom, known.holder = m.now+pause, -1
		}
	case dice < 8:
		expect(b.Split(m.ctx, batch))
		m.logf("split %s attempt %d: held %t", batch.ID, batch.Attempt, held)
		if held {
			m.split(batch.ID)
			m.seen["split"]++
		}
	default:
		rejected := m.rejections(batch)
		full := len(m.letters)+len(rejected) > modelLetters
		if held && full {
			want = delivery.ErrDeadLettersFull
		}
		expect(b.Ack(m.ctx, batch, rejected...))
		m.logf("ack %s attempt %d, rejected %v: held %t, full %t", batch.ID, batch.Attempt, rejected, held, full)
		switch {
		case !held:
		case full && len(rejected) == len(known.items):
			m.seen["dead letters full"]++
		case full:
			m.seen["rejected messages stay"]++
			m.remove(batch.ID, known.items, rejected)
		default:
			m.remove(batch.ID, known.items, nil)
			for _, r := range rejected {
				m.letters = append(m.letters, r.Key)
			}
		}
	}
}

func (m *inboxModel) rejections(batch *delivery.Batch) (rejected []delivery.Rejection) {
	all := m.random.IntN(3) == 0
	for _, item := range batch.Items {
		if all || m.random.IntN(2) == 0 {
			rejected = append(rejected, delivery.Rejection{SessionID: item.SessionID, Key: item.Key, Reason: "no"})
		}
	}
	return rejected
}

// remove ends a batch. Its kept messages, if there are any, become one with another id.
func (m *inboxModel) remove(id string, items []string, kept []delivery.Rejection) {
	from := m.batches[id].claimableFrom
	delete(m.batches, id)
	var left []string
	for _, r := range kept {
		left = append(left, r.Key)
	}
	for _, key := range items {
		s := m.sessions[sessionOf(key)]
		s.inBatch = 0
		s.batch = ""
		if !slices.Contains(left, key) {
			s.waiting = slices.DeleteFunc(s.waiting, func(k string) bool { return k == key })
		}
		s.holed = len(s.waiting) > 0 && (s.holed || len(left) > 0)
	}
	for _, key := range items {
		s := m.sessions[sessionOf(key)]
		s.due = 0
		if len(s.waiting) > 0 {
			s.due = m.now
		}
	}
	if len(left) == 0 {
		return
	}
	// The new id is found in the table.
	var renamed string
	m.g.Expect(m.store.db.QueryRow(m.ctx, "SELECT batch FROM whatsapp_operator_inbox_head WHERE session_id=$1", sessionOf(left[0])).Scan(&renamed)).To(Succeed())
	m.g.Expect(m.batches).NotTo(HaveKey(renamed))
	m.store1(renamed, left, from)
}

// store1 records a batch that nobody has claimed.
func (m *inboxModel) store1(id string, items []string, from int64) {
	m.batches[id] = &modelBatch{items: items, claimableFrom: from, holder: -1}
	for _, key := range items {
		s := m.sessions[sessionOf(key)]
		if s.batch != id {
			s.inBatch = 0
		}
		s.batch, s.due = id, 0
		s.inBatch++
	}
}

func (m *inboxModel) split(id string) {
	items := m.batches[id].items
	delete(m.batches, id)
	for _, key := range items {
		m.sessions[sessionOf(key)].batch = "" // until it is found again
	}
	rows, err := m.store.db.Query(m.ctx, "SELECT id, ranges FROM whatsapp_operator_inbox_batch ORDER BY id")
	m.g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = rows.Close() }()
	var halves [][]string
	for rows.Next() {
		var half, encoded string
		m.g.Expect(rows.Scan(&half, &encoded)).To(Succeed())
		if _, known := m.batches[half]; known {
			continue
		}
		var ranges []messageRange
		m.g.Expect(json.Unmarshal([]byte(encoded), &ranges)).To(Succeed())
		var own []string
		for _, key := range items {
			for _, r := range ranges {
				if r.SessionID == sessionOf(key) && m.number(key) >= r.First && m.number(key) <= r.Last {
					own = append(own, key)
				}
			}
		}
		halves = append(halves, own)
		m.store1(half, own, m.now)
	}
	m.g.Expect(rows.Err()).NotTo(HaveOccurred())
	sessions := map[string]bool{}
	for _, key := range items {
		sessions[sessionOf(key)] = true
	}
	if len(sessions) > 1 {
		m.g.Expect(halves).To(HaveLen(2))
		m.g.Expect(slices.Concat(halves...)).To(Equal(items))
		return
	}
	m.g.Expect(halves).To(HaveLen(1), "the first half stays, the others wait behind it")
	m.g.Expect(halves[0]).To(Equal(items[:len(halves[0])]))
	if len(items) > 1 {
		m.g.Expect(len(halves[0])).To(BeNumerically("<", len(items)))
	}
}

// number is the position of a message in the table.
func (m *inboxModel) number(key string) (n int64) {
	m.g.Expect(m.store.db.QueryRow(m.ctx, "SELECT COALESCE(MAX(n), 0) FROM whatsapp_operator_inbox WHERE key=$1", key).Scan(&n)).To(Succeed())
	return n
}

func (m *inboxModel) replay(b *Inbox) {
	var all []delivery.DeadLetter
	m.g.Expect(b.DeadLetters(m.ctx, delivery.KindMessage, func(l delivery.DeadLetter) bool { all = append(all, l); return true })).To(Succeed())
	if len(all) == 0 {
		return
	}
	l := all[m.random.IntN(len(all))]
	m.letters = slices.DeleteFunc(m.letters, func(key string) bool { return key == l.Key })
	if m.random.IntN(3) == 0 {
		m.logf("drop %s", l.Key)
		m.g.Expect(b.Drop(m.ctx, delivery.KindMessage, l.ID)).To(Equal(1))
		m.g.Expect(b.Drop(m.ctx, delivery.KindMessage, l.ID)).To(Equal(0))
		return
	}
	m.logf("replay %s", l.Key)
	m.seen["replay"]++
	m.g.Expect(b.Replay(m.ctx, delivery.KindMessage, l.ID)).To(Equal(delivery.Replayed))
	m.g.Expect(b.Replay(m.ctx, delivery.KindMessage, l.ID)).To(Equal(delivery.NotFound), "its answer was lost")
	m.append(l.SessionID, l.Key)
}

// check compares all tables with the model.
func (m *inboxModel) check() {
	stored := map[string][]string{}
	rows, err := m.store.db.Query(m.ctx, "SELECT session_id, key FROM whatsapp_operator_inbox ORDER BY session_id, n")
	m.g.Expect(err).NotTo(HaveOccurred())
	for rows.Next() {
		var id, key string
		m.g.Expect(rows.Scan(&id, &key)).To(Succeed())
		stored[id] = append(stored[id], key)
	}
	m.g.Expect(rows.Close()).To(Succeed())
	for id, s := range m.sessions {
		m.g.Expect(slices.Equal(stored[id], s.waiting)).To(BeTrue(), "%s: %v is stored, %v should wait", id, stored[id], s.waiting)
		if s.seq == 0 {
			continue
		}
		var waiting, bytes, due int64
		var batch, lastKey string
		m.g.Expect(m.store.db.QueryRow(m.ctx, "SELECT tail-head, bytes_in-bytes_out, COALESCE(due, 0), COALESCE(batch, ''), last_key FROM whatsapp_operator_inbox_head WHERE session_id=$1", id).
			Scan(&waiting, &bytes, &due, &batch, &lastKey)).To(Succeed())
		m.g.Expect(bytes).To(BeEquivalentTo(len(s.waiting)*m.size), id)
		m.g.Expect(waiting).To(BeNumerically(">=", len(s.waiting)), id)
		if !s.holed {
			m.g.Expect(waiting).To(BeEquivalentTo(len(s.waiting)), id)
		}
		m.g.Expect(due).To(Equal(s.due), id)
		m.g.Expect(batch).To(Equal(s.batch), id)
		m.g.Expect(lastKey).To(Equal(s.lastKey), id)
	}
	var batches []string
	rows, err = m.store.db.Query(m.ctx, "SELECT id, attempt, claimable_from FROM whatsapp_operator_inbox_batch")
	m.g.Expect(err).NotTo(HaveOccurred())
	for rows.Next() {
		var id string
		var attempt int
		var from int64
		m.g.Expect(rows.Scan(&id, &attempt, &from)).To(Succeed())
		batches = append(batches, id)
		known := m.batches[id]
		m.g.Expect(known).NotTo(BeNil(), id)
		m.g.Expect([]any{attempt, from}).To(Equal([]any{known.attempt, known.claimableFrom}), id)
	}
	m.g.Expect(rows.Close()).To(Succeed())
	m.g.Expect(batches).To(HaveLen(len(m.batches)))
	letters, err := m.store.strings(m.ctx, "SELECT key FROM whatsapp_operator_dead_letter")
	m.g.Expect(err).NotTo(HaveOccurred())
	slices.SortFunc(letters, cmp.Compare[string])
	want := slices.Clone(m.letters)
	slices.Sort(want)
	m.g.Expect(slices.Equal(letters, want)).To(BeTrue(), "the dead letters are %v, and should be %v", letters, want)
	backlog, err := m.inboxes[0].Backlog(m.ctx, delivery.KindMessage)
	m.g.Expect(err).NotTo(HaveOccurred())
	due := 0
	for _, s := range m.sessions {
		if s.due > 0 {
			due++
		}
	}
	m.g.Expect([]int{backlog.Waiting, backlog.Unfinished}).To(Equal([]int{due, len(m.batches)}))
}
