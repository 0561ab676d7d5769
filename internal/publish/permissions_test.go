package publish

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// operations are everything that a role does in Redis, through its own ACL user.
type operations struct {
	*WithT
	ctx    context.Context
	admin  *goredis.Client // damages what the role must repair, by commands that no role uses
	client goredis.UniversalClient
	keys   redis.Keys
}

// shared is what manager and worker both do.
func (o *operations) shared() {
	check, err := redis.Check(o.ctx, o.client)
	o.Expect(err).NotTo(HaveOccurred())
	o.Expect(check.Problems).To(BeEmpty())
	durability := redis.NewDurability(o.client, o.keys, redis.DurabilityAuto)
	level, err := durability.Detect(o.ctx)
	o.Expect(err).NotTo(HaveOccurred())
	o.Expect(level.Replica).To(BeTrue())
	o.Expect(o.client.Ping(o.ctx).Err()).To(Succeed())

	o.Expect(redis.ClaimInstallation(o.ctx, o.client, o.keys, "mine")).To(Succeed())
	o.Expect(redis.CheckInstallation(o.ctx, o.client, o.keys, "mine")).To(Succeed())
	o.Expect(o.admin.Unlink(o.ctx, o.keys.Marker()).Err()).To(Succeed())
	watcher := &redis.Watcher{Client: o.client, Keys: o.keys, Log: logr.Discard(), OnDataLoss: func(redis.LossReason) {}}
	watcher.Observe(o.ctx)
	o.Expect(o.admin.Exists(o.ctx, o.keys.Marker()).Val()).To(BeEquivalentTo(1))

	heartbeat := redis.NewHeartbeat(o.client, o.keys)
	o.Eventually(func() error { return heartbeat.Renew(o.ctx, "w", "one", "") }).WithTimeout(time.Minute).Should(Succeed())
	_, _, err = heartbeat.Read(o.ctx) // a worker does so when it joins
	o.Expect(err).NotTo(HaveOccurred())
	o.Expect(heartbeat.Remove(o.ctx, "w", "one")).To(Succeed())
}

func (o *operations) queue() *batch.Queue {
	return batch.NewQueue(o.client, o.keys, clock.RealClock{}, batch.Options{Durability: redis.NewDurability(o.client, o.keys, redis.DurabilityAuto)})
}

func publication(sessionID string, n int64) session.Publication {
	now := time.Now()
	numbers := delivery.Numbers{Epoch: 100, Seq: n}
	return session.Publication{
		NewStatus: true, Worker: "w",
		Status: delivery.StatusItem{
			SessionID: sessionID, Numbers: numbers, Status: delivery.Pending, Phase: "Pairing", Priority: delivery.High, OccurredAt: delivery.Time{Time: now},
		},
		QR: &delivery.QRItem{
			SessionID: sessionID, Numbers: numbers, QR: "code-" + strconv.FormatInt(n, 10), Attempt: 1,
			GeneratedAt: delivery.Time{Time: now}, ExpiresAt: delivery.Time{Time: now.Add(time.Minute)},
		},
	}
}

// publish is what a worker does for its sessions.
func (o *operations) publish() {
	queue := o.queue()
	publisher := NewPublisher(queue, cache.New(o.client, o.keys, clock.RealClock{}))
	o.Expect(publisher.Publish(o.ctx, publication("a", 1))).To(Succeed())
	o.Expect(publisher.Publish(o.ctx, publication("a", 2))).To(Succeed())
	o.Expect(publisher.Refresh(o.ctx, []session.Publication{publication("a", 2)})).To(Succeed())
	gone := publication("a", 3)
	gone.QR, gone.QRGone = nil, true
	o.Expect(publisher.Publish(o.ctx, gone)).To(Succeed())
	o.Expect(o.admin.ScriptFlush(o.ctx).Err()).To(Succeed())
	o.Expect(publisher.Publish(o.ctx, publication("b", 1))).To(Succeed())

	// Keys that others have damaged: a due time that is gone, records and a key that are
	// not as they must be.
	for _, part := range []string{"urgent", "normal"} {
		o.Expect(o.admin.Unlink(o.ctx, o.keys.Queue(delivery.KindStatus, part)).Err()).To(Succeed())
	}
	for _, part := range []string{"items", "last", "flight"} {
		o.Expect(o.admin.HMSet(o.ctx, o.keys.Queue(delivery.KindStatus, part), "c", "damaged").Err()).To(Succeed())
	}
	flight := publication("b", 1).Status.Numbers.String() + "msg_of-a-batch-that-is-gone"
	o.Expect(o.admin.HMSet(o.ctx, o.keys.Queue(delivery.KindStatus, "flight"), "b", flight).Err()).To(Succeed())
	forget := o.keys.Queue(delivery.KindStatus, "forget")
	o.Expect(o.admin.Unlink(o.ctx, forget).Err()).To(Succeed())
	o.Expect(o.admin.LPush(o.ctx, forget, "x").Err()).To(Succeed())
	again := publication("a", 3)
	again.QR = nil
	o.Expect(publisher.Publish(o.ctx, publication("b", 2))).To(Succeed())
	o.Expect(publisher.Publish(o.ctx, again)).To(Succeed())
	o.Expect(publisher.Publish(o.ctx, publication("c", 1))).To(Succeed())
}

// lead is what only the leading manager does.
func (o *operations) lead() {
	queue := o.queue()
	manager := NewManagerPublisher(queue, cache.New(o.client, o.keys, clock.RealClock{}))
	_, err := manager.Update(o.ctx, publication("a", 9).Status)
	o.Expect(err).NotTo(HaveOccurred())
	for _, id := range []string{"d", "e", "f", "g"} {
		o.Expect(manager.Enqueue(o.ctx, publication(id, 9).Status)).To(Succeed())
	}
	o.Expect(manager.Deleted(o.ctx, publication("d", 10).Status)).To(Succeed())

	waking, stop := context.WithCancel(o.ctx)
	wake := queue.WakeUps(waking)
	n := int64(11)
	o.Eventually(func() <-chan struct{} {
		o.Expect(manager.Enqueue(o.ctx, publication("d", n).Status)).To(Succeed())
		n++
		return wake
	}).WithTimeout(time.Minute).Should(Receive())
	stop()
	o.Eventually(wake).WithTimeout(time.Minute).Should(BeClosed())

	claim := func(limit int) *delivery.Batch {
		b, err := queue.Claim(o.ctx, delivery.KindStatus, limit, time.Minute)
		o.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		o.ExpectWithOffset(1, b).NotTo(BeNil())
		return b
	}
	_, err = queue.Backlog(o.ctx, delivery.KindStatus) // repairs what publish has left
	o.Expect(err).NotTo(HaveOccurred())
	b := claim(2)
	o.Expect(queue.Release(o.ctx, b, time.Time{})).To(Succeed())
	o.Expect(queue.Split(o.ctx, claim(2))).To(Succeed())
	o.Expect(queue.Ack(o.ctx, claim(1))).To(Succeed())
	o.Expect(queue.DeadLetter(o.ctx, claim(1), delivery.Poison, delivery.Answer{StatusCode: 500})).To(Succeed())
	rejected := claim(1)
	o.Expect(queue.Ack(o.ctx, rejected, delivery.Rejection{SessionID: rejected.Items[0].SessionID, Reason: "no"})).To(Succeed())
	var letters []delivery.DeadLetter
	o.Expect(queue.DeadLetters(o.ctx, delivery.KindStatus, func(l delivery.DeadLetter) bool { letters = append(letters, l); return true })).To(Succeed())
	o.Expect(letters).To(HaveLen(2))
	o.Expect(queue.Replay(o.ctx, delivery.KindStatus, letters[0].ID)).To(Equal(delivery.Replayed))
	o.Expect(queue.Drop(o.ctx, delivery.KindStatus, letters[1].ID)).To(Equal(1))
	damaged := claim(1)
	o.Expect(queue.Release(o.ctx, damaged, time.Time{})).To(Succeed())
	o.Expect(o.admin.HMSet(o.ctx, o.keys.Queue(delivery.KindStatus, "content"), damaged.ID, "damaged").Err()).To(Succeed())
	claim(1)

	o.Expect(redis.Adopt(o.ctx, o.client, o.keys, "mine")).To(Succeed())
}

// TestEachRoleMayDoWhatItDoes runs everything that manager and worker do in Redis, each with
// the ACL user that `redis-acl` prints, and holds the list of permissions against what the
// server has executed: nothing is missing, and nothing is superfluous.
func TestEachRoleMayDoWhatItDoes(t *testing.T) {
	primary := testenv.RedisServer(t, "--repl-diskless-sync-delay", "0")
	testenv.RedisServer(t, "--replicaof", "127.0.0.1", strconv.Itoa(primary.Port()))
	admin := goredis.NewClient(&goredis.Options{Addr: primary.Addr()})
	t.Cleanup(func() { _ = admin.Close() })
	NewWithT(t).Eventually(func() (string, error) { return admin.Info(t.Context(), "replication").Result() }).
		WithTimeout(time.Minute).Should(ContainSubstring("state=online"))
	password := filepath.Join(t.TempDir(), "password")
	// The replica has begun to confirm what it gets; until then a write does not count.
	NewWithT(t).Eventually(func() (int64, error) {
		if err := admin.Incr(t.Context(), "n").Err(); err != nil {
			return 0, err
		}
		return admin.Wait(t.Context(), 1, time.Second).Result()
	}).WithTimeout(time.Minute).Should(BeEquivalentTo(1))
	NewWithT(t).Expect(os.WriteFile(password, []byte("secret"), 0o600)).To(Succeed())

	for _, role := range []redis.Role{redis.Worker, redis.Manager} {
		t.Run(string(role), func(t *testing.T) {
			g, ctx := NewWithT(t), t.Context()
			var refused []redis.Refusal
			config := redis.Config{
				Addresses: []string{primary.Addr()}, KeyPrefix: "wa:", Username: string(role), PasswordFile: password,
				OnRefusal: func(r redis.Refusal) { refused = append(refused, r) },
			}
			line := strings.Fields(strings.Replace(redis.ACLUser(role, string(role), config, false), ">PASSWORD", ">secret", 1))
			words := make([]any, len(line))
			for i := range line {
				words[i] = line[i]
			}
			g.Expect(admin.Do(ctx, words...).Err()).To(Succeed())
			client, err := redis.New(config)
			g.Expect(err).NotTo(HaveOccurred())
			t.Cleanup(func() { _ = client.Close() })
			g.Expect(admin.FlushAll(ctx).Err()).To(Succeed())
			g.Expect(admin.ConfigResetStat(ctx).Err()).To(Succeed())

			o := &operations{WithT: g, ctx: ctx, admin: admin, client: client, keys: config.Keys()}
			o.shared()
			o.publish()
			if role == redis.Manager {
				o.lead()
			}
			g.Expect(refused).NotTo(ContainElement(redis.NoPermission))

			statistics, err := admin.Info(ctx, "commandstats").Result()
			g.Expect(err).NotTo(HaveOccurred())
			var executed []string
			for line := range strings.Lines(statistics) {
				name, _, _ := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":")
				executed = append(executed, strings.ToLower(name))
			}
			var permitted []string
			for _, word := range line {
				if name, isCommand := strings.CutPrefix(word, "+"); isCommand {
					permitted = append(permitted, name)
				}
			}
			slices.Sort(permitted)
			for _, name := range permitted {
				g.Expect(executed).To(ContainElement(name), "a permission that nothing needs")
			}
		})
	}
}
