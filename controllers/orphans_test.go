package controllers

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func liveSessions(sessions ...*v1alpha1.WhatsAppSession) LiveSessions {
	live := LiveSessions{terminating: map[types.UID]bool{}, ids: map[string]bool{}}
	for _, s := range sessions {
		live.add(s)
	}
	return live
}

func TestCompareKeys(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	record := func(state KeyState) KeyRecord {
		return KeyRecord{SessionID: "Shop", Namespace: "a", UID: "u", State: state}
	}
	object := func(namespace, id, uid string, terminating bool) *v1alpha1.WhatsAppSession {
		s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "any", UID: types.UID(uid)}}
		s.Spec.SessionID = id
		if terminating {
			s.DeletionTimestamp = &metav1.Time{Time: now}
		}
		return s
	}
	missing := func(d time.Duration) KeyState { return KeyState{Missing: ago(d)} }
	for name, tt := range map[string]struct {
		state KeyState
		live  []*v1alpha1.WhatsAppSession
		want  KeyState
	}{
		"its session exists":                            {live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", false)}},
		"its session is gone":                           {want: KeyState{Missing: now}},
		"gone for less than a day":                      {state: missing(orphanGrace - 1), want: missing(orphanGrace - 1)},
		"gone for a day":                                {state: missing(orphanGrace), want: KeyState{Orphaned: now}},
		"an orphan stays one":                           {state: KeyState{Orphaned: ago(time.Hour)}, want: KeyState{Orphaned: ago(time.Hour)}},
		"a retained record is not an orphan":            {state: KeyState{Retained: ago(100 * orphanGrace)}, want: KeyState{Retained: ago(100 * orphanGrace)}},
		"the session is back":                           {state: missing(time.Hour), live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", false)}},
		"restored from a backup after it was an orphan": {state: KeyState{Orphaned: ago(time.Hour)}, live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", false)}},
		"retained by a migration, and in use":           {state: KeyState{Retained: ago(time.Hour)}, live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", false)}},
		"applied again, not claimed yet":                {state: missing(time.Hour), live: []*v1alpha1.WhatsAppSession{object("a", "shop", "u2", false)}},
		"retained, applied again, not claimed yet":      {state: KeyState{Retained: ago(time.Hour)}, live: []*v1alpha1.WhatsAppSession{object("a", "shop", "u2", false)}, want: KeyState{Retained: ago(time.Hour)}},
		"an orphan, applied again, not claimed yet":     {state: KeyState{Orphaned: ago(time.Hour)}, live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u2", false)}, want: KeyState{Orphaned: ago(time.Hour)}},
		"another namespace has the id":                  {live: []*v1alpha1.WhatsAppSession{object("b", "Shop", "u2", false)}, want: KeyState{Missing: now}},
		"its deletion has retained the keys":            {state: KeyState{Retained: ago(1)}, live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", true)}, want: KeyState{Retained: ago(1)}},
		"its deletion has left an orphan":               {state: KeyState{Orphaned: ago(1)}, live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", true)}, want: KeyState{Orphaned: ago(1)}},
		"it is being deleted":                           {live: []*v1alpha1.WhatsAppSession{object("a", "Shop", "u", true)}},
		"missing since a time in the future":            {state: KeyState{Missing: now.Add(1000 * time.Hour)}, want: KeyState{Missing: now}},
		"missing since a time within the tolerance":     {state: KeyState{Missing: now.Add(clockTolerance)}, want: KeyState{Missing: now.Add(clockTolerance)}},
		"orphaned at a time in the future":              {state: KeyState{Orphaned: now.Add(1000 * time.Hour)}, want: KeyState{Orphaned: now}},
		"missing, orphaned and retained by mistake":     {state: KeyState{Missing: ago(2 * orphanGrace), Retained: ago(1)}, want: KeyState{Missing: ago(2 * orphanGrace), Retained: ago(1)}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			r := record(tt.state)
			c := CompareKeys([]KeyRecord{r}, liveSessions(tt.live...), now, false)
			if tt.want == tt.state {
				g.Expect(c.Moves).To(BeEmpty())
			} else {
				g.Expect(c.Moves).To(Equal([]KeyMove{{KeyRecord: r, To: tt.want}}))
			}
			g.Expect(c.InUse + c.Missing + c.Orphaned + c.Retained).To(Equal(1))
		})
	}
}

func TestCompareKeysOfManyMissingSessions(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		records, missing, recent int // recent: marked in the last hour
		implausible              bool
	}{
		{records: 10, missing: 10},
		{records: 11, missing: 11, implausible: true},
		{records: 500, missing: 10},
		{records: 500, missing: 11, implausible: true},
		{records: 10_000, missing: 200},
		{records: 10_000, missing: 201, implausible: true},
		{records: 10_000, missing: 100, recent: 100},
		{records: 10_000, missing: 100, recent: 101, implausible: true},
		{records: 10_000, missing: 10_000, implausible: true},
	} {
		t.Run(fmt.Sprintf("%d and %d of %d", tt.missing, tt.recent, tt.records), func(t *testing.T) {
			g := NewWithT(t)
			var records []KeyRecord
			var sessions []*v1alpha1.WhatsAppSession
			for i := range tt.records {
				r := KeyRecord{SessionID: fmt.Sprint("s", i), Namespace: "a", UID: types.UID(fmt.Sprint("u", i))}
				switch {
				case i < tt.missing:
				case i < tt.missing+tt.recent:
					r.State.Missing = now.Add(-orphanWindow + 1)
				default:
					s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: r.SessionID, UID: r.UID}}
					sessions = append(sessions, s)
				}
				records = append(records, r)
			}
			// One has been missing for a day, and one is back; the latter always changes.
			records = append(records, KeyRecord{SessionID: "old", Namespace: "a", UID: "old", State: KeyState{Missing: now.Add(-orphanGrace)}},
				KeyRecord{SessionID: "back", Namespace: "a", UID: "back", State: KeyState{Missing: now.Add(-orphanGrace)}})
			sessions = append(sessions, &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "back", UID: "back"}})
			c := CompareKeys(records, liveSessions(sessions...), now, false)
			g.Expect(c.Implausible).To(Equal(tt.implausible), "allowed: %d", c.Allowed)
			if tt.implausible {
				g.Expect(c.Moves).To(HaveExactElements(HaveField("UID", types.UID("back"))))
			} else {
				g.Expect(c.Moves).To(HaveLen(tt.missing + 2))
			}
			confirmed := CompareKeys(records, liveSessions(sessions...), now, true)
			g.Expect(confirmed.Implausible).To(BeFalse())
			g.Expect(confirmed.Moves).To(HaveLen(tt.missing + 2))

			after := slices.Clone(records)
			for i := range after {
				for _, m := range confirmed.Moves {
					if m.UID == after[i].UID {
						after[i].State = m.To
					}
				}
			}
			c = CompareKeys(after, liveSessions(sessions...), now.Add(orphanInterval), false)
			g.Expect(c.Implausible).To(BeFalse(), "the manager does not doubt what a person has confirmed")
		})
	}
}

// keys is a store in memory.
type keys struct {
	mu      sync.Mutex
	records []KeyRecord
}

func (k *keys) KeyRecords(context.Context) ([]KeyRecord, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]KeyRecord(nil), k.records...), nil
}

func (k *keys) Move(_ context.Context, moves []KeyMove) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range moves {
		for i := range k.records {
			if k.records[i] == m.KeyRecord {
				k.records[i].State = m.To
			}
		}
	}
	return nil
}

func (k *keys) states() map[string]KeyState {
	k.mu.Lock()
	defer k.mu.Unlock()
	states := map[string]KeyState{}
	for _, r := range k.records {
		states[r.SessionID] = r.State
	}
	return states
}

// The finalizer of a session was removed by hand.
func TestKeysBecomeOrphansWhenTheFinalizerWasRemoved(t *testing.T) {
	g := NewWithT(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	namespace := newEnv(t).namespace("orphans-")
	store := &keys{}
	for i := range 3 {
		s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("s", i)}}
		g.Expect(k8s.Create(ctx, s)).To(Succeed())
		store.records = append(store.records, KeyRecord{SessionID: s.Name, Namespace: namespace, UID: s.UID})
	}
	clock := clocktesting.NewFakeClock(time.Now().Truncate(time.Second))
	compared := make(chan KeyComparison, 100)
	orphans := &Orphans{Store: store, Reader: k8s, Clock: clock, Log: logr.Discard(), Compared: func(c KeyComparison) { compared <- c }}
	ended := make(chan error, 1)
	go func() { ended <- orphans.Start(ctx) }()
	round := func() (c KeyComparison) {
		g.Eventually(clock.HasWaiters).Should(BeTrue())
		clock.Step(orphanInterval)
		g.Eventually(compared, "30s").Should(Receive(&c))
		return c
	}
	var c KeyComparison
	g.Eventually(compared, "30s").Should(Receive(&c))
	g.Expect(c.InUse).To(Equal(3))

	gone := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "s1"}}
	g.Expect(k8s.Delete(ctx, gone)).To(Succeed())
	c = round()
	since := clock.Now()
	g.Expect(c.Missing).To(Equal(1))
	g.Expect(store.states()).To(HaveKeyWithValue("s1", KeyState{Missing: since}))
	g.Expect(store.states()).To(HaveKeyWithValue("s0", KeyState{}))
	for clock.Now().Before(since.Add(orphanGrace - orphanInterval)) {
		round()
	}
	g.Expect(store.states()).To(HaveKeyWithValue("s1", KeyState{Missing: since}))
	c = round()
	g.Expect(c.Orphaned).To(Equal(1))
	g.Expect(store.states()).To(HaveKeyWithValue("s1", KeyState{Orphaned: clock.Now()}))
	cancel()
	g.Eventually(ended).Should(Receive(BeNil()))
}

func TestTooManyOrphansAreReportedOnce(t *testing.T) {
	g := NewWithT(t)
	store := &keys{}
	for i := range 11 {
		store.records = append(store.records, KeyRecord{SessionID: fmt.Sprint("gone", i), Namespace: "nowhere", UID: types.UID(fmt.Sprint("gone", i))})
	}
	var messages []string
	orphans := &Orphans{
		Store: store, Reader: k8s, Clock: clocktesting.NewFakeClock(time.Now()), Log: logr.Discard(),
		Implausible: func(message string) { messages = append(messages, message) },
	}
	for range 3 {
		g.Expect(orphans.compare(t.Context())).To(Succeed())
	}
	g.Expect(messages).To(HaveExactElements(And(ContainSubstring("11 of 11 records"), ContainSubstring("store orphans --confirm"))))
	for _, state := range store.states() {
		g.Expect(state).To(BeZero())
	}
}
