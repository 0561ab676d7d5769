package controllers

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// deletion is what is known of the deletion of a session beside its object.
type deletion struct {
	// deadline is when the logout is given up.
	deadline time.Time
	// hopeless: no worker will ever get the proxy's Secret, because the namespace is being
	// deleted too, so there is nothing to wait for.
	hopeless bool
}

// over reports whether no logout is tried any more.
func (d deletion) over(now time.Time) bool { return d.hopeless || !now.Before(d.deadline) }

// wait is for how long one is tried.
func (d deletion) wait(now time.Time) time.Duration {
	if d.over(now) {
		return 0
	}
	return d.deadline.Sub(now)
}

// Deletions are the deletions of sessions that this process has seen. The session
// controller takes note of them and the placement reads them: if the two differed about when
// a logout is given up, each would take back what the other has written.
type Deletions struct {
	mu   sync.Mutex
	seen map[types.NamespacedName]seenDeletion
}

// seenDeletion is when a session was first seen to be deleted.
type seenDeletion struct {
	uid types.UID
	at  time.Time
	// hopeless is that of the deletion. It stays, also when the holder has let go and says
	// why no more.
	hopeless bool
}

// see takes note of a deletion, and of whether it is hopeless.
func (d *Deletions) see(s *v1alpha1.WhatsAppSession, hopeless bool, now time.Time) deletion {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.first(s, now)
	seen.hopeless = seen.hopeless || hopeless
	if d.seen == nil {
		d.seen = map[types.NamespacedName]seenDeletion{}
	}
	d.seen[client.ObjectKeyFromObject(s)] = seen
	return deletion{deadline: session.DeletionDeadline(s, seen.at), hopeless: seen.hopeless}
}

// of is what is known of a deletion; the zero value for a session that is not deleted.
func (d *Deletions) of(s *v1alpha1.WhatsAppSession, namespaceEnds bool, now time.Time) deletion {
	if s.DeletionTimestamp.IsZero() {
		return deletion{}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.first(s, now)
	return deletion{deadline: session.DeletionDeadline(s, seen.at), hopeless: seen.hopeless || namespaceEnds && lacksSecret(s)}
}

// first is the first time at which a deletion was seen: now, if it was not. The caller holds d.mu.
func (d *Deletions) first(s *v1alpha1.WhatsAppSession, now time.Time) seenDeletion {
	if seen, known := d.seen[client.ObjectKeyFromObject(s)]; known && seen.uid == s.UID {
		return seen
	}
	return seenDeletion{uid: s.UID, at: now}
}

// forget forgets a session that does not exist any more.
func (d *Deletions) forget(key types.NamespacedName) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.seen, key)
}
