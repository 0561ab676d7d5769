package batch_test

import (
	"context"
	"fmt"
	"net/http"
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
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

var (
	_ manager.Runnable               = &batch.Flusher{}
	_ manager.LeaderElectionRunnable = &batch.Flusher{}
	_ batch.Source                   = &batch.Queue{}
	_ batch.Sender                   = &laravel.Client{}
)

// waitTimeout bounds every wait; a loaded machine needs seconds.
const waitTimeout = 60 * time.Second

func fails(status int, body string) laraveltest.Answer { return laraveltest.Refuse(status, body) }

// world is a queue on a real Redis, the client, and the receiver in Laravel's place.
type world struct {
	t       *testing.T
	g       *WithT
	redis   goredis.UniversalClient
	keys    redis.Keys
	queue   *batch.Queue
	client  *laravel.Client
	laravel *laraveltest.Receiver

	mu      sync.Mutex
	stopped []batch.StopReason
	again   int
}

var prefixes atomic.Int64

func newWorld(t *testing.T, addr string, timeout time.Duration, decide func(laraveltest.Request) laraveltest.Answer) *world {
	g := NewWithT(t)
	w := &world{t: t, g: g, laravel: laraveltest.Start(t, laraveltest.Options{Decide: decide}), keys: redis.NewKeys(fmt.Sprintf("w%d:", prefixes.Add(1)))}
	w.redis = goredis.NewClient(&goredis.Options{Addr: addr})
	t.Cleanup(func() { _ = w.redis.Close() })
	w.queue = batch.NewQueue(w.redis, w.keys, clock.RealClock{}, batch.Options{DeadLetters: 5})
	config, err := w.laravel.Config(t.TempDir())
	g.Expect(err).NotTo(HaveOccurred())
	config.Timeout = timeout
	client, err := laravel.New(config, clock.RealClock{}, logr.Discard())
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
	}, waitTimeout, 20*time.Millisecond).Should(Succeed())
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
				g.Expect(w.laravel.Status(name).Numbers).To(Equal(delivery.Numbers{Epoch: 1, Seq: int64(rounds)}), name)
			}
		}
		p, err := w.queue.Pending(w.t.Context(), delivery.KindStatus)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(p.Waiting + p.InFlight + p.Unfinished).To(BeZero())
	}, waitTimeout, 20*time.Millisecond).Should(Succeed())
	w.g.Expect(w.laravel.Breaches()).To(BeEmpty())
	for _, session := range w.laravel.NotAccepted() {
		if !slices.Contains(but, session) {
			w.t.Errorf("an update of %s was sent, not taken, and not sent again", session)
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
	always := func(answer laraveltest.Answer) func(laraveltest.Request) laraveltest.Answer {
		return func(laraveltest.Request) laraveltest.Answer { return answer }
	}
	first := func(n int, bad laraveltest.Answer) func(laraveltest.Request) laraveltest.Answer {
		return func(r laraveltest.Request) laraveltest.Answer {
			if r.N <= n {
				return bad
			}
			return laraveltest.Accept()
		}
	}
	later := laraveltest.Answer{Write: func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	}}
	redirects := laraveltest.Answer{Write: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) }}
	named := laraveltest.AcceptExcept("no such tenant", sessionName(7))

	for _, row := range []struct {
		name    string
		timeout time.Duration
		decide  func(laraveltest.Request) laraveltest.Answer
		// without never reaches Laravel.
		without string
		stopped batch.StopReason
	}{
		{name: "quick", decide: always(laraveltest.Accept())},
		{name: "slow", decide: always(laraveltest.AcceptAfter(100 * time.Millisecond))},
		{name: "failing, then well", decide: first(6, fails(http.StatusServiceUnavailable, "down")), stopped: batch.LaravelUnavailable},
		{name: "flapping", decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.N%2 == 1 {
				return fails(http.StatusBadGateway, "bad gateway")
			}
			return laraveltest.Accept()
		}},
		{name: "taken, and the connection breaks", decide: first(3, laraveltest.AcceptThenDisconnect())},
		{name: "taken, and no answer in time", timeout: 200 * time.Millisecond, decide: first(3, laraveltest.AcceptThenHang())},
		{name: "asks for a pause", decide: first(1, later)},
		{name: "redirects to a login", decide: first(1, redirects), stopped: batch.LaravelMisconfigured},
		{name: "answers with HTML", decide: first(1, laraveltest.Refuse(http.StatusOK, "<html>login</html>")), stopped: batch.LaravelMisconfigured},
		{name: "does not know the token", decide: first(1, fails(http.StatusUnauthorized, "who?")), stopped: batch.LaravelMisconfigured},
		{name: "refuses one session", without: sessionName(7), decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.Contains(sessionName(7)) {
				return fails(http.StatusUnprocessableEntity, `{"message":"The session_id is unknown."}`)
			}
			return laraveltest.Accept()
		}},
		{name: "rejects one session by name", without: sessionName(7), decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.Contains(sessionName(7)) {
				return named
			}
			return laraveltest.Accept()
		}},
		{name: "takes ten at a time", decide: func(r laraveltest.Request) laraveltest.Answer {
			if len(r.Items) > 10 {
				return fails(http.StatusRequestEntityTooLarge, "too large")
			}
			return laraveltest.Accept()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, addr, row.timeout, row.decide)
			updates := rounds
			if row.without != "" {
				updates = 1 // each of its updates would be a dead letter, and there is room for five
			}
			stop := w.flush(w.queue, batch.FlusherOptions{})
			w.traffic(sessions, updates)
			w.settled(sessions, updates, row.without)
			dead := int64(0)
			if row.without != "" {
				dead = 1
			}
			w.g.Eventually(func() int64 {
				return w.redis.XLen(t.Context(), w.keys.DeadLetters(delivery.KindStatus)).Val()
			}, waitTimeout).Should(Equal(dead), "also after it was sent again")
			stop()
			if row.stopped != "" {
				w.g.Expect(w.stopped).To(ContainElement(row.stopped))
				w.g.Expect(w.again).To(BeNumerically(">", 0))
			} else {
				w.g.Expect(w.stopped).To(BeEmpty())
			}
			w.g.Expect(w.laravel.MaxConcurrent("")).To(BeNumerically("<=", 4))
		})
	}
}

// A thousand at once go in full batches.
func TestThousandAtOnce(t *testing.T) {
	const sessions = 1000
	w := newWorld(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptAfter(50 * time.Millisecond) })
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.traffic(sessions, 1)
	w.settled(sessions, 1)
	stop()
	w.g.Expect(w.laravel.Count()).To(BeNumerically("<=", 22))
}

// What a lost publish costs is one poll.
func TestLostPublish(t *testing.T) {
	w := newWorld(t, shared(t), 0, nil)
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
	w := newWorld(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptWhen(release) })
	stop := w.flush(w.queue, batch.FlusherOptions{})
	var codes []delivery.Item
	for i := range 500 {
		codes = append(codes, qrItem(sessionName(i), 1))
	}
	w.enqueue(delivery.KindQR, codes...)
	w.g.Eventually(w.laravel.Count, waitTimeout).Should(Equal(2))
	w.traffic(200, 1)
	w.g.Eventually(w.laravel.Count, waitTimeout).Should(Equal(4), "statuses have room beside them")
	close(release)
	w.settled(200, 1)
	w.g.Eventually(func() int64 { return w.laravel.Code(sessionName(499)).Seq }, waitTimeout).Should(BeEquivalentTo(1))
	stop()
	w.g.Expect(w.laravel.MaxConcurrent(delivery.KindQR)).To(Equal(2))
	w.g.Expect(w.laravel.MaxConcurrent("")).To(BeNumerically("<=", 4))
}

// A leader goes in the middle of a request: in time it is finished, else it is
// given back, and the next leader repeats it with the same id and items (the
// receiver checks).
func TestLeaderChange(t *testing.T) {
	for _, row := range []struct {
		name     string
		grace    time.Duration
		requests int
	}{
		{"finished in the grace", waitTimeout, 1},
		{"cut off", time.Millisecond, 2},
	} {
		t.Run(row.name, func(t *testing.T) {
			arrived, release := make(chan struct{}), make(chan struct{})
			w := newWorld(t, shared(t), 0, func(r laraveltest.Request) laraveltest.Answer {
				if r.N > 1 {
					return laraveltest.Accept()
				}
				close(arrived)
				return laraveltest.AcceptWhen(release)
			})
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
			w.g.Expect(w.laravel.Count()).To(Equal(1))
			p, err := w.queue.Pending(t.Context(), delivery.KindStatus)
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(p.Unfinished).To(Equal(row.requests - 1))

			stop = w.flush(w.queue, batch.FlusherOptions{})
			w.settled(20, 2)
			stop()
			w.g.Expect(w.laravel.Batches()).To(Equal(2))
			w.g.Expect(w.laravel.Count()).To(Equal(row.requests + 1))
		})
	}
}

// Leaders replace each other all the time, and overlap: nothing is lost or out of order.
func TestManyLeaders(t *testing.T) {
	w := newWorld(t, shared(t), 0, func(r laraveltest.Request) laraveltest.Answer {
		return laraveltest.AcceptAfter(time.Duration(r.N%5) * 10 * time.Millisecond)
	})
	traffic := make(chan struct{})
	go func() { defer close(traffic); w.traffic(100, 150) }()
	stop := func() {}
	for more := true; more; {
		next := w.flush(w.queue, batch.FlusherOptions{Grace: time.Millisecond})
		before := w.laravel.Count()
		w.g.Eventually(func() bool {
			select {
			case <-traffic:
				more = false
				return true
			default:
				return w.laravel.Count() > before+2
			}
		}, waitTimeout, 10*time.Millisecond).Should(BeTrue())
		stop()
		stop = next
	}
	w.settled(100, 150)
	stop()
}

// Redis goes away and comes back with what it had.
func TestRedisRestarts(t *testing.T) {
	server := testenv.RedisServer(t)
	w := newWorld(t, server.Addr(), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptAfter(20 * time.Millisecond) })
	stop := w.flush(w.queue, batch.FlusherOptions{})
	traffic := make(chan struct{})
	go func() { defer close(traffic); w.traffic(80, 100) }()
	for range 2 {
		before := w.laravel.Count()
		w.g.Eventually(w.laravel.Count, waitTimeout).Should(BeNumerically(">", before+3))
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
		bad      laraveltest.Answer
		stopped  batch.StopReason
		dead     int64
	}{
		{name: "a few are refused", sessions: 3, bad: fails(http.StatusUnprocessableEntity, `{"message":"a bug"}`), dead: 3},
		{name: "everything is refused", sessions: 60, bad: fails(http.StatusUnprocessableEntity, `{"message":"a bug"}`), stopped: batch.LaravelMisconfigured, dead: 19},
		{name: "everything is rejected by name", sessions: 60, bad: laraveltest.AcceptExcept("a bug", sessionNames(60)...), stopped: batch.LaravelMisconfigured},
		{name: "an ingress that expects TLS", sessions: 60, bad: fails(http.StatusBadRequest, "<html>The plain HTTP request was sent to HTTPS port"), stopped: batch.LaravelMisconfigured},
		{name: "a deadlock", sessions: 60, bad: fails(http.StatusConflict, `{"message":"deadlock"}`)},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var broken atomic.Bool
			w := newWorld(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer {
				if broken.Load() {
					return row.bad
				}
				return laraveltest.Accept()
			})
			w.queue = batch.NewQueue(w.redis, w.keys, clock.RealClock{}, batch.Options{})
			stop := w.flush(w.queue, batch.FlusherOptions{})
			w.traffic(row.sessions, 1)
			w.settled(row.sessions, 1)
			broken.Store(true)
			w.traffic(row.sessions, 2) // a second status of each
			dead := func() int64 { return w.redis.XLen(t.Context(), w.keys.DeadLetters(delivery.KindStatus)).Val() }
			w.g.Eventually(dead, waitTimeout).Should(Equal(row.dead))
			w.g.Eventually(func() []batch.StopReason {
				w.mu.Lock()
				defer w.mu.Unlock()
				return slices.Clone(w.stopped)
			}, waitTimeout).Should(ContainElements(reasons(row.stopped)))
			before := w.laravel.Count()
			w.g.Eventually(w.laravel.Count, waitTimeout).Should(BeNumerically(">", before), "it is probed")
			w.g.Eventually(dead, waitTimeout).Should(Equal(row.dead), "also after they were sent again")
			broken.Store(false)
			w.settled(row.sessions, 2)
			w.g.Eventually(dead, waitTimeout).Should(BeZero(), "a letter whose item is delivered is gone")
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

func sessionNames(n int) []string {
	var names []string
	for i := range n {
		names = append(names, sessionName(i))
	}
	return names
}

// When there is no room for dead letters delivery stops and says so, and it
// goes on when there is room.
func TestNoRoomForDeadLetters(t *testing.T) {
	w := newWorld(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer {
		return fails(http.StatusUnprocessableEntity, `{"message":"no"}`)
	})
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.traffic(8, 1)
	w.g.Eventually(func() []batch.StopReason {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Clone(w.stopped)
	}, waitTimeout).Should(ConsistOf(batch.DeadLettersFull))
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
	w := newWorld(t, shared(t), 0, nil)
	w.traffic(1, 1) // connections are made
	ignore := goleak.IgnoreCurrent()
	stop := w.flush(w.queue, batch.FlusherOptions{})
	w.settled(1, 1)
	stop()
	w.client.Close()
	w.g.Expect(w.laravel.Close()).To(Succeed())
	goleak.VerifyNone(t, ignore)
}
