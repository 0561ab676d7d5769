package batch_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

var (
	_ manager.Runnable               = &batch.Flusher{}
	_ manager.LeaderElectionRunnable = &batch.Flusher{}
	_ batch.Source                   = &batch.Queue{}
	_ batch.Sender                   = &laravel.Client{}
)

// patience bounds every wait; a loaded machine needs seconds.
const patience = 60 * time.Second

const signingSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

// outcome is what the stand-in does with a request.
type outcome struct {
	// process: the items are taken, before the answer.
	process bool
	answer  http.HandlerFunc
}

func ok() outcome {
	return outcome{true, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"ok":true}`) }}
}

func fails(status int, body string) outcome {
	return outcome{false, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, body, status) }}
}

// standIn is Laravel as the contract wants it: it takes a batch once, whatever
// its repetitions, ignores what is not newer, and keeps a record of everything
// that must not happen.
type standIn struct {
	*httptest.Server
	decide func(n int, kind delivery.Kind, items []delivery.StatusItem) outcome

	mu       sync.Mutex
	requests int
	batches  map[string]string // id → items
	taken    map[string]bool
	newest   map[string]delivery.Numbers // what came, taken or not
	has      map[string]delivery.Numbers // what was taken
	owed     map[string]string           // what came and was not taken yet, with its session
	faults   []string

	running, runningQR, mostRunning, mostRunningQR int
}

func newStandIn(t *testing.T, decide func(n int, kind delivery.Kind, items []delivery.StatusItem) outcome) *standIn {
	s := &standIn{decide: decide, batches: map[string]string{}, taken: map[string]bool{},
		newest: map[string]delivery.Numbers{}, has: map[string]delivery.Numbers{}, owed: map[string]string{}}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *standIn) serve(w http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return
	}
	s.handle(request, body).answer(w, request)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running--
	if request.URL.Path == laravel.DefaultQRPath {
		s.runningQR--
	}
}

func (s *standIn) handle(request *http.Request, body []byte) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests++
	s.running++
	kind := delivery.KindStatus
	if request.URL.Path == laravel.DefaultQRPath {
		kind = delivery.KindQR
		s.runningQR++
	}
	s.mostRunning, s.mostRunningQR = max(s.mostRunning, s.running), max(s.mostRunningQR, s.runningQR)
	fault := func(format string, args ...any) { s.faults = append(s.faults, fmt.Sprintf(format, args...)) }

	secret, _ := laravel.ParseSecret(signingSecret)
	if err := laravel.Verify(request.Header, []laravel.Secret{secret}, time.Now(), laravel.DefaultTolerance, body); err != nil {
		fault("%v", err)
	}
	var envelope struct {
		BatchID string          `json:"batch_id"`
		Items   json.RawMessage `json:"items"`
	}
	var items []delivery.StatusItem
	if err := errors.Join(json.Unmarshal(body, &envelope), json.Unmarshal(envelope.Items, &items)); err != nil {
		fault("malformed: %v", err)
	}
	if envelope.BatchID != request.Header.Get(laravel.HeaderID) {
		fault("batch %s has another id in its header", envelope.BatchID)
	}
	if before, repeated := s.batches[envelope.BatchID]; repeated && before != string(envelope.Items) {
		fault("batch %s is repeated with other items", envelope.BatchID)
	}
	s.batches[envelope.BatchID] = string(envelope.Items)
	for _, item := range items {
		key := string(kind) + "/" + item.SessionID
		if s.newest[key].Newer(item.Numbers) {
			fault("%s: %v after %v", key, item.Numbers, s.newest[key])
		}
		s.newest[key] = item.Numbers
		s.owed[key+"/"+item.Numbers.String()] = item.SessionID
	}
	result := s.decide(s.requests, kind, items)
	if !result.process {
		return result
	}
	for _, item := range items {
		key := string(kind) + "/" + item.SessionID
		delete(s.owed, key+"/"+item.Numbers.String())
		if !s.taken[envelope.BatchID] && item.Numbers.Newer(s.has[key]) {
			s.has[key] = item.Numbers
		}
	}
	s.taken[envelope.BatchID] = true
	return result
}

func (s *standIn) numbers(kind delivery.Kind, session string) delivery.Numbers {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.has[string(kind)+"/"+session]
}

func (s *standIn) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

// world is a queue on a real Redis, the client, and the stand-in.
type world struct {
	t       *testing.T
	g       *WithT
	redis   goredis.UniversalClient
	keys    redis.Keys
	queue   *batch.Queue
	client  *laravel.Client
	standIn *standIn

	mu      sync.Mutex
	stopped []batch.StopReason
	again   int
}

var prefixes atomic.Int64

func newWorld(t *testing.T, addr string, timeout time.Duration, s *standIn) *world {
	g := NewWithT(t)
	w := &world{t: t, g: g, standIn: s, keys: redis.NewKeys(fmt.Sprintf("w%d:", prefixes.Add(1)))}
	w.redis = goredis.NewClient(&goredis.Options{Addr: addr})
	t.Cleanup(func() { _ = w.redis.Close() })
	w.queue = batch.NewQueue(w.redis, w.keys, clock.RealClock{}, batch.Options{DeadLetters: 5})
	dir := t.TempDir()
	for name, content := range map[string]string{"token": "token", "secret": signingSecret} {
		g.Expect(os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600)).To(Succeed())
	}
	client, err := laravel.New(laravel.Config{
		BaseURL: s.URL, TokenFile: filepath.Join(dir, "token"), SigningSecretFiles: []string{filepath.Join(dir, "secret")}, Timeout: timeout,
	}, clock.RealClock{}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(client.Close)
	w.client = client
	return w
}

// flush starts a flusher; the function that it returns stops it and waits for its end.
func (w *world) flush(source batch.Source, opts batch.FlusherOptions) (stop func()) {
	w.t.Helper()
	opts.OnStopped = func(_ delivery.Kind, reason batch.StopReason, detail string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if detail == "" {
			w.t.Error("people are told nothing")
		}
		w.stopped = append(w.stopped, reason)
	}
	opts.OnRecovered = func(delivery.Kind) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.again++
	}
	f, err := batch.NewFlusher(source, w.client, clock.RealClock{}, logr.Discard(), opts)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(f.NeedLeaderElection()).To(BeTrue())
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Start(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		w.g.Expect(<-done).To(Succeed())
	})
}

func statusItem(session string, n int64) delivery.Item {
	priority := delivery.Normal
	if n%2 == 0 {
		priority = delivery.High
	}
	item, err := delivery.StatusItem{SessionID: session, Status: delivery.Pending, Phase: "Connecting", Priority: priority,
		OccurredAt: delivery.Time{Time: time.Now()}, Numbers: delivery.Numbers{Epoch: 1, Seq: n}}.Item()
	if err != nil {
		panic(err)
	}
	return item
}

func qrItem(session string, n int64) delivery.Item {
	item, err := delivery.QRItem{SessionID: session, QR: "2@code", ExpiresAt: delivery.Time{Time: time.Now().Add(time.Hour)},
		Numbers: delivery.Numbers{Epoch: 1, Seq: n}}.Item()
	if err != nil {
		panic(err)
	}
	return item
}

func sessionName(i int) string { return fmt.Sprintf("s%03d", i) }

// enqueue repeats until the queue has the items, as a worker does.
func (w *world) enqueue(kind delivery.Kind, items ...delivery.Item) {
	w.t.Helper()
	w.g.Eventually(func() error {
		_, err := w.queue.Enqueue(w.t.Context(), kind, items...)
		return err
	}, patience, 20*time.Millisecond).Should(Succeed())
}

// traffic changes sessions×rounds statuses, a round each few milliseconds.
func (w *world) traffic(sessions, rounds int) {
	w.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := 1; n <= rounds; n++ {
		var items []delivery.Item
		for i := range sessions {
			items = append(items, statusItem(sessionName(i), int64(n)))
		}
		w.enqueue(delivery.KindStatus, items...)
		<-tick.C
	}
}

// settled waits until every session's last status is at Laravel, but for those
// named, and the queue is empty; and nothing happened that must not.
func (w *world) settled(sessions, rounds int, but ...string) {
	w.t.Helper()
	w.g.Eventually(func(g Gomega) {
		for i := range sessions {
			if name := sessionName(i); !slices.Contains(but, name) {
				g.Expect(w.standIn.numbers(delivery.KindStatus, name)).To(Equal(delivery.Numbers{Epoch: 1, Seq: int64(rounds)}), name)
			}
		}
		p, err := w.queue.Pending(w.t.Context(), delivery.KindStatus)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(p.Waiting + p.InFlight + p.Unfinished).To(BeZero())
	}, patience, 20*time.Millisecond).Should(Succeed())
	w.standIn.mu.Lock()
	defer w.standIn.mu.Unlock()
	w.g.Expect(w.standIn.faults).To(BeEmpty())
	for item, session := range w.standIn.owed {
		if !slices.Contains(but, session) {
			w.t.Errorf("%s was sent, not taken, and not sent again", item)
		}
	}
}

// shared is one Redis for the tests that do not stop it.
func shared(t *testing.T) string {
	t.Helper()
	return testenv.Redis(t, "--save", "")
}

func TestDelivery(t *testing.T) {
	addr := shared(t)
	const sessions, rounds = 120, 30
	always := func(o outcome) func(int, delivery.Kind, []delivery.StatusItem) outcome {
		return func(int, delivery.Kind, []delivery.StatusItem) outcome { return o }
	}
	first := func(n int, bad outcome) func(int, delivery.Kind, []delivery.StatusItem) outcome {
		return func(i int, _ delivery.Kind, _ []delivery.StatusItem) outcome {
			if i <= n {
				return bad
			}
			return ok()
		}
	}
	slow := ok()
	slow.answer = func(w http.ResponseWriter, r *http.Request) {
		<-time.After(100 * time.Millisecond)
		ok().answer(w, r)
	}
	breaks := outcome{true, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }}
	hangs := outcome{true, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }}
	later := fails(http.StatusTooManyRequests, "slow down")
	later.answer = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	}
	redirects := outcome{false, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) }}
	html := outcome{false, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>login</html>") }}
	named := outcome{true, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"rejected":[{"session_id":%q,"reason":"no such tenant"}]}`, sessionName(7))
	}}
	holds := func(items []delivery.StatusItem, session string) bool {
		for _, item := range items {
			if item.SessionID == session {
				return true
			}
		}
		return false
	}

	for _, row := range []struct {
		name    string
		timeout time.Duration
		decide  func(int, delivery.Kind, []delivery.StatusItem) outcome
		// without never reaches Laravel.
		without string
		stopped batch.StopReason
	}{
		{name: "quick", decide: always(ok())},
		{name: "slow", decide: always(slow)},
		{name: "failing, then well", decide: first(6, fails(http.StatusServiceUnavailable, "down")), stopped: batch.LaravelUnavailable},
		{name: "flapping", decide: func(i int, _ delivery.Kind, _ []delivery.StatusItem) outcome {
			if i%2 == 1 {
				return fails(http.StatusBadGateway, "bad gateway")
			}
			return ok()
		}},
		{name: "taken, and the connection breaks", decide: first(3, breaks)},
		{name: "taken, and no answer in time", timeout: 200 * time.Millisecond, decide: first(3, hangs)},
		{name: "asks for a pause", decide: first(1, later)},
		{name: "redirects to a login", decide: first(1, redirects), stopped: batch.LaravelMisconfigured},
		{name: "answers with HTML", decide: first(1, html), stopped: batch.LaravelMisconfigured},
		{name: "does not know the token", decide: first(1, fails(http.StatusUnauthorized, "who?")), stopped: batch.LaravelMisconfigured},
		{name: "refuses one session", without: sessionName(7), decide: func(_ int, _ delivery.Kind, items []delivery.StatusItem) outcome {
			if holds(items, sessionName(7)) {
				return fails(http.StatusUnprocessableEntity, `{"message":"The session_id is unknown."}`)
			}
			return ok()
		}},
		{name: "rejects one session by name", without: sessionName(7), decide: func(_ int, _ delivery.Kind, items []delivery.StatusItem) outcome {
			if holds(items, sessionName(7)) {
				return named
			}
			return ok()
		}},
		{name: "takes ten at a time", decide: func(_ int, _ delivery.Kind, items []delivery.StatusItem) outcome {
			if len(items) > 10 {
				return fails(http.StatusRequestEntityTooLarge, "too large")
			}
			return ok()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, addr, row.timeout, newStandIn(t, row.decide))
			updates := rounds
			if row.without != "" {
				updates = 1 // each of its updates would be a dead letter, and there is room for five
			}
			stop := w.flush(w.queue, batch.FlusherOptions{})
			w.traffic(sessions, updates)
			w.settled(sessions, updates, row.without)
			stop()
			dead, err := w.redis.XLen(t.Context(), w.keys.DeadLetters(delivery.KindStatus)).Result()
			w.g.Expect(err).NotTo(HaveOccurred())
			if row.without != "" {
				w.g.Expect(dead).To(BeEquivalentTo(1))
			} else {
				w.g.Expect(dead).To(BeZero())
			}
			if row.stopped != "" {
				w.g.Expect(w.stopped).To(ContainElement(row.stopped))
				w.g.Expect(w.again).To(BeNumerically(">", 0))
			} else {
				w.g.Expect(w.stopped).To(BeEmpty())
			}
			w.g.Expect(w.standIn.mostRunning).To(BeNumerically("<=", 4))
		})
	}
}

// A thousand at once go in full batches.
func TestThousandAtOnce(t *testing.T) {
	const sessions = 1000
	s := newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome {
		o := ok()
		o.answer = func(http.ResponseWriter, *http.Request) { <-time.After(50 * time.Millisecond) }
		return o
	})
	w := newWorld(t, shared(t), 0, s)
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.traffic(sessions, 1)
	w.settled(sessions, 1)
	stop()
	w.g.Expect(s.count()).To(BeNumerically("<=", 22))
}

// What a lost publish costs is one poll.
func TestLostPublish(t *testing.T) {
	w := newWorld(t, shared(t), 0, newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome { return ok() }))
	stop := w.flush(deaf{w.queue}, batch.FlusherOptions{})
	w.traffic(60, 3)
	w.settled(60, 3)
	stop()
}

// deaf is a queue whose publishes are lost.
type deaf struct{ *batch.Queue }

func (deaf) WakeUps(ctx context.Context) <-chan struct{} {
	wake := make(chan struct{})
	go func() { <-ctx.Done(); close(wake) }()
	return wake
}

// QR codes take half of the requests at most, also when nothing else goes.
func TestQRCodesTakeHalf(t *testing.T) {
	release := make(chan struct{})
	s := newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome {
		o := ok()
		o.answer = func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
		return o
	})
	w := newWorld(t, shared(t), 0, s)
	stop := w.flush(w.queue, batch.FlusherOptions{})
	var codes []delivery.Item
	for i := range 500 {
		codes = append(codes, qrItem(sessionName(i), 1))
	}
	w.enqueue(delivery.KindQR, codes...)
	w.g.Eventually(s.count, patience).Should(Equal(2))
	w.traffic(200, 1)
	w.g.Eventually(s.count, patience).Should(Equal(4), "statuses have room beside them")
	close(release)
	w.settled(200, 1)
	w.g.Eventually(func() int64 { return s.numbers(delivery.KindQR, sessionName(499)).Seq }, patience).Should(BeEquivalentTo(1))
	stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	w.g.Expect(s.mostRunningQR).To(Equal(2))
	w.g.Expect(s.mostRunning).To(BeNumerically("<=", 4))
}

// A leader goes in the middle of a request: in time it is finished, else it is
// given back, and the next leader repeats it with the same id and items (the
// stand-in checks).
func TestLeaderChange(t *testing.T) {
	for _, row := range []struct {
		name     string
		grace    time.Duration
		requests int
	}{
		{"finished in the grace", patience, 1},
		{"cut off", time.Millisecond, 2},
	} {
		t.Run(row.name, func(t *testing.T) {
			arrived, release := make(chan struct{}), make(chan struct{})
			s := newStandIn(t, func(n int, _ delivery.Kind, _ []delivery.StatusItem) outcome {
				o := ok()
				if n == 1 {
					o.answer = func(_ http.ResponseWriter, r *http.Request) {
						close(arrived)
						select {
						case <-release:
						case <-r.Context().Done():
						}
					}
				}
				return o
			})
			w := newWorld(t, shared(t), 0, s)
			stop := w.flush(w.queue, batch.FlusherOptions{Grace: row.grace})
			w.traffic(20, 1)
			<-arrived
			w.traffic(20, 2) // newer ones wait behind it
			stopping := make(chan struct{})
			go func() { defer close(stopping); stop() }()
			if row.requests == 1 {
				close(release)
			}
			<-stopping
			w.g.Expect(s.count()).To(Equal(1))
			p, err := w.queue.Pending(t.Context(), delivery.KindStatus)
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(p.Unfinished).To(Equal(row.requests - 1))

			stop = w.flush(w.queue, batch.FlusherOptions{})
			w.settled(20, 2)
			stop()
			w.g.Expect(s.batches).To(HaveLen(2))
			w.g.Expect(s.count()).To(Equal(row.requests + 1))
		})
	}
}

// Leaders replace each other all the time, and overlap: nothing is lost or out of order.
func TestManyLeaders(t *testing.T) {
	s := newStandIn(t, func(n int, _ delivery.Kind, _ []delivery.StatusItem) outcome {
		o := ok()
		o.answer = func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(time.Duration(n%5) * 10 * time.Millisecond):
			case <-r.Context().Done():
			}
		}
		return o
	})
	w := newWorld(t, shared(t), 0, s)
	traffic := make(chan struct{})
	go func() { defer close(traffic); w.traffic(100, 150) }()
	stop := func() {}
	for more := true; more; {
		next := w.flush(w.queue, batch.FlusherOptions{Grace: time.Millisecond})
		select {
		case <-traffic:
			more = false
		case <-time.After(100 * time.Millisecond):
		}
		stop()
		stop = next
	}
	w.settled(100, 150)
	stop()
}

// Redis goes away and comes back with what it had.
func TestRedisRestarts(t *testing.T) {
	server := testenv.RedisServer(t)
	s := newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome {
		o := ok()
		o.answer = func(http.ResponseWriter, *http.Request) { <-time.After(20 * time.Millisecond) }
		return o
	})
	w := newWorld(t, server.Addr(), 0, s)
	stop := w.flush(w.queue, batch.FlusherOptions{})
	traffic := make(chan struct{})
	go func() { defer close(traffic); w.traffic(80, 100) }()
	for range 2 {
		before := s.count()
		w.g.Eventually(s.count, patience).Should(BeNumerically(">", before+3))
		server.Restart()
	}
	<-traffic
	w.settled(80, 100)
	stop()
}

// A session's state that Laravel refused is enqueued again when the application accepts
// again: nothing else happens to the session, and Laravel must not keep its old state.
func TestRefusedStateIsSentAgain(t *testing.T) {
	for _, row := range []struct {
		name string
		// sessions are refused; from five on the brake keeps most of them from being dead letters.
		sessions int
		bad      outcome
		stopped  batch.StopReason
		dead     int64
	}{
		{name: "a few are refused", sessions: 3, bad: fails(http.StatusUnprocessableEntity, `{"message":"a bug"}`), dead: 3},
		{name: "everything is refused", sessions: 60, bad: fails(http.StatusUnprocessableEntity, `{"message":"a bug"}`), stopped: batch.LaravelMisconfigured, dead: 19},
		{name: "everything is rejected by name", sessions: 60, bad: outcome{false, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, rejectsAll(60))
		}}, stopped: batch.LaravelMisconfigured},
		{name: "an ingress that expects TLS", sessions: 60, bad: fails(http.StatusBadRequest, "<html>The plain HTTP request was sent to HTTPS port"), stopped: batch.LaravelMisconfigured},
		{name: "a deadlock", sessions: 60, bad: fails(http.StatusConflict, `{"message":"deadlock"}`)},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var broken atomic.Bool
			s := newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome {
				if broken.Load() {
					return row.bad
				}
				return ok()
			})
			w := newWorld(t, shared(t), 0, s)
			w.queue = batch.NewQueue(w.redis, w.keys, clock.RealClock{}, batch.Options{})
			stop := w.flush(w.queue, batch.FlusherOptions{})
			w.traffic(row.sessions, 1)
			w.settled(row.sessions, 1)
			broken.Store(true)
			w.traffic(row.sessions, 2) // a second status of each
			dead := func() int64 { return w.redis.XLen(t.Context(), w.keys.DeadLetters(delivery.KindStatus)).Val() }
			w.g.Eventually(dead, patience).Should(Equal(row.dead))
			w.g.Eventually(func() []batch.StopReason {
				w.mu.Lock()
				defer w.mu.Unlock()
				return slices.Clone(w.stopped)
			}, patience).Should(ContainElements(reasons(row.stopped)))
			before := s.count()
			w.g.Eventually(s.count, patience).Should(BeNumerically(">", before), "it is probed")
			w.g.Expect(dead()).To(Equal(row.dead))
			broken.Store(false)
			w.settled(row.sessions, 2)
			w.g.Eventually(dead, patience).Should(BeZero(), "a letter whose item is delivered is gone")
			stop()
		})
	}
}

func reasons(r batch.StopReason) []batch.StopReason {
	if r == "" {
		return nil
	}
	return []batch.StopReason{r}
}

func rejectsAll(sessions int) string {
	var list []delivery.Rejection
	for i := range sessions {
		list = append(list, delivery.Rejection{SessionID: sessionName(i), Reason: "a bug"})
	}
	text, err := json.Marshal(map[string]any{"rejected": list})
	if err != nil {
		panic(err)
	}
	return string(text)
}

// When there is no room for dead letters delivery stops and says so, and it
// goes on when there is room.
func TestNoRoomForDeadLetters(t *testing.T) {
	s := newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome {
		return fails(http.StatusUnprocessableEntity, `{"message":"no"}`)
	})
	w := newWorld(t, shared(t), 0, s)
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.traffic(8, 1)
	w.g.Eventually(func() []batch.StopReason {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Clone(w.stopped)
	}, patience).Should(ConsistOf(batch.DeadLettersFull))
	stop()
	dead, err := w.redis.XLen(t.Context(), w.keys.DeadLetters(delivery.KindStatus)).Result()
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(dead).To(BeEquivalentTo(5))
	p, err := w.queue.Pending(t.Context(), delivery.KindStatus)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(p.InFlight+p.Waiting).To(Equal(3), "the others are kept")
}

// Nothing that Start began is left when it returns.
func TestNothingIsLeft(t *testing.T) {
	w := newWorld(t, shared(t), 0, newStandIn(t, func(int, delivery.Kind, []delivery.StatusItem) outcome { return ok() }))
	w.traffic(1, 1) // connections are made
	ignore := goleak.IgnoreCurrent()
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.settled(1, 1)
	stop()
	w.client.Close()
	w.standIn.CloseClientConnections()
	goleak.VerifyNone(t, ignore)
}
