package app

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// What a holder pushes reaches Laravel through the manager. What Laravel rejects is listed, and
// replayed, by the commands.
func TestMessagesReachLaravel(t *testing.T) {
	s := newEnvironment(t, testenv.Postgres(t))
	var works atomic.Bool
	s.laravel.AnswerWith(func(r laraveltest.Request) laraveltest.Answer {
		for _, item := range r.Items {
			if item.Message.Key == "k2" && !works.Load() {
				return laraveltest.AcceptExceptMessages("no such contact", item.Message)
			}
		}
		return laraveltest.Accept()
	})
	s.manager()

	ctx := t.Context()
	opened, err := store.Open(ctx, store.Config{URL: s.store}, logr.Discard())
	s.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { s.Expect(opened.Close()).To(Succeed()) })
	s.Eventually(func() (bool, error) { return opened.SchemaReady(ctx) }).Should(BeTrue())
	_, err = opened.Claim(ctx, store.Claimant{SessionID: "shop", Namespace: s.namespace, UID: "u"}, func(context.Context, string) (bool, error) { return false, nil })
	s.Expect(err).NotTo(HaveOccurred())
	taking, err := opened.Take(ctx, "u", 1)
	s.Expect(err).NotTo(HaveOccurred())
	inbox := store.NewInbox(opened, store.InboxOptions{})
	for n := range int64(3) {
		message := laraveltest.Message{SessionID: "shop", Key: fmt.Sprint("k", n+1), Text: "hello", Numbers: delivery.Numbers{Epoch: 1, Seq: n + 1}}
		payload, err := json.Marshal(message)
		s.Expect(err).NotTo(HaveOccurred())
		_, err = inbox.Push(ctx, taking, delivery.Item{SessionID: "shop", Key: message.Key, Numbers: message.Numbers, Payload: payload})
		s.Expect(err).NotTo(HaveOccurred())
	}
	keys := func() (keys []string) {
		for _, m := range s.laravel.Messages("shop") {
			keys = append(keys, m.Key)
		}
		return keys
	}
	s.Eventually(keys).Should(Equal([]string{"k1", "k3"}))

	command := func(args ...string) string {
		p := s.start("deadletter", append(args, s.common()...)...)
		s.Eventually(p.Done()).Should(BeClosed())
		return p.output()
	}
	s.Expect(command("list", "--kind=message")).To(MatchRegexp(`m1 +message +shop .* Rejected +no such contact`))
	works.Store(true)
	s.Expect(command("replay", "m1")).To(MatchRegexp(`m1 +message +shop +replayed`))
	s.Eventually(keys).Should(Equal([]string{"k1", "k3", "k2"}))
	s.Expect(command("list")).NotTo(ContainSubstring("m1 "))
}
