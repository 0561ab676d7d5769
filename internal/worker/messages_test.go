package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// pushes is an account that keeps what was pushed.
type pushes struct {
	account
	items []delivery.Item
	over  string
	errs  []error // those of the next pushes
}

func (p *pushes) push(_ context.Context, item delivery.Item) (string, error) {
	if len(p.errs) > 0 {
		err := p.errs[0]
		if p.errs = p.errs[1:]; err != nil {
			return "", err
		}
	}
	p.items = append(p.items, item)
	return p.over, nil
}

// messagesTotal is the value of the metric with that outcome.
func messagesTotal(g *WithT, outcome string) float64 {
	families, err := metrics.Registry.Gather()
	g.Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() != "whatsapp_operator_worker_messages_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == outcome {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestAccept(t *testing.T) {
	text := func(class delivery.MessageClass) delivery.MessageItem {
		return delivery.MessageItem{SessionID: "shop", Key: "k", Type: delivery.TypeText, Text: "hello", Class: class}
	}
	away := errors.New("the database is away")
	for name, row := range map[string]struct {
		item    delivery.MessageItem
		ignore  []v1alpha1.IgnoredMessages
		drop    bool
		over    string
		errs    []error
		want    error
		stored  int
		payload string
		outcome string // in the metric; empty: stored
	}{
		"a message is stored":       {item: text(""), stored: 1, payload: `"text":"hello"`},
		"ignored":                   {outcome: "ignored", item: text(delivery.ClassGroups), ignore: []v1alpha1.IgnoredMessages{v1alpha1.IgnoreGroups}},
		"another class is ignored":  {item: text(delivery.ClassGroups), ignore: []v1alpha1.IgnoredMessages{v1alpha1.IgnoreStatus}, stored: 1},
		"no class, and all ignored": {item: text(""), ignore: []v1alpha1.IgnoredMessages{v1alpha1.IgnoreStatus, v1alpha1.IgnoreChannels, v1alpha1.IgnoreGroups, v1alpha1.IgnoreBroadcasts}, stored: 1},
		"nobody is there to get it": {outcome: "dropped", item: text(""), drop: true},
		"refused":                   {outcome: "refused", item: text(""), errs: []error{away}, want: away},
		"over a bound":              {item: text(""), over: "Session", stored: 1, want: whatsapp.ErrBacklog},
		"what the inbox can never store is replaced by what identifies it": {
			item: text(""), errs: []error{ErrInvalidMessage}, stored: 1, payload: `"type":"unsupported"`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			p := &pushes{account: account{starts: 3}, over: row.over, errs: row.errs}
			m := &messages{push: p.push, epoch: 100, first: delivery.FirstSeq(3), drop: row.drop}
			m.observe(newSession(func(s *v1alpha1.WhatsAppSession) {
				s.Spec.Messages.Ignore, s.Spec.Metadata = row.ignore, map[string]string{"tenant": "a"}
			}))
			outcome := cmp.Or(row.outcome, "stored")
			before := messagesTotal(g, outcome)
			err := m.accept(t.Context(), row.item)
			g.Expect(messagesTotal(g, outcome)-before).To(Equal(1.0), "it is counted")
			if row.want == nil {
				g.Expect(err).NotTo(HaveOccurred())
			} else {
				g.Expect(err).To(MatchError(row.want))
			}
			g.Expect(p.items).To(HaveLen(row.stored))
			for _, item := range p.items {
				g.Expect(item.Key).To(Equal("k"))
				g.Expect(item.SessionID).To(Equal("shop"))
				g.Expect(item.Numbers).To(Equal(delivery.Numbers{Epoch: 100, Seq: delivery.FirstSeq(3) + 1}))
				g.Expect(string(item.Payload)).To(And(ContainSubstring(row.payload), ContainSubstring(`"metadata":{"tenant":"a"}`)))
			}
		})
	}
}

// The numbers of a session's messages rise without gaps, and no two messages have the same one.
// The database may have stored a message although it was refused.
func TestNumbersOfMessages(t *testing.T) {
	const refused = true
	type arrival struct {
		key     string
		refused bool
	}
	text := func(key string, refused bool) arrival { return arrival{key, refused} }
	for name, row := range map[string]struct {
		arrivals []arrival
		want     []int64 // of all attempts
	}{
		"all are stored": {[]arrival{text("a", !refused), text("b", !refused), text("c", !refused)}, []int64{1, 2, 3}},
		"a refused one gets its number when it comes again": {[]arrival{text("a", !refused), text("b", refused), text("b", refused), text("b", !refused), text("c", !refused)}, []int64{1, 2, 2, 2, 3}},
		"another one does not get it":                       {[]arrival{text("a", refused), text("b", !refused), text("c", !refused)}, []int64{1, 2, 3}},
		"nor does a placeholder of it":                      {[]arrival{text("a", refused), text("a?", !refused), text("b", !refused)}, []int64{1, 2, 3}},
		"several are refused":                               {[]arrival{text("a", refused), text("b", refused), text("b", !refused), text("c", !refused)}, []int64{1, 2, 2, 3}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			var numbers []int64
			var err error
			m := &messages{epoch: 100, first: delivery.FirstSeq(1), push: func(_ context.Context, item delivery.Item) (string, error) {
				numbers = append(numbers, item.Seq-delivery.FirstSeq(1))
				return "", err
			}}
			m.observe(newSession())
			for _, a := range row.arrivals {
				item := delivery.MessageItem{Key: strings.TrimSuffix(a.key, "?"), Type: delivery.TypeText}
				if item.Key != a.key {
					item.Type = delivery.TypeUndecryptable
				}
				if err = nil; a.refused {
					err = errors.New("the database is away")
				}
				g.Expect(m.accept(t.Context(), item) != nil).To(Equal(a.refused))
			}
			g.Expect(numbers).To(Equal(row.want))
		})
	}
}

// What spec.messages.ignore says counts at once, also on a connection that is open.
func TestIgnoreChangesWhileConnected(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	var accept func(context.Context, delivery.MessageItem) error
	st.locked(func() { accept = st.accept })
	group := delivery.MessageItem{Key: "k", Type: delivery.TypeText, Class: delivery.ClassGroups}
	st.Expect(accept(t.Context(), group)).To(Succeed())
	st.Expect(st.pushedItems()).To(HaveLen(1))
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Generation++
		s.Spec.Messages.Ignore = []v1alpha1.IgnoredMessages{v1alpha1.IgnoreGroups}
	})
	st.Eventually(func() int {
		before := len(st.pushedItems())
		st.Expect(accept(t.Context(), group)).To(Succeed())
		return len(st.pushedItems()) - before
	}).Should(BeZero())
	st.Expect(st.dialCount()).To(Equal(1), "the connection stays")
}

func TestASessionWaitsForTheInbox(t *testing.T) {
	for reason, row := range map[string]struct {
		condition string
		ready     func(*fakeInbox)
	}{
		session.EndInboxUnavailable: {v1alpha1.ReasonInboxUnavailable, func(i *fakeInbox) { i.probeErr = nil }},
		session.EndStoreFailed:      {v1alpha1.ReasonReconnecting, func(i *fakeInbox) { i.probeErr = nil }},
		session.EndBacklog:          {v1alpha1.ReasonBacklog, func(i *fakeInbox) { i.room = true }},
	} {
		t.Run(reason, func(t *testing.T) {
			st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone}, func(env *environment) {
				env.inbox.probeErr, env.pushOver = errDown, "Session"
			})
			st.connect()
			if reason == session.EndBacklog {
				var accept func(context.Context, delivery.MessageItem) error
				st.locked(func() { accept = st.accept })
				st.Expect(accept(t.Context(), delivery.MessageItem{Key: "k", Type: delivery.TypeText})).To(MatchError(whatsapp.ErrBacklog))
			}
			st.emit(session.Event{Type: session.EventDisconnected, Reason: reason, Ours: true})
			st.eventuallyPhase(v1alpha1.PhaseDisconnected)
			st.Eventually(func() string {
				for _, c := range st.status().Conditions {
					if c.Type == v1alpha1.ConditionConnected {
						return c.Reason
					}
				}
				return ""
			}).Should(Equal(row.condition))
			asked := func() int {
				var n int
				st.locked(func() { n = st.inbox.asked })
				return n
			}
			for range 5 { // it is asked each second, for longer than any backoff
				before := asked()
				st.Eventually(func() int {
					st.clock.Step(time.Minute)
					return asked()
				}).Should(BeNumerically(">", before))
			}
			st.Expect(st.dialCount()).To(Equal(1))
			st.Expect(st.publishedStates()).To(ContainElement("pending/Disconnected"))

			st.locked(func() { row.ready(&st.inbox) })
			st.Eventually(func() int {
				st.clock.Step(time.Second)
				return st.dialCount()
			}).Should(Equal(2))
			st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
			st.eventuallyPhase(v1alpha1.PhaseConnected)
			if reason == session.EndBacklog {
				st.locked(func() { st.Expect(st.inbox.bound).To(Equal("Session")) })
			}
			st.Expect(st.logins).NotTo(BeEmpty(), "through the limiter")
		})
	}
}

// A session that is started again by a person awaits nothing any more: the database is asked no
// more questions for it.
func TestNothingIsAwaitedAfterARestart(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone}, func(env *environment) { env.inbox.probeErr = errDown })
	st.connect()
	st.emit(session.Event{Type: session.EventDisconnected, Reason: session.EndInboxUnavailable, Ours: true})
	waiting := func() int { return len(st.s.Inbox.all()) }
	st.Eventually(waiting).Should(Equal(1))
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "1"}
	})
	st.Eventually(waiting).Should(BeZero())
	st.eventuallyDials(2)
}

// One question for the whole worker answers all its sessions.
func TestOneProbeForAllSessions(t *testing.T) {
	g := NewWithT(t)
	clk := clocktesting.NewFakeClock(noon)
	inbox := &environment{}
	inbox.inbox.probeErr = errDown
	health := NewHealth(clk, testr.New(t))
	w := newInboxWatch(inbox, health, clk, testr.New(t))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); w.run(ctx) }()
	defer func() { cancel(); <-ended }()
	sessions := make([]*supervisor, 10)
	for i := range sessions {
		sessions[i] = &supervisor{uid: types.UID(fmt.Sprint(i)), inbox: make(chan func(), 1), finished: make(chan struct{})}
		w.await(sessions[i], awaited{reason: session.EndInboxUnavailable})
	}
	asked := func() (n int) {
		inbox.locked(func() { n = inbox.inbox.asked })
		return n
	}
	g.Eventually(func() bool {
		failing, _ := health.Failing()
		return failing
	}).Should(BeTrue(), "the manager must know that this worker cannot store messages")
	inbox.locked(func() { inbox.inbox.probeErr = nil })
	before := asked()
	g.Eventually(func() int {
		clk.Step(inboxInterval)
		return len(w.all())
	}).Should(BeZero())
	g.Expect(asked()).To(BeNumerically("<=", before+2))
	for _, s := range sessions {
		g.Eventually(s.inbox).Should(Receive())
	}
	failing, _ := health.Failing()
	g.Expect(failing).To(BeFalse())
}
