package batch_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"k8s.io/utils/clock"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// inboxes are the databases of these tests.
var inboxes = map[string]func(t *testing.T) (url string){
	"PostgreSQL": func(t *testing.T) string { return testenv.Postgres(t) },
	"SQLite":     func(t *testing.T) string { return filepath.Join(t.TempDir(), "inbox.db") },
}

// messages is an inbox, its flusher, and a receiver that stands in for Laravel.
type messages struct {
	t       *testing.T
	g       *WithT
	store   *store.Store
	inbox   *store.Inbox
	client  *laravel.Client
	laravel *laraveltest.Receiver
	wake    chan struct{}
	clock   clock.Clock // of the flusher

	mu      sync.Mutex
	takings map[string]*store.Taking
	pushed  map[string]int64
	stopped []batch.StopReason
}

func newMessages(t *testing.T, url string, opts store.InboxOptions, receive laraveltest.Options) *messages {
	g := NewWithT(t)
	s, err := store.Open(t.Context(), store.Config{URL: url}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { g.Expect(s.Close()).To(Succeed()) })
	g.Expect(s.Migrate(t.Context())).To(Succeed())
	m := &messages{t: t, g: g, store: s, inbox: store.NewInbox(s, opts), laravel: laraveltest.Start(t, receive),
		wake: make(chan struct{}, 1), clock: clock.RealClock{}, takings: map[string]*store.Taking{}, pushed: map[string]int64{}}
	m.client = m.newClient(0)
	return m
}

func (m *messages) newClient(timeout time.Duration) *laravel.Client {
	config, err := m.laravel.Config(m.t.TempDir())
	m.g.Expect(err).NotTo(HaveOccurred())
	config.Timeout = timeout
	client, err := laravel.New(config, clock.RealClock{}, logr.Discard())
	m.g.Expect(err).NotTo(HaveOccurred())
	m.t.Cleanup(client.Close)
	return client
}

// awake is the inbox with wake-ups.
type awake struct {
	*store.Inbox
	wake chan struct{}
}

func (a awake) WakeUps(ctx context.Context) <-chan struct{} {
	out := make(chan struct{}, 1)
	go func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case <-a.wake:
				select {
				case out <- struct{}{}:
				default:
				}
			}
		}
	}()
	return out
}

// jumpingClock is the real clock, some time later.
type jumpingClock struct {
	clock.RealClock
	later *atomic.Int64
}

func (c jumpingClock) Now() time.Time                  { return time.Now().Add(time.Duration(c.later.Load())) }
func (c jumpingClock) Since(t time.Time) time.Duration { return c.Now().Sub(t) }

// jump makes inbox and flusher use a clock that jump sets forward.
func (m *messages) jumping(opts store.InboxOptions) (jump func(time.Duration)) {
	c := jumpingClock{later: &atomic.Int64{}}
	opts.Now = c.Now
	m.clock, m.inbox = c, store.NewInbox(m.store, opts)
	return func(d time.Duration) { c.later.Add(int64(d)) }
}

func (m *messages) source() batch.Source { return awake{m.inbox, m.wake} }

// flush starts the flusher of messages; stop stops it and waits until it has ended.
func (m *messages) flush(source batch.Source, opts batch.FlusherOptions) (stop func()) {
	m.t.Helper()
	opts.OnStopped = func(kind delivery.Kind, reason batch.StopReason, _ string) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.g.Expect(kind).To(Equal(delivery.KindMessage))
		m.stopped = append(m.stopped, reason)
	}
	f, err := batch.NewMessageFlusher(source, m.client, m.clock, logr.Discard(), opts)
	m.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Start(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		m.g.Expect(<-done).To(Succeed())
	})
	m.t.Cleanup(stop) // before the store is closed
	return stop
}

func (m *messages) reasons() []batch.StopReason {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.stopped)
}

func keyOf(session string, n int64) string { return fmt.Sprintf("%s-%06d", session, n) }

// push pushes the next message of a session, as often as needed.
func (m *messages) push(session string) {
	m.t.Helper()
	m.mu.Lock()
	taking := m.takings[session]
	m.pushed[session]++
	n := m.pushed[session]
	m.mu.Unlock()
	if taking == nil {
		_, err := m.store.Claim(m.t.Context(), store.Claimant{SessionID: session, Namespace: "ns", UID: session}, func(context.Context, string) (bool, error) { return false, nil })
		m.g.Expect(err).NotTo(HaveOccurred())
		taking, err = m.store.Take(m.t.Context(), session, 1)
		m.g.Expect(err).NotTo(HaveOccurred())
		m.mu.Lock()
		m.takings[session] = taking
		m.mu.Unlock()
	}
	payload, err := json.Marshal(laraveltest.Message{SessionID: session, Key: keyOf(session, n), Text: "hello", Numbers: delivery.Numbers{Epoch: 1, Seq: n}})
	m.g.Expect(err).NotTo(HaveOccurred())
	item := delivery.Item{SessionID: session, Key: keyOf(session, n), Numbers: delivery.Numbers{Epoch: 1, Seq: n}, Payload: payload}
	m.g.Eventually(func() error {
		_, err := m.inbox.Push(m.t.Context(), taking, item)
		return err
	}, waitTimeout, 20*time.Millisecond).Should(Succeed())
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// traffic pushes rounds messages of each of some sessions.
func (m *messages) traffic(sessions, rounds int) {
	m.t.Helper()
	for range rounds {
		for i := range sessions {
			m.push(sessionName(i))
		}
	}
}

// settleTimeout is longer than a refused batch is kept back after its fifth probe (3 minutes).
const settleTimeout = 5 * time.Minute

// settled waits until Laravel has every pushed message, but for some, and nothing waits. Each
// has come once by its key, and in the order of its session.
func (m *messages) settled(but ...string) {
	m.t.Helper()
	m.g.Eventually(func() ([]store.SessionUsage, error) { return m.inbox.Usage(m.t.Context()) }, settleTimeout, 20*time.Millisecond).Should(BeEmpty())
	m.expectAll(but...)
	m.g.Expect(m.laravel.Breaches()).To(BeEmpty())
}

// expectAll checks what Laravel has. Messages that a person has replayed come later than others.
func (m *messages) expectAll(but ...string) {
	m.t.Helper()
	m.mu.Lock()
	pushed := map[string]int64{}
	for session, n := range m.pushed {
		pushed[session] = n
	}
	m.mu.Unlock()
	for session, n := range pushed {
		var want, got []string
		for i := range n {
			if key := keyOf(session, i+1); !slices.Contains(but, key) {
				want = append(want, key)
			}
		}
		for _, message := range m.laravel.Messages(session) {
			got = append(got, message.Key)
		}
		slices.Sort(got)
		m.g.Expect(slices.Equal(got, want)).To(BeTrue(), "Laravel has %v, and should have %v", got, want)
	}
}

// letters are the dead letters.
func (m *messages) letters() (all []delivery.DeadLetter) {
	m.t.Helper()
	m.g.Expect(m.inbox.DeadLetters(m.t.Context(), delivery.KindMessage, func(l delivery.DeadLetter) bool {
		all = append(all, l)
		return true
	})).To(Succeed())
	return all
}

// with reports whether a request has the message of a key.
func with(r laraveltest.Request, key string) bool {
	return slices.ContainsFunc(r.Items, func(i laraveltest.Item) bool { return i.Message.Key == key })
}

// Each answer of the contract, for batches of messages.
func TestMessagesAreDelivered(t *testing.T) {
	const sessions, rounds = 30, 12
	bad := keyOf(sessionName(7), 5)
	first := func(n int, answer laraveltest.Answer) func(laraveltest.Request) laraveltest.Answer {
		return func(r laraveltest.Request) laraveltest.Answer {
			if r.N <= n {
				return answer
			}
			return laraveltest.Accept()
		}
	}
	ifBad := func(answer laraveltest.Answer) func(laraveltest.Request) laraveltest.Answer {
		return func(r laraveltest.Request) laraveltest.Answer {
			if with(r, bad) {
				return answer
			}
			return laraveltest.Accept()
		}
	}
	for _, row := range []struct {
		name    string
		timeout time.Duration
		decide  func(laraveltest.Request) laraveltest.Answer
		// dead: the bad message becomes a dead letter with this reason.
		dead    delivery.DeadLetterReason
		stopped batch.StopReason
	}{
		{name: "quick answers", decide: first(0, laraveltest.Answer{})},
		{name: "slow answers", decide: func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptAfter(100 * time.Millisecond) }},
		{name: "errors, then success", decide: first(6, laraveltest.Refuse(http.StatusServiceUnavailable, "down")), stopped: batch.LaravelUnavailable},
		{name: "accepted, and the connection breaks", decide: first(3, laraveltest.AcceptThenDisconnect())},
		{name: "accepted, and no answer in time", timeout: 200 * time.Millisecond, decide: first(3, laraveltest.AcceptThenHang())},
		{name: "a redirect", decide: first(1, laraveltest.Refuse(http.StatusFound, "")), stopped: batch.LaravelMisconfigured},
		{name: "HTML", decide: first(1, laraveltest.Refuse(http.StatusOK, "<html>login</html>")), stopped: batch.LaravelMisconfigured},
		{name: "an unknown token", decide: first(1, laraveltest.Refuse(http.StatusUnauthorized, "who?")), stopped: batch.LaravelMisconfigured},
		{name: "a deadlock", decide: first(3, laraveltest.Refuse(http.StatusConflict, `{"message":"deadlock"}`))},
		{name: "batches are too large", decide: func(r laraveltest.Request) laraveltest.Answer {
			if len(r.Items) > 20 {
				return laraveltest.Refuse(http.StatusRequestEntityTooLarge, "{}")
			}
			return laraveltest.Accept()
		}},
		{name: "one message is refused", decide: ifBad(laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"no"}`)), dead: delivery.RefusedAlone},
		{name: "one message is too large", decide: ifBad(laraveltest.Refuse(http.StatusRequestEntityTooLarge, "{}")), dead: delivery.TooLargeAlone},
		{name: "one message is rejected by its key", dead: delivery.RejectedByName, decide: ifBad(laraveltest.AcceptExceptMessages("no", laraveltest.Message{SessionID: sessionName(7), Key: bad}))},
		{name: "one message is rejected by its session alone", dead: delivery.RejectedByName, decide: func(r laraveltest.Request) laraveltest.Answer {
			own := 0
			for _, item := range r.Items {
				if item.SessionID == sessionName(7) {
					own++
				}
			}
			answer := laraveltest.Answer{Write: func(w http.ResponseWriter, _ *http.Request) {
				_, _ = fmt.Fprintf(w, `{"rejected":[{"session_id":%q}]}`, sessionName(7))
			}}
			if answer.Accept = own == 1; answer.Accept { // otherwise the batch is halved
				answer.RejectedKeys = []string{bad}
			}
			return ifBad(answer)(r)
		}},
	} {
		for kind, url := range inboxes {
			if kind == "SQLite" && row.dead == "" && row.stopped != "" {
				continue // nothing of these depends on the database
			}
			t.Run(row.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				m := newMessages(t, url(t), store.InboxOptions{}, laraveltest.Options{Decide: row.decide})
				if row.timeout > 0 {
					m.client = m.newClient(row.timeout)
				}
				stop := m.flush(m.source(), batch.FlusherOptions{})
				m.traffic(sessions, rounds)
				if row.dead == "" {
					m.settled()
				} else {
					m.settled(bad)
				}
				stop()
				letters := m.letters()
				if row.dead == "" {
					m.g.Expect(letters).To(BeEmpty())
				} else {
					m.g.Expect(letters).To(HaveLen(1))
					m.g.Expect(letters[0]).To(And(HaveField("Key", bad), HaveField("Reason", row.dead)))
				}
				if row.stopped == "" {
					m.g.Expect(m.reasons()).To(BeEmpty())
				} else {
					m.g.Expect(m.reasons()).To(ContainElement(row.stopped))
				}
				m.g.Expect(m.laravel.MaxConcurrent(delivery.KindMessage)).To(BeNumerically("<=", 8))
			})
		}
	}
}

// A broken application refuses everything. At most 20 messages become dead letters; when it
// works again the others are delivered, and those after a person has replayed them.
func TestLaravelRefusesEverything(t *testing.T) {
	for name, bad := range map[string]func(r laraveltest.Request) laraveltest.Answer{
		"422": func(laraveltest.Request) laraveltest.Answer {
			return laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"a bug"}`)
		},
		"all are rejected by key": func(r laraveltest.Request) laraveltest.Answer {
			var all []laraveltest.Message
			for _, item := range r.Items {
				all = append(all, item.Message)
			}
			return laraveltest.AcceptExceptMessages("a bug", all...)
		},
	} {
		for kind, url := range inboxes {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				var works atomic.Bool
				m := newMessages(t, url(t), store.InboxOptions{}, laraveltest.Options{Decide: func(r laraveltest.Request) laraveltest.Answer {
					if works.Load() {
						return laraveltest.Accept()
					}
					return bad(r)
				}})
				jump := m.jumping(store.InboxOptions{})
				stop := m.flush(m.source(), batch.FlusherOptions{})
				m.traffic(40, 8)
				m.g.Eventually(m.reasons, waitTimeout).Should(ContainElement(batch.LaravelMisconfigured))
				before := m.laravel.Count()
				m.g.Eventually(m.laravel.Count, waitTimeout).Should(BeNumerically(">=", before+3), "it is probed")
				works.Store(true)
				jump(settleTimeout) // no batch is kept back any more
				m.g.Eventually(func() ([]store.SessionUsage, error) { return m.inbox.Usage(t.Context()) }, settleTimeout, 20*time.Millisecond).Should(BeEmpty())
				// Not before: the database may still be storing those that were refused first.
				letters := m.letters()
				m.g.Expect(len(letters)).To(BeNumerically("<=", 20))
				var dead []string
				for _, l := range letters {
					dead = append(dead, l.Key)
				}
				m.settled(dead...)
				for _, l := range letters {
					m.g.Expect(m.inbox.Replay(t.Context(), delivery.KindMessage, l.ID)).To(Equal(delivery.Replayed))
				}
				m.settled()
				stop()
			})
		}
	}
}

// One message makes the application fail with 500. The others of its batch are delivered after
// some attempts; the message itself, and those of its session behind it, wait for an hour, until
// it becomes a dead letter.
func TestPoisonItemAlone(t *testing.T) {
	m := newMessages(t, testenv.Postgres(t), store.InboxOptions{}, laraveltest.Options{})
	clk := testclock.NewFakeClock(time.Now().Truncate(time.Millisecond))
	begun := clk.Now()
	m.inbox = store.NewInbox(m.store, store.InboxOptions{Now: clk.Now})
	poison := keyOf("bad", 3)
	var mu sync.Mutex
	var failures int
	var alone []bool
	delivered := map[string][]string{}
	sender := senderFunc(func(_ context.Context, b delivery.Batch) delivery.Answer {
		mu.Lock()
		defer mu.Unlock()
		if slices.ContainsFunc(b.Items, func(i delivery.Item) bool { return i.Key == poison }) {
			failures++
			alone = append(alone, len(b.Items) == 1)
			return delivery.Answer{Result: delivery.Retry, StatusCode: 500, Detail: "500 boom"}
		}
		for _, item := range b.Items {
			if !slices.Contains(delivered[item.SessionID], item.Key) {
				delivered[item.SessionID] = append(delivered[item.SessionID], item.Key)
			}
		}
		return delivery.Answer{Result: delivery.Delivered, StatusCode: 204}
	})
	f, err := batch.NewMessageFlusher(m.source(), sender, clk, logr.Discard(), batch.FlusherOptions{})
	m.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Start(ctx) }()
	stop := sync.OnceFunc(func() { cancel(); m.g.Expect(<-done).To(Succeed()) })
	t.Cleanup(stop)

	// A few of the others may be in a batch with the bad message. It is halved after some attempts,
	// so nobody waits for those.
	other := func(n int) {
		session := fmt.Sprint("other", n)
		m.push(session)
		polls := 0
		m.g.Eventually(func() bool {
			clk.Step(50 * time.Millisecond)
			polls++
			mu.Lock()
			defer mu.Unlock()
			return len(delivered[session]) > 0 || polls == 100
		}, waitTimeout, time.Millisecond).Should(BeTrue())
	}
	m.push("first")
	m.g.Eventually(func() int {
		clk.Step(50 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		return len(delivered["first"])
	}, waitTimeout, time.Millisecond).Should(Equal(1))
	for range 5 {
		m.push("bad")
		m.push("good")
	}
	m.g.Eventually(func() int {
		clk.Step(50 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		return failures
	}, waitTimeout, time.Millisecond).Should(BeNumerically(">", 0))
	became, others := time.Duration(0), 0
	for became == 0 {
		others++
		m.g.Expect(others).To(BeNumerically("<", 5000))
		other(others) // others are delivered all the time
		clk.Step(5 * time.Second)
		if others%20 == 0 && len(m.letters()) > 0 {
			became = clk.Since(begun)
		}
	}
	m.g.Expect(became).To(BeNumerically(">=", time.Hour))
	m.g.Expect(m.letters()).To(HaveLen(1))
	m.g.Expect(m.letters()[0]).To(And(HaveField("Key", poison), HaveField("Reason", delivery.Poison)))
	has := func() map[string][]string {
		clk.Step(100 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		return map[string][]string{"bad": slices.Clone(delivered["bad"]), "good": slices.Clone(delivered["good"])}
	}
	m.g.Eventually(has, waitTimeout, 5*time.Millisecond).Should(Equal(map[string][]string{
		"bad":  {keyOf("bad", 1), keyOf("bad", 2), keyOf("bad", 4), keyOf("bad", 5)},
		"good": {keyOf("good", 1), keyOf("good", 2), keyOf("good", 3), keyOf("good", 4), keyOf("good", 5)},
	}))
	m.g.Eventually(func() int {
		clk.Step(100 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		return len(delivered)
	}, waitTimeout, 5*time.Millisecond).Should(Equal(len([]string{"first", "bad", "good"}) + others))
	stop()
	mu.Lock()
	defer mu.Unlock()
	m.g.Expect(failures).To(BeNumerically(">=", 20))
	m.g.Expect(alone[len(alone)-1]).To(BeTrue())
}

// All requests with messages hang, and thousands of messages wait: an urgent status has its own
// requests, and the flusher of statuses does not wait for the database.
func TestStatusDuringMessageBacklog(t *testing.T) {
	release := make(chan struct{})
	decide := func(r laraveltest.Request) laraveltest.Answer {
		if r.Kind == delivery.KindMessage {
			return laraveltest.AcceptWhen(release)
		}
		return laraveltest.Accept()
	}
	m := newMessages(t, testenv.Postgres(t), store.InboxOptions{}, laraveltest.Options{Decide: decide})
	m.traffic(40, 60)
	held := &heldSource{Source: m.source(), held: make(chan struct{})}
	stopMessages := m.flush(held, batch.FlusherOptions{})
	m.g.Eventually(func() int { return m.laravel.MaxConcurrent(delivery.KindMessage) }, waitTimeout).Should(Equal(8))

	env := newEnvironment(t, shared(t), 0, nil)
	env.client, env.laravel = m.client, m.laravel
	stop := env.flush(env.queue, batch.FlusherOptions{})
	send := func(session string) {
		env.enqueue(delivery.KindStatus, statusItem(session, 2))
		m.g.Eventually(func() int64 { return m.laravel.Status(session).Seq }, waitTimeout).Should(BeEquivalentTo(2))
	}
	send("while-requests-hang")
	held.holding.Store(true)
	close(release)
	m.g.Eventually(held.blocked.Load, waitTimeout).Should(BeTrue())
	send("while-the-database-hangs")
	m.g.Expect(m.laravel.CountMessages()).To(BeNumerically("<", 40*60))
	close(held.held)
	m.settled()
	stop()
	stopMessages()
}

// heldSource is a source whose database hangs while holding is true, until held is closed.
type heldSource struct {
	batch.Source
	held             chan struct{}
	holding, blocked atomic.Bool
}

func (s *heldSource) Backlog(ctx context.Context, kind delivery.Kind) (delivery.Backlog, error) {
	if s.holding.Load() {
		s.blocked.Store(true)
		<-s.held
	}
	return s.Source.Backlog(ctx, kind)
}

// A message that Laravel has rejected is replayed by a person, with its key and its old numbers,
// and Laravel takes it although it has newer messages of the session.
func TestReplayIsTaken(t *testing.T) {
	for kind, url := range inboxes {
		t.Run(kind, func(t *testing.T) {
			var works atomic.Bool
			rejected := laraveltest.Message{SessionID: sessionName(1), Key: keyOf(sessionName(1), 2)}
			m := newMessages(t, url(t), store.InboxOptions{}, laraveltest.Options{Decide: func(r laraveltest.Request) laraveltest.Answer {
				if with(r, rejected.Key) && !works.Load() {
					return laraveltest.AcceptExceptMessages("no such contact", rejected)
				}
				return laraveltest.Accept()
			}})
			stop := m.flush(m.source(), batch.FlusherOptions{})
			m.traffic(3, 4)
			m.settled(rejected.Key)
			letters := m.letters()
			m.g.Expect(letters).To(HaveLen(1))
			m.g.Expect(letters[0].Answer).To(Equal("no such contact"))

			works.Store(true)
			m.g.Expect(m.inbox.Replay(t.Context(), delivery.KindMessage, letters[0].ID)).To(Equal(delivery.Replayed))
			m.settled()
			m.g.Expect(m.letters()).To(BeEmpty())
			got := m.laravel.Messages(sessionName(1))
			m.g.Expect(got[len(got)-1]).To(And(HaveField("Key", rejected.Key), HaveField("Seq", BeEquivalentTo(2))))
			stop()
		})
	}
}

// When there is no room for dead letters, delivery of messages stops and reports it; nothing is lost.
func TestNoRoomForDeadMessages(t *testing.T) {
	var works atomic.Bool
	m := newMessages(t, testenv.Postgres(t), store.InboxOptions{}, laraveltest.Options{Decide: func(laraveltest.Request) laraveltest.Answer {
		if works.Load() {
			return laraveltest.Accept()
		}
		return laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"no"}`)
	}})
	jump := m.jumping(store.InboxOptions{DeadLetters: 2})
	stop := m.flush(m.source(), batch.FlusherOptions{})
	m.traffic(2, 5)
	m.g.Eventually(m.reasons, waitTimeout).Should(ContainElement(batch.DeadLettersFull))
	stop()
	letters := m.letters()
	m.g.Expect(letters).To(HaveLen(2))
	works.Store(true)
	stop = m.flush(m.source(), batch.FlusherOptions{})
	jump(2 * time.Minute) // the pause is over
	for _, l := range letters {
		m.g.Expect(m.inbox.Replay(t.Context(), delivery.KindMessage, l.ID)).To(Equal(delivery.Replayed))
	}
	m.settled()
	stop()
}

// A leader is killed between Laravel's answer and its record in the database. The next leader
// sends the same messages under the same id when the claim has ended, and Laravel ignores them.
func TestLeaderKilledBetweenAnswerAndAck(t *testing.T) {
	for kind, url := range inboxes {
		t.Run(kind, func(t *testing.T) {
			m := newMessages(t, url(t), store.InboxOptions{}, laraveltest.Options{})
			jump := m.jumping(store.InboxOptions{})
			m.traffic(5, 3)
			killed := &killedSource{Source: m.source(), dead: make(chan struct{})}
			stop := m.flush(killed, batch.FlusherOptions{Grace: time.Millisecond})
			m.g.Eventually(m.laravel.CountMessages, waitTimeout).Should(Equal(15))
			m.g.Eventually(killed.dead, waitTimeout).Should(BeClosed())
			m.g.Expect(m.laravel.Count()).To(Equal(1))
			stop()
			m.traffic(5, 1) // they wait behind the batch

			stop = m.flush(m.source(), batch.FlusherOptions{})
			jump(time.Minute) // the claim ends
			m.settled()
			stop()
			m.g.Expect(m.laravel.Batches()).To(Equal(2))
			m.g.Expect(m.laravel.Count()).To(Equal(3), "the first batch came twice, with the same messages")
		})
	}
}

// killedSource is the source of a leader that is killed before it records its first answer.
type killedSource struct {
	batch.Source
	once sync.Once
	dead chan struct{}
}

var errKilled = errors.New("the process is gone")

func (s *killedSource) Ack(context.Context, *delivery.Batch, ...delivery.Rejection) error {
	s.once.Do(func() { close(s.dead) })
	return errKilled
}

func (s *killedSource) Release(context.Context, *delivery.Batch, time.Time) error { return errKilled }

// The database restarts, and crashes, while messages are pushed and delivered.
func TestDatabaseRestartsInTheMiddle(t *testing.T) {
	server := testenv.PostgresServer(t)
	m := newMessages(t, server.URL(), store.InboxOptions{}, laraveltest.Options{Decide: func(laraveltest.Request) laraveltest.Answer {
		return laraveltest.AcceptAfter(20 * time.Millisecond)
	}})
	stop := m.flush(m.source(), batch.FlusherOptions{})
	m.traffic(12, 1) // the sessions are taken
	var pushing sync.WaitGroup
	for i := range 4 {
		pushing.Go(func() {
			for n := range 150 {
				m.push(sessionName(i + 4*(n%3)))
			}
		})
	}
	for _, crash := range []bool{false, true} {
		before := m.laravel.CountMessages()
		m.g.Eventually(m.laravel.CountMessages, waitTimeout).Should(BeNumerically(">", before+50))
		if crash {
			server.Kill()
		}
		server.Restart()
	}
	pushing.Wait()
	// A batch whose claim was answered to nobody is claimed again when the claim has ended.
	m.settled()
	stop()
}

// Without wake-ups a message waits for a timer. Without messages the database is asked rarely.
func TestIdleInboxIsRarelyQueried(t *testing.T) {
	m := newMessages(t, testenv.Postgres(t), store.InboxOptions{}, laraveltest.Options{})
	clk := testclock.NewFakeClock(time.Now().Truncate(time.Millisecond))
	m.inbox = store.NewInbox(m.store, store.InboxOptions{Now: clk.Now})
	counting := &countingSource{Source: awake{m.inbox, nil}}
	f, err := batch.NewMessageFlusher(counting, m.client, clk, logr.Discard(), batch.FlusherOptions{})
	m.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Start(ctx) }()
	stop := sync.OnceFunc(func() { cancel(); m.g.Expect(<-done).To(Succeed()) })
	t.Cleanup(stop)
	step := func(d time.Duration) {
		for end := clk.Now().Add(d); clk.Now().Before(end); clk.Step(100 * time.Millisecond) {
			m.g.Eventually(clk.HasWaiters, waitTimeout, time.Millisecond).Should(BeTrue())
		}
	}
	step(20 * time.Second)
	before := counting.backlogs.Load()
	step(time.Minute)
	m.g.Expect(counting.backlogs.Load()-before).To(BeNumerically("<=", 13), "once in 5 s")
	m.push("a")
	m.g.Eventually(func() []laraveltest.Message {
		clk.Step(100 * time.Millisecond)
		return m.laravel.Messages("a")
	}, waitTimeout, 5*time.Millisecond).Should(HaveLen(1))
	stop()
}

type countingSource struct {
	batch.Source
	backlogs atomic.Int64
}

func (s *countingSource) Backlog(ctx context.Context, kind delivery.Kind) (delivery.Backlog, error) {
	s.backlogs.Add(1)
	return s.Source.Backlog(ctx, kind)
}

// A push wakes the flusher of messages through Redis, and not that of states.
func TestWakeUpsOfMessages(t *testing.T) {
	env := newEnvironment(t, shared(t), 0, nil)
	states, messages := env.queue.WakeUps(t.Context()), env.queue.MessageWakeUps(t.Context())
	env.g.Eventually(func() error { return env.queue.WakeForMessages(t.Context()) }, waitTimeout).Should(Succeed())
	env.g.Eventually(func() bool {
		_ = env.queue.WakeForMessages(t.Context()) // the subscription may not be there yet
		select {
		case <-messages:
			return true
		default:
			return false
		}
	}, waitTimeout, 10*time.Millisecond).Should(BeTrue())
	env.g.Expect(states).NotTo(Receive())
	env.enqueue(delivery.KindStatus, statusItem("a", 1))
	env.g.Eventually(states, waitTimeout).Should(Receive())
}
