package batch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const lease = 30 * time.Second

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// environment is a queue with a clock that the test moves.
type environment struct {
	t      *testing.T
	g      *WithT
	ctx    context.Context
	client goredis.UniversalClient
	clock  *testclock.FakePassiveClock
	*Queue
	expired atomic.Int64
}

func newEnvironment(t *testing.T, client goredis.UniversalClient, opts Options) *environment {
	b := &environment{t: t, g: NewWithT(t), ctx: t.Context(), client: client, clock: testclock.NewFakePassiveClock(start)}
	opts.Now = b.clock.Now
	opts.OnExpired = func(_ delivery.Kind, n int) { b.expired.Add(int64(n)) }
	b.Queue = NewQueue(client, redis.NewKeys("test:"), b.clock, opts)
	return b
}

var scenarios = []struct {
	name string
	opts Options
	run  func(*environment)
}{
	{"status queue", Options{}, statusQueue},
	{"repeated batch", Options{}, repeatedBatch},
	{"lost answer of a claim", Options{}, lostAnswerOfAClaim},
	{"QR queue", Options{}, qrQueue},
	{"QR batch without its expired codes", Options{}, qrBatchWithoutExpiredCodes},
	{"many expired codes", Options{}, manyExpiredCodes},
	{"withdraw", Options{}, withdraw},
	{"codes that replace invalid ones", Options{}, codesThatReplaceInvalidOnes},
	{"dead letters", Options{DeadLetters: 2}, deadLetters},
	{"replay", Options{}, replay},
	{"old records of deliveries are deleted", Options{NumbersTTL: time.Hour}, oldRecordsAreDeleted},
	{"update", Options{}, update},
	{"wake ups", Options{}, wakeUps},
	{"due rule", Options{}, dueRule},
}

// TestQueue runs every scenario on a real Redis, on a Redis Cluster, and on the embedded
// Redis.
func TestQueue(t *testing.T) {
	for _, server := range []struct {
		name    string
		connect func(*testing.T) func() goredis.UniversalClient
	}{
		{"redis", func(t *testing.T) func() goredis.UniversalClient {
			addr := testenv.Redis(t)
			return func() goredis.UniversalClient { return goredis.NewClient(&goredis.Options{Addr: addr}) }
		}},
		{"cluster", func(t *testing.T) func() goredis.UniversalClient {
			addr := clusterOfOne(t)
			return func() goredis.UniversalClient {
				return goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: []string{addr}})
			}
		}},
		{"embedded", func(t *testing.T) func() goredis.UniversalClient {
			addr := miniredis.RunT(t).Addr()
			return func() goredis.UniversalClient { return goredis.NewClient(&goredis.Options{Addr: addr}) }
		}},
	} {
		t.Run(server.name, func(t *testing.T) {
			connect := server.connect(t)
			for _, scenario := range scenarios {
				t.Run(scenario.name, func(t *testing.T) {
					client := connect()
					t.Cleanup(func() { _ = client.Close() })
					b := newEnvironment(t, client, scenario.opts)
					b.g.Expect(client.FlushAll(b.ctx).Err()).To(Succeed())
					scenario.run(b)
				})
			}
		})
	}
}

func realClient(t *testing.T) goredis.UniversalClient {
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// clusterOfOne is a cluster of one node: like a larger one it refuses scripts whose keys are
// not in one slot.
func clusterOfOne(t *testing.T) string {
	g := NewWithT(t)
	addr := testenv.Redis(t, "--cluster-enabled", "yes")
	node := goredis.NewClient(&goredis.Options{Addr: addr})
	defer func() { _ = node.Close() }()
	g.Expect(node.ClusterAddSlotsRange(t.Context(), 0, 16383).Err()).To(Succeed())
	g.Eventually(func() (string, error) { return node.ClusterInfo(t.Context()).Result() }).
		WithTimeout(time.Minute).Should(ContainSubstring("cluster_state:ok"))
	return addr
}

func (b *environment) pass(d time.Duration) { b.clock.SetTime(b.clock.Now().Add(d)) }

func (b *environment) enqueue(kind delivery.Kind, items ...delivery.Item) []EnqueueCode {
	b.t.Helper()
	results, err := b.Enqueue(b.ctx, kind, items...)
	b.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
	return codesOf(results)
}

func codesOf(results []EnqueueResult) []EnqueueCode {
	var codes []EnqueueCode
	for _, result := range results {
		codes = append(codes, result.Code)
	}
	return codes
}

func (b *environment) claim(kind delivery.Kind, limit int) *delivery.Batch {
	b.t.Helper()
	batch, err := b.Claim(b.ctx, kind, limit, lease)
	b.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
	return batch
}

func (b *environment) pending(kind delivery.Kind) delivery.Backlog {
	b.t.Helper()
	p, err := b.Backlog(b.ctx, kind)
	b.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
	return p
}

func status(session string, seq int64, priority delivery.Priority) delivery.Item {
	n := delivery.Numbers{Epoch: 1_800_000_000, Seq: delivery.FirstSeq(3) + seq}
	payload, err := json.Marshal(map[string]any{"session_id": session, "n": seq})
	if err != nil {
		panic(err)
	}
	return delivery.Item{SessionID: session, Numbers: n, Priority: priority, Payload: payload}
}

func code(session string, seq int64, expires time.Time) delivery.Item {
	item := status(session, seq, delivery.Normal)
	item.ExpiresAt = expires
	return item
}

// seqs lists the items of a batch as "session/n".
func seqs(b *delivery.Batch) []string {
	if b == nil {
		return nil
	}
	names := make([]string, 0, len(b.Items))
	for _, item := range b.Items {
		names = append(names, fmt.Sprintf("%s/%d", item.SessionID, item.Seq-delivery.FirstSeq(3)))
	}
	return names
}

func statusQueue(b *environment) {
	g, kind := b.g, delivery.KindStatus

	g.Expect(b.pending(kind)).To(Equal(delivery.Backlog{}))
	g.Expect(b.claim(kind, 50)).To(BeNil())

	// The newest item of a session is kept, and the time at which the first became due.
	g.Expect(b.enqueue(kind, status("a", 1, delivery.Normal), status("b", 1, delivery.High))).To(Equal([]EnqueueCode{Queued, Queued}))
	b.pass(time.Second)
	g.Expect(b.enqueue(kind,
		status("a", 3, delivery.High), status("a", 2, delivery.High), // late
		status("b", 2, delivery.Normal), status("b", 2, delivery.Normal), // repeated
		status("c", 1, delivery.Normal),
	)).To(Equal([]EnqueueCode{Replaced, Stale, Replaced, Queued, Queued}))
	results, err := b.Enqueue(b.ctx, kind, status("a", 2, delivery.High))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(results).To(Equal([]EnqueueResult{{Code: Stale, Newest: status("a", 3, "").Numbers}}), "the waiting item is newer")
	p := b.pending(kind)
	g.Expect(p).To(Equal(delivery.Backlog{
		Urgent: 2, Normal: 1, Waiting: 3, // an item that replaces an urgent one is urgent
		UrgentSince: start, NormalSince: start.Add(time.Second),
	}))
	g.Expect(p.Due()).To(Equal(3))
	g.Expect(p.Since()).To(Equal(start))

	// A claim takes the urgent items first, and stores exactly the items that it took.
	first := b.claim(kind, 2)
	g.Expect(seqs(first)).To(Equal([]string{"a/3", "b/2"}))
	g.Expect(first.Deadline).To(Equal(b.clock.Now().Add(lease)))
	g.Expect(first.Attempt).To(Equal(1))
	g.Expect(first.Items[0]).To(Equal(delivery.Item{
		SessionID: "a", Numbers: status("a", 3, "").Numbers, Priority: delivery.High, Payload: status("a", 3, "").Payload,
	}))
	second := b.claim(kind, 50)
	g.Expect(seqs(second)).To(Equal([]string{"c/1"}))
	g.Expect(second.ID).NotTo(Equal(first.ID))
	g.Expect(b.claim(kind, 50)).To(BeNil())

	// A newer item waits until the item in flight is finished.
	g.Expect(b.enqueue(kind, status("a", 4, delivery.Normal))).To(Equal([]EnqueueCode{Queued}))
	g.Expect(b.enqueue(kind, status("a", 5, delivery.Normal))).To(Equal([]EnqueueCode{Replaced}))
	g.Expect(b.claim(kind, 50)).To(BeNil())
	g.Expect(b.pending(kind)).To(Equal(delivery.Backlog{InFlight: 3, Unfinished: 2, NextClaimable: start.Add(time.Second + lease)}))
	g.Expect(b.Ack(b.ctx, first)).To(Succeed())
	g.Expect(b.Ack(b.ctx, first)).To(Succeed(), "the answer was lost and the acknowledgement repeated")
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/5"}))

	// An item that is not newer than the last delivered one is refused.
	g.Expect(b.enqueue(kind, status("b", 2, delivery.High), status("b", 1, delivery.High))).To(Equal([]EnqueueCode{Repeated, Stale}))
	newEpoch := status("b", 0, delivery.Normal)
	newEpoch.Numbers = delivery.Numbers{Epoch: 1_800_000_001}
	g.Expect(b.enqueue(kind, newEpoch)).To(Equal([]EnqueueCode{Queued}))
}

func repeatedBatch(b *environment) {
	g, kind := b.g, delivery.KindStatus
	b.enqueue(kind, status("a", 1, delivery.Normal), status("b", 1, delivery.Normal))
	lost := b.claim(kind, 50)
	b.enqueue(kind, status("a", 2, delivery.Normal), status("c", 1, delivery.High))
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"c/1"}))

	// Its claim ends without an answer: the next leader repeats exactly the same batch.
	b.pass(lease - time.Millisecond)
	g.Expect(b.claim(kind, 0)).To(BeNil())
	b.pass(time.Millisecond)
	g.Expect(b.pending(kind).Claimable).To(Equal(2))
	again := b.claim(kind, 50)
	g.Expect(again.ID).To(Equal(lost.ID))
	g.Expect(again.Items).To(Equal(lost.Items))
	g.Expect(again.Attempt).To(Equal(2))

	// The first leader continues too late: its calls have no effect.
	g.Expect(b.Ack(b.ctx, lost)).To(MatchError(delivery.ErrClaimLost))
	g.Expect(b.Release(b.ctx, lost, time.Time{})).To(MatchError(delivery.ErrClaimLost))
	g.Expect(b.Split(b.ctx, lost)).To(MatchError(delivery.ErrClaimLost))
	g.Expect(b.pending(kind).InFlight).To(Equal(3))

	// After a release it can be claimed again at the given time.
	g.Expect(b.Release(b.ctx, again, b.clock.Now().Add(5*time.Second))).To(Succeed())
	g.Expect(seqs(b.claim(kind, 0))).To(Equal([]string{"c/1"}), "the other batch, whose claim has ended")
	g.Expect(b.claim(kind, 0)).To(BeNil())
	b.pass(5 * time.Second)
	third := b.claim(kind, 0)
	g.Expect(third.ID).To(Equal(lost.ID))
	g.Expect(third.Items).To(Equal(lost.Items))
	g.Expect(third.Attempt).To(Equal(3))

	// After a split the halves have new ids and the same order, and each can be finished.
	g.Expect(b.Split(b.ctx, third)).To(Succeed())
	one, two := b.claim(kind, 0), b.claim(kind, 0)
	g.Expect(seqs(one)).To(Equal([]string{"a/1"}))
	g.Expect(seqs(two)).To(Equal([]string{"b/1"}))
	g.Expect([]string{one.ID, two.ID}).NotTo(ContainElement(lost.ID))
	g.Expect(one.ID < two.ID).To(BeTrue())
	g.Expect(b.Split(b.ctx, one)).To(Succeed(), "one item gets a new id")
	renewed := b.claim(kind, 0)
	g.Expect(seqs(renewed)).To(Equal(seqs(one)))
	g.Expect(renewed.ID).NotTo(Equal(one.ID))
	one = renewed
	g.Expect(b.Ack(b.ctx, one)).To(Succeed())
	g.Expect(b.Ack(b.ctx, two)).To(Succeed())
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/2"}))
}

func lostAnswerOfAClaim(b *environment) {
	g, kind := b.g, delivery.KindStatus
	lossy := &lossy{}
	b.client.AddHook(lossy)
	b.enqueue(kind, status("a", 1, delivery.Normal), status("b", 1, delivery.Normal))
	lossy.lose.Store(true)
	_, err := b.Claim(b.ctx, kind, 1, lease)
	g.Expect(err).To(HaveOccurred())
	lossy.lose.Store(false)
	g.Expect(seqs(b.claim(kind, 1))).To(Equal([]string{"a/1"}), "the batch of the lost answer")
	g.Expect(seqs(b.claim(kind, 1))).To(Equal([]string{"b/1"}))
	g.Expect(b.claim(kind, 1)).To(BeNil())
}

// lossy loses answers: the command is executed, but the caller gets an error.
type lossy struct{ lose atomic.Bool }

var errLost = errors.New("connection reset by peer")

func (l *lossy) DialHook(next goredis.DialHook) goredis.DialHook { return next }

func (l *lossy) ProcessHook(next goredis.ProcessHook) goredis.ProcessHook {
	return func(ctx context.Context, cmd goredis.Cmder) error {
		if err := next(ctx, cmd); err != nil || !l.lose.Load() {
			return err
		}
		cmd.SetErr(errLost)
		return errLost
	}
}

func (l *lossy) ProcessPipelineHook(next goredis.ProcessPipelineHook) goredis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []goredis.Cmder) error {
		if err := next(ctx, cmds); err != nil || !l.lose.Load() {
			return err
		}
		return errLost
	}
}

func qrQueue(b *environment) {
	g, kind := b.g, delivery.KindQR
	at := start.Add

	// The first code is due at once. The next is due 30 s after Laravel has accepted the
	// first, because that is still valid; a code in between replaces the waiting one.
	b.enqueue(kind, code("a", 1, at(60*time.Second)))
	g.Expect(b.Ack(b.ctx, b.claim(kind, 50))).To(Succeed())
	b.pass(20 * time.Second)
	g.Expect(b.enqueue(kind, code("a", 2, at(70*time.Second)))).To(Equal([]EnqueueCode{Queued}))
	g.Expect(b.enqueue(kind, code("a", 3, at(75*time.Second)))).To(Equal([]EnqueueCode{Replaced}))
	g.Expect(b.claim(kind, 50)).To(BeNil())
	g.Expect(b.pending(kind)).To(Equal(delivery.Backlog{NextDue: at(30 * time.Second), Waiting: 1}))
	b.pass(10 * time.Second)
	third := b.claim(kind, 50)
	g.Expect(seqs(third)).To(Equal([]string{"a/3"}))
	g.Expect(third.Items[0].ExpiresAt).To(Equal(at(75 * time.Second)))

	// The due time of a code that arrives while another is in flight counts from the acknowledgement.
	b.enqueue(kind, code("a", 4, at(90*time.Second)))
	b.pass(time.Second)
	g.Expect(b.Ack(b.ctx, third)).To(Succeed())
	g.Expect(b.pending(kind).NextDue).To(Equal(at(61 * time.Second)))

	// A code that replaces an expired one is sent with the next batch.
	b.pass(30 * time.Second)
	g.Expect(b.Ack(b.ctx, b.claim(kind, 50))).To(Succeed()) // a/4, valid until 90 s
	b.pass(20 * time.Second)
	b.enqueue(kind, code("a", 5, at(120*time.Second)))
	g.Expect(b.pending(kind).NextDue).To(Equal(at(90*time.Second)), "not 91 s: the code that Laravel has expires before")
	b.pass(15 * time.Second)
	g.Expect(b.claim(kind, 50)).NotTo(BeNil())

	// An item that replaces a code which is useless now does not wait, nor does its
	// successor.
	b.enqueue(kind, code("u", 1, at(300*time.Second)))
	b.pass(0)
	g.Expect(b.Ack(b.ctx, b.claim(kind, 50))).To(Succeed())
	urgent := code("u", 2, at(300*time.Second))
	urgent.Priority = delivery.High
	b.enqueue(kind, urgent, code("u", 3, at(300*time.Second)))
	inFlight := b.claim(kind, 50)
	g.Expect(seqs(inFlight)).To(Equal([]string{"u/3"}))
	urgent = code("u", 4, at(300*time.Second))
	urgent.Priority = delivery.High
	b.enqueue(kind, urgent) // while the one before is in flight
	g.Expect(b.Ack(b.ctx, inFlight)).To(Succeed())
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"u/4"}))

	// An expired code is not sent.
	b.enqueue(kind, code("b", 1, at(97*time.Second)), code("c", 1, at(200*time.Second)))
	b.pass(time.Second)
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"c/1"}))
	g.Expect(b.expired.Load()).To(Equal(int64(1)))
	g.Expect(b.pending(kind).Waiting).To(BeZero())
}

func qrBatchWithoutExpiredCodes(b *environment) {
	g, kind := b.g, delivery.KindQR
	b.enqueue(kind, code("a", 1, start.Add(20*time.Second)), code("b", 1, start.Add(60*time.Second)), code("c", 1, start.Add(20*time.Second)))
	first := b.claim(kind, 50)
	g.Expect(first.Items).To(HaveLen(3))
	b.enqueue(kind, code("a", 2, start.Add(60*time.Second)))
	g.Expect(b.Release(b.ctx, first, time.Time{})).To(Succeed())
	again := b.claim(kind, 50)
	g.Expect(again.ID).To(Equal(first.ID), "nothing has expired: the repetition is the same batch")
	g.Expect(b.Release(b.ctx, again, time.Time{})).To(Succeed())

	b.pass(25 * time.Second)
	cut := b.claim(kind, 50)
	g.Expect(seqs(cut)).To(Equal([]string{"b/1"}))
	g.Expect(cut.ID).NotTo(Equal(first.ID))
	g.Expect(cut.Attempt).To(Equal(1))
	g.Expect(b.expired.Load()).To(Equal(int64(2)))
	g.Expect(b.Ack(b.ctx, again)).To(Succeed(), "it is not stored any more: this has no effect")
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/2"}), "the code that waited behind the expired one")

	// A batch whose items have all expired is discarded.
	g.Expect(b.Release(b.ctx, cut, time.Time{})).To(Succeed())
	b.pass(40 * time.Second)
	g.Expect(b.claim(kind, 50)).To(BeNil())
	g.Expect(b.pending(kind)).To(Equal(delivery.Backlog{}))
}

func manyExpiredCodes(b *environment) {
	var items []delivery.Item
	for i := range 1200 {
		items = append(items, code(fmt.Sprintf("s%04d", i), 1, start.Add(time.Second)))
	}
	items = append(items, code("z", 1, start.Add(time.Hour)))
	b.g.Expect(b.enqueue(delivery.KindQR, items...)).To(HaveLen(1201))
	b.pass(2 * time.Second)
	b.g.Expect(seqs(b.claim(delivery.KindQR, 50))).To(Equal([]string{"z/1"}))
	b.g.Expect(b.expired.Load()).To(Equal(int64(1200)))
}

func withdraw(b *environment) {
	g, kind := b.g, delivery.KindQR
	valid := start.Add(time.Hour)
	b.enqueue(kind, code("a", 2, valid), code("b", 5, valid), code("c", 1, valid))
	g.Expect(b.Withdraw(b.ctx, kind, "a", code("a", 3, valid).Numbers)).To(Succeed())
	g.Expect(b.Withdraw(b.ctx, kind, "b", code("b", 4, valid).Numbers)).To(Succeed())
	g.Expect(b.enqueue(kind, code("a", 3, valid))).To(Equal([]EnqueueCode{Repeated}))
	claimed := b.claim(kind, 50)
	g.Expect(seqs(claimed)).To(Equal([]string{"b/5", "c/1"}))
	g.Expect(b.Withdraw(b.ctx, kind, "c", code("c", 7, valid).Numbers)).To(Succeed(), "in flight")
	g.Expect(b.Ack(b.ctx, claimed)).To(Succeed())
	g.Expect(b.enqueue(kind, code("c", 7, valid), code("c", 8, valid))).To(Equal([]EnqueueCode{Repeated, Queued}))
	g.Expect(b.pending(kind).NextDue).To(Equal(start.Add(DefaultQRInterval)), "Laravel has the code that was in flight")
}

// A code that replaces one which WhatsApp accepts no more does not wait.
func codesThatReplaceInvalidOnes(b *environment) {
	g, kind, valid := b.g, delivery.KindQR, start.Add(time.Hour)
	urgent := func(item delivery.Item) delivery.Item {
		item.Priority = delivery.High
		return item
	}
	b.enqueue(kind, code("a", 1, valid))
	g.Expect(b.Ack(b.ctx, b.claim(kind, 50))).To(Succeed())
	b.enqueue(kind, code("a", 2, valid))
	g.Expect(b.claim(kind, 50)).To(BeNil(), "Laravel has a valid code")
	b.enqueue(kind, urgent(code("a", 3, valid)))
	claimed := b.claim(kind, 50)
	g.Expect(seqs(claimed)).To(Equal([]string{"a/3"}))
	b.enqueue(kind, urgent(code("a", 4, valid)))
	g.Expect(b.Ack(b.ctx, claimed)).To(Succeed())
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/4"}), "it came while the other was in flight")
}

func update(b *environment) {
	g, kind := b.g, delivery.KindStatus
	update := func(why string, want EnqueueCode, item delivery.Item) {
		b.t.Helper()
		results, err := b.Update(b.ctx, kind, item)
		g.ExpectWithOffset(1, err).NotTo(HaveOccurred(), why)
		g.ExpectWithOffset(1, codesOf(results)).To(Equal([]EnqueueCode{want}), why)
	}
	update("nothing is known", Unknown, status("a", 1, delivery.Normal))
	g.Expect(b.claim(kind, 50)).To(BeNil())
	b.enqueue(kind, status("a", 2, delivery.Normal))
	update("an older item", Stale, status("a", 1, delivery.Normal))
	update("the waiting item", Queued, status("a", 2, delivery.Normal))
	update("a newer item", Replaced, status("a", 3, delivery.Normal))
	update("another session", Unknown, status("b", 9, delivery.Normal))

	inFlight := b.claim(kind, 50)
	g.Expect(seqs(inFlight)).To(Equal([]string{"a/3"}))
	update("older than the item in flight", Stale, status("a", 2, delivery.Normal))
	g.Expect(b.Ack(b.ctx, inFlight)).To(Succeed())
	update("older than the delivered item", Stale, status("a", 2, delivery.Normal))
	results, err := b.Enqueue(b.ctx, kind, status("a", 2, delivery.Normal))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(results).To(Equal([]EnqueueResult{{Code: Stale, Newest: status("a", 3, "").Numbers}}), "the writer learns the newest numbers")
	update("the delivered item", Repeated, status("a", 3, delivery.Normal))
	update("newer than the delivered item", Queued, status("a", 4, delivery.Normal))
	update("the delivered item, which is now older", Stale, status("a", 3, delivery.Normal))

	g.Expect(b.client.FlushAll(b.ctx).Err()).To(Succeed())
	update("Redis was emptied", Unknown, status("a", 5, delivery.Normal))
	g.Expect(b.Update(b.ctx, kind)).To(BeEmpty())
	g.Expect(b.enqueue(kind, status("a", 5, delivery.Normal))).To(Equal([]EnqueueCode{Queued}))
}

func deadLetters(b *environment) {
	g, kind := b.g, delivery.KindStatus
	b.enqueue(kind, status("a", 1, delivery.Normal), status("b", 1, delivery.Normal), status("c", 1, delivery.Normal))
	batch := b.claim(kind, 50)
	b.enqueue(kind, status("b", 2, delivery.Normal))
	g.Expect(b.Ack(b.ctx, batch, delivery.Rejection{SessionID: "b", Reason: "unknown \xff session"},
		delivery.Rejection{SessionID: "stranger", Reason: "not in the batch"})).To(Succeed())
	dead, err := b.client.XRange(b.ctx, "test:batch:{queue}:dead:status", "-", "+").Result()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(dead).To(HaveLen(1))
	g.Expect(dead[0].Values).To(Equal(map[string]any{
		"session_id": "b", "epoch": "1800000000", "seq": "12884901889", "batch_id": batch.ID,
		"reason": "Rejected", "answer": "unknown  session", "payload": `{"n":1,"session_id":"b"}`,
		"numbers": "00000000018000000000000000012884901889", "class": "n", "expires": "0000000000000",
	}))
	g.Expect(b.enqueue(kind, status("b", 1, delivery.Normal))).To(Equal([]EnqueueCode{Stale}), "a dead letter is not enqueued again")
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"b/2"}), "a newer item may be accepted")

	// A single bad item.
	b.enqueue(kind, status("d", 1, delivery.Normal))
	single := b.claim(kind, 50)
	g.Expect(b.DeadLetter(b.ctx, single, delivery.RefusedAlone, delivery.Answer{StatusCode: 422, Detail: "bad"})).To(Succeed())
	dead, err = b.client.XRange(b.ctx, "test:batch:{queue}:dead:status", "-", "+").Result()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(dead[1].Values).To(HaveKeyWithValue("answer", "422 bad"))

	// There is no room: nothing is dropped.
	b.enqueue(kind, status("e", 1, delivery.Normal))
	full := b.claim(kind, 50)
	g.Expect(b.DeadLetter(b.ctx, full, delivery.RefusedAlone, delivery.Answer{Detail: "bad"})).To(MatchError(delivery.ErrDeadLettersFull))
	g.Expect(b.Release(b.ctx, full, time.Time{})).To(Succeed(), "the claim is still held")
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"e/1"}))

	b.enqueue(kind, status("f", 1, delivery.Normal), status("g", 1, delivery.Normal))
	two := b.claim(kind, 50)
	g.Expect(b.Ack(b.ctx, two, delivery.Rejection{SessionID: "g"})).To(MatchError(delivery.ErrDeadLettersFull))
	g.Expect(b.enqueue(kind, status("f", 1, delivery.Normal))).To(Equal([]EnqueueCode{Repeated}), "the others are delivered")
	g.Expect(b.Ack(b.ctx, two)).To(Succeed(), "not stored any more")
	b.pass(lease)
	var rest []string
	for batch := b.claim(kind, 0); batch != nil; batch = b.claim(kind, 0) {
		g.Expect(batch.ID).NotTo(Equal(two.ID))
		rest = append(rest, seqs(batch)...)
	}
	g.Expect(rest).To(ConsistOf("b/2", "e/1", "g/1"))
	g.Expect(b.DeadLetter(b.ctx, two, delivery.RefusedAlone, delivery.Answer{})).NotTo(Succeed(), "more than one item")
}

func replay(b *environment) {
	g, kind := b.g, delivery.KindStatus
	deadLetters := func(kind delivery.Kind) map[string]delivery.DeadLetter {
		found := map[string]delivery.DeadLetter{}
		g.Expect(b.DeadLetters(b.ctx, kind, func(l delivery.DeadLetter) bool { found[l.SessionID] = l; return true })).To(Succeed())
		return found
	}
	expectReplay := func(l delivery.DeadLetter, want delivery.ReplayResult) {
		b.t.Helper()
		g.Expect(b.Replay(b.ctx, l.Kind, l.ID)).To(Equal(want))
	}
	b.enqueue(kind, status("a", 1, delivery.High), status("b", 1, delivery.Normal))
	batch := b.claim(kind, 50)
	g.Expect(b.Ack(b.ctx, batch, delivery.Rejection{SessionID: "a", Reason: "no"}, delivery.Rejection{SessionID: "b"})).To(Succeed())
	a := deadLetters(kind)["a"]
	g.Expect(a.Reason).To(Equal(delivery.RejectedByName))
	g.Expect(a.Answer).To(Equal("no"))
	g.Expect(a.BatchID).To(Equal(batch.ID))
	g.Expect(a.Numbers).To(Equal(status("a", 1, delivery.High).Numbers))
	g.Expect(a.Payload).To(MatchJSON(status("a", 1, delivery.High).Payload))
	g.Expect(a.At).NotTo(BeZero())

	expectReplay(a, delivery.Replayed)
	expectReplay(a, delivery.NotFound)
	g.Expect(b.pending(kind).Urgent).To(Equal(1), "it keeps its priority")
	g.Expect(deadLetters(kind)).To(HaveLen(1))
	repeated := b.claim(kind, 50)
	g.Expect(seqs(repeated)).To(Equal([]string{"a/1"}))
	g.Expect(repeated.Items[0].Payload).To(MatchJSON(a.Payload))
	g.Expect(b.Ack(b.ctx, repeated)).To(Succeed())
	g.Expect(b.enqueue(kind, status("a", 1, delivery.High))).To(Equal([]EnqueueCode{Repeated}), "it is delivered")

	// A newer item waits, is in flight, was delivered: Laravel would ignore the dead letter.
	old := deadLetters(kind)["b"]
	b.enqueue(kind, status("b", 2, delivery.Normal))
	expectReplay(old, delivery.Superseded)
	newer := b.claim(kind, 50)
	expectReplay(old, delivery.Superseded)
	g.Expect(b.Ack(b.ctx, newer)).To(Succeed())
	expectReplay(old, delivery.Superseded)
	g.Expect(b.Drop(b.ctx, kind, old.ID, a.ID)).To(Equal(1))
	g.Expect(b.CountDeadLetters(b.ctx, kind)).To(BeZero())

	// The newer item was refused too: only the newest dead letter is replayed.
	b.enqueue(kind, status("c", 1, delivery.Normal))
	g.Expect(b.DeadLetter(b.ctx, b.claim(kind, 1), delivery.RefusedAlone, delivery.Answer{StatusCode: 422})).To(Succeed())
	first := deadLetters(kind)["c"]
	b.enqueue(kind, status("c", 2, delivery.Normal))
	g.Expect(b.DeadLetter(b.ctx, b.claim(kind, 1), delivery.RefusedAlone, delivery.Answer{StatusCode: 422})).To(Succeed())
	expectReplay(first, delivery.Superseded)
	expectReplay(deadLetters(kind)["c"], delivery.Replayed)
	expectReplay(first, delivery.Superseded)

	// An expired QR code is not replayed.
	b.enqueue(delivery.KindQR, code("q", 1, b.clock.Now().Add(time.Minute)))
	g.Expect(b.DeadLetter(b.ctx, b.claim(delivery.KindQR, 1), delivery.RefusedAlone, delivery.Answer{StatusCode: 422})).To(Succeed())
	b.pass(2 * time.Minute)
	expectReplay(deadLetters(delivery.KindQR)["q"], delivery.Expired)

	for _, id := range []string{"", "-", "+", "1", "1-2-3", "a-1"} {
		_, err := b.Replay(b.ctx, kind, id)
		g.Expect(err).To(MatchError(ErrInvalidDeadLetterID), id)
		_, err = b.Drop(b.ctx, kind, id)
		g.Expect(err).To(MatchError(ErrInvalidDeadLetterID), id)
	}
	expectReplay(delivery.DeadLetter{Kind: kind, ID: "1-2"}, delivery.NotFound)
}

func TestDeadLettersAge(t *testing.T) {
	server := miniredis.RunT(t)
	client := goredis.NewClient(&goredis.Options{Addr: server.Addr()})
	t.Cleanup(func() { _ = client.Close() })
	b := newEnvironment(t, client, Options{DeadLetters: 1})
	kind := delivery.KindStatus
	server.SetTime(start)
	for i, session := range []string{"a", "b"} {
		b.enqueue(kind, status(session, 1, delivery.Normal))
		b.g.Expect(b.DeadLetter(b.ctx, b.claim(kind, 1), delivery.RefusedAlone, delivery.Answer{})).To(Succeed(), "%d", i)
		server.SetTime(start.Add(8 * 24 * time.Hour))
	}
	b.g.Expect(client.XLen(b.ctx, "test:batch:{queue}:dead:status").Val()).To(Equal(int64(1)))
}

func oldRecordsAreDeleted(b *environment) {
	g, kind := b.g, delivery.KindStatus
	records := func() int64 { return b.client.HLen(b.ctx, "test:batch:{queue}:status:last").Val() }
	b.enqueue(kind, status("deleted", 1, delivery.Normal))
	g.Expect(b.Ack(b.ctx, b.claim(kind, 1))).To(Succeed())
	b.pass(30 * time.Minute)
	b.enqueue(kind, status("alive", 1, delivery.Normal))
	g.Expect(b.Ack(b.ctx, b.claim(kind, 1))).To(Succeed())
	g.Expect(records()).To(Equal(int64(2)))
	b.pass(40 * time.Minute)
	b.enqueue(kind, status("alive", 2, delivery.Normal))
	g.Expect(b.Ack(b.ctx, b.claim(kind, 1))).To(Succeed())
	g.Expect(records()).To(Equal(int64(1)))
	keys := b.client.Keys(b.ctx, "*").Val()
	g.Expect(keys).To(ConsistOf("test:batch:{queue}:status:last", "test:batch:{queue}:status:forget", "test:batch:{queue}:status:state"), "a finished queue leaves nothing else")
}

func TestInvalidItems(t *testing.T) {
	b := newEnvironment(t, realClient(t), Options{})
	good := status("a", 1, delivery.Normal)
	for name, change := range map[string]func(*delivery.Item){
		"no session id":        func(i *delivery.Item) { i.SessionID = "" },
		"a long session id":    func(i *delivery.Item) { i.SessionID = string(make([]byte, 256)) },
		"negative numbers":     func(i *delivery.Item) { i.Seq = -1 },
		"an epoch too high":    func(i *delivery.Item) { i.Epoch = 1 << 53 },
		"no JSON":              func(i *delivery.Item) { i.Payload = json.RawMessage("{") },
		"a large payload":      func(i *delivery.Item) { i.Payload = json.RawMessage(`"` + string(make([]byte, 70<<10)) + `"`) },
		"expired before 1970":  func(i *delivery.Item) { i.ExpiresAt = time.Unix(-5, 0) },
		"expires in year 9999": func(i *delivery.Item) { i.ExpiresAt = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		bad := good
		change(&bad)
		_, err := b.Enqueue(b.ctx, delivery.KindStatus, good, bad)
		b.g.Expect(err).To(MatchError(ErrInvalidItem), name)
	}
	_, err := b.Enqueue(b.ctx, delivery.KindQR, good)
	b.g.Expect(err).To(MatchError(ErrInvalidItem), "a QR code that never expires")
	b.g.Expect(b.pending(delivery.KindStatus).Waiting).To(BeZero())
	b.g.Expect(b.enqueue(delivery.KindStatus)).To(BeEmpty())
	_, err = b.Claim(b.ctx, delivery.KindStatus, 50, time.Second)
	b.g.Expect(err).To(HaveOccurred(), "a lease that leaves no time for a request")
}

func TestClockOfRedis(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	client := realClient(t)
	// The caller's clock is a year behind; this must not matter.
	clk := testclock.NewFakePassiveClock(time.Now().Add(-365 * 24 * time.Hour))
	q := NewQueue(client, redis.Keys{}, clk, Options{})
	_, err := q.Enqueue(ctx, delivery.KindStatus, status("a", 1, delivery.High))
	g.Expect(err).NotTo(HaveOccurred())
	p, err := q.Backlog(ctx, delivery.KindStatus)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(p.Urgent).To(Equal(1))
	g.Expect(p.UrgentSince).To(And(BeTemporally("<=", clk.Now()), BeTemporally(">", clk.Now().Add(-time.Minute))))
	batch, err := q.Claim(ctx, delivery.KindStatus, 1, lease)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(batch.Deadline).To(Equal(clk.Now().Add(lease)))
	g.Expect(q.Ack(ctx, batch)).To(Succeed())
}

func TestWakeUpsEnd(t *testing.T) {
	client := realClient(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	wakeUps(newEnvironment(t, client, Options{}))
}

func wakeUps(b *environment) {
	ctx, cancel := context.WithCancel(b.ctx)
	wake := b.WakeUps(ctx)
	n := int64(0)
	b.g.Eventually(func() bool {
		n++
		b.enqueue(delivery.KindStatus, status("a", n, delivery.Normal))
		select {
		case <-wake:
			return true
		default:
			return false
		}
	}).Should(BeTrue())
	cancel()
	b.g.Eventually(wake).Should(BeClosed())
}

func TestRedisRestarts(t *testing.T) {
	g := NewWithT(t)
	server := testenv.RedisServer(t)
	client := goredis.NewClient(&goredis.Options{Addr: server.Addr(), DialerRetries: 1})
	t.Cleanup(func() { _ = client.Close() })
	b := newEnvironment(t, client, Options{Durability: redis.NewDurability(client, redis.NewKeys("test:"), redis.DurabilityAuto)})
	kind := delivery.KindStatus
	present := []delivery.Item{status("a", 1, delivery.Normal), status("b", 1, delivery.Normal)}
	b.enqueue(kind, present...)
	batch := b.claim(kind, 1)

	server.Restart()
	g.Expect(b.enqueue(kind, present...)).To(Equal([]EnqueueCode{Queued, Queued}), "the scripts were lost with the old process, the items were not")
	g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"b/1"}))
	g.Expect(b.Ack(b.ctx, batch)).To(Succeed())
	g.Expect(b.enqueue(kind, present[0])).To(Equal([]EnqueueCode{Repeated}))

	server.RestartEmpty()
	g.Expect(b.Ack(b.ctx, batch)).To(Succeed(), "the batch is not stored any more")
	g.Expect(b.claim(kind, 50)).To(BeNil())
	g.Expect(b.enqueue(kind, present...)).To(Equal([]EnqueueCode{Queued, Queued}), "the present states are enqueued again")
	again := b.claim(kind, 50)
	g.Expect(seqs(again)).To(Equal([]string{"a/1", "b/1"}))
	g.Expect(again.ID).NotTo(Equal(batch.ID))

	server.Stop()
	_, err := b.Enqueue(b.ctx, kind, status("a", 2, delivery.Normal))
	g.Expect(err).To(HaveOccurred())
	_, err = b.Backlog(b.ctx, kind)
	g.Expect(err).To(HaveOccurred())
}

// lastDelivered is the newest item that Laravel has; the zero value: it has none.
type lastDelivered struct{ At, ExpiresAt time.Time }

type dueRow struct {
	name string
	kind delivery.Kind
	last lastDelivered
	want time.Time
}

func dueRows() []dueRow {
	now := start
	s := func(n int) time.Time { return now.Add(time.Duration(n) * time.Second) }
	return []dueRow{
		{"a status is due at once", delivery.KindStatus, lastDelivered{At: s(-1)}, now},
		{"the first code is due at once", delivery.KindQR, lastDelivered{}, now},
		{"the code that Laravel has is expired", delivery.KindQR, lastDelivered{At: s(-10), ExpiresAt: s(-1)}, now},
		{"the code that Laravel has expires now", delivery.KindQR, lastDelivered{At: s(-10), ExpiresAt: now}, now},
		{"the interval counts from the delivery", delivery.KindQR, lastDelivered{At: s(-10), ExpiresAt: s(50)}, s(20)},
		{"Laravel's code expires before the interval ends", delivery.KindQR, lastDelivered{At: s(-10), ExpiresAt: s(10)}, s(10)},
		{"the interval is over and Laravel's code is still valid", delivery.KindQR, lastDelivered{At: s(-40), ExpiresAt: s(20)}, now},
		{"delivered before the clock was set back", delivery.KindQR, lastDelivered{At: s(100), ExpiresAt: s(160)}, s(30)},
		{"delivered now", delivery.KindQR, lastDelivered{At: now, ExpiresAt: s(60)}, s(30)},
	}
}

func dueRule(b *environment) {
	script := goredis.NewScript(libLua + "return due_at(ARGV[5] ~= '' and ARGV[5])")
	for _, row := range dueRows() {
		last := ""
		if row.last != (lastDelivered{}) {
			last = delivery.Numbers{}.String() + millis(row.last.At) + millis(row.last.ExpiresAt)
		}
		got, err := script.Run(b.ctx, b.client, b.kindKeys(row.kind), b.args(row.kind, last)...).Int64()
		b.g.Expect(err).NotTo(HaveOccurred())
		b.g.Expect(time.UnixMilli(got).UTC()).To(Equal(row.want), row.name)
	}
}

// clockOf is a clock whose time a function returns.
type clockOf func() time.Time

func (c clockOf) Now() time.Time                  { return c() }
func (c clockOf) Since(t time.Time) time.Duration { return c().Sub(t) }
