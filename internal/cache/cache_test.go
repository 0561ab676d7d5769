package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

type fixture struct {
	t      *testing.T
	g      *WithT
	client goredis.UniversalClient
	clock  *testclock.FakePassiveClock
	*Cache
}

// onEach runs a test on a real Redis, on one that is a cluster, and on the embedded one.
func onEach(t *testing.T, f func(*fixture)) {
	t.Helper()
	run := func(t *testing.T, client goredis.UniversalClient) {
		t.Cleanup(func() { _ = client.Close() })
		clk := testclock.NewFakePassiveClock(start)
		f(&fixture{t: t, g: NewWithT(t), client: client, clock: clk, Cache: New(client, redis.NewKeys("p:"), clk)})
	}
	t.Run("redis", func(t *testing.T) { run(t, goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})) })
	t.Run("cluster", func(t *testing.T) {
		g := NewWithT(t)
		addr := testenv.Redis(t, "--cluster-enabled", "yes")
		node := goredis.NewClient(&goredis.Options{Addr: addr})
		defer func() { _ = node.Close() }()
		g.Expect(node.ClusterAddSlotsRange(t.Context(), 0, 16383).Err()).To(Succeed())
		g.Eventually(func() (string, error) { return node.ClusterInfo(t.Context()).Result() }).
			WithTimeout(time.Minute).Should(ContainSubstring("cluster_state:ok"))
		run(t, goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: []string{addr}}))
	})
	t.Run("embedded", func(t *testing.T) {
		run(t, goredis.NewClient(&goredis.Options{Addr: miniredis.RunT(t).Addr()}))
	})
}

// SetStatus writes a session's status for delivery.CacheTTL.
func (c *Cache) SetStatus(ctx context.Context, status delivery.StatusItem) (WriteResult, error) {
	w, err := c.status(status)
	if err != nil {
		return Stale, err
	}
	return c.write(ctx, w)
}

// SetConnection writes which worker holds a session's connection, for delivery.CacheTTL.
func (c *Cache) SetConnection(ctx context.Context, connection Connection) (WriteResult, error) {
	w, err := c.connection(connection)
	if err != nil {
		return Stale, err
	}
	return c.write(ctx, w)
}

// QR reads a session's code; nil: there is none to scan.
func (c *Cache) QR(ctx context.Context, sessionID string) (*delivery.QRItem, error) {
	return read[delivery.QRItem](ctx, c.client, c.keys.QR(sessionID))
}

// Status reads a session's status; nil: none was published in the last two minutes.
func (c *Cache) Status(ctx context.Context, sessionID string) (*delivery.StatusItem, error) {
	return read[delivery.StatusItem](ctx, c.client, c.keys.Status(sessionID))
}

// Connection reads which worker holds a session's connection; nil: none was published in
// the last two minutes.
func (c *Cache) Connection(ctx context.Context, sessionID string) (*Connection, error) {
	return read[Connection](ctx, c.client, c.keys.Connection(sessionID))
}

func read[T any](ctx context.Context, client goredis.UniversalClient, key string) (*T, error) {
	text, err := client.Get(ctx, key).Bytes()
	if errors.Is(err, goredis.Nil) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the session cache: %w", err)
	}
	value := new(T)
	if err := json.Unmarshal(text, value); err != nil {
		// Its text may be a QR code: it is not repeated.
		return nil, errors.New("reading the session cache: the value is no JSON object as described")
	}
	return value, nil
}

func at(epoch, seq int64) delivery.Numbers { return delivery.Numbers{Epoch: epoch, Seq: seq} }

func qr(session, code string, n delivery.Numbers) delivery.QRItem {
	return delivery.QRItem{Numbers: n, SessionID: session, QR: code, Attempt: 1,
		GeneratedAt: delivery.Time{Time: start}, ExpiresAt: delivery.Time{Time: start.Add(time.Minute)}}
}

func status(session, phase string, n delivery.Numbers) delivery.StatusItem {
	return delivery.StatusItem{Numbers: n, SessionID: session, Status: delivery.Active, Phase: phase, OccurredAt: delivery.Time{Time: start}}
}

// big numbers are neighbours that a float64 cannot distinguish.
const big = int64(1)<<62 + 1

func TestCache(t *testing.T) {
	onEach(t, func(b *fixture) {
		for name, f := range map[string]func(*fixture){"qr": qrRules, "status": statusRules, "delete": deleteRules, "refresh": refreshRules, "races": races} {
			b.t.Run(name, func(t *testing.T) {
				c := *b
				c.t, c.g = t, NewWithT(t)
				f(&c)
			})
		}
	})
}

func qrRules(b *fixture) {
	g, ctx := b.g, b.t.Context()
	set := func(q delivery.QRItem) bool {
		b.t.Helper()
		isNew, err := b.SetQR(ctx, q)
		g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		return isNew
	}
	const s = "qr-1"
	const text = `2@a"b\c<d>,é,==`
	g.Expect(b.QR(ctx, s)).To(BeNil())
	g.Expect(set(qr(s, text, at(9, big)))).To(BeTrue())
	g.Expect(set(qr(s, text, at(9, big)))).To(BeTrue(), "a repetition whose first answer was lost")
	g.Expect(set(qr(s, text, at(9, big+1)))).To(BeFalse(), "the same code again")
	g.Expect(set(qr(s, "older", at(9, big-1)))).To(BeFalse())
	g.Expect(set(qr(s, "older epoch", at(8, big+5)))).To(BeFalse())
	got, err := b.QR(ctx, s)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(*got).To(Equal(qr(s, text, at(9, big))))
	g.Expect(set(qr(s, text[:5], at(9, big+1)))).To(BeTrue(), "a part of the code is another one")
	g.Expect(set(qr(s, "c", at(10, 0)))).To(BeTrue(), "9 < 10, though \"9\" > \"10\"")
	ttl := b.client.PTTL(ctx, "p:session:qr-1:qr").Val()
	g.Expect(ttl).To(And(BeNumerically("<=", time.Minute), BeNumerically(">", 0)))
	g.Expect(b.client.Get(ctx, "p:session:qr-1:qr").Val()).To(Equal(
		`{"epoch":10,"seq":0,"session_id":"qr-1","qr":"c","attempt":1,"generated_at":"2026-03-01T12:00:00.000Z","expires_at":"2026-03-01T12:01:00.000Z"}`))

	g.Expect(b.ClearQR(ctx, s, at(9, big))).To(Succeed())
	g.Expect(b.QR(ctx, s)).NotTo(BeNil(), "an older clearing does not remove a newer code")
	g.Expect(b.ClearQR(ctx, s, at(10, 0))).To(Succeed())
	g.Expect(b.ClearQR(ctx, s, at(10, 0))).To(Succeed())
	g.Expect(b.QR(ctx, s)).To(BeNil())
	g.Expect(set(qr(s, "late", at(9, big+1)))).To(BeFalse(), "a clearing is not undone by an older code")
	g.Expect(set(qr(s, "c", at(10, 0)))).To(BeFalse())
	g.Expect(set(qr(s, "d", at(10, 1)))).To(BeTrue())

	expired := qr("qr-2", "x", at(1, 1))
	expired.ExpiresAt = delivery.Time{Time: start}
	g.Expect(set(expired)).To(BeFalse(), "what has expired is not written")
	g.Expect(b.QR(ctx, "qr-2")).To(BeNil())
	_, err = b.SetQR(ctx, qr("qr-2", "x", at(-1, 0)))
	g.Expect(err).To(HaveOccurred())

	// What others have put there is no obstacle, and its text in no error.
	g.Expect(b.client.Set(ctx, "p:session:qr-3:qr", "hunter2", 0).Err()).To(Succeed())
	_, err = b.QR(ctx, "qr-3")
	g.Expect(err).To(MatchError(Not(ContainSubstring("hunter2"))))
	g.Expect(set(qr("qr-3", "x", at(0, 0)))).To(BeTrue())
}

func statusRules(b *fixture) {
	g, ctx := b.g, b.t.Context()
	const s = "status-1"
	g.Expect(b.SetStatus(ctx, status(s, "Connecting", at(1, big)))).To(Equal(Written))
	g.Expect(b.SetStatus(ctx, status(s, "Pairing", at(1, big-1)))).To(Equal(Stale))
	g.Expect(b.SetStatus(ctx, status(s, "Connected", at(1, big+1)))).To(Equal(Written))
	got, err := b.Status(ctx, s)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(*got).To(Equal(status(s, "Connected", at(1, big+1))))
	g.Expect(b.client.Get(ctx, "p:session:status-1:status").Val()).To(HavePrefix(
		`{"epoch":1,"seq":4611686018427387906,"session_id":"status-1","status":"active","phase":"Connected"`))
	g.Expect(b.client.PTTL(ctx, "p:session:status-1:status").Val()).To(And(BeNumerically("<=", delivery.CacheTTL), BeNumerically(">", delivery.CacheTTL-time.Minute)))

	c := Connection{Numbers: at(1, 2), SessionID: s, Connected: true, Worker: "w-1", Since: delivery.Time{Time: start}}
	g.Expect(b.SetConnection(ctx, c)).To(Equal(Written), "each kind has its own numbers")
	read, err := b.Connection(ctx, s)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(*read).To(Equal(c))
	c.Numbers = at(1, 1)
	g.Expect(b.SetConnection(ctx, c)).To(Equal(Stale))
}

func deleteRules(b *fixture) {
	g, ctx := b.g, b.t.Context()
	const s = "deleted-1"
	g.Expect(b.SetStatus(ctx, status(s, "Connected", at(5, 1)))).To(Equal(Written))
	_, err := b.SetQR(ctx, qr(s, "x", at(7, 0)))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(b.Delete(ctx, s, at(6, 0))).To(Succeed())
	g.Expect(b.Status(ctx, s)).To(BeNil())
	g.Expect(b.QR(ctx, s)).NotTo(BeNil(), "it is newer than the deletion")
	g.Expect(b.SetStatus(ctx, status(s, "Connected", at(5, 9)))).To(Equal(Stale), "an older write does not undo it")
	g.Expect(b.SetStatus(ctx, status(s, "Connected", at(6, 0)))).To(Equal(Stale))
	g.Expect(b.RefreshAll(ctx, []Entry{{Status: new(status(s, "Connected", at(5, 9)))}})).To(Succeed())
	g.Expect(b.Status(ctx, s)).To(BeNil())
	g.Expect(b.SetStatus(ctx, status(s, "Pairing", at(8, 0)))).To(Equal(Written), "applied again")
	g.Expect(b.client.PTTL(ctx, "p:gone:{p:session:deleted-1:status}").Val()).To(BeNumerically(">", 0), "it does not stay for ever")
}

func refreshRules(b *fixture) {
	g, ctx := b.g, b.t.Context()
	var entries []Entry
	for i := range 700 {
		id := fmt.Sprintf("refresh-%d", i)
		entries = append(entries, Entry{
			Status:     new(status(id, "Connected", at(1, 1))),
			Connection: &Connection{Numbers: at(1, 1), SessionID: id, Connected: true},
			QR:         new(qr(id, "code", at(1, 1))),
		})
	}
	g.Expect(b.RefreshAll(ctx, entries)).To(Succeed())
	g.Expect(b.Status(ctx, "refresh-699")).NotTo(BeNil(), "a value that Redis has lost is there again")
	g.Expect(b.SetStatus(ctx, status("refresh-1", "Newer", at(1, 2)))).To(Equal(Written))
	g.Expect(b.client.PExpire(ctx, "p:session:refresh-2:status", time.Second).Err()).To(Succeed())
	g.Expect(b.client.ScriptFlush(ctx).Err()).To(Succeed())
	b.clock.SetTime(start.Add(2 * time.Minute)) // the codes have expired
	defer b.clock.SetTime(start)
	g.Expect(b.RefreshAll(ctx, entries)).To(Succeed())
	got, err := b.Status(ctx, "refresh-1")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(got.Phase).To(Equal("Newer"), "what is newer stays")
	g.Expect(b.client.PTTL(ctx, "p:session:refresh-2:status").Val()).To(BeNumerically(">", time.Second))
	g.Expect(b.RefreshAll(ctx, nil)).To(Succeed())
	bad := Entry{Status: new(status("refresh-3", "x", at(-1, 0)))}
	g.Expect(b.RefreshAll(ctx, []Entry{bad})).NotTo(Succeed())
}

// races: writers of different age at once; the newest wins on every key.
func races(b *fixture) {
	g, ctx := b.g, b.t.Context()
	const s, writers, rounds = "race-1", 4, 100
	var work sync.WaitGroup
	seed := testenv.Seed(b.t)
	for i := range uint64(writers) {
		work.Go(func() {
			order := rand.New(rand.NewPCG(seed, i)).Perm(rounds)
			for _, n := range order {
				if _, err := b.SetStatus(ctx, status(s, "x", at(3, big+int64(n)))); err != nil {
					b.t.Error(err)
				}
			}
		})
	}
	work.Wait()
	got, err := b.Status(ctx, s)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(got.Seq).To(Equal(big + rounds - 1))
}

func TestUnreachable(t *testing.T) {
	g := NewWithT(t)
	client := goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1", MaxRetries: -1, DialerRetries: 1})
	t.Cleanup(func() { _ = client.Close() })
	c := New(client, redis.Keys{}, testclock.NewFakePassiveClock(start))
	ctx := t.Context()
	_, err := c.SetQR(ctx, qr("s", "secret-code", at(1, 1)))
	g.Expect(err).To(MatchError(Not(ContainSubstring("secret-code"))))
	_, err = c.SetStatus(ctx, status("s", "x", at(1, 1)))
	g.Expect(err).To(HaveOccurred())
	_, err = c.QR(ctx, "s")
	g.Expect(err).To(HaveOccurred())
	g.Expect(c.Delete(ctx, "s", at(1, 1))).NotTo(Succeed())
	g.Expect(c.RefreshAll(ctx, []Entry{{Status: new(status("s", "x", at(1, 1)))}})).NotTo(Succeed())
}

// TestValuesBeginWithTheNumbers holds the values to what the script reads.
func TestValuesBeginWithTheNumbers(t *testing.T) {
	for _, value := range []any{delivery.QRItem{Numbers: at(1, 2)}, delivery.StatusItem{Numbers: at(1, 2)}, Connection{Numbers: at(1, 2)}} {
		text, err := json.Marshal(value)
		if err != nil || !strings.HasPrefix(string(text), `{"epoch":1,"seq":2,`) {
			t.Errorf("%T is written as %s, %v", value, text, err)
		}
	}
}

// TestFullRedis: what frees memory runs when there is none; what takes it is refused.
func TestFullRedis(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})
	t.Cleanup(func() { _ = client.Close() })
	c := New(client, redis.NewKeys(""), testclock.NewFakePassiveClock(start))
	_, err := c.SetQR(ctx, qr("s", "code", at(1, 1)))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(c.SetStatus(ctx, status("s", "Pairing", at(1, 1)))).To(Equal(Written))
	g.Expect(client.ScriptFlush(ctx).Err()).To(Succeed())
	g.Expect(client.ConfigSet(ctx, "maxmemory", "1mb").Err()).To(Succeed())

	_, err = c.SetStatus(ctx, status("s", "Connected", at(1, 2)))
	g.Expect(err).To(MatchError(ContainSubstring("OOM")))
	g.Expect(c.ClearQR(ctx, "s", at(1, 2))).To(Succeed())
	g.Expect(c.QR(ctx, "s")).To(BeNil())
	g.Expect(c.Delete(ctx, "s", at(1, 3))).To(Succeed())
	g.Expect(c.Status(ctx, "s")).To(BeNil())
}

// TestTwoRefreshesMayFail: no key expires, at no moment, when the third refresh takes as
// long as it may.
func TestTwoRefreshesMayFail(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	server := miniredis.RunT(t)
	client := goredis.NewClient(&goredis.Options{Addr: server.Addr()})
	t.Cleanup(func() { _ = client.Close() })
	c := New(client, redis.NewKeys(""), testclock.NewFakePassiveClock(start))
	s := status("s", "Connected", at(1, 1))
	entries := []Entry{{Status: &s, Connection: &Connection{SessionID: "s", Numbers: at(1, 1)}}}
	var now time.Duration
	pass := func(until time.Duration) {
		for ; now < until; now += time.Second {
			server.FastForward(time.Second)
			g.Expect(c.Status(ctx, "s")).NotTo(BeNil(), "after %s", now)
			g.Expect(c.Connection(ctx, "s")).NotTo(BeNil(), "after %s", now)
		}
	}
	g.Expect(c.RefreshAll(ctx, entries)).To(Succeed())
	for refresh := range 10 {
		begins := time.Duration(refresh+1) * delivery.CacheRefreshInterval
		pass(begins)
		if refresh%3 < 2 {
			server.SetError("LOADING")
			g.Expect(c.RefreshAll(ctx, entries)).NotTo(Succeed())
			server.SetError("")
			continue
		}
		pass(begins + delivery.CacheRefreshTimeout) // it ends at the last moment
		g.Expect(c.RefreshAll(ctx, entries)).To(Succeed())
	}
	g.Expect(delivery.CacheRefreshTimeout).To(BeNumerically("<", delivery.CacheRefreshInterval))
}
