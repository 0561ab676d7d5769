package controllers

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// deletion is what this process knows about the deletion of a session.
type deletion struct {
	// deadline is when the manager stops waiting for the logout.
	deadline time.Time
	// noProxy says that no worker will ever get the proxy's Secret, because the namespace is
	// being deleted too. Then there is nothing to wait for.
	noProxy bool
}

// over reports whether the manager waits for the logout no longer.
func (d deletion) over(now time.Time) bool { return d.noProxy || !now.Before(d.deadline) }

// wait is how long the manager still waits for the logout.
func (d deletion) wait(now time.Time) time.Duration {
	if d.over(now) {
		return 0
	}
	return d.deadline.Sub(now)
}

// Deletions are the deletions of sessions that this process has seen. The session
// controller records them and the placement reads them: if the two had different deadlines,
// each would undo what the other has written.
type Deletions struct {
	mu   sync.Mutex
	seen map[types.NamespacedName]seenDeletion
}

// seenDeletion is when this process first saw that a session is being deleted.
type seenDeletion struct {
	uid types.UID
	at  time.Time
	// noProxy is that of the deletion. It is kept, because the status does not say it any
	// more when the holder has released the session.
	noProxy bool
}

// see records a deletion and whether its logout is impossible without the proxy's Secret.
func (d *Deletions) see(s *v1alpha1.WhatsAppSession, noProxy bool, now time.Time) deletion {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.first(s, now)
	seen.noProxy = seen.noProxy || noProxy
	if d.seen == nil {
		d.seen = map[types.NamespacedName]seenDeletion{}
	}
	d.seen[client.ObjectKeyFromObject(s)] = seen
	return deletion{deadline: session.DeletionDeadline(s, seen.at), noProxy: seen.noProxy}
}

// of returns what is known about a deletion; the zero value for a session that is not deleted.
func (d *Deletions) of(s *v1alpha1.WhatsAppSession, namespaceEnds bool, now time.Time) deletion {
	if s.DeletionTimestamp.IsZero() {
		return deletion{}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.first(s, now)
	return deletion{deadline: session.DeletionDeadline(s, seen.at), noProxy: seen.noProxy || namespaceEnds && lacksProxySecret(s)}
}

// first returns when a deletion was first seen: now, if it was not seen before. The caller
// holds d.mu.
func (d *Deletions) first(s *v1alpha1.WhatsAppSession, now time.Time) seenDeletion {
	if seen, known := d.seen[client.ObjectKeyFromObject(s)]; known && seen.uid == s.UID {
		return seen
	}
	return seenDeletion{uid: s.UID, at: now}
}

// forget removes the deletion of a session that does not exist any more.
func (d *Deletions) forget(key types.NamespacedName) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.seen, key)
}
