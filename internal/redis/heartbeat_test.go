package redis

import (
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

func TestHeartbeat(t *testing.T) {
	g := NewWithT(t)
	server := testenv.RedisServer(t)
	client := goredis.NewClient(&goredis.Options{Addr: server.Addr()})
	t.Cleanup(func() { _ = client.Close() })
	h := NewHeartbeat(client, NewKeys("p:"))
	read := func() (string, map[string]string) {
		run, values, err := h.Read(t.Context())
		g.Expect(err).NotTo(HaveOccurred())
		return run, values
	}

	run, values := read()
	g.Expect(run).NotTo(BeEmpty())
	g.Expect(values).To(BeEmpty())
	for range 11 {
		g.Expect(h.Renew(t.Context(), "a", "one", "")).To(Succeed())
	}
	_, values = read()
	g.Expect(values).To(Equal(map[string]string{"a": "one/11"}))

	var foreign *OtherIncarnationError
	g.Expect(h.Renew(t.Context(), "a", "two", "")).To(MatchError(ContainSubstring("another incarnation")))
	g.Expect(h.Renew(t.Context(), "a", "two", "three")).To(BeAssignableToTypeOf(foreign))
	g.Expect(h.Remove(t.Context(), "a", "two")).To(Succeed())
	_, values = read()
	g.Expect(values).To(HaveKeyWithValue("a", "one/11"), "another incarnation's value is neither renewed nor removed")

	g.Expect(h.Renew(t.Context(), "a", "two", "one")).To(Succeed())
	_, values = read()
	g.Expect(values).To(HaveKeyWithValue("a", "two/1"))
	g.Expect(h.Remove(t.Context(), "a", "two")).To(Succeed())
	_, values = read()
	g.Expect(values).To(BeEmpty())

	server.Restart()
	g.Eventually(func() string {
		again, _, err := h.Read(t.Context())
		if err != nil {
			return run
		}
		return again
	}).ShouldNot(Equal(run), "a restart changes the run id")
}

func TestHeartbeatWithAReplica(t *testing.T) {
	g := NewWithT(t)
	primary, replica := testenv.RedisServer(t), testenv.RedisServer(t)
	client := goredis.NewClient(&goredis.Options{Addr: primary.Addr()})
	second := goredis.NewClient(&goredis.Options{Addr: replica.Addr()})
	t.Cleanup(func() { _, _ = client.Close(), second.Close() })
	g.Expect(second.Do(t.Context(), "REPLICAOF", "127.0.0.1", primary.Port()).Err()).To(Succeed())
	h := NewHeartbeat(client, NewKeys(""))
	g.Eventually(func() (int, error) {
		fields, err := info(t.Context(), client, "replication")
		return replicas(fields), err
	}).WithTimeout(time.Minute).Should(Equal(1))
	g.Eventually(func() error { return h.Renew(t.Context(), "a", "one", "") }).WithTimeout(time.Minute).Should(Succeed())
	g.Expect(second.HGet(t.Context(), "operator:workers", "a").Result()).To(HavePrefix("one/"), "it counts when the replica has it")

	_, _, err := NewHeartbeat(second, NewKeys("")).Read(t.Context())
	g.Expect(err).To(MatchError(ErrNoPrimary), "a replica may hold old heartbeats")
}

func TestAPrimaryWhoseReplicasAreSilent(t *testing.T) {
	tests := []struct {
		name   string
		fields map[string]string
		silent bool
	}{
		{"no replica", map[string]string{"connected_slaves": "0"}, false},
		{"one that answers", map[string]string{"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=1,lag=1"}, false},
		{"one that does not", map[string]string{"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=1,lag=9"}, true},
		{"Redis 8", map[string]string{"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=1,lag=1,io-thread=0"}, false},
		{"Redis 8, one that does not", map[string]string{"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=1,lag=9,io-thread=0"}, true},
		{"Valkey 8", map[string]string{"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=1,lag=0,type=replica"}, false},
		{"one of two answers", map[string]string{"connected_slaves": "2", "slave0": "lag=9", "slave1": "lag=0"}, false},
		{"a server that does not say", map[string]string{"connected_slaves": "1", "slave0": "ip=h"}, false},
		{"no INFO", map[string]string{}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			NewWithT(t).Expect(replicasSilent(tt.fields)).To(Equal(tt.silent))
		})
	}
}

func TestAPrimaryThatLostItsReplicas(t *testing.T) {
	g := NewWithT(t)
	now := time.Now()
	h := &Heartbeat{now: func() time.Time { return now }}
	with, without := map[string]string{"run_id": "a", "connected_slaves": "1"}, map[string]string{"run_id": "a", "connected_slaves": "0"}
	g.Expect(h.replicasLost(without)).To(BeFalse(), "it never had one")
	g.Expect(h.replicasLost(with)).To(BeFalse())
	g.Expect(h.replicasLost(without)).To(BeTrue(), "another one may have taken its place")
	g.Expect(h.replicasLost(map[string]string{"run_id": "b"})).To(BeFalse(), "another server")
	g.Expect(h.replicasLost(with)).To(BeFalse())
	now = now.Add(replicasLostTimeout)
	g.Expect(h.replicasLost(without)).To(BeFalse(), "the replica is gone for good")
}

// TestAFullRedis: a worker renews its heartbeat, and can be restarted, while Redis is full.
func TestAFullRedis(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})
	t.Cleanup(func() { _ = client.Close() })
	keys := NewKeys("")
	g.Expect(ClaimInstallation(ctx, client, keys, "mine")).To(Succeed())
	h := NewHeartbeat(client, keys)
	g.Expect(h.Renew(ctx, "known", "one", "")).To(Succeed())
	var reasons []LossReason
	w := &Watcher{Client: client, Keys: keys, OnDataLoss: func(r LossReason) { reasons = append(reasons, r) }, Log: logr.Discard()}
	w.Observe(ctx)
	g.Expect(client.ConfigSet(ctx, "maxmemory", "1mb").Err()).To(Succeed())
	g.Expect(client.Set(ctx, "k", "v", 0).Err()).To(MatchError(ContainSubstring("OOM")))

	g.Expect(h.Renew(ctx, "known", "one", "")).To(Succeed())
	g.Expect(h.Renew(ctx, "known", "two", "one")).To(Succeed(), "a worker that is started again")
	g.Expect(h.Renew(ctx, "new", "one", "")).To(Succeed(), "a new worker")
	g.Expect(h.Renew(ctx, "new", "two", "")).To(BeAssignableToTypeOf(&OtherIncarnationError{}))
	g.Expect(h.Remove(ctx, "known", "two")).To(Succeed())
	g.Expect(client.HGetAll(ctx, keys.Workers()).Val()).To(Equal(map[string]string{"new": "one/1"}))
	g.Expect(ClaimInstallation(ctx, client, keys, "mine")).To(Succeed())
	g.Expect(ClaimInstallation(ctx, client, keys, "other's")).To(BeAssignableToTypeOf(&OwnedElsewhereError{}))

	g.Expect(client.Del(ctx, keys.Marker()).Err()).To(Succeed())
	w.Observe(ctx)
	w.Observe(ctx)
	g.Expect(reasons).To(Equal([]LossReason{MarkerMissing}), "also where no new marker can be set")
}
