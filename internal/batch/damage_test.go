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

// part is a key of the queue.
func (b *bench) part(kind delivery.Kind, name string) string {
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

// damage is something that a person, an eviction or another program does to the keys.
type damage struct {
	name string
	do   func(*damaged)
	// pair: of so many, each is done at a third of the steps.
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
		add(part+" is gone", func(d *damaged) { remove(d, part) })
		for _, other := range allParts[i+1:] {
			all = append(all, damage{part + " and " + other + " are gone", func(d *damaged) { remove(d, part, other) }, true})
		}
		add(part+" is of another type", func(d *damaged) {
			remove(d, part)
			if part == "state" {
				d.done(d.client.LPush(d.ctx, d.part(d.kind, part), "x").Err())
				return
			}
			d.done(d.client.Set(d.ctx, d.part(d.kind, part), "x", 0).Err())
		})
	}
	add("all but what was delivered is gone", func(d *damaged) {
		remove(d, "items", "flight", "claims", "content", "urgent", "normal", "open")
	})
	add("everything is gone", func(d *damaged) { remove(d, allParts...) })
	add("state is nonsense", func(d *damaged) {
		d.done(d.client.Set(d.ctx, d.part(d.kind, "state"), "x", 0).Err())
	})
	for _, part := range hashes {
		change := func(name string, to func(old string) string) {
			add("a record of "+part+" is "+name, func(d *damaged) {
				for field, old := range d.client.HGetAll(d.ctx, d.part(d.kind, part)).Val() {
					d.done(d.client.HSet(d.ctx, d.part(d.kind, part), field, to(old)).Err())
					return // the first that comes
				}
			})
		}
		change("empty", func(string) string { return "" })
		change("nonsense", func(string) string { return "hunter2" })
		change("cut off", func(old string) string { return old[:len(old)/2] })
		change("cut off at its end", func(old string) string { return old[:max(0, len(old)-1)] })
		change("longer", func(old string) string { return old + "x" })
		change("full of letters", func(old string) string { return strings.Repeat("x", len(old)) })
		change("no JSON", func(old string) string { return strings.ReplaceAll(old, "}", "{") })
		change("beyond all numbers", func(old string) string { return strings.ReplaceAll(old, "0000000001800000000", "9999999999999999999") })
		add("a record of "+part+" is gone", func(d *damaged) {
			for field := range d.client.HGetAll(d.ctx, d.part(d.kind, part)).Val() {
				d.done(d.client.HDel(d.ctx, d.part(d.kind, part), field).Err())
				return
			}
		})
		add("a record of "+part+" belongs to nobody", func(d *damaged) {
			value := status("stranger", 1, delivery.Normal).Numbers.String()
			d.done(d.client.HSet(d.ctx, d.part(d.kind, part), "stranger", value).Err())
		})
	}
	for _, part := range sets {
		add("a member of "+part+" is gone", func(d *damaged) {
			d.done(d.client.ZPopMin(d.ctx, d.part(d.kind, part)).Err())
		})
		add("a member of "+part+" belongs to nobody", func(d *damaged) {
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

// done fails the test if a damage could not be done; a key that another damage has left
// of another type is damaged enough.
func (d *damaged) done(err error) {
	if !goredis.HasErrorPrefix(err, "WRONGTYPE") && !errors.Is(err, goredis.Nil) {
		d.g.Expect(err).NotTo(HaveOccurred())
	}
}

// damaged is a queue whose keys are damaged, a Laravel, and who publishes again when
// the marker is gone.
type damaged struct {
	*bench
	kind   delivery.Kind
	seq    int64
	newest map[string]int64
	has    map[string]int64
	held   []*delivery.Batch
}

func newDamaged(b *bench, kind delivery.Kind) *damaged {
	d := &damaged{bench: b, kind: kind, newest: map[string]int64{}, has: map[string]int64{}}
	d.g.Expect(d.client.FlushAll(d.ctx).Err()).To(Succeed())
	d.watched()
	return d
}

// watched is what the watchers of all processes do with the marker.
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

// next is the batch that has been held longest; nil: none is.
func (d *damaged) next() *delivery.Batch {
	if len(d.held) == 0 {
		return nil
	}
	batch := d.held[0]
	d.held = d.held[1:]
	return batch
}

func (d *damaged) tolerate(err error) {
	d.t.Helper()
	if !errors.Is(err, ErrClaimLost) {
		d.g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
	}
}

func (d *damaged) deliver() {
	if batch := d.next(); batch != nil {
		for _, item := range batch.Items {
			d.has[item.SessionID] = max(d.has[item.SessionID], item.Seq-delivery.FirstSeq(3))
		}
		d.tolerate(d.Ack(d.ctx, batch))
	}
}

func (d *damaged) refuse() {
	if batch := d.next(); batch != nil {
		for _, item := range batch.Items {
			d.has[item.SessionID] = max(d.has[item.SessionID], item.Seq-delivery.FirstSeq(3))
		}
		d.tolerate(d.Ack(d.ctx, batch, delivery.Rejection{SessionID: batch.Items[0].SessionID, Reason: "no"}))
	}
}

func (d *damaged) giveBack() {
	if batch := d.next(); batch != nil {
		d.tolerate(d.Release(d.ctx, batch, time.Time{}))
	}
}

func (d *damaged) halve() {
	if batch := d.next(); batch != nil && len(batch.Items) > 1 {
		d.tolerate(d.Split(d.ctx, batch))
	}
}

// withdraw takes back what waits, as after a code that was used; a newer one follows.
func (d *damaged) withdraw(session string) {
	d.tolerate(d.Withdraw(d.ctx, d.kind, session, d.item(session).Numbers))
	d.publish(session)
}

// settle lets everything come to rest: claims end, repairs are made, what is present is
// published again when the marker is gone, and Laravel takes everything.
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
	d.g.ExpectWithOffset(1, d.pending(d.kind)).To(Equal(Pending{}))
	for _, part := range []string{"items", "urgent", "normal", "flight", "open", "claims", "content"} {
		d.g.ExpectWithOffset(1, d.client.Exists(d.ctx, d.part(d.kind, part)).Val()).To(BeZero(), part+" has a remainder")
	}
}

// steps is a life of the queue in which every part of it holds something at some time.
func (d *damaged) steps() []func() {
	return []func(){
		func() { d.pending(d.kind); d.watched() },
		func() { d.publish("a", "u1", "b", "u2", "c", "d") },
		d.take, // u1, u2, a
		func() { d.publish("a", "u1", "c") },
		d.take, // b, c, d
		d.giveBack,
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

// TestDamagedQueue does every damage at every step of a queue's life: nothing fails, the
// queue goes on, and Laravel gets the newest state of every session.
func TestDamagedQueue(t *testing.T) {
	for _, server := range []struct {
		name string
		addr func(*testing.T) string
	}{
		{"redis", func(t *testing.T) string { return testenv.Redis(t, "--appendonly", "no") }},
		{"embedded", func(t *testing.T) string { return miniredis.RunT(t).Addr() }},
	} {
		for _, kind := range delivery.Kinds {
			t.Run(server.name+"/"+string(kind), func(t *testing.T) {
				t.Parallel()
				client := goredis.NewClient(&goredis.Options{Addr: server.addr(t)})
				t.Cleanup(func() { _ = client.Close() })
				for i, harm := range damages() {
					// The rules are the same everywhere: of the other kind, and of the embedded
					// server, a sample shows that it is so.
					if kind != delivery.KindStatus && i%5 > 0 || server.name == "embedded" && i%29 > 0 {
						continue
					}
					t.Run(harm.name, func(t *testing.T) {
						for at := range newDamaged(newBench(t, client, Options{}), kind).steps() {
							if harm.pair && (at+i)%3 > 0 {
								continue
							}
							d := newDamaged(newBench(t, client, Options{}), kind)
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

// TestRandomDamage is TestDamagedQueue in an order that nobody thought of.
func TestRandomDamage(t *testing.T) {
	random := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t, "--appendonly", "no")})
	t.Cleanup(func() { _ = client.Close() })
	all := damages()
	for round := range 300 {
		kind := delivery.Kinds[random.IntN(2)]
		d := newDamaged(newBench(t, client, Options{}), kind)
		var story []string
		for range 40 {
			session := fmt.Sprintf("%s%d", []string{"u", "n"}[random.IntN(2)], random.IntN(6))
			steps := map[string]func(){
				"publish " + session: func() { d.publish(session) }, "take": d.take, "deliver": d.deliver, "give back": d.giveBack,
				"halve": d.halve, "refuse": d.refuse, "time": func() { d.pass(time.Duration(random.IntN(20)) * time.Second) },
				"look": func() { d.pending(kind) },
			}
			name := slices.Sorted(maps.Keys(steps))[random.IntN(len(steps))]
			step := steps[name]
			if random.IntN(4) == 0 {
				harm := all[random.IntN(len(all))]
				name, step = harm.name, func() { harm.do(d) }
			}
			story = append(story, name)
			step()
		}
		d.settle()
		if t.Failed() {
			t.Fatalf("round %d: %s", round, strings.Join(story, "; "))
		}
	}
}

// TestRepairIsReported: a person hears of a damage, once for a while.
func TestRepairIsReported(t *testing.T) {
	var repairs []Repair
	b := newBench(t, realClient(t), Options{OnRepaired: func(kind delivery.Kind, r Repair) {
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
	b.g.Expect(b.pending(kind).Waiting).To(Equal(1), "too soon")
	b.pass(repairInterval)
	b.g.Expect(b.client.Set(b.ctx, b.keys.Marker(), "x", 0).Err()).To(Succeed())
	b.g.Expect(b.pending(kind).Waiting).To(Equal(1))
	b.g.Expect(repairs).To(Equal([]Repair{{}, {Discarded: 1, Restored: 1}}))
	b.g.Expect(b.client.Exists(b.ctx, b.keys.Marker()).Val()).To(BeZero(), "everything present is published again")
	b.g.Expect(seqs(b.claim(kind, 50))).To(Equal([]string{"a/1"}))
}

// TestALongHold: the bound is the same in Go and in the scripts.
func TestALongHold(t *testing.T) {
	b := newBench(t, realClient(t), Options{})
	kind := delivery.KindStatus
	b.enqueue(kind, status("a", 1, delivery.High))
	b.g.Expect(b.Release(b.ctx, b.claim(kind, 1), b.clock.Now().Add(365*24*time.Hour))).To(Succeed())
	b.pending(kind)
	b.g.Expect(b.client.Set(b.ctx, b.keys.Marker(), "x", 0).Err()).To(Succeed())
	b.pass(repairInterval)
	b.g.Expect(b.pending(kind).NextClaimable).To(Equal(start.Add(maxHold)))
	b.g.Expect(b.client.Exists(b.ctx, b.keys.Marker()).Val()).To(Equal(int64(1)), "the longest hold is no damage")
	for _, text := range []string{pendingLua, repairLua} {
		b.g.Expect(text).To(ContainSubstring(fmt.Sprint(maxHold.Milliseconds())))
	}
	_, err := b.Claim(b.ctx, kind, 1, maxHold+1)
	b.g.Expect(err).To(HaveOccurred())
}
