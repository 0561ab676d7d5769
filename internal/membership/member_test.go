package membership

import (
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func member() Member {
	return Member{
		Release: "main", Name: "worker-a", Incarnation: "k3x9", Pool: "blue", Revision: 7, Format: Format,
		Capacity: 1000, Load: 12, Tokens: 200, StoreConnections: 8, Draining: true,
		WhatsAppFailing: true, DropsMessages: true, AcquireTime: time.Date(2026, 5, 4, 2, 2, 1, 123456000, time.UTC),
		RenewTime: time.Date(2026, 5, 4, 3, 2, 1, 123456000, time.UTC), Duration: 15 * time.Second,
	}
}

func encode(m Member) *coordinationv1.Lease {
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: LeaseName(m.Release, m.Name)}}
	m.Into(l)
	return l
}

func TestAMemberIsReadAsItWasWritten(t *testing.T) {
	g := NewWithT(t)
	l := encode(member())
	back, err := FromLease(l)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(back).To(Equal(member()))
	g.Expect(*l.Spec.HolderIdentity).To(Equal("worker-a/k3x9"))
	g.Expect(l.Labels).To(HaveKeyWithValue(v1alpha1.PoolLabel, "blue"))
}

func TestIntoKeepsUnknownLabelsAndAnnotations(t *testing.T) {
	g := NewWithT(t)
	annotations := map[string]string{"whatsapp-operator.io/shoe-size": "44", "whatsapp-operator.io/load": "1"}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
		Name: LeaseName("main", "worker-a"), Annotations: annotations, Labels: map[string]string{"team": "x"},
	}}
	member().Into(l)
	g.Expect(l.Annotations).To(HaveKeyWithValue("whatsapp-operator.io/shoe-size", "44"))
	g.Expect(l.Annotations).To(HaveKeyWithValue("whatsapp-operator.io/load", "12"))
	g.Expect(l.Labels).To(HaveKeyWithValue("team", "x"))
	g.Expect(annotations).To(HaveLen(2), "the original maps may belong to a cache and must not change")
}

func TestFromLease(t *testing.T) {
	tests := []struct {
		name   string
		change func(l *coordinationv1.Lease)
		want   func(m *Member)
		err    string
	}{
		{name: "a worker", change: func(*coordinationv1.Lease) {}, want: func(*Member) {}},
		{
			name:   "no pool is the default pool",
			change: func(l *coordinationv1.Lease) { delete(l.Labels, v1alpha1.PoolLabel) },
			want:   func(m *Member) { m.Pool = v1alpha1.DefaultPool },
		},
		{
			name:   "a newer format is read as far as it is known",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationFormat] = "7" },
			want:   func(m *Member) { m.Format = 7 },
		},
		{
			name:   "an older worker does not report its connections to the database",
			change: func(l *coordinationv1.Lease) { delete(l.Annotations, annotationConns) },
			want:   func(m *Member) { m.StoreConnections = 0 },
		},
		{
			name: "an older format does not have the newer fields: their values are those of an earlier process",
			change: func(l *coordinationv1.Lease) {
				l.Annotations[annotationFormat] = "1"
				l.Annotations[annotationStore] = failing
			},
			want: func(m *Member) {
				m.Format, m.AcquireTime, m.WhatsAppFailing, m.DropsMessages = 1, time.Time{}, false, false
			},
		},
		{
			name:   "a worker of the format before drops nothing, whatever an earlier process has left",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationFormat] = "2" },
			want:   func(m *Member) { m.Format, m.DropsMessages = 2, false },
		},
		{
			name: "a new worker that does not report what it reaches",
			change: func(l *coordinationv1.Lease) {
				delete(l.Annotations, annotationStore)
				delete(l.Annotations, annotationWhatsApp)
				l.Spec.AcquireTime = nil
			},
			want: func(m *Member) { m.AcquireTime, m.WhatsAppFailing = time.Time{}, false },
		},
		{
			name: "an unknown value, of a newer version, for what it reaches is not failing",
			change: func(l *coordinationv1.Lease) {
				l.Annotations[annotationStore], l.Annotations[annotationWhatsApp] = "slow", "degraded"
			},
			want: func(m *Member) { m.WhatsAppFailing = false },
		},
		{
			name:   "a renewal never counts for hours, whatever the Lease says",
			change: func(l *coordinationv1.Lease) { l.Spec.LeaseDurationSeconds = ptr.To(int32(1 << 30)) },
			want:   func(m *Member) { m.Duration = time.Minute },
		},
		{
			name:   "the leader election's lease",
			change: func(l *coordinationv1.Lease) { delete(l.Labels, ComponentLabel) },
			err:    "not a worker's",
		},
		{
			name:   "a worker of another release",
			change: func(l *coordinationv1.Lease) { l.Labels[ReleaseLabel] = "other" },
			err:    "another worker's name",
		},
		{
			name:   "a worker that has left",
			change: func(l *coordinationv1.Lease) { l.Spec.HolderIdentity = ptr.To("") },
			err:    ErrNoHolder.Error(),
		},
		{
			name:   "no holder at all",
			change: func(l *coordinationv1.Lease) { l.Spec.HolderIdentity = nil },
			err:    ErrNoHolder.Error(),
		},
		{
			name:   "a holder without an incarnation",
			change: func(l *coordinationv1.Lease) { l.Spec.HolderIdentity = ptr.To("worker-a/") },
			err:    "worker/incarnation",
		},
		{
			name:   "a Lease with another worker as its holder",
			change: func(l *coordinationv1.Lease) { l.Spec.HolderIdentity = ptr.To("worker-b/k3x9") },
			err:    "another worker's name",
		},
		{
			name:   "no renewal time",
			change: func(l *coordinationv1.Lease) { l.Spec.RenewTime = nil },
			err:    "no renewal time",
		},
		{
			name:   "no duration",
			change: func(l *coordinationv1.Lease) { l.Spec.LeaseDurationSeconds = ptr.To(int32(0)) },
			err:    "no duration",
		},
		{
			name:   "a capacity below zero",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationCap] = "-1" },
			err:    annotationCap,
		},
		{
			name:   "a capacity above the maximum",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationCap] = "1000001" },
			err:    annotationCap,
		},
		{
			name:   "no number of tokens",
			change: func(l *coordinationv1.Lease) { delete(l.Annotations, annotationTokens) },
			err:    annotationTokens,
		},
		{
			name:   "a revision that is not a number",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationRev] = "v3" },
			err:    annotationRev,
		},
		{
			name:   "format 0",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationFormat] = "0" },
			err:    annotationFormat,
		},
		{
			name:   "draining is neither true nor false",
			change: func(l *coordinationv1.Lease) { l.Annotations[annotationDrain] = "maybe" },
			err:    annotationDrain,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			l := encode(member())
			tt.change(l)
			got, err := FromLease(l)
			if tt.err != "" {
				g.Expect(err).To(MatchError(ContainSubstring(tt.err)))
				return
			}
			g.Expect(err).NotTo(HaveOccurred())
			want := member()
			tt.want(&want)
			g.Expect(got).To(Equal(want))
		})
	}
}

func TestLeaseName(t *testing.T) {
	g := NewWithT(t)
	g.Expect(LeaseName("main", "whatsapp-6d5f-x2x")).To(Equal("whatsapp-worker-main.whatsapp-6d5f-x2x"))
	g.Expect(LeaseName("main", "a")).NotTo(Equal(LeaseName("other", "a")), "there may be two releases in one namespace")
	g.Expect(LeaseName("a", "b-c")).NotTo(Equal(LeaseName("a-b", "c")))
	long := strings.Repeat("a", 252)
	g.Expect(len(LeaseName("main", long+"b"))).To(BeNumerically("<=", 253))
	g.Expect(LeaseName("main", long+"b")).NotTo(Equal(LeaseName("main", long+"c")))
}

func FuzzFromLease(f *testing.F) {
	f.Add("worker-a/k3x9", "blue", "1", "7", "1000", "false", int32(15))
	f.Add("", "", "", "", "", "", int32(0))
	f.Add("a/b/c", "default", "2", "-1", "99999999999", "1", int32(-3))
	f.Fuzz(func(t *testing.T, holder, pool, format, revision, capacity, draining string, seconds int32) {
		name, _, _ := strings.Cut(holder, "/")
		l := &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{
				Name:   LeaseName("main", name),
				Labels: map[string]string{ReleaseLabel: "main", ComponentLabel: ComponentWorker, v1alpha1.PoolLabel: pool},
				Annotations: map[string]string{
					annotationFormat: format, annotationRev: revision, annotationCap: capacity,
					annotationLoad: "0", annotationTokens: "0", annotationDrain: draining,
				},
			},
			Spec: coordinationv1.LeaseSpec{
				HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &metav1.MicroTime{Time: time.Unix(1, 0)},
			},
		}
		m, err := FromLease(l)
		if err != nil {
			return
		}
		if m.Name == "" || m.Incarnation == "" || m.Pool == "" || m.Capacity < 0 || m.Capacity > maxCount || m.Duration <= 0 {
			t.Fatalf("an invalid lease was accepted: %+v", m)
		}
		again := l.DeepCopy()
		m.Into(again)
		if back, err := FromLease(again); err != nil || back != m {
			t.Fatalf("%+v became %+v, %v", m, back, err)
		}
	})
}
