package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv/claimtest"
)

// A holder was paused for longer than its heartbeats may be silent. Its session was taken by
// another process; its push is refused, whatever the message is.
func TestPausedHolderPushesLate(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		paused, successor := NewInbox(s, InboxOptions{}), open(t, url)
		taking := taken(t, s, "a", "ns", 5)
		_, err := paused.Push(ctx, taking, messageItem("a", 1))
		g.Expect(err).NotTo(HaveOccurred())

		next, err := successor.Take(ctx, "uid-a", 5) // the same epoch: a restart in place
		g.Expect(err).NotTo(HaveOccurred())
		for _, seq := range []int64{1, 2} {
			_, err = paused.Push(ctx, taking, messageItem("a", seq))
			g.Expect(err).To(MatchError(ErrFenced), "message %d", seq)
		}
		r, err := NewInbox(successor, InboxOptions{}).Push(ctx, next, messageItem("a", 2))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r).To(Equal(PushResult{Waiting: 2, Bytes: 2 * int64(len(messageItem("a", 1).Payload))}))

		g.Expect(successor.DeleteSession(ctx, "uid-a")).To(Succeed())
		_, err = paused.Push(ctx, taking, messageItem("a", 3))
		g.Expect(err).To(MatchError(ErrFenced), "the session is gone")
		b, err := NewInbox(s, InboxOptions{}).Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{messageKey("a", 1), messageKey("a", 2)}), "what was pushed is delivered also when the session is gone")
	})
}

// A taking waits for a push that is being executed, and the push of the former holder that comes
// after it is refused: there is no moment between.
func TestPushAndTakingAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		successor := open(t, url)
		inbox, others := NewInbox(s, InboxOptions{}), NewInbox(successor, InboxOptions{})
		taking := taken(t, s, "a", "ns", 1)
		seq := int64(0)
		for round := range 20 {
			var pushes sync.WaitGroup
			last := seq
			pushes.Go(func() { // the former holder, until it is refused
				for {
					if _, err := inbox.Push(ctx, taking, messageItem("a", last+1)); errors.Is(err, ErrFenced) {
						return
					} else if err != nil {
						t.Error(err)
						return
					}
					last++
				}
			})
			next, err := successor.Take(ctx, "uid-a", int64(round+2))
			g.Expect(err).NotTo(HaveOccurred())
			var newest int64
			g.Expect(s.db.QueryRow(ctx, "SELECT COALESCE(MAX(n), 0) FROM whatsapp_operator_inbox").Scan(&newest)).To(Succeed())
			_, err = others.Push(ctx, next, messageItem("a", 100_000+int64(round)))
			g.Expect(err).NotTo(HaveOccurred())
			pushes.Wait()
			var after int64
			g.Expect(s.db.QueryRow(ctx, "SELECT MAX(n) FROM whatsapp_operator_inbox").Scan(&after)).To(Succeed())
			g.Expect(after).To(Equal(newest+1), "nothing of the former holder came after the taking")
			seq, taking = last, next
			inbox, others, successor, s = others, inbox, s, successor
		}
	})
}

// The answer to a push is lost. The holder pushes again, or WhatsApp delivers the message again
// to the next holder: it is stored once.
func TestLostPushAnswer(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		lost := true
		inbox.loseAnswer = func(context.Context) error {
			if lost {
				return claimtest.ErrLost
			}
			return nil
		}
		taking := taken(t, s, "a", "ns", 1)
		_, err := inbox.Push(ctx, taking, messageItem("a", 1))
		g.Expect(err).To(MatchError(claimtest.ErrLost))
		lost = false
		want := PushResult{Repeated: true, Waiting: 1, Bytes: int64(len(messageItem("a", 1).Payload))}
		g.Expect(inbox.Push(ctx, taking, messageItem("a", 1))).To(Equal(want))
		successor := open(t, url)
		next, err := successor.Take(ctx, "uid-a", 2)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(NewInbox(successor, InboxOptions{}).Push(ctx, next, messageItem("a", 1))).To(Equal(want))

		// Also when the message has been delivered meanwhile.
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(b.Items).To(Equal([]delivery.Item{{SessionID: "a", Key: messageKey("a", 1), Numbers: delivery.Numbers{Epoch: 1, Seq: 1}, Priority: delivery.Normal, Payload: messageItem("a", 1).Payload}}))
		g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		g.Expect(inbox.Push(ctx, next, messageItem("a", 1))).To(Equal(PushResult{Repeated: true}))
		g.Expect(inbox.Backlog(ctx, delivery.KindMessage)).To(Equal(delivery.Backlog{}))
	})
}

// A message could not be decrypted, and then the sender sends it again: both have the same key,
// follow each other, and both are stored. Either of them, pushed again, is not.
func TestMessageAfterItsPlaceholder(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		taking := taken(t, s, "a", "ns", 1)
		message := messageItem("a", 1)
		placeholder := message
		placeholder.Placeholder, placeholder.Payload = true, []byte(`{"type":"undecryptable"}`)
		for _, row := range []struct {
			item     delivery.Item
			repeated bool
		}{{placeholder, false}, {placeholder, true}, {message, false}, {message, true}} {
			result, err := inbox.Push(ctx, taking, row.item)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(result.Repeated).To(Equal(row.repeated))
		}
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{message.Key, message.Key}))
		g.Expect(b.Items[1].Payload).To(Equal(message.Payload))
	})
}

// Whatever a message contains, it is stored as it is, or refused with an error that is a fault
// of the program.
func TestPushedMessages(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		taking := taken(t, s, "a", "ns", 1)
		large := delivery.Item{Key: "large", Payload: fmt.Appendf(nil, "%q", strings.Repeat("a", delivery.MaxMessagePayload-2))}
		strange := delivery.Item{Key: "k\x00\xff", Payload: []byte("{\"text\":\"\\u0000 \xff ä\"}")}
		for _, item := range []delivery.Item{large, strange} {
			_, err := inbox.Push(ctx, taking, item)
			g.Expect(err).NotTo(HaveOccurred())
		}
		for _, item := range []delivery.Item{
			{Payload: []byte("{}")}, {Key: "k", Payload: []byte("{")}, {Key: "k"}, {Key: strings.Repeat("k", 65), Payload: []byte("{}")},
			{Key: "k", Payload: append(large.Payload, large.Payload...)},
		} {
			_, err := inbox.Push(ctx, taking, item)
			g.Expect(err).To(MatchError(ErrInvalidMessage))
		}
		for _, item := range []delivery.Item{large, strange} {
			b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(b.Items).To(HaveLen(1))
			g.Expect(slices.Equal(b.Items[0].Payload, item.Payload)).To(BeTrue())
			g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		}
	})
}

// A batch has 200 messages at most, 100 of one session, and 1 MiB; one message may have as much.
func TestTheSizeOfABatch(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start
		inbox := openInbox(s, func() time.Time { now = now.Add(time.Millisecond); return now }, InboxOptions{})
		push := func(taking *Taking, n, size int) {
			for i := range n {
				item := messageItem(taking.Record.SessionID, int64(i+1))
				item.Key = fmt.Sprintf("%s-%d-%d", taking.Record.SessionID, size, i)
				item.Payload = []byte(strings.Repeat(" ", size-3) + `"x"`)
				_, err := inbox.Push(ctx, taking, item)
				g.Expect(err).NotTo(HaveOccurred())
			}
		}
		claim := func() (counts map[string]int) {
			b, err := inbox.Claim(ctx, delivery.KindMessage, 200, lease)
			g.Expect(err).NotTo(HaveOccurred())
			if b == nil {
				return nil
			}
			counts = map[string]int{}
			for _, item := range b.Items {
				counts[item.SessionID]++
			}
			g.Expect(inbox.Ack(ctx, b)).To(Succeed())
			return counts
		}
		a, b, c := taken(t, s, "a", "ns", 1), taken(t, s, "b", "ns", 1), taken(t, s, "c", "ns", 1)
		push(a, 250, 10)
		push(b, 30, 10)
		push(c, 120, 10)
		backlog, err := inbox.Backlog(ctx, delivery.KindMessage)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect([]any{backlog.Waiting, backlog.Normal, backlog.Full}).To(Equal([]any{3, 230, false}))
		g.Expect(claim()).To(Equal(map[string]int{"a": 100, "b": 30, "c": 70}))
		g.Expect(claim()).To(Equal(map[string]int{"a": 100, "c": 50}), "in their turn")
		g.Expect(claim()).To(Equal(map[string]int{"a": 50}))
		g.Expect(claim()).To(BeNil())

		push(a, 3, delivery.MaxMessagePayload)
		push(b, 9, delivery.MaxMessagePayload/4)
		backlog, err = inbox.Backlog(ctx, delivery.KindMessage)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(backlog.Full).To(BeTrue())
		g.Expect(claim()).To(Equal(map[string]int{"a": 1}))
		g.Expect(claim()).To(Equal(map[string]int{"b": 4}), "in their turn")
		g.Expect(claim()).To(Equal(map[string]int{"a": 1}))
	})
}

// A person has deleted messages of the table: the others are delivered.
func TestDeletedMessages(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		a, b := taken(t, s, "a", "ns", 1), taken(t, s, "b", "ns", 1)
		for seq := range int64(3) {
			for _, taking := range []*Taking{a, b} {
				_, err := inbox.Push(ctx, taking, messageItem(taking.Record.SessionID, seq+1))
				g.Expect(err).NotTo(HaveOccurred())
			}
		}
		g.Expect(s.exec(ctx, "DELETE FROM whatsapp_operator_inbox WHERE session_id='a' OR n=2")).To(Succeed())
		batch, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(batch)).To(Equal([]string{messageKey("b", 1), messageKey("b", 3)}))
		g.Expect(inbox.Ack(ctx, batch)).To(Succeed())
		g.Expect(inbox.Push(ctx, a, messageItem("a", 4))).To(HaveField("Waiting", BeEquivalentTo(1)))
		batch, err = inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(batch)).To(Equal([]string{messageKey("a", 4)}))
		g.Expect(inbox.Ack(ctx, batch)).To(Succeed())
		g.Expect(inbox.Usage(ctx)).To(BeEmpty())
	})
}

// A person has deleted the messages of a stored batch: it ends, and others are claimed, whether
// it is claimed again after its release, or because the answer to its claim was lost.
func TestDeletedMessagesOfABatch(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		for _, answer := range []string{"received", "lost"} {
			t.Run(answer, func(t *testing.T) {
				g := NewWithT(t)
				ctx := t.Context()
				inbox := NewInbox(s, InboxOptions{})
				a, b := taken(t, s, "a-"+answer, "ns", 1), taken(t, s, "b-"+answer, "ns", 1)
				push := func(taking *Taking, seq int64) {
					_, err := inbox.Push(ctx, taking, messageItem(taking.Record.SessionID, seq))
					g.Expect(err).NotTo(HaveOccurred())
				}
				for seq := range int64(3) {
					push(a, seq+1)
					push(b, seq+1)
				}
				if answer == "lost" {
					inbox.loseAnswer = func(context.Context) error { return claimtest.ErrLost }
				}
				batch, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
				inbox.loseAnswer = nil
				if answer == "lost" {
					g.Expect(err).To(MatchError(claimtest.ErrLost))
				} else {
					g.Expect(err).NotTo(HaveOccurred())
					g.Expect(inbox.Release(ctx, batch, time.Time{})).To(Succeed())
				}
				push(a, 4)
				g.Expect(s.exec(ctx, "DELETE FROM whatsapp_operator_inbox WHERE n<=3")).To(Succeed())
				batch, err = inbox.Claim(ctx, delivery.KindMessage, 10, lease)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(keysOf(batch)).To(Equal([]string{messageKey(a.Record.SessionID, 4)}))
				g.Expect(inbox.Ack(ctx, batch)).To(Succeed())
				g.Expect(inbox.Usage(ctx)).To(BeEmpty())
				g.Expect(inbox.Backlog(ctx, delivery.KindMessage)).To(Equal(delivery.Backlog{}))
				g.Expect(inbox.Claim(ctx, delivery.KindMessage, 0, lease)).To(BeNil())
			})
		}
	})
}

// A session's id is not free for another namespace while messages of it wait: Laravel would get
// them as the other tenant's. Nor does a dead letter reach another namespace.
func TestMessagesStayInTheirNamespace(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		taking := taken(t, s, "shop", "mine", 1)
		for seq := range int64(2) {
			_, err := inbox.Push(ctx, taking, messageItem("shop", seq+1))
			g.Expect(err).NotTo(HaveOccurred())
		}
		g.Expect(s.DeleteSession(ctx, "uid-shop")).To(Succeed())
		_, err := s.Claim(ctx, Claimant{SessionID: "SHOP", Namespace: "other", UID: "u2"}, never)
		g.Expect(err).To(MatchError(ErrTaken))
		again, err := s.Claim(ctx, Claimant{SessionID: "shop", Namespace: "mine", UID: "u3"}, never)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(s.DeleteSession(ctx, again.UID)).To(Succeed())

		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(inbox.Ack(ctx, b, delivery.Rejection{SessionID: "shop", Key: messageKey("shop", 1), Reason: "no"})).To(Succeed())
		other := taken(t, s, "SHOP", "other", 1)
		var letters []delivery.DeadLetter
		visit := func(l delivery.DeadLetter) bool { letters = append(letters, l); return true }
		g.Expect(inbox.DeadLetters(ctx, delivery.KindMessage, visit)).To(Succeed())
		g.Expect(letters).To(HaveLen(1))
		g.Expect(inbox.Replay(ctx, delivery.KindMessage, letters[0].ID)).To(Equal(delivery.OtherNamespace))
		g.Expect(inbox.CountDeadLetters(ctx, delivery.KindMessage)).To(Equal(1))
		g.Expect(s.DeleteSession(ctx, other.Record.UID)).To(Succeed())
		g.Expect(inbox.Replay(ctx, delivery.KindMessage, letters[0].ID)).To(Equal(delivery.Replayed))
		b, err = inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(b.Items).To(HaveLen(1))
		g.Expect(b.Items[0]).To(And(HaveField("Key", messageKey("shop", 1)), HaveField("Seq", BeEquivalentTo(1))))
	})
}

// After the session of a dead letter another namespace had the id. A replay does not mix their
// messages, and after it the id is not free for the other one.
func TestReplayAfterAnotherNamespaceHadTheID(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		letter := refusedMessage(t, s, inbox, "shop", "mine")
		other := taken(t, s, "shop", "other", 1)
		_, err := inbox.Push(ctx, other, messageItem("shop", 2))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(s.DeleteSession(ctx, other.Record.UID)).To(Succeed())
		g.Expect(inbox.Replay(ctx, delivery.KindMessage, letter)).To(Equal(delivery.OtherNamespace), "its message waits")
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{messageKey("shop", 2)}))
		g.Expect(inbox.Ack(ctx, b)).To(Succeed())

		g.Expect(inbox.Replay(ctx, delivery.KindMessage, letter)).To(Equal(delivery.Replayed))
		_, err = s.Claim(ctx, Claimant{SessionID: "Shop", Namespace: "other", UID: "u2"}, never)
		g.Expect(err).To(MatchError(ErrTaken))
		g.Expect(inbox.Usage(ctx)).To(HaveExactElements(HaveField("Namespace", "mine")))
		_, err = inbox.Push(ctx, taken(t, s, "shop", "mine", 2), messageItem("shop", 3))
		g.Expect(err).NotTo(HaveOccurred())
		b, err = inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{messageKey("shop", 1), messageKey("shop", 3)}))
	})
}

// refusedMessage pushes a message of a new session, makes it a dead letter, deletes the session,
// and returns the dead letter's id.
func refusedMessage(t *testing.T, s *Store, inbox *Inbox, sessionID, namespace string) (id string) {
	t.Helper()
	g := NewWithT(t)
	ctx := t.Context()
	taking := taken(t, s, sessionID, namespace, 1)
	_, err := inbox.Push(ctx, taking, messageItem(sessionID, 1))
	g.Expect(err).NotTo(HaveOccurred())
	b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(inbox.DeadLetter(ctx, b, delivery.RefusedAlone, delivery.Answer{StatusCode: 422})).To(Succeed())
	g.Expect(s.DeleteSession(ctx, taking.Record.UID)).To(Succeed())
	g.Expect(inbox.DeadLetters(ctx, delivery.KindMessage, func(l delivery.DeadLetter) bool { id = l.ID; return true })).To(Succeed())
	return id
}

// A dead letter is replayed while another namespace claims the id: one of them waits, and then
// sees what the other did. Otherwise the first message that Laravel got of the new session would
// be the other tenant's.
func TestReplayWhileAnotherNamespaceClaimsTheID(t *testing.T) {
	claim := func(ctx context.Context, s *Store) error {
		_, err := s.Claim(ctx, Claimant{SessionID: "SHOP", Namespace: "other", UID: "u2"}, never)
		return err
	}
	for name, row := range map[string]struct {
		claimFirst bool
		want       delivery.ReplayResult
		wantErr    error
		messages   []string
	}{
		"the replay is first": {want: delivery.Replayed, wantErr: ErrTaken, messages: []string{messageKey("shop", 1)}},
		"the claim is first":  {claimFirst: true, want: delivery.OtherNamespace, messages: []string{messageKey("SHOP", 2)}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := testenv.Postgres(t)
			s := open(t, url)
			g.Expect(s.Migrate(ctx)).To(Succeed())
			second := open(t, url)
			letter := refusedMessage(t, s, NewInbox(s, InboxOptions{}), "shop", "mine")

			var result delivery.ReplayResult
			var claimErr error
			replay := func(ctx context.Context, s *Store) (err error) {
				result, err = NewInbox(s, InboxOptions{}).Replay(ctx, delivery.KindMessage, letter)
				return err
			}
			claims := func(ctx context.Context, s *Store) error { claimErr = claim(ctx, s); return nil }
			first, then := replay, claims
			if row.claimFirst {
				first, then = claims, replay
			}
			ended := make(chan error, 1)
			g.Expect(s.transaction(ctx, func(ctx context.Context) error {
				g.Expect(first(ctx, s)).To(Succeed())
				go func() { ended <- then(t.Context(), second) }()
				g.Eventually(func(g Gomega) { // it waits, or has ended although it should
					var waiting bool
					g.Expect(second.db.QueryRow(t.Context(), "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname=current_database() AND wait_event_type='Lock')").Scan(&waiting)).To(Succeed())
					g.Expect(waiting || len(ended) > 0).To(BeTrue())
				}).Should(Succeed())
				return nil
			})).To(Succeed())
			g.Expect(<-ended).To(Succeed())
			g.Expect(result).To(Equal(row.want))
			if row.wantErr != nil {
				g.Expect(claimErr).To(MatchError(row.wantErr))
			} else {
				g.Expect(claimErr).NotTo(HaveOccurred())
				taking, err := s.Take(ctx, "u2", 1)
				g.Expect(err).NotTo(HaveOccurred())
				_, err = NewInbox(s, InboxOptions{}).Push(ctx, taking, messageItem("SHOP", 2))
				g.Expect(err).NotTo(HaveOccurred())
			}
			b, err := NewInbox(s, InboxOptions{}).Claim(ctx, delivery.KindMessage, 10, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(keysOf(b)).To(Equal(row.messages))
		})
	}
}

// A namespace whose record is a duplicate gets the id only when the messages of its former
// owner are delivered.
func TestADuplicateWaitsForTheMessagesOfAnotherNamespace(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		owner := taken(t, s, "shop", "mine", 1)
		_, err := inbox.Push(ctx, owner, messageItem("shop", 1))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(s.exec(ctx, `INSERT INTO whatsapp_operator_session (session_id, namespace, uid, created_at, updated_at, duplicate)
			VALUES ('Shop', 'other', 'u2', 0, 0, $1)`, true)).To(Succeed())
		g.Expect(s.DeleteSession(ctx, owner.Record.UID)).To(Succeed())
		_, err = s.Claim(ctx, Claimant{SessionID: "Shop", Namespace: "other", UID: "u2"}, never)
		g.Expect(err).To(MatchError(ErrTaken))
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		_, err = s.Claim(ctx, Claimant{SessionID: "Shop", Namespace: "other", UID: "u2"}, never)
		g.Expect(err).NotTo(HaveOccurred())
	})
}

// Dead letters are kept for 7 days, and their number and size are bounded.
func TestDeadLettersOfMessages(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start
		clock := func() time.Time { return now }
		size := int64(len(messageItem("a", 1).Payload))
		inbox := openInbox(s, clock, InboxOptions{DeadLetterBytes: 2 * size})
		taking := taken(t, s, "a", "ns", 1)
		for seq := range int64(3) {
			_, err := inbox.Push(ctx, taking, messageItem("a", seq+1))
			g.Expect(err).NotTo(HaveOccurred())
		}
		refuse := func() error {
			b, err := inbox.Claim(ctx, delivery.KindMessage, 1, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(b.Items).To(HaveLen(1))
			err = inbox.DeadLetter(ctx, b, delivery.Poison, delivery.Answer{StatusCode: 500, Detail: "boom\xff"})
			if err != nil {
				g.Expect(inbox.Release(ctx, b, now)).To(Succeed(), "the claim is still held")
			}
			return err
		}
		g.Expect(refuse()).To(Succeed())
		g.Expect(refuse()).To(Succeed())
		g.Expect(refuse()).To(MatchError(delivery.ErrDeadLettersFull), "there is no room")
		var letters []delivery.DeadLetter
		g.Expect(inbox.DeadLetters(ctx, delivery.KindMessage, func(l delivery.DeadLetter) bool { letters = append(letters, l); return true })).To(Succeed())
		g.Expect(letters).To(HaveLen(2))
		letters[0].BatchID = ""
		g.Expect(letters[0]).To(Equal(delivery.DeadLetter{
			ID: "m1", Kind: delivery.KindMessage, At: now, SessionID: "a", Key: messageKey("a", 1), Numbers: delivery.Numbers{Epoch: 1, Seq: 1},
			Reason: delivery.Poison, Answer: "500 boom", Payload: messageItem("a", 1).Payload,
		}))
		for _, id := range []string{"1", "x1", "m", "m-1", "m1 ", "1700000000000-0"} {
			_, err := inbox.Replay(ctx, delivery.KindMessage, id)
			g.Expect(err).To(MatchError(ErrInvalidDeadLetterID), id)
			_, err = inbox.Drop(ctx, delivery.KindMessage, id)
			g.Expect(err).To(MatchError(ErrInvalidDeadLetterID), id)
		}
		now = now.Add(7*24*time.Hour + time.Second)
		g.Expect(refuse()).To(Succeed(), "the old ones are gone")
		g.Expect(inbox.CountDeadLetters(ctx, delivery.KindMessage)).To(Equal(1))
		g.Expect(inbox.Replay(ctx, delivery.KindMessage, "m1")).To(Equal(delivery.NotFound))
	})
}

// The tenant whose sessions have the long backlogs is stopped, and no other one.
func TestOneTenantsBacklogRefusesOnlyItsOwn(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		size := int64(len(messageItem("a1", 1).Payload))
		inbox := NewInbox(s, InboxOptions{Bounds: Bounds{SessionMessages: 50, NamespaceBytes: 60 * size}})
		elapsed := clocktesting.NewFakePassiveClock(start)
		inbox.elapsed = elapsed
		push := func(taking *Taking, n int) (last PushResult) {
			var head int64
			g.Expect(s.db.QueryRow(ctx, "SELECT COALESCE(MAX(tail), 0) FROM whatsapp_operator_inbox_head WHERE session_id=$1", taking.Record.SessionID).Scan(&head)).To(Succeed())
			for i := range n {
				var err error
				last, err = inbox.Push(ctx, taking, messageItem(taking.Record.SessionID, head+int64(i)+1))
				g.Expect(err).NotTo(HaveOccurred(), "what was decrypted is always stored")
			}
			return last
		}
		a1, a2, b1 := taken(t, s, "a1", "a", 1), taken(t, s, "a2", "a", 1), taken(t, s, "b1", "b", 1)
		g.Expect(push(a1, 49).Over).To(Equal(NoBound))
		g.Expect(push(a1, 1).Over).To(Equal(SessionBound))
		push(a2, 30)
		push(b1, 40)
		_, err := inbox.readUsage(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(inbox.Over()).To(Equal(map[Bound]int{NamespaceBound: 1}))
		g.Expect(push(a1, 1).Over).To(Equal(SessionBound))
		g.Expect(push(a2, 1).Over).To(Equal(NoBound), "the longest backlog of the namespace comes first")
		g.Expect(push(b1, 1).Over).To(Equal(NoBound), "another tenant")

		push(a2, 18) // 49
		g.Expect(inbox.HasRoom(ctx, "a1", "a", SessionBound)).To(BeFalse())
		g.Expect(inbox.HasRoom(ctx, "a1", "a", NamespaceBound)).To(BeFalse())
		g.Expect(inbox.HasRoom(ctx, "b1", "b", SessionBound)).To(BeFalse(), "41 of 50 wait")
		g.Expect(inbox.HasRoom(ctx, "b1", "b", NamespaceBound)).To(BeFalse())
		g.Expect(inbox.HasRoom(ctx, "b1", "b", TotalBound)).To(BeTrue())
		for b, err := inbox.Claim(ctx, delivery.KindMessage, 200, lease); b != nil || err != nil; b, err = inbox.Claim(ctx, delivery.KindMessage, 200, lease) {
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		}
		g.Expect(inbox.HasRoom(ctx, "a1", "a", SessionBound)).To(BeTrue())
		g.Expect(inbox.HasRoom(ctx, "a1", "a", NamespaceBound)).To(BeFalse(), "a thousand sessions that ask at once make one query in two seconds")
		elapsed.SetTime(elapsed.Now().Add(usageInterval))
		g.Expect(inbox.HasRoom(ctx, "a1", "a", NamespaceBound)).To(BeTrue())
		g.Expect(push(a1, 1).Over).To(Equal(NoBound))
	})
}

// A session was over the bound of its namespace. Nothing is pushed for a while, Laravel takes
// all, and the next push is not measured by what waited then.
func TestAnOldBacklogStopsNoSession(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{Bounds: Bounds{NamespaceBytes: int64(len(messageItem("a", 1).Payload))}})
		elapsed := clocktesting.NewFakePassiveClock(start)
		inbox.elapsed = elapsed
		a := taken(t, s, "a", "ns", 1)
		for n := range int64(3) {
			_, err := inbox.Push(ctx, a, messageItem("a", n+1))
			g.Expect(err).NotTo(HaveOccurred())
		}
		_, err := inbox.readUsage(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(inbox.Push(ctx, a, messageItem("a", 4))).To(HaveField("Over", NamespaceBound))
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		elapsed.SetTime(elapsed.Now().Add(usageAge + time.Millisecond))
		g.Expect(inbox.Over()).To(BeEmpty())
		g.Expect(inbox.Push(ctx, a, messageItem("a", 5))).To(HaveField("Over", NoBound))
	})
}

// The age of the oldest message does not become shorter when earlier ones of its session are delivered.
func TestOldestMessage(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start
		inbox := openInbox(s, func() time.Time { return now }, InboxOptions{})
		g.Expect(inbox.Oldest(ctx)).To(BeZero())
		a, b := taken(t, s, "a", "ns", 1), taken(t, s, "b", "ns", 1)
		for n := range int64(3) {
			for _, taking := range []*Taking{a, b} {
				_, err := inbox.Push(ctx, taking, messageItem(taking.Record.SessionID, n+1))
				g.Expect(err).NotTo(HaveOccurred())
			}
			now = now.Add(time.Minute)
		}
		g.Expect(inbox.Oldest(ctx)).To(BeTemporally("==", claimtest.Start))
		for range 2 { // the first two of one session, then the first two of the other
			batch, err := inbox.Claim(ctx, delivery.KindMessage, 2, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(inbox.Ack(ctx, batch)).To(Succeed())
		}
		g.Expect(inbox.Oldest(ctx)).To(BeTemporally("==", claimtest.Start.Add(2*time.Minute)))
	})
}

func TestBounds(t *testing.T) {
	session := func(id, namespace string, bytes int64) SessionUsage {
		return SessionUsage{SessionID: id, Namespace: namespace, Messages: 1, Bytes: bytes}
	}
	bounds := Bounds{NamespaceBytes: 100, TotalBytes: 200}
	for _, row := range []struct {
		name string
		all  []SessionUsage
		want map[string]Bound
	}{
		{"nothing waits", nil, map[string]Bound{}},
		{"within all bounds", []SessionUsage{session("a1", "a", 100), session("b1", "b", 100)}, map[string]Bound{}},
		{"one namespace is over its bound", []SessionUsage{session("a1", "a", 40), session("a2", "a", 70), session("b1", "b", 60)}, map[string]Bound{"a2": NamespaceBound}},
		{"several sessions of it", []SessionUsage{session("a1", "a", 40), session("a2", "a", 55), session("a3", "a", 50), session("a4", "a", 5)},
			map[string]Bound{"a2": NamespaceBound, "a3": NamespaceBound}},
		{"twice the bound of a namespace: all that wait", []SessionUsage{session("a1", "a", 90), session("a2", "a", 105), session("a3", "a", 5)},
			map[string]Bound{"a1": NamespaceBound, "a2": NamespaceBound, "a3": NamespaceBound}},
		{"all together are over the bound: the namespace with the longest backlogs", []SessionUsage{
			session("a1", "a", 50), session("a2", "a", 45), session("b1", "b", 50), session("c1", "c", 70),
		}, map[string]Bound{"a1": TotalBound}},
		{"a namespace with many short backlogs is not spared", []SessionUsage{
			session("a1", "a", 32), session("a2", "a", 32), session("a3", "a", 32), session("b1", "b", 68), session("c1", "c", 61),
		}, map[string]Bound{"a1": TotalBound, "b1": TotalBound}},
	} {
		t.Run(row.name, func(t *testing.T) {
			NewWithT(t).Expect(bounds.compare(row.all).over).To(Equal(row.want))
		})
	}
}

// Laravel is away, and all sessions get messages until they are stopped: what waits stays within
// twice the bound, however many sessions and namespaces there are.
func TestABacklogOfManySessionsIsBounded(t *testing.T) {
	for name, row := range map[string]struct {
		namespaces, sessions int
		bounds               Bounds
	}{
		"one namespace":   {1, 500, Bounds{NamespaceBytes: 100_000, TotalBytes: 800_000}},
		"many namespaces": {50, 10, Bounds{NamespaceBytes: 100_000, TotalBytes: 800_000}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			var all []SessionUsage
			for n := range row.namespaces {
				for s := range row.sessions {
					all = append(all, SessionUsage{SessionID: fmt.Sprint(n, "-", s), Namespace: fmt.Sprint(n)})
				}
			}
			const message, rounds = 20, 1000
			for range rounds {
				u := row.bounds.compare(all)
				for i, s := range all {
					if u.over[s.SessionID] == NoBound {
						all[i].Bytes += message
					}
				}
			}
			u := row.bounds.compare(all)
			slack := int64(row.namespaces * row.sessions * message) // what comes between two readings
			g.Expect(u.total).To(BeNumerically("<=", 2*row.bounds.TotalBytes+slack))
			for _, bytes := range u.namespaces {
				g.Expect(bytes).To(BeNumerically("<=", 2*row.bounds.NamespaceBytes+slack))
			}
		})
	}
}

// The program before this one uses the tables of this one.
func TestARollBackOfTheInbox(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		inbox := NewInbox(s, InboxOptions{})
		_, err := inbox.Push(ctx, taken(t, s, "a", "ns", 1), messageItem("a", 1))
		g.Expect(err).NotTo(HaveOccurred())

		former := open(t, url)
		former.own = former.db.Child("whatsapp_operator_version", schema[:6], nil)
		g.Expect(former.Migrate(ctx)).To(Succeed())
		g.Expect(former.WaitForSchema(ctx)).To(Succeed())
		paired(t, former, "b", jidOf("4915100000001"))
		g.Expect(former.Clean(ctx)).To(Succeed())
		g.Expect(former.DeleteSession(ctx, "uid-a")).To(Succeed())

		g.Expect(s.Migrate(ctx)).To(Succeed())
		b, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{messageKey("a", 1)}), "what waited is delivered when this one is back")
	})
}

// A store of the former release gets the tables, and its sessions push.
func TestMigrationToTheInbox(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := make(t)
			before := open(t, url)
			before.migrateTo(t, 6)
			g.Expect(before.exec(ctx, "INSERT INTO whatsapp_operator_session (session_id, namespace, uid, created_at, updated_at) VALUES ('a', 'ns', 'uid-a', 0, 0)")).To(Succeed())
			s := open(t, url)
			g.Expect(s.SchemaReady(ctx)).To(BeFalse(), "a worker waits for the leader")
			g.Expect(s.Migrate(ctx)).To(Succeed())
			taking, err := s.Take(ctx, "uid-a", 1)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(NewInbox(s, InboxOptions{}).Push(ctx, taking, messageItem("a", 1))).To(HaveField("Waiting", BeEquivalentTo(1)))
		})
	}
}

// Sessions that are gone leave nothing in the inbox when their messages are delivered.
func TestHeadsOfGoneSessionsAreDeleted(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start
		inbox := openInbox(s, func() time.Time { now = now.Add(time.Millisecond); return now }, InboxOptions{})
		for _, id := range []string{"gone", "stays", "waits"} {
			_, err := inbox.Push(ctx, taken(t, s, id, "ns", 1), messageItem(id, 1))
			g.Expect(err).NotTo(HaveOccurred())
		}
		g.Expect(s.DeleteSession(ctx, "uid-gone")).To(Succeed())
		g.Expect(s.Clean(ctx)).To(Succeed())
		b, err := inbox.Claim(ctx, delivery.KindMessage, 2, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(Equal([]string{messageKey("gone", 1), messageKey("stays", 1)}), "Clean deletes nothing that waits")
		g.Expect(inbox.Ack(ctx, b)).To(Succeed())
		g.Expect(s.DeleteSession(ctx, "uid-waits")).To(Succeed())
		g.Expect(s.Clean(ctx)).To(Succeed())
		g.Expect(s.strings(ctx, "SELECT session_id FROM whatsapp_operator_inbox_head ORDER BY 1")).To(Equal([]string{"stays", "waits"}))
	})
}

// The claims of a leader find a session whose push got its time early and committed late.
func TestALateCommitIsFound(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	s := open(t, testenv.Postgres(t))
	g.Expect(s.Migrate(ctx)).To(Succeed())
	now := claimtest.Start
	pusher := openInbox(s, func() time.Time { return claimtest.Start }, InboxOptions{})
	leader := openInbox(s, func() time.Time { return now }, InboxOptions{})
	early, next := taken(t, s, "early", "ns", 1), taken(t, s, "next", "ns", 1)
	now = now.Add(time.Minute)
	_, err := leader.Push(ctx, next, messageItem("next", 1))
	g.Expect(err).NotTo(HaveOccurred())
	b, err := leader.Claim(ctx, delivery.KindMessage, 10, lease)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(keysOf(b)).To(Equal([]string{messageKey("next", 1)}))
	g.Expect(leader.from).To(BeNumerically(">", claimtest.Start.UnixMilli()))
	_, err = pusher.Push(ctx, early, messageItem("early", 1))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(leader.Backlog(ctx, delivery.KindMessage)).To(HaveField("Normal", 1))
	b, err = leader.Claim(ctx, delivery.KindMessage, 10, lease)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(keysOf(b)).To(Equal([]string{messageKey("early", 1)}))
}

// busySessions pushes messages of two sessions that are always due. Those of pusher are due a
// minute earlier, as those of a commit that was late; elapsed is the leader's clock.
func busySessions(t *testing.T, s *Store, now func() time.Time) (pusher, leader *Inbox, elapsed *clocktesting.FakePassiveClock) {
	t.Helper()
	pusher = openInbox(s, func() time.Time { return claimtest.Start }, InboxOptions{})
	leader = openInbox(s, now, InboxOptions{})
	elapsed = clocktesting.NewFakePassiveClock(start)
	leader.elapsed = elapsed
	for _, id := range []string{"busy1", "busy2"} {
		taking := taken(t, s, id, "ns", 1)
		for seq := range int64(20) {
			_, err := leader.Push(t.Context(), taking, messageItem(id, seq+1))
			NewWithT(t).Expect(err).NotTo(HaveOccurred())
		}
	}
	return pusher, leader, elapsed
}

// It is found also while busy sessions are always due, and what waits is read before each
// claim, as the flusher does.
func TestALateCommitIsFoundBehindBusySessions(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start.Add(time.Minute)
		pusher, leader, elapsed := busySessions(t, s, func() time.Time { return now })
		late := taken(t, s, "late", "ns", 1)
		var claimed []string
		for round := range 10 {
			g.Expect(leader.Backlog(ctx, delivery.KindMessage)).To(HaveField("Normal", BeNumerically(">", 0)))
			b, err := leader.Claim(ctx, delivery.KindMessage, 2, lease)
			g.Expect(err).NotTo(HaveOccurred())
			claimed = append(claimed, keysOf(b)...)
			g.Expect(leader.Ack(ctx, b)).To(Succeed())
			if round == 1 {
				g.Expect(leader.from).To(BeNumerically(">", claimtest.Start.UnixMilli()))
				_, err := pusher.Push(ctx, late, messageItem("late", 1))
				g.Expect(err).NotTo(HaveOccurred())
			}
			now = now.Add(rescanInterval / 2)
			elapsed.SetTime(elapsed.Now().Add(rescanInterval / 2))
		}
		g.Expect(claimed).To(ContainElement(messageKey("late", 1)))
	})
}

// While Laravel fails, the claims of stored batches read no sessions: they do not put off the
// reading that finds a late one.
func TestClaimsOfStoredBatchesReadNoSessions(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start.Add(time.Minute)
		pusher, leader, elapsed := busySessions(t, s, func() time.Time { return now })
		stored, err := leader.Claim(ctx, delivery.KindMessage, 2, lease)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = pusher.Push(ctx, taken(t, s, "late", "ns", 1), messageItem("late", 1))
		g.Expect(err).NotTo(HaveOccurred())
		for range 4 {
			elapsed.SetTime(elapsed.Now().Add(rescanInterval))
			g.Expect(leader.Release(ctx, stored, now)).To(Succeed())
			again, err := leader.Claim(ctx, delivery.KindMessage, 2, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(again.ID).To(Equal(stored.ID))
			stored = again
		}
		b, err := leader.Claim(ctx, delivery.KindMessage, 2, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(b)).To(ContainElement(messageKey("late", 1)))
	})
}

// Two leaders that claim at once get different messages, or one gets nothing; neither waits.
// Behind the sessions that another transaction has locked, a claim finds others, and the next
// claim finds those.
func TestClaimsOfBatchesAtOnce(t *testing.T) {
	for limit, others := range map[int]int{8: 5, 2: 2} {
		t.Run(fmt.Sprintf("up to %d messages", limit), func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := testenv.Postgres(t)
			s := open(t, url)
			g.Expect(s.Migrate(ctx)).To(Succeed())
			now := claimtest.Start
			clock := func() time.Time { now = now.Add(time.Second); return now }
			inbox := openInbox(s, clock, InboxOptions{})
			var keys []string
			for i := range 8 {
				id := claimtest.SessionName(i)
				_, err := inbox.Push(ctx, taken(t, s, id, "ns", 1), messageItem(id, 1))
				g.Expect(err).NotTo(HaveOccurred())
				keys = append(keys, messageKey(id, 1))
			}
			other := openInbox(open(t, url), clock, InboxOptions{})
			other.elapsed = clocktesting.NewFakePassiveClock(start)
			err := s.transaction(ctx, func(ctx context.Context) error {
				heads, _, _, err := inbox.lockDue(ctx, 3, 0)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(heads).To(HaveLen(3))
				b, err := other.Claim(t.Context(), delivery.KindMessage, limit, lease)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(b).NotTo(BeNil())
				g.Expect(keysOf(b)).To(Equal(keys[3 : 3+others]))
				return nil
			})
			g.Expect(err).NotTo(HaveOccurred())
			b, err := other.Claim(ctx, delivery.KindMessage, 3, lease)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(keysOf(b)).To(Equal(keys[:3]))
		})
	}
}

// The clock of the database is set back by hours: what waits, and what is claimed, does not wait
// for hours.
func TestTheClockIsSetBack(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		now := claimtest.Start
		inbox := openInbox(s, func() time.Time { return now }, InboxOptions{})
		a, b := taken(t, s, "a", "ns", 1), taken(t, s, "b", "ns", 1)
		_, err := inbox.Push(ctx, a, messageItem("a", 1))
		g.Expect(err).NotTo(HaveOccurred())
		claimed, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = inbox.Push(ctx, b, messageItem("b", 1))
		g.Expect(err).NotTo(HaveOccurred())

		now = now.Add(-5 * time.Hour)
		inbox = openInbox(s, func() time.Time { return now }, InboxOptions{})
		g.Expect(inbox.Backlog(ctx, delivery.KindMessage)).To(Equal(delivery.Backlog{
			Normal: 1, NormalSince: now, Waiting: 1, InFlight: 1, Unfinished: 1, Claimable: 1,
		}))
		again, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again.ID).To(Equal(claimed.ID))
		next, err := inbox.Claim(ctx, delivery.KindMessage, 10, lease)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keysOf(next)).To(Equal([]string{messageKey("b", 1)}))
	})
}
