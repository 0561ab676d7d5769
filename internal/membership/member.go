package membership

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// ReleaseLabel names the release that an object belongs to: there may be several in one
	// namespace, and none of them reads the Leases of another.
	ReleaseLabel = "app.kubernetes.io/instance"
	// ComponentLabel with ComponentWorker marks the Leases of workers.
	ComponentLabel = "app.kubernetes.io/component"
	// ComponentWorker is the value of ComponentLabel on a worker's Lease.
	ComponentWorker = "worker"

	// Format is the version of this encoding that this program writes. Fields are only
	// added, so a reader of a newer version uses the fields that it knows. Version 2 added the
	// time at which the process joined, and whether the worker reaches its database and
	// WhatsApp; version 3 whether it drops messages.
	Format = 3

	annotationPrefix = "whatsapp-operator.io/"
	annotationFormat = annotationPrefix + "format"
	annotationRev    = annotationPrefix + "revision"
	annotationCap    = annotationPrefix + "capacity"
	annotationLoad   = annotationPrefix + "load"
	annotationTokens = annotationPrefix + "tokens"
	annotationDrain  = annotationPrefix + "draining"
	annotationPod    = annotationPrefix + "pod-uid"
	annotationConns  = annotationPrefix + "store-connections"
	annotationDrops  = annotationPrefix + "drops-messages"
	// annotationStore and annotationWhatsApp say whether the worker reaches its database and
	// WhatsApp: ok or failing.
	annotationStore    = annotationPrefix + "store"
	annotationWhatsApp = annotationPrefix + "whatsapp"
	ok, failing        = "ok", "failing"

	namePrefix   = "whatsapp-worker-"
	leaderPrefix = "whatsapp-manager-"
	// maxName is the longest name that Kubernetes allows for a Lease.
	maxName = 253
	// maxDuration bounds how long one renewal counts, whatever the Lease says: a dead worker
	// must not be given sessions for hours.
	maxDuration = time.Minute
	// maxCount bounds the numbers in a Lease: no worker has more sessions, and their sums
	// cannot overflow.
	maxCount = 1_000_000
)

// ErrNoHolder says that the Lease has no holder: its worker has left.
var ErrNoHolder = errors.New("the lease has no holder")

// Member is a worker as its Lease describes it (docs/architecture.md, "Ownership").
type Member struct {
	// Release is the release that the worker belongs to.
	Release string
	// Name is the name of the worker, which is that of its pod.
	Name string
	// Incarnation distinguishes a worker from an earlier one of the same name.
	Incarnation string
	// PodUID is the UID of its pod; empty: it has none. Only the kubelet's reports about that
	// pod count.
	PodUID types.UID
	// Pool is the pool whose namespaces it serves.
	Pool string
	// Revision orders the versions of the workers: a higher one is newer.
	Revision int64
	// Format is the encoding's version; 0 is written as Format.
	Format int
	// Capacity is how many sessions it holds at most.
	Capacity int
	// Load is how many sessions it held at the last renewal.
	Load int
	// StoreConnections is how many connections to the database it opens at most; 0: it does
	// not use PostgreSQL, or is too old to report it.
	StoreConnections int
	// Tokens is how many logins it could begin at once at the last renewal.
	Tokens int
	// Draining says that its sessions are being moved away and that it accepts no new ones.
	Draining bool
	// StoreFailing and WhatsAppFailing say that the worker's own attempts to reach its
	// database, or WhatsApp, fail (docs/architecture.md, "Ownership"). They are false for a
	// worker that does not report them.
	StoreFailing, WhatsAppFailing bool
	// DropsMessages says that it acknowledges messages without storing them. It is false for a
	// worker that does not report it.
	DropsMessages bool
	// AcquireTime is when the process that renews the Lease joined, by the worker's own clock;
	// zero: the worker is too old to report it.
	AcquireTime time.Time
	// RenewTime is the time of the last renewal, by the worker's own clock.
	RenewTime time.Time
	// Duration is how long the worker counts as live after a renewal.
	Duration time.Duration
}

// WorkerLabels returns the labels that select the Leases of a release's workers.
func WorkerLabels(release string) map[string]string {
	return map[string]string{ReleaseLabel: release, ComponentLabel: ComponentWorker}
}

// LeaderLeaseName is the name of the Lease with which the managers of a release elect
// their leader.
func LeaderLeaseName(release string) string { return leaderPrefix + release }

// LeaseName is the name of a worker's Lease. It is different for each release (the name of
// a release contains no dot) and for each worker, and it is never longer than Kubernetes
// allows, however long the worker's name is.
func LeaseName(release, worker string) string {
	name := namePrefix + release + "." + worker
	if len(name) <= maxName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "-" + hex.EncodeToString(sum[:8])
	return strings.TrimRight(name[:maxName-len(suffix)], "-.") + suffix
}

// FromLease reads the worker that a Lease describes. A Lease that is not a worker's, or
// whose holder is not the worker in its name, is an error; ErrNoHolder says that the
// worker has left.
func FromLease(l *coordinationv1.Lease) (Member, error) {
	if l.Labels[ComponentLabel] != ComponentWorker {
		return Member{}, errors.New("the lease is not a worker's")
	}
	if l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity == "" {
		return Member{}, ErrNoHolder
	}
	name, incarnation, found := strings.Cut(*l.Spec.HolderIdentity, "/")
	if !found || name == "" || incarnation == "" {
		return Member{}, errors.New("the lease's holder is not of the form worker/incarnation")
	}
	release := l.Labels[ReleaseLabel]
	if l.Name != LeaseName(release, name) {
		return Member{}, fmt.Errorf("the lease %q has another worker's name in its holder: %q", l.Name, name)
	}
	if l.Spec.RenewTime == nil || l.Spec.LeaseDurationSeconds == nil || *l.Spec.LeaseDurationSeconds <= 0 {
		return Member{}, errors.New("the lease has no renewal time or no duration")
	}
	m := Member{
		Release: release, Name: name, Incarnation: incarnation, Pool: l.Labels[v1alpha1.PoolLabel], PodUID: types.UID(l.Annotations[annotationPod]),
		RenewTime: l.Spec.RenewTime.Time,
		Duration:  min(time.Duration(*l.Spec.LeaseDurationSeconds)*time.Second, maxDuration),
	}
	if m.Pool == "" {
		m.Pool = v1alpha1.DefaultPool
	}
	var err error
	if m.Revision, err = strconv.ParseInt(l.Annotations[annotationRev], 10, 64); err != nil || m.Revision < 0 {
		return Member{}, fmt.Errorf("the lease's annotation %s is not a number from 0 on", annotationRev)
	}
	for key, field := range map[string]*int{
		annotationFormat: &m.Format, annotationCap: &m.Capacity, annotationLoad: &m.Load, annotationTokens: &m.Tokens,
	} {
		if *field, err = strconv.Atoi(l.Annotations[key]); err != nil || *field < 0 || *field > maxCount {
			return Member{}, fmt.Errorf("the lease's annotation %s is not a number from 0 to %d", key, maxCount)
		}
	}
	if m.Format == 0 {
		return Member{}, fmt.Errorf("the lease's annotation %s is 0", annotationFormat)
	}
	// An older program leaves fields that it does not know as they are: in its Lease they
	// still have the values of the newer process before it.
	if m.Format >= 2 {
		if l.Spec.AcquireTime != nil {
			m.AcquireTime = l.Spec.AcquireTime.Time
		}
		m.StoreFailing = l.Annotations[annotationStore] == failing
		m.WhatsAppFailing = l.Annotations[annotationWhatsApp] == failing
	}
	if m.Format >= 3 {
		m.DropsMessages = l.Annotations[annotationDrops] == strconv.FormatBool(true)
	}
	if n, err := strconv.Atoi(l.Annotations[annotationConns]); err == nil && n >= 0 && n <= maxCount {
		m.StoreConnections = n
	}
	if m.Draining, err = strconv.ParseBool(l.Annotations[annotationDrain]); err != nil {
		return Member{}, fmt.Errorf("the lease's annotation %s is neither true nor false", annotationDrain)
	}
	return m, nil
}

// Into writes the member into a Lease. The Lease's name and namespace, and labels and
// annotations that this program does not know, are not changed.
func (m Member) Into(l *coordinationv1.Lease) {
	format := m.Format
	if format == 0 {
		format = Format
	}
	labels, annotations := maps.Clone(l.Labels), maps.Clone(l.Annotations)
	if labels == nil {
		labels = map[string]string{}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	labels[ReleaseLabel] = m.Release
	labels[ComponentLabel] = ComponentWorker
	labels[v1alpha1.PoolLabel] = m.Pool
	annotations[annotationFormat] = strconv.Itoa(format)
	annotations[annotationRev] = strconv.FormatInt(m.Revision, 10)
	annotations[annotationCap] = strconv.Itoa(m.Capacity)
	annotations[annotationLoad] = strconv.Itoa(m.Load)
	annotations[annotationTokens] = strconv.Itoa(m.Tokens)
	annotations[annotationConns] = strconv.Itoa(m.StoreConnections)
	annotations[annotationDrain] = strconv.FormatBool(m.Draining)
	annotations[annotationDrops] = strconv.FormatBool(m.DropsMessages)
	annotations[annotationStore] = reached(!m.StoreFailing)
	annotations[annotationWhatsApp] = reached(!m.WhatsAppFailing)
	if m.PodUID != "" {
		annotations[annotationPod] = string(m.PodUID)
	} else {
		delete(annotations, annotationPod)
	}
	l.Labels, l.Annotations = labels, annotations

	l.Spec.AcquireTime = nil
	if !m.AcquireTime.IsZero() {
		acquired := metav1.NewMicroTime(m.AcquireTime)
		l.Spec.AcquireTime = &acquired
	}
	holder := m.Name + "/" + m.Incarnation
	seconds := int32(m.Duration / time.Second)
	renew := metav1.NewMicroTime(m.RenewTime)
	l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &holder, &seconds, &renew
}

func reached(yes bool) string {
	if yes {
		return ok
	}
	return failing
}
