package app

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

// fakeDeadLetterQueue holds dead letters in memory. Those of the session "old" are superseded.
type fakeDeadLetterQueue struct{ kept []delivery.DeadLetter }

func (f *fakeDeadLetterQueue) DeadLetters(_ context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error {
	for _, l := range f.kept {
		if l.Kind == kind && !visit(l) {
			break
		}
	}
	return nil
}

func (f *fakeDeadLetterQueue) Replay(ctx context.Context, kind delivery.Kind, id string) (delivery.ReplayResult, error) {
	if slices.ContainsFunc(f.kept, func(l delivery.DeadLetter) bool { return l.ID == id && l.SessionID == "old" }) {
		return delivery.Superseded, nil
	}
	_, err := f.Drop(ctx, kind, id)
	return delivery.Replayed, err
}

func (f *fakeDeadLetterQueue) Drop(_ context.Context, kind delivery.Kind, ids ...string) (int, error) {
	before := len(f.kept)
	f.kept = slices.DeleteFunc(f.kept, func(l delivery.DeadLetter) bool { return l.Kind == kind && slices.Contains(ids, l.ID) })
	return before - len(f.kept), nil
}

// A dead letter that was replayed is reported as replayed, also when Redis cannot wake the flusher
// any more: a second attempt would not find it.
func TestReplayWithoutAWakeUp(t *testing.T) {
	g := NewWithT(t)
	letters := &fakeDeadLetterQueue{kept: []delivery.DeadLetter{{ID: "m7", Kind: delivery.KindMessage, SessionID: "shop", Key: "4f0c"}}}
	client := goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1"})
	g.Expect(client.Close()).To(Succeed())
	var logged []string
	all := &allDeadLetters{
		log:      funcr.New(func(_, args string) { logged = append(logged, args) }, funcr.Options{}),
		states:   batch.NewQueue(client, redis.Keys{}, clock.RealClock{}, batch.Options{}),
		messages: letters,
	}
	out := &bytes.Buffer{}
	g.Expect(replayDeadLetters(t.Context(), all, &deadLetterFilter{kind: "message", ids: []string{"m7"}}, out)).To(Succeed())
	g.Expect(out.String()).To(MatchRegexp(`m7 +message +shop +replayed`))
	g.Expect(logged).To(HaveExactElements(ContainSubstring("Failed to wake the flusher")))
}

func TestDeadLetterCommands(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	queue := &fakeDeadLetterQueue{}
	for i, session := range []string{"shop", "old", "shop"} {
		kind := delivery.KindStatus
		if i == 2 {
			kind = delivery.KindQR
		}
		queue.kept = append(queue.kept, delivery.DeadLetter{
			ID: fmt.Sprintf("%d-0", i), Kind: kind, At: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), SessionID: session,
			BatchID: "msg_1", Reason: delivery.RefusedAlone, Answer: "422 no such tenant", Payload: json.RawMessage(`{"phase":"Connected"}`),
		})
	}
	run := func(what func(context.Context, deadLetterQueue, *deadLetterFilter, *bytes.Buffer) error, f deadLetterFilter) string {
		out := &bytes.Buffer{}
		if err := what(ctx, queue, &f, out); err != nil {
			return "error: " + err.Error()
		}
		return out.String()
	}
	list := func(ctx context.Context, q deadLetterQueue, f *deadLetterFilter, out *bytes.Buffer) error {
		return listDeadLetters(ctx, q, f, out)
	}
	show := func(ctx context.Context, q deadLetterQueue, f *deadLetterFilter, out *bytes.Buffer) error {
		return showDeadLetters(ctx, q, f, out)
	}
	replay := func(ctx context.Context, q deadLetterQueue, f *deadLetterFilter, out *bytes.Buffer) error {
		return replayDeadLetters(ctx, q, f, out)
	}
	drop := func(ctx context.Context, q deadLetterQueue, f *deadLetterFilter, out *bytes.Buffer) error {
		return dropDeadLetters(ctx, q, f, out)
	}

	queue.kept = append(queue.kept, delivery.DeadLetter{
		ID: "m7", Kind: delivery.KindMessage, At: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), SessionID: "shop", Key: "4f0c",
		BatchID: "msg_2", Reason: delivery.RejectedByName, Answer: "no such contact", Payload: json.RawMessage(`{"text":"hello"}`),
	})
	g.Expect(run(list, deadLetterFilter{kind: "message"})).To(And(MatchRegexp(`m7 +message +shop +2026-03-01T12:00:00Z +Rejected +no such contact`), Not(ContainSubstring("0-0"))))
	g.Expect(run(show, deadLetterFilter{ids: []string{"m7"}})).To(And(MatchRegexp(`key: +4f0c`), ContainSubstring(`"text": "hello"`)))
	without := deadLetterFilter{withoutMessages: true}
	g.Expect(run(list, without)).To(And(ContainSubstring("0-0"), Not(ContainSubstring("m7"))))
	without.ids = []string{"m7"}
	g.Expect(run(show, without)).To(ContainSubstring("set --store"))
	without.kind = "message"
	g.Expect(run(list, without)).To(ContainSubstring("set --store"))
	g.Expect(run(replay, deadLetterFilter{ids: []string{"m7"}})).To(MatchRegexp(`m7 +message +shop +replayed`))

	g.Expect(run(list, deadLetterFilter{})).To(And(
		MatchRegexp(`ID +KIND +SESSION-ID +SINCE +REASON +ANSWER`), MatchRegexp(`0-0 +status +shop +2026-03-01T12:00:00Z +Refused +422 no such tenant`), ContainSubstring("2-0")))
	g.Expect(run(list, deadLetterFilter{kind: "qr"})).To(And(ContainSubstring("2-0"), Not(ContainSubstring("0-0"))))
	g.Expect(run(list, deadLetterFilter{sessionID: "old"})).To(And(ContainSubstring("1-0"), Not(ContainSubstring("2-0"))))
	g.Expect(run(list, deadLetterFilter{kind: "status,qr"})).To(ContainSubstring("choose one of"))
	g.Expect(run(show, deadLetterFilter{ids: []string{"0-0"}})).To(And(ContainSubstring(`"phase": "Connected"`), ContainSubstring("no such tenant")))
	g.Expect(run(show, deadLetterFilter{ids: []string{"9-9"}})).To(ContainSubstring("there is no dead letter"))
	g.Expect(run(replay, deadLetterFilter{})).To(ContainSubstring("no dead letter is named"))
	g.Expect(run(drop, deadLetterFilter{})).To(ContainSubstring("no dead letter is named"))
	g.Expect(run(drop, deadLetterFilter{ids: []string{"0-0", "9-9"}})).To(ContainSubstring("there is no dead letter"))
	g.Expect(queue.kept).To(HaveLen(3), "a mistaken id drops nothing")

	g.Expect(run(replay, deadLetterFilter{all: true})).To(And(
		MatchRegexp(`0-0 +status +shop +replayed`), MatchRegexp(`1-0 +status +old +not replayed, superseded`), MatchRegexp(`2-0 +qr +shop +replayed`)))
	g.Expect(queue.kept).To(HaveLen(1))
	g.Expect(run(drop, deadLetterFilter{sessionID: "old"})).To(Equal("dropped 1\n"))
	g.Expect(queue.kept).To(BeEmpty())
}
