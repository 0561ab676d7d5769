package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx", as the store's
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// writes are the writes of a part: status patches, the watch events on sessions that they
// caused, and takings of a device in the store.
type writes struct{ patches, events, takings int }

func (w writes) String() string {
	return fmt.Sprintf("%d status patches, %d watch events, %d takings", w.patches, w.events, w.takings)
}

// counted are the counters before a part.
type counted struct {
	api    benchenv.Metrics
	starts int
}

func (b *bench) count() (c counted, err error) {
	if c.api, err = b.APIServer(); err != nil {
		return c, err
	}
	c.starts, err = b.starts()
	return c, err
}

// starts is how many times devices have been taken so far.
func (b *bench) starts() (n int, err error) {
	err = b.query("SELECT COALESCE(SUM(starts), 0) FROM whatsapp_operator_session", &n)
	return n, err
}

func (b *bench) query(text string, into any) error {
	db, err := sql.Open("pgx", b.Store)
	if err != nil {
		return fmt.Errorf("connecting to the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	if err := db.QueryRowContext(b.ctx, text).Scan(into); err != nil {
		return fmt.Errorf("querying the database: %w", err)
	}
	return nil
}

var (
	statusPatches = benchenv.Labels{"verb": "PATCH", "code": "200", "resource": "whatsappsessions", "subresource": "status"}
	watchEvents   = benchenv.Labels{"resource": "whatsappsessions"}
)

// since returns the writes since the counters were read.
func (b *bench) since(before counted) (*writes, error) {
	now, err := b.count()
	if err != nil {
		return nil, err
	}
	added := func(name string, labels benchenv.Labels) int {
		return int(now.api.Sum(name, labels) - before.api.Sum(name, labels))
	}
	w := &writes{
		patches: added("apiserver_request_total", statusPatches), events: added("apiserver_watch_events_total", watchEvents),
		takings: now.starts - before.starts,
	}
	b.APIWrites = now.api.Writes() - before.api.Writes()
	benchenv.Print("written: %s", w)
	now.api.PrintRequests(before.api, float64(b.Sessions)/10)
	return w, nil
}

// raw stops the program's processes and makes the writes of the parts again with a bare client.
func (b *bench) raw() error {
	b.Manager.Kill()
	for _, w := range b.Workers {
		w.Kill()
	}
	parts := []struct {
		name      string
		writes    *writes
		took      float64
		raw, over *float64
	}{
		{"restart", b.restarted, b.RestartLast, &b.RestartRaw, &b.RestartOverRaw},
		{"kill", b.killed, b.KillLast - b.Silence, &b.KillRaw, &b.KillOverRaw},
	}
	for _, p := range parts {
		if p.writes == nil {
			continue
		}
		benchenv.Print("making the writes of the part %s with a bare client", p.name)
		spent, err := benchenv.CPUTimes()
		if err != nil {
			return err
		}
		took, err := b.rawWrites(p.name, *p.writes)
		if err != nil {
			return err
		}
		*p.raw, *p.over = took.Seconds(), p.took/took.Seconds()
		if err := benchenv.PrintCPUTimes(spent); err != nil {
			return err
		}
	}
	return nil
}

// rawConcurrency is the concurrency of a worker: the highest number of its requests at the
// API server at the same time.
const rawConcurrency = 32

// rawConns is how many connections to PostgreSQL a worker has.
const rawConns = 16

// rawWrites makes the writes with a client that knows all of them in advance, and returns
// how long it took. The writes of one session follow each other as in the program: the patch
// that moves it, the one that claims it, its taking, its connection.
func (b *bench) rawWrites(prefix string, w writes) (time.Duration, error) {
	sessions, err := b.rawSessions(prefix)
	if err != nil {
		return 0, err
	}
	db, err := sql.Open("pgx", b.Store)
	if err != nil {
		return 0, fmt.Errorf("connecting to the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	db.SetMaxOpenConns(rawConns)
	db.SetMaxIdleConns(rawConns)
	if err := b.rawRecords(db, sessions); err != nil {
		return 0, err
	}
	stop, err := b.watch(watchers(w))
	if err != nil {
		return 0, err
	}
	defer stop()
	begun := time.Now()
	group, ctx := errgroup.WithContext(b.ctx)
	group.SetLimit(rawConcurrency)
	for i, s := range sessions {
		group.Go(func() error {
			patches, takings := share(w.patches, i, len(sessions)), share(w.takings, i, len(sessions))
			for n := range max(patches, takings) {
				if n < patches {
					if err := patch(ctx, b.Client, s, n); err != nil {
						return err
					}
				}
				if n < takings {
					if err := take(ctx, db, string(s.UID)); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	err = group.Wait()
	return time.Since(begun), err
}

// watchers is the number of watches on all sessions that would get these events, rounded.
func watchers(w writes) int {
	if w.patches == 0 {
		return 0
	}
	return int(math.Round(float64(w.events) / float64(w.patches)))
}

// share is the i-th part of total in n parts that differ by one at most.
func share(total, i, n int) int { return total*(i+1)/n - total*i/n }

// rawSessions applies as many sessions as the benchmark has; no controller handles them.
func (b *bench) rawSessions(prefix string) ([]*v1alpha1.WhatsAppSession, error) {
	sessions := make([]*v1alpha1.WhatsAppSession, b.Sessions)
	group, ctx := errgroup.WithContext(b.ctx)
	group.SetLimit(8)
	for i := range sessions {
		group.Go(func() error {
			sessions[i] = &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{
				Namespace: benchenv.Namespace, Name: fmt.Sprintf("raw-%s-%05d", prefix, i), Finalizers: []string{v1alpha1.Finalizer},
			}}
			if err := b.Client.Create(ctx, sessions[i]); err != nil {
				return fmt.Errorf("applying a session: %w", err)
			}
			return nil
		})
	}
	return sessions, group.Wait()
}

// rawRecords makes a record of each session in a separate table like the store's.
func (b *bench) rawRecords(db *sql.DB, sessions []*v1alpha1.WhatsAppSession) error {
	for _, text := range []string{
		"DROP TABLE IF EXISTS raw_session",
		"CREATE TABLE raw_session (uid TEXT PRIMARY KEY, epoch BIGINT NOT NULL, starts BIGINT NOT NULL, updated_at BIGINT NOT NULL)",
	} {
		if _, err := db.ExecContext(b.ctx, text); err != nil {
			return fmt.Errorf("making the records: %w", err)
		}
	}
	for _, s := range sessions {
		if _, err := db.ExecContext(b.ctx, "INSERT INTO raw_session VALUES ($1, 0, 0, 0)", string(s.UID)); err != nil {
			return fmt.Errorf("making the records: %w", err)
		}
	}
	return nil
}

// take makes the database commands of a taking: it increments the counters of the record,
// and reads the device of the session.
func take(ctx context.Context, db *sql.DB, uid string) error {
	var starts, devices int
	err := db.QueryRowContext(ctx, "UPDATE raw_session SET epoch=epoch+1, starts=starts+1, updated_at=updated_at+1 WHERE uid=$1 RETURNING starts", uid).Scan(&starts)
	if err == nil {
		err = db.QueryRowContext(ctx, "SELECT COUNT(*) FROM whatsmeow_device WHERE jid=$1", uid).Scan(&devices)
	}
	if err != nil {
		return fmt.Errorf("taking a device: %w", err)
	}
	return nil
}

// patch writes the n-th status of a session that is moved, claimed and connected, again and again.
func patch(ctx context.Context, c client.Client, s *v1alpha1.WhatsAppSession, n int) error {
	base := s.DeepCopy()
	s.Status = next(s, n)
	if err := c.Status().Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("writing a status: %w", err)
	}
	return nil
}

func next(s *v1alpha1.WhatsAppSession, n int) v1alpha1.WhatsAppSessionStatus {
	now, st := time.Now(), s.Status
	switch n % 3 {
	case 0:
		st.SessionID, st.Installation = s.SessionID(), "11111111-2222-3333-4444-555555555555/default/whatsapp-operator"
		st.Worker, st.HeldBy, st.HolderStart, st.Epoch = fmt.Sprintf("worker-%d", n), "", "", now.Unix()+int64(n)
		return status.Summarize(st, status.Facts{
			Generation: s.Generation, Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonWorkerLost,
			Message: "the worker is lost; another one takes the session up",
		}, now)
	case 1:
		st.HeldBy, st.HolderStart = st.Worker, "abcdefghijklmnopqrstuvwxyz"
		return status.Summarize(st, status.Facts{
			Generation: s.Generation, Phase: v1alpha1.PhaseConnecting, Reason: v1alpha1.ReasonConnecting, Message: "connecting to WhatsApp",
		}, now)
	}
	return status.Summarize(st, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected, Message: "connected to WhatsApp",
	}, now)
}

// watch opens n watches on all sessions and reads their events without decoding them.
func (b *bench) watch(n int) (stop func(), err error) {
	config := rest.CopyConfig(b.Config)
	config.GroupVersion, config.APIPath = &v1alpha1.GroupVersion, "/apis"
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	config.DisableCompression = true // as in the program
	var now v1alpha1.WhatsAppSessionList
	if err := b.Client.List(b.ctx, &now, client.Limit(1)); err != nil {
		return nil, fmt.Errorf("listing the sessions: %w", err)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	var reading sync.WaitGroup
	stop = func() { cancel(); reading.Wait() }
	for range n {
		c, err := rest.RESTClientFor(config)
		if err != nil {
			stop()
			return nil, fmt.Errorf("reaching the API server: %w", err)
		}
		stream, err := c.Get().Resource("whatsappsessions").Param("watch", "true").Param("resourceVersion", now.ResourceVersion).Stream(ctx)
		if err != nil {
			stop()
			return nil, fmt.Errorf("watching the sessions: %w", err)
		}
		reading.Go(func() {
			_, _ = io.Copy(io.Discard, stream) // until ctx ends
			_ = stream.Close()
		})
	}
	return stop, nil
}
