package batch

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// part is the name of a key of the queue.
func (b *environment) part(kind delivery.Kind, name string) string {
	if name == "dead" {
		return b.keys.DeadLetters(kind)
	}
	return b.keys.Queue(kind, name)
}

var (
	hashes   = []string{"items", "flight", "last", "claims", "content"}
	sets     = []string{"urgent", "normal", "forget", "open"}
	allParts = slices.Concat(hashes, sets, []string{"dead", "state"})
)

// damage is a change of the keys by a person, an eviction or another program.
type damage struct {
	name string
	do   func(*damaged)
	// pair: there are many of these, so each is made only at a third of the steps.
	pair bool
}

func damages() []damage {
	var all []damage
	add := func(name string, do func(*damaged)) { all = append(all, damage{name: name, do: do}) }
	remove := func(d *damaged, parts ...string) {
		for _, part := range parts {
			d.done(d.client.Del(d.ctx, d.part(d.kind, part)).Err())
		}
	}
	for i, part := range allParts {
		add(part+" is missing", func(d *damaged) { remove(d, part) })
		for _, other := range allParts[i+1:] {
			all = append(all, damage{part + " and " + other + " are missing", func(d *damaged) { remove(d, part, other) }, true})
		}
		add(part+" has another type", func(d *damaged) {
			remove(d, part)
			if part == "state" {
				d.done(d.client.LPush(d.ctx, d.part(d.kind, part), "x").Err())
				return
			}
			d.done(d.client.Set(d.ctx, d.part(d.kind, part), "x", 0).Err())
		})
	}
	add("everything except last and forget is missing", func(d *damaged) {
		remove(d, "items", "flight", "claims", "content", "urgent", "normal", "open")
	})
	add("everything is missing", func(d *damaged) { remove(d, allParts...) })
	add("state is invalid", func(d *damaged) {
		d.done(d.client.Set(d.ctx, d.part(d.kind, "state"), "x", 0).Err())
	})
	for _, part := range hashes {
		change := func(name string, to func(old string) string) {
			add("a record of "+part+" is "+name, func(d *damaged) {
				for field, old := range d.client.HGetAll(d.ctx, d.part(d.kind, part)).Val() {
					d.done(d.client.HSet(d.ctx, d.part(d.kind, part), field, to(old)).Err())
					return // one is enough
				}
			})
		}
		change("empty", func(string) string { return "" })
		change("invalid", func(string) string { return "hunter2" })
		change("cut off", func(old string) string { return old[:len(old)/2] })
		change("cut off at its end", func(old string) string { return old[:max(0, len(old)-1)] })
		change("longer", func(old string) string { return old + "x" })
		change("full of letters", func(old string) string { return strings.Repeat("x", len(old)) })
		change("not JSON", func(old string) string { return strings.ReplaceAll(old, "}", "{") })
		change("with an impossible epoch", func(old string) string { return strings.ReplaceAll(old, "0000000001800000000", "9999999999999999999") })
		add("a record of "+part+" is missing", func(d *damaged) {
			for field := range d.client.HGetAll(d.ctx, d.part(d.kind, part)).Val() {
				d.done(d.client.HDel(d.ctx, d.part(d.kind, part), field).Err())
				return
			}
		})
		add("a record of "+part+" belongs to no session", func(d *damaged) {
			value := status("stranger", 1, delivery.Normal).Numbers.String()
			d.done(d.client.HSet(d.ctx, d.part(d.kind, part), "stranger", value).Err())
		})
	}
	for _, part := range sets {
		add("a member of "+part+" is missing", func(d *damaged) {
			d.done(d.client.ZPopMin(d.ctx, d.part(d.kind, part)).Err())
		})
		add("a member of "+part+" belongs to no session", func(d *damaged) {
			d.done(d.client.ZAdd(d.ctx, d.part(d.kind, part), goredis.Z{Member: "stranger", Score: 1}).Err())
		})
		add("a member of "+part+" is far in the future", func(d *damaged) {
			for _, member := range d.client.ZRange(d.ctx, d.part(d.kind, part), 0, 0).Val() {
				d.done(d.client.ZAdd(d.ctx, d.part(d.kind, part), goredis.Z{Member: member, Score: 9e12}).Err())
			}
		})
	}
	return all
}

// done fails the test if a damage could not be made. It ignores a key whose type an earlier
// damage has changed.
func (d *damaged) done(err error) {
	if !goredis.HasErrorPrefix(err, "WRONGTYPE") && !errors.Is(err, goredis.Nil) {
		d.g.Expect(err).NotTo(HaveOccurred())
	}
}

// damaged is a queue whose keys are damaged, with a Laravel, and a process that publishes
// again when the marker is missing.
type damaged struct {
	*environment
	kind   delivery.Kind
	seq    int64
	newest map[string]int64
	has    map[string]int64
	held   []*delivery.Batch
}

func newDamaged(b *environment, kind delivery.Kind) *damaged {
	d := &damaged{environment: b, kind: kind, newest: map[string]int64{}, has: map[string]int64{}}
	d.g.Expect(d.client.FlushAll(d.ctx).Err()).To(Succeed())
	d.watched()
	return d
}

// watched does what redis.Watcher does: it restores the marker, and reports whether it was missing.
func (d *damaged) watched() (missing bool) {
	set, err := d.client.SetNX(d.ctx, d.keys.Marker(), "x", 0).Result()
	d.g.Expect(err).NotTo(HaveOccurred())
	return set
}

func (d *damaged) item(session string) delivery.Item {
	item := code(session, d.newest[session], start.Add(24*time.Hour))
	if strings.HasPrefix(session, "u") {
		item.Priority = delivery.High
	}
	return item
}

func (d *damaged) publish(sessions ...string) {
	for _, session := range sessions {
		d.seq++
		d.newest[session] = d.seq
		d.enqueue(d.kind, d.item(session))
	}
}

func (d *damaged) take() {
	if batch := d.claim(d.kind, 3); batch != nil {
		d.held = append(d.held, batch)
	}
}

// next is the batch that was claimed first; nil: there is none.
func (d *damaged) next() *delivery.Batch {
	if len(d.held) == 0 {
		return nil
	}
	batch := d.held[0]
	d.held = d.held[1:]
	return batch
}

func (d *damaged) mayLoseClaim(err error) {
	d.t.Helper()
	if !errors.Is(err, delivery.ErrClaimLost) {
		d.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
	}
}

func (d *damaged) deliver() {
	if batch := d.next(); batch != nil {
		for _, item := range batch.Items {
			d.has[item.SessionID] = max(d.has[item.SessionID], item.Seq-delivery.FirstSeq(3))
		}
		d.mayLoseClaim(d.Ack(d.ctx, batch))
	}
}

func (d *damaged) refuse() {
	if batch := d.next(); batch != nil {
		for _, item := range batch.Items {
			d.has[item.SessionID] = max(d.has[item.SessionID], item.Seq-delivery.FirstSeq(3))
		}
		d.mayLoseClaim(d.Ack(d.ctx, batch, delivery.Rejection{SessionID: batch.Items[0].SessionID, Reason: "no"}))
	}
}

func (d *damaged) release() {
	if batch := d.next(); batch != nil {
		d.mayLoseClaim(d.Release(d.ctx, batch, time.Time{}))
	}
}

func (d *damaged) halve() {
	if batch := d.next(); batch != nil && len(batch.Items) > 1 {
		d.mayLoseClaim(d.Split(d.ctx, batch))
	}
}

// withdraw withdraws the waiting item, as after a code that was used, and publishes a newer one.
func (d *damaged) withdraw(session string) {
	d.mayLoseClaim(d.Withdraw(d.ctx, d.kind, session, d.item(session).Numbers))
	d.publish(session)
}

// settle works until nothing waits: claims end, repairs are made, present states are
// published again when the marker is missing, and Laravel accepts everything.
func (d *damaged) settle() {
	d.t.Helper()
	d.held = nil
	for quiet := 0; quiet < 3; quiet++ {
		d.pass(lease)
		p := d.pending(d.kind)
		if d.watched() {
			quiet = 0
			for _, session := range slices.Sorted(maps.Keys(d.newest)) {
				d.enqueue(d.kind, d.item(session))
			}
		}
		if p.Waiting+p.Unfinished > 0 {
			quiet = 0
		}
		for d.take(); len(d.held) > 0; d.take() {
			d.deliver()
		}
	}
	d.g.ExpectWithOffset(1, d.has).To(Equal(d.newest), "Laravel has the newest state of every session")
	d.g.ExpectWithOffset(1, d.pending(d.kind)).To(Equal(delivery.Backlog{}))
	for _, part := range []string{"items", "urgent", "normal", "flight", "open", "claims", "content"} {
		d.g.ExpectWithOffset(1, d.client.Exists(d.ctx, d.part(d.kind, part)).Val()).To(BeZero(), part+" is not empty")
	}
}

// steps use the queue so that each of its keys is present at some time.
func (d *damaged) steps() []func() {
	return []func(){
		func() { d.pending(d.kind); d.watched() },
		func() { d.publish("a", "u1", "b", "u2", "c", "d") },
		d.take, // u1, u2, a
		func() { d.publish("a", "u1", "c") },
		d.take, // b, c, d
		d.release,
		d.take,
		d.refuse, // b
		d.halve,
		func() { d.withdraw("d"); d.publish("e") },
		d.take,
		d.deliver,
		d.take,
		func() { d.publish("u2", "e"); d.pass(time.Second) },
		d.deliver,
	}
}

// TestDamagedQueue makes every damage before every step: nothing fails, the queue continues
// to work, and Laravel gets the newest state of every session.
func TestDamagedQueue(t *testing.T) {
	for _, server := range []struct {
		name string
		addr func(*testing.T) string
	}{
		{"redis", func(t *testing.T) string { return testenv.Redis(t, "--appendonly", "no") }},
		{"embedded", func(t *testing.T) string { return miniredis.RunT(t).Addr() }},
	} {
		for _, kind := range delivery.StateKinds {
			t.Run(server.name+"/"+string(kind), func(t *testing.T) {
				t.Parallel()
				client := goredis.NewClient(&goredis.Options{Addr: server.addr(t)})
				t.Cleanup(func() { _ = client.Close() })
				for i, harm := range damages() {
					// The rules are the same for both kinds and servers, so a sample is enough for
					// the other kind and for the embedded server.
					if kind != delivery.KindStatus && i%5 > 0 || server.name == "embedded" && i%29 > 0 {
						continue
					}
					t.Run(harm.name, func(t *testing.T) {
						for at := range newDamaged(newEnvironment(t, client, Options{}), kind).steps() {
							if harm.pair && (at+i)%3 > 0 {
								continue
							}
							d := newDamaged(newEnvironment(t, client, Options{}), kind)
							for i, step := range d.steps() {
								if i == at {
									harm.do(d)
								}
								step()
							}
							d.settle()
							d.publish("a", "u1", "new")
							d.settle()
							if t.Failed() {
								t.Fatalf("damaged before step %d", at)
							}
						}
					})
				}
			})
		}
	}
}

// TestRandomDamage is TestDamagedQueue in random order.
func TestRandomDamage(t *testing.T) {
	random := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t, "--appendonly", "no")})
	t.Cleanup(func() { _ = client.Close() })
	all := damages()
	for round := range 300 {
		kind := delivery.StateKinds[random.IntN(2)]
		d := newDamaged(newEnvironment(t, client, Options{}), kind)
		var log []string
		for range 40 {
			session := fmt.Sprintf("%s%d", []string{"u", "n"}[random.IntN(2)], random.IntN(6))
			steps := map[string]func(){
				"publish " + session: func() { d.publish(session) }, "take": d.take, "deliver": d.deliver, "release": d.release,
				"halve": d.halve, "refuse": d.refuse, "time": func() { d.pass(time.Duration(random.IntN(20)) * time.Second) },
				"observe": func() { d.pending(kind) },
			}
			name := slices.Sorted(maps.Keys(steps))[random.IntN(len(steps))]
			step := steps[name]
			if random.IntN(4) == 0 {
				harm := all[random.IntN(len(all))]
				name, step = harm.name, func() { harm.do(d) }
			}
			log = append(log, name)
			step()
		}
		d.settle()
		if t.Failed() {
			t.Fatalf("round %d: %s", round, strings.Join(log, "; "))
		}
	}
}

// TestRepairIsReported: a repair is reported, at most once per interval.
func TestRepairIsReported(t *testing.T) {
	var repairs []Repair
	b := newEnvironment(t, realClient(t), Options{OnRepaired: func(kind delivery.Kind, r Repair) {
		if kind == delivery.KindStatus {
			repairs = append(repairs, r)
		}
	}})
	kind := delivery.KindStatus
	b.enqueue(kind, status("a", 1, delivery.High), status("b", 1, delivery.Normal))
	b.pending(kind)
	b.g.Expect(repairs).To(Equal([]Repair{{}}), "the queue is new")
	b.pending(kind)
	b.g.Expect(repairs).To(HaveLen(1), "an intact queue is not repaired")

	b.g.Expect(b.client.Del(b.ctx, b.part(kind, "urgent")).Err()).To(Succeed())
	b.g.Expect(b.client.HSet(b.ctx, b.part(kind, "items"), "b", "x").Err()).To(Succeed())
	b.g.Expect(b.pending(kind).Waiting).To(Equal(1), "too early for another repair")
	b.pass(repairInterval)
	b.g.Expect(b.client.Set(b.ctx, b.keys.Marker(), "x", 0).Err()).To(Succeed())
	b.g.Expect(b.pending(kind).Waiting).To(Equal(1))
	b.g.Expect(repairs).To(Equal([]Repair{{}, {Discarded: 1, Restored: 1}}))
	b.g.Expect(b.client.Exists(b.ctx, b.keys.Marker()).Val()).To(BeZero(), "everything present is published again")
	b.g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/1"}))
}

// TestLongestHold: the bound is the same in Go and in the scripts.
func TestLongestHold(t *testing.T) {
	b := newEnvironment(t, realClient(t), Options{})
	kind := delivery.KindStatus
	b.enqueue(kind, status("a", 1, delivery.High))
	b.g.Expect(b.Release(b.ctx, b.claim(kind, 1), b.clock.Now().Add(365*24*time.Hour))).To(Succeed())
	b.pending(kind)
	b.g.Expect(b.client.Set(b.ctx, b.keys.Marker(), "x", 0).Err()).To(Succeed())
	b.pass(repairInterval)
	b.g.Expect(b.pending(kind).NextClaimable).To(Equal(start.Add(delivery.MaxHold)))
	b.g.Expect(b.client.Exists(b.ctx, b.keys.Marker()).Val()).To(Equal(int64(1)), "the longest hold is not damage")
	for _, text := range []string{pendingLua, repairLua} {
		b.g.Expect(text).To(ContainSubstring(fmt.Sprint(delivery.MaxHold.Milliseconds())))
	}
	_, err := b.Claim(b.ctx, kind, 1, delivery.MaxHold+1)
	b.g.Expect(err).To(HaveOccurred())
}
