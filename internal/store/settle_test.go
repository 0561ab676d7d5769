package store

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// takings claims a session, and returns how a process takes it, and two more processes.
func takings(t *testing.T, url string, s *Store) (take func(process *Store, epoch int64) *Taking, second, third *Store) {
	t.Helper()
	_, err := s.Claim(t.Context(), Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	take = func(process *Store, epoch int64) *Taking {
		t.Helper()
		taking, err := process.Take(t.Context(), "u", epoch)
		NewWithT(t).Expect(err).NotTo(HaveOccurred())
		return taking
	}
	return take, open(t, url), open(t, url)
}

func TestTakingsThatNothingHasSettled(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		take, second, third := takings(t, url, s)

		first := take(s, 1)
		g.Expect(first.Unsettled()).To(BeEquivalentTo(0))
		g.Expect(take(s, 1).Unsettled()).To(BeEquivalentTo(0), "the answer to the first was lost: the process lives")
		g.Expect(take(second, 1).Unsettled()).To(BeEquivalentTo(1), "the first process was restarted in place")
		last := take(third, 2)
		g.Expect(last.Unsettled()).To(BeEquivalentTo(2))

		g.Expect(first.Settle(ctx)).To(Succeed(), "a former owner is late")
		g.Expect(take(third, 2).Unsettled()).To(BeEquivalentTo(2), "and has changed nothing")
		g.Expect(last.Settle(ctx)).To(Succeed(), "it has been taken again since, by the same process")
		last = take(third, 3)
		g.Expect(last.Unsettled()).To(BeEquivalentTo(2))

		g.Expect(last.Settle(ctx)).To(Succeed())
		g.Expect(last.Settle(ctx)).To(Succeed(), "the answer was lost")
		g.Expect(take(third, 3).Unsettled()).To(BeEquivalentTo(0))
		g.Expect(take(s, 4).Unsettled()).To(BeEquivalentTo(1), "a taking counts again after a settled one of the same process")

		g.Expect(s.DeleteSession(ctx, "u")).To(Succeed())
		g.Expect(last.Settle(ctx)).To(Succeed(), "the record is gone")
	})
}

// A worker's sessions are settled at the same time: together, and each with its own result.
func TestTakingsAreSettledTogether(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		const sessions = maxSettlements + 30
		all := make([]*Taking, sessions)
		for i := range all {
			uid := fmt.Sprintf("u%03d", i)
			_, err := s.Claim(t.Context(), Claimant{SessionID: "id-" + uid, Namespace: "a", UID: uid}, never)
			g.Expect(err).NotTo(HaveOccurred())
			all[i], err = s.Take(t.Context(), uid, 1)
			g.Expect(err).NotTo(HaveOccurred())
		}
		waiting := func() (n int) {
			s.settlements.mu.Lock()
			defer s.settlements.mu.Unlock()
			if s.settlements.next != nil {
				n = len(s.settlements.next.takings)
			}
			return n
		}

		s.settlements.turn <- struct{}{} // another statement runs
		gaveUp, giveUp := context.WithCancel(t.Context())
		errs := make([]error, sessions)
		var settling sync.WaitGroup
		settling.Go(func() { errs[0] = all[0].Settle(gaveUp) })
		g.Eventually(waiting).Should(Equal(1))
		giveUp()
		settling.Wait()
		g.Expect(errs[0]).To(MatchError(context.Canceled))
		g.Expect(waiting()).To(BeZero())
		for i := range all[1:] {
			settling.Go(func() { errs[i+1] = all[i+1].Settle(t.Context()) })
		}
		g.Eventually(waiting).Should(Equal(sessions-1-maxSettlements), "two groups wait, and the second has room")
		<-s.settlements.turn
		settling.Wait()
		for i, taking := range all {
			r, err := s.Record(t.Context(), taking.Record.UID)
			g.Expect(err).NotTo(HaveOccurred())
			if i == 0 {
				g.Expect(r.Unsettled).To(BeEquivalentTo(1), "its caller gave up before the statement began")
				continue
			}
			g.Expect(errs[i]).NotTo(HaveOccurred())
			g.Expect(r.Unsettled).To(BeZero())
		}
	})
}

// The one whose turn it is may be cancelled while its statement runs for others too.
func TestASettlementOutlivesItsCaller(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		take, _, _ := takings(t, url, s)
		taking := take(s, 1)
		ctx, cancel := context.WithCancel(t.Context())
		group := s.settlements.join(&taking.Record)
		cancel()
		s.settleGroup(ctx, group)
		g.Expect(group.done).To(BeClosed())
		g.Expect(group.err).NotTo(HaveOccurred())
		r, err := s.Record(t.Context(), "u")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.Unsettled).To(BeZero())
	})
}

// The keys of a session may be written for seconds. The settlement of the others does not
// wait for that: it would keep their records locked meanwhile.
func TestASettlementDoesNotWaitForOtherSessions(t *testing.T) {
	g := NewWithT(t)
	s := open(t, testenv.Postgres(t))
	g.Expect(s.Migrate(t.Context())).To(Succeed())
	all := map[string]*Taking{}
	for _, uid := range []string{"busy", "idle"} {
		_, err := s.Claim(t.Context(), Claimant{SessionID: uid, Namespace: "a", UID: uid}, never)
		g.Expect(err).NotTo(HaveOccurred())
		all[uid], err = s.Take(t.Context(), uid, 1)
		g.Expect(err).NotTo(HaveOccurred())
	}
	unsettled := func(uid string) int64 {
		r, err := s.Record(t.Context(), uid)
		g.Expect(err).NotTo(HaveOccurred())
		return r.Unsettled
	}
	var settling sync.WaitGroup
	errs := make(chan error, 2)
	err := s.db.DoTxn(t.Context(), nil, func(ctx context.Context) error {
		if _, err := s.db.Exec(ctx, "SELECT 1 FROM whatsapp_operator_session WHERE uid='busy' FOR SHARE"); err != nil { // as the fence does
			return err
		}
		s.settlements.turn <- struct{}{}
		for _, taking := range all {
			settling.Go(func() { errs <- taking.Settle(t.Context()) })
		}
		g.Eventually(func() int {
			s.settlements.mu.Lock()
			defer s.settlements.mu.Unlock()
			if s.settlements.next == nil {
				return 0
			}
			return len(s.settlements.next.takings)
		}).Should(Equal(2))
		<-s.settlements.turn
		g.Expect(<-errs).NotTo(HaveOccurred(), "the idle one")
		g.Expect(unsettled("idle")).To(BeZero())
		g.Consistently(errs, "100ms").ShouldNot(Receive(), "the busy one waits, alone")
		return nil
	})
	g.Expect(err).NotTo(HaveOccurred())
	settling.Wait()
	g.Expect(<-errs).NotTo(HaveOccurred())
	g.Expect(unsettled("busy")).To(BeZero())
}

func TestTrials(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		take, second, third := takings(t, url, s)

		first := take(s, 1)
		g.Expect(first.Trial()).To(BeZero())
		g.Expect(first.RecordTrial(ctx, -1)).To(Succeed())
		g.Expect(take(second, 1).Trial()).To(BeEquivalentTo(-1))
		first = take(s, 1)
		g.Expect(first.RecordTrial(ctx, 125)).To(Succeed())
		next := take(second, 2)
		g.Expect(next.Trial()).To(BeEquivalentTo(125), "the first process has died")
		g.Expect(first.RecordTrial(ctx, 1)).To(Succeed(), "it was only paused: it is late")
		g.Expect(take(third, 3).Trial()).To(BeEquivalentTo(125), "and has changed nothing; the second process died while the session waited")

		again := take(third, 3)
		g.Expect(again.Trial()).To(BeZero(), "the same process: it lives")
		g.Expect(again.RecordTrial(ctx, 1)).To(Succeed())
		g.Expect(again.RecordTrial(ctx, 0)).To(Succeed())
		last := take(s, 4)
		g.Expect(last.Trial()).To(BeZero(), "the process has lived through the trial")
		g.Expect(last.Unsettled()).To(BeEquivalentTo(5), "which settles nothing")

		g.Expect(last.RecordTrial(ctx, 1)).To(Succeed())
		g.Expect(last.Settle(ctx)).To(Succeed())
		g.Expect(take(second, 5).Trial()).To(BeZero(), "a settled taking leaves no trial")

		g.Expect(s.DeleteSession(ctx, "u")).To(Succeed())
		g.Expect(last.RecordTrial(ctx, 1)).To(Succeed(), "the record is gone")
	})
}

// Processes take a session, crash, or settle late and at the same time as the taking
// of another: the count is always the number of takings since the
// last one that its owner settled.
func TestTakingsAndSettlingsInAnyOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		random := rand.New(rand.NewPCG(testenv.Seed(t), 0))
		_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred())

		processes := []*Store{s, open(t, url), open(t, url)}
		epoch, want, takenBy := int64(1), int64(0), -1
		takings := []*Taking{}
		for range 120 {
			switch owner, process := len(takings)-1, random.IntN(len(processes)); random.IntN(4) {
			case 0, 1: // a process takes the session
				epoch += random.Int64N(2)
				taking, err := processes[process].Take(ctx, "u", epoch)
				g.Expect(err).NotTo(HaveOccurred())
				if takenBy != process {
					want++
				}
				takings, takenBy = append(takings, taking), process
				g.Expect(taking.Unsettled()).To(BeEquivalentTo(want - 1))
			case 2: // anybody who ever had it settles
				if owner < 0 {
					continue
				}
				settled := random.IntN(len(takings))
				g.Expect(takings[settled].Settle(ctx)).To(Succeed())
				if settled == owner && want > 0 {
					want, takenBy = 0, -1
				}
			case 3: // the owner settles while another process takes the session
				if owner < 0 || process == takenBy {
					continue
				}
				epoch++
				var both sync.WaitGroup
				var taking *Taking
				var takeErr, settleErr error
				both.Go(func() { taking, takeErr = processes[process].Take(ctx, "u", epoch) })
				both.Go(func() { settleErr = takings[owner].Settle(ctx) })
				both.Wait()
				g.Expect(takeErr).NotTo(HaveOccurred())
				g.Expect(settleErr).NotTo(HaveOccurred())
				takings, takenBy = append(takings, taking), process
				g.Expect(taking.Unsettled()).To(BeElementOf(int32(0), int32(want)), "the one or the other came first")
				want = int64(taking.Unsettled()) + 1
			}
			r, err := s.Record(ctx, "u")
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(r.Unsettled).To(Equal(want))
		}
	})
}
