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

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(waitTimeout) }

// environment is a queue on a real Redis, the client, and a receiver that stands in for Laravel.
type environment struct {
	t       *testing.T
	g       *WithT
	redis   goredis.UniversalClient
	keys    redis.Keys
	queue   *batch.Queue
	client  *laravel.Client
	laravel *laraveltest.Receiver

	mu        sync.Mutex
	stopped   []batch.StopReason
	recovered int
}

var prefixes atomic.Int64

func newEnvironment(t *testing.T, addr string, timeout time.Duration, decide func(laraveltest.Request) laraveltest.Answer) *environment {
	g := NewWithT(t)
	env := &environment{t: t, g: g, laravel: laraveltest.Start(t, laraveltest.Options{Decide: decide}), keys: redis.NewKeys(fmt.Sprintf("test%d:", prefixes.Add(1)))}
	env.redis = goredis.NewClient(&goredis.Options{Addr: addr})
	t.Cleanup(func() { _ = env.redis.Close() })
	env.queue = batch.NewQueue(env.redis, env.keys, clock.RealClock{}, batch.Options{DeadLetters: 5})
	config, err := env.laravel.Config(t.TempDir())
	g.Expect(err).NotTo(HaveOccurred())
	config.Timeout = timeout
	client, err := laravel.New(config, clock.RealClock{}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(client.Close)
	env.client = client
	return env
}

// flush starts a flusher; stop stops it and waits until it has ended.
func (env *environment) flush(source batch.Source, opts batch.FlusherOptions) (stop func()) {
	env.t.Helper()
	opts.OnStopped = func(_ delivery.Kind, reason batch.StopReason, detail string) {
		env.mu.Lock()
		defer env.mu.Unlock()
		if detail == "" {
			env.t.Error("the detail for people is missing")
		}
		env.stopped = append(env.stopped, reason)
	}
	opts.OnRecovered = func(delivery.Kind) {
		env.mu.Lock()
		defer env.mu.Unlock()
		env.recovered++
	}
	f, err := batch.NewFlusher(source, env.client, clock.RealClock{}, logr.Discard(), opts)
	env.g.Expect(err).NotTo(HaveOccurred())
	env.g.Expect(f.NeedLeaderElection()).To(BeTrue())
	ctx, cancel := context.WithCancel(env.t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Start(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		env.g.Expect(<-done).To(Succeed())
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
func (env *environment) enqueue(kind delivery.Kind, items ...delivery.Item) {
	env.t.Helper()
	env.g.Eventually(func() error {
		_, err := env.queue.Enqueue(env.t.Context(), kind, items...)
		return err
	}, waitTimeout, 20*time.Millisecond).Should(Succeed())
}

// traffic enqueues sessions×rounds statuses, one round every 10 milliseconds.
func (env *environment) traffic(sessions, rounds int) {
	env.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := 1; n <= rounds; n++ {
		var items []delivery.Item
		for i := range sessions {
			items = append(items, statusItem(sessionName(i), int64(n)))
		}
		env.enqueue(delivery.KindStatus, items...)
		<-tick.C
	}
}

// settled waits until Laravel has every session's last status, except those of but, and
// the queue is empty. Then it checks that the contract was never broken.
func (env *environment) settled(sessions, rounds int, but ...string) {
	env.t.Helper()
	env.settledWithin(waitTimeout, sessions, rounds, but...)
}

func (env *environment) settledWithin(timeout time.Duration, sessions, rounds int, but ...string) {
	env.t.Helper()
	env.g.Eventually(func(g Gomega) {
		for i := range sessions {
			if name := sessionName(i); !slices.Contains(but, name) {
				g.Expect(env.laravel.Status(name).Numbers).To(Equal(delivery.Numbers{Epoch: 1, Seq: int64(rounds)}), name)
			}
		}
		p, err := env.queue.Backlog(env.t.Context(), delivery.KindStatus)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(p.Waiting + p.InFlight + p.Unfinished).To(BeZero())
	}, timeout, 20*time.Millisecond).Should(Succeed())
	env.g.Expect(env.laravel.Breaches()).To(BeEmpty())
	for _, session := range env.laravel.NotAccepted() {
		if !slices.Contains(but, session) {
			env.t.Errorf("an update of %s was sent, not accepted, and not sent again", session)
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
		// without is the session whose status Laravel never accepts.
		without string
		stopped batch.StopReason
	}{
		{name: "quick answers", decide: always(laraveltest.Accept())},
		{name: "slow answers", decide: always(laraveltest.AcceptAfter(100 * time.Millisecond))},
		{name: "errors, then success", decide: first(6, laraveltest.Refuse(http.StatusServiceUnavailable, "down")), stopped: batch.LaravelUnavailable},
		{name: "every second request fails", decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.N%2 == 1 {
				return laraveltest.Refuse(http.StatusBadGateway, "bad gateway")
			}
			return laraveltest.Accept()
		}},
		{name: "accepted, and the connection breaks", decide: first(3, laraveltest.AcceptThenDisconnect())},
		{name: "accepted, and no answer in time", timeout: 200 * time.Millisecond, decide: first(3, laraveltest.AcceptThenHang())},
		{name: "Laravel asks for a pause", decide: first(1, later)},
		{name: "Laravel redirects to a login", decide: first(1, redirects), stopped: batch.LaravelMisconfigured},
		{name: "Laravel answers with HTML", decide: first(1, laraveltest.Refuse(http.StatusOK, "<html>login</html>")), stopped: batch.LaravelMisconfigured},
		{name: "Laravel does not know the token", decide: first(1, laraveltest.Refuse(http.StatusUnauthorized, "who?")), stopped: batch.LaravelMisconfigured},
		{name: "Laravel refuses one session", without: sessionName(7), decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.Contains(sessionName(7)) {
				return laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"The session_id is unknown."}`)
			}
			return laraveltest.Accept()
		}},
		{name: "Laravel rejects one session by name", without: sessionName(7), decide: func(r laraveltest.Request) laraveltest.Answer {
			if r.Contains(sessionName(7)) {
				return named
			}
			return laraveltest.Accept()
		}},
		{name: "Laravel accepts ten items at a time", decide: func(r laraveltest.Request) laraveltest.Answer {
			if len(r.Items) > 10 {
				return laraveltest.Refuse(http.StatusRequestEntityTooLarge, "too large")
			}
			return laraveltest.Accept()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			env := newEnvironment(t, addr, row.timeout, row.decide)
			updates := rounds
			if row.without != "" {
				updates = 1 // each of its updates would be a dead letter, and there is room for five
			}
			stop := env.flush(env.queue, batch.FlusherOptions{})
			env.traffic(sessions, updates)
			env.settled(sessions, updates, row.without)
			dead := int64(0)
			if row.without != "" {
				dead = 1
			}
			env.g.Eventually(func() int64 {
				return env.redis.XLen(t.Context(), env.keys.DeadLetters(delivery.KindStatus)).Val()
			}, waitTimeout).Should(Equal(dead), "the same after it was sent again")
			stop()
			if row.stopped != "" {
				env.g.Expect(env.stopped).To(ContainElement(row.stopped))
				env.g.Expect(env.recovered).To(BeNumerically(">", 0))
			} else {
				env.g.Expect(env.stopped).To(BeEmpty())
			}
			env.g.Expect(env.laravel.MaxConcurrent("")).To(BeNumerically("<=", 4))
		})
	}
}

// A thousand updates at once are sent in full batches.
func TestThousandUpdatesAtOnce(t *testing.T) {
	const sessions = 1000
	env := newEnvironment(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptAfter(50 * time.Millisecond) })
	stop := env.flush(env.queue, batch.FlusherOptions{})
	env.traffic(sessions, 1)
	env.settled(sessions, 1)
	stop()
	env.g.Expect(env.laravel.Count()).To(BeNumerically("<=", 22))
}

// A lost wake-up delays delivery by one poll interval at most.
func TestLostWakeUp(t *testing.T) {
	env := newEnvironment(t, shared(t), 0, nil)
	stop := env.flush(noWakeUps{env.queue}, batch.FlusherOptions{})
	env.traffic(60, 3)
	env.settled(60, 3)
	stop()
}

// noWakeUps is a queue whose wake-ups are lost.
type noWakeUps struct{ *batch.Queue }

func (noWakeUps) WakeUps(ctx context.Context) <-chan struct{} {
	wake := make(chan struct{})
	go func() { <-ctx.Done(); close(wake) }()
	return wake
}

// At most half of the requests are for QR codes, even if there are no statuses.
func TestQRCodesUseHalfOfTheRequests(t *testing.T) {
	release := make(chan struct{})
	env := newEnvironment(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptWhen(release) })
	stop := env.flush(env.queue, batch.FlusherOptions{})
	var codes []delivery.Item
	for i := range 500 {
		codes = append(codes, qrItem(sessionName(i), 1))
	}
	env.enqueue(delivery.KindQR, codes...)
	env.g.Eventually(env.laravel.Count, waitTimeout).Should(Equal(2))
	env.traffic(200, 1)
	env.g.Eventually(env.laravel.Count, waitTimeout).Should(Equal(4), "the other half is free for statuses")
	close(release)
	env.settled(200, 1)
	env.g.Eventually(func() int64 { return env.laravel.Code(sessionName(499)).Seq }, waitTimeout).Should(BeEquivalentTo(1))
	stop()
	env.g.Expect(env.laravel.MaxConcurrent(delivery.KindQR)).To(Equal(2))
	env.g.Expect(env.laravel.MaxConcurrent("")).To(BeNumerically("<=", 4))
}

// A leader stops during a request. If the request ends within the grace, the batch is
// finished. Otherwise it is released, and the next leader repeats it with the same id and
// items (the receiver checks this).
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
			env := newEnvironment(t, shared(t), 0, func(r laraveltest.Request) laraveltest.Answer {
				if r.N > 1 {
					return laraveltest.Accept()
				}
				close(arrived)
				return laraveltest.AcceptWhen(release)
			})
			stop := env.flush(env.queue, batch.FlusherOptions{Grace: row.grace})
			env.traffic(20, 1)
			<-arrived
			env.traffic(20, 2) // newer ones wait behind it
			stopping := make(chan struct{})
			go func() { defer close(stopping); stop() }()
			if row.requests == 1 {
				close(release)
			}
			<-stopping
			env.g.Expect(env.laravel.Count()).To(Equal(1))
			p, err := env.queue.Backlog(t.Context(), delivery.KindStatus)
			env.g.Expect(err).NotTo(HaveOccurred())
			env.g.Expect(p.Unfinished).To(Equal(row.requests - 1))

			stop = env.flush(env.queue, batch.FlusherOptions{})
			env.settled(20, 2)
			stop()
			env.g.Expect(env.laravel.Batches()).To(Equal(2))
			env.g.Expect(env.laravel.Count()).To(Equal(row.requests + 1))
		})
	}
}

// Leaders replace each other often, and overlap: nothing is lost or out of order.
func TestManyLeaders(t *testing.T) {
	env := newEnvironment(t, shared(t), 0, func(r laraveltest.Request) laraveltest.Answer {
		return laraveltest.AcceptAfter(time.Duration(r.N%5) * 10 * time.Millisecond)
	})
	traffic := make(chan struct{})
	go func() { defer close(traffic); env.traffic(100, 150) }()
	stop := func() {}
	for more := true; more; {
		next := env.flush(env.queue, batch.FlusherOptions{Grace: time.Millisecond})
		before := env.laravel.Count()
		env.g.Eventually(func() bool {
			select {
			case <-traffic:
				more = false
				return true
			default:
				return env.laravel.Count() > before+2
			}
		}, waitTimeout, 10*time.Millisecond).Should(BeTrue())
		stop()
		stop = next
	}
	env.settled(100, 150)
	stop()
}

// Redis restarts and keeps its data.
func TestRedisRestarts(t *testing.T) {
	server := testenv.RedisServer(t)
	env := newEnvironment(t, server.Addr(), 0, func(laraveltest.Request) laraveltest.Answer { return laraveltest.AcceptAfter(20 * time.Millisecond) })
	stop := env.flush(env.queue, batch.FlusherOptions{})
	traffic := make(chan struct{})
	go func() { defer close(traffic); env.traffic(80, 100) }()
	for range 2 {
		before := env.laravel.Count()
		env.g.Eventually(env.laravel.Count, waitTimeout).Should(BeNumerically(">", before+3))
		server.Restart()
	}
	<-traffic
	env.settled(80, 100)
	stop()
}

// A session's state that Laravel refused is enqueued again when the application accepts
// states again. Otherwise Laravel would keep the old state until the session changes.
func TestRefusedStateIsSentAgain(t *testing.T) {
	// A refused state is sent again after 10 s, 30 s and 90 s. On a loaded machine two of
	// these attempts may pass before the test has read that the first one came.
	const resendTimeout = 3 * time.Minute
	for _, row := range []struct {
		name string
		// sessions is the number of refused sessions; with five or more, most of their items
		// are kept in the queue and do not become dead letters.
		sessions int
		bad      laraveltest.Answer
		stopped  batch.StopReason
		dead     int64
	}{
		{name: "a few are refused", sessions: 3, bad: laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"a bug"}`), dead: 3},
		{name: "everything is refused", sessions: 60, bad: laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"a bug"}`), stopped: batch.LaravelMisconfigured, dead: 19},
		{name: "everything is rejected by name", sessions: 60, bad: laraveltest.AcceptExcept("a bug", sessionNames(60)...), stopped: batch.LaravelMisconfigured},
		{name: "an ingress that expects TLS", sessions: 60, bad: laraveltest.Refuse(http.StatusBadRequest, "<html>The plain HTTP request was sent to HTTPS port"), stopped: batch.LaravelMisconfigured},
		{name: "a deadlock", sessions: 60, bad: laraveltest.Refuse(http.StatusConflict, `{"message":"deadlock"}`)},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var broken atomic.Bool
			env := newEnvironment(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer {
				if broken.Load() {
					return row.bad
				}
				return laraveltest.Accept()
			})
			env.queue = batch.NewQueue(env.redis, env.keys, clock.RealClock{}, batch.Options{})
			stop := env.flush(env.queue, batch.FlusherOptions{})
			env.traffic(row.sessions, 1)
			env.settled(row.sessions, 1)
			broken.Store(true)
			env.traffic(row.sessions, 2) // a second status of each
			dead := func() int64 { return env.redis.XLen(t.Context(), env.keys.DeadLetters(delivery.KindStatus)).Val() }
			env.g.Eventually(dead, waitTimeout).Should(Equal(row.dead))
			env.g.Eventually(func() []batch.StopReason {
				env.mu.Lock()
				defer env.mu.Unlock()
				return slices.Clone(env.stopped)
			}, waitTimeout).Should(ContainElements(reasons(row.stopped)))
			before := env.laravel.Count()
			env.g.Eventually(env.laravel.Count, resendTimeout).Should(BeNumerically(">", before), "it is probed")
			env.g.Eventually(dead, waitTimeout).Should(Equal(row.dead), "the same after they were sent again")
			broken.Store(false)
			env.settledWithin(resendTimeout, row.sessions, 2)
			env.g.Eventually(dead, waitTimeout).Should(BeZero(), "a dead letter is deleted when its item is delivered")
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

// When there is no room for dead letters, delivery stops and reports it, and the other items
// are kept.
func TestNoRoomForDeadLetters(t *testing.T) {
	env := newEnvironment(t, shared(t), 0, func(laraveltest.Request) laraveltest.Answer {
		return laraveltest.Refuse(http.StatusUnprocessableEntity, `{"message":"no"}`)
	})
	stop := env.flush(env.queue, batch.FlusherOptions{})
	env.traffic(8, 1)
	env.g.Eventually(func() []batch.StopReason {
		env.mu.Lock()
		defer env.mu.Unlock()
		return slices.Clone(env.stopped)
	}, waitTimeout).Should(ConsistOf(batch.DeadLettersFull))
	stop()
	dead, err := env.redis.XLen(t.Context(), env.keys.DeadLetters(delivery.KindStatus)).Result()
	env.g.Expect(err).NotTo(HaveOccurred())
	env.g.Expect(dead).To(BeEquivalentTo(5))
	p, err := env.queue.Backlog(t.Context(), delivery.KindStatus)
	env.g.Expect(err).NotTo(HaveOccurred())
	env.g.Expect(p.InFlight+p.Waiting).To(Equal(3), "the others are kept")
}

// Start leaves no goroutine when it returns.
func TestStartLeavesNoGoroutine(t *testing.T) {
	env := newEnvironment(t, shared(t), 0, nil)
	env.traffic(1, 1) // opens the connections
	ignore := goleak.IgnoreCurrent()
	stop := env.flush(env.queue, batch.FlusherOptions{})
	env.settled(1, 1)
	stop()
	env.client.Close()
	env.g.Expect(env.laravel.Close()).To(Succeed())
	goleak.VerifyNone(t, ignore)
}
