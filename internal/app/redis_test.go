package app

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// redisUser makes the ACL user of a role as `redis-acl` prints it, changes it by rules, and
// returns the flags with which a process uses it.
func (s *environment) redisUser(role redis.Role, rules ...string) []string {
	config := redis.Config{}
	var words []any
	for word := range strings.FieldsSeq(redis.ACLUser(role, string(role), config, false)) {
		words = append(words, strings.Replace(word, ">PASSWORD", ">hunter2", 1))
	}
	for _, rule := range rules {
		words = append(words, rule)
	}
	s.Expect(s.redis.Do(s.t.Context(), words...).Err()).To(Succeed())
	return []string{"--redis-username=" + string(role), "--redis-password-file=" + s.file("redis-"+string(role), "hunter2")}
}

// TestRedisNewerThanResources: Redis and Laravel have a newer state of a session than its
// resource, for example after the restore of a backup. The epoch rises above it,
// and Laravel receives updates of the session again. Each process uses the ACL user of its role.
func TestRedisNewerThanResources(t *testing.T) {
	s := newEnvironment(t, "")
	processes := []*process{
		s.manager(s.redisUser(redis.Manager)...),
		s.worker("worker-1", s.redisUser(redis.Worker)...),
	}
	queue := batch.NewQueue(s.redis, redis.Keys{}, clock.RealClock{}, batch.Options{})
	remember := func(kind delivery.Kind, item delivery.Item, err error) {
		t.Helper()
		s.Expect(err).NotTo(HaveOccurred())
		results, err := queue.Enqueue(t.Context(), kind, item)
		s.Expect(err).NotTo(HaveOccurred())
		s.Expect(results[0].Code).NotTo(Equal(batch.Stale))
	}
	ahead := time.Now().Unix() + 1_000_000
	statusAhead := func(sessionID string) {
		t.Helper()
		item, err := delivery.StatusItem{
			Numbers: delivery.Numbers{Epoch: ahead, Seq: delivery.FirstSeq(7)}, SessionID: sessionID, Status: delivery.Inactive,
			Phase: string(v1alpha1.PhaseSuspended), Reason: "Suspended", Priority: delivery.High, OccurredAt: delivery.Time{Time: time.Now()},
		}.Item()
		remember(delivery.KindStatus, item, err)
		s.Eventually(func() int64 { return s.laravel.Status(sessionID).Epoch }).Should(Equal(ahead))
	}

	t.Run("a session that is connected", func(*testing.T) {
		s.apply("connected")
		s.scan("connected", "+34600111230")
		s.phase("connected", v1alpha1.PhaseConnected)
		s.expectPublished("connected", delivery.Active, v1alpha1.PhaseConnected)
		statusAhead("connected")
		_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop, Device: s.get("connected").Status.JID})
		s.Expect(err).NotTo(HaveOccurred())
		s.Expect(s.expectPublished("connected", delivery.Active, v1alpha1.PhaseConnected).Epoch).To(BeNumerically(">", ahead))
	})
	t.Run("a session that is applied again", func(*testing.T) {
		statusAhead("again")
		s.apply("again")
		s.scan("again", "+34600111231")
		s.Expect(s.expectPublished("again", delivery.Active, v1alpha1.PhaseConnected).Epoch).To(BeNumerically(">", ahead))
	})
	t.Run("the codes alone", func(*testing.T) {
		item, err := delivery.QRItem{
			Numbers: delivery.Numbers{Epoch: ahead, Seq: delivery.FirstSeq(7)}, SessionID: "codes", QR: "old", Attempt: 1,
			GeneratedAt: delivery.Time{Time: time.Now()}, ExpiresAt: delivery.Time{Time: time.Now().Add(time.Minute)},
		}.Item()
		remember(delivery.KindQR, item, err)
		s.Eventually(func() int64 { return s.laravel.Code("codes").Epoch }).Should(Equal(ahead))
		s.apply("codes")
		s.Eventually(func() int64 { return s.laravel.Code("codes").Epoch }).Should(BeNumerically(">", ahead))
		s.Expect(s.laravel.Code("codes").QR).NotTo(Equal("old"))
	})
	for _, p := range processes {
		s.Expect(p.output()).NotTo(ContainSubstring("no permission"))
		s.Expect(p.output()).To(ContainSubstring("Redis is fit"))
	}
}

// TestRedisBecomesUnfit: a permission that is taken away while the program runs is reported
// once, and once when it is back.
func TestRedisBecomesUnfit(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	addr := testenv.Redis(t)
	admin := goredis.NewClient(&goredis.Options{Addr: addr})
	t.Cleanup(func() { _ = admin.Close() })
	clk := testclock.NewFakeClock(time.Now())
	d := &dependencies{
		config: &commonConfig{Redis: redis.Config{Addresses: []string{addr}}, StartTimeout: waitTimeout}, clock: clk, log: logr.Discard(),
	}
	t.Cleanup(func() { _ = d.close() })
	g.Expect(d.openRedis(ctx, redis.Manager)).To(Succeed())
	problems := make(chan error, 10)
	monitor := d.monitors(func() {}, func(problem error) { problems <- problem })[0]
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- monitor.start(ctx) }()
	nextCheck := func() {
		g.Eventually(clk.HasWaiters).Should(BeTrue())
		clk.Step(time.Minute)
	}
	g.Expect(admin.Do(ctx, "ACL", "SETUSER", "default", "-hkeys").Err()).To(Succeed())
	nextCheck()
	g.Eventually(problems).Should(Receive(MatchError(And(ContainSubstring("manager"), ContainSubstring("HKEYS")))))
	nextCheck()
	g.Expect(admin.Do(ctx, "ACL", "SETUSER", "default", "+hkeys").Err()).To(Succeed())
	g.Eventually(func() chan error { nextCheck(); return problems }).Should(Receive(BeNil()))
	stop()
	g.Eventually(ended).Should(Receive(BeNil()))
	g.Expect(problems).To(BeEmpty(), "each change is reported once")
}
