package app

import (
	"context"
	"database/sql"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/controllers"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// The leader needs the database neither for placement nor for delivery: one that
// is unreachable when a leader starts, or later, ends no leader and blocks no reconciler.
func TestLeaderWithoutDatabase(t *testing.T) {
	for name, away := range map[string]func(*testenv.TCPProxy){
		"it refuses": (*testenv.TCPProxy).Cut,
		"it hangs":   (*testenv.TCPProxy).Hang,
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			server := testenv.PostgresServer(t)
			proxy := testenv.NewTCPProxy(t, server.Addr())
			away(proxy)
			opened, err := store.Open(t.Context(), store.Config{URL: server.URLVia(proxy.Addr())}, logr.Discard())
			g.Expect(err).NotTo(HaveOccurred(), "a manager begins without its database")
			defer func() { g.Expect(opened.Close()).To(Succeed()) }()
			d := &dependencies{store: opened, installation: "here", clock: clock.RealClock{}, log: logr.Discard()}
			gate := d.storeGate(func(string, string, string) {})
			ids := &ids{store: opened, gate: gate}
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- d.keepStore(ctx, gate) }()

			ask := func() error {
				_, err := ids.Record(ctx, "id")
				return err
			}
			asksNothing := func() {
				g.EventuallyWithOffset(1, ask, "30s").Should(MatchError(store.ErrAway))
				g.ExpectWithOffset(1, ids.Release(ctx, "u", controllers.ReleaseForget)).To(MatchError(store.ErrAway))
				_, err := ids.Claim(ctx, controllers.Claimant{SessionID: "id", Namespace: "a", UID: "u"}, nil)
				g.ExpectWithOffset(1, err).To(MatchError(store.ErrAway))
				g.ExpectWithOffset(1, ended).NotTo(Receive())
			}
			asksNothing()
			proxy.Restore()
			g.Eventually(ask, "60s").Should(Succeed())
			held, err := ids.Claim(ctx, controllers.Claimant{SessionID: "id", Namespace: "a", UID: "u"}, func(types.UID) bool { return false })
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(held).To(BeTrue())

			away(proxy)
			asksNothing()
			proxy.Restore()
			g.Eventually(ask, "60s").Should(Succeed())
			stop()
			g.Eventually(ended, "30s").Should(Receive(BeNil()))
		})
	}
}

// A database that is restored from a backup of an older release, while a leader runs, is
// migrated again: no worker could use it before the next change of the leader.
func TestADatabaseIsRestoredFromAnOlderRelease(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	url := testenv.Postgres(t)
	opened, err := store.Open(ctx, store.Config{URL: url}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(opened.Close()).To(Succeed()) }()
	d := &dependencies{store: opened, installation: "here", clock: clock.RealClock{}, log: logr.Discard()}
	warnings := make(chan string, 100)
	gate := d.storeGate(func(_, _, message string) { warnings <- message })
	ids := &ids{store: opened, gate: gate}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- d.keepStore(ctx, gate) }()
	ask := func() error {
		_, err := ids.Record(ctx, "id")
		return err
	}
	g.Eventually(ask, "60s").Should(Succeed())

	database, err := sql.Open("pgx", url)
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(database.Close()).To(Succeed()) }()
	_, err = database.ExecContext(ctx, "DROP TABLE whatsapp_operator_message_secret; UPDATE whatsapp_operator_version SET version=7")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() (bool, error) { return opened.SchemaReady(ctx) }, "60s").Should(BeTrue())
	g.Eventually(ask, "60s").Should(Succeed())

	// An emptied one stays as it is, because a person may be about to restore it.
	_, err = database.ExecContext(ctx, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(ask, "60s").Should(MatchError(store.ErrAway))
	g.Eventually(warnings, "60s").Should(Receive(ContainSubstring("restart the manager")))
	stop()
	g.Eventually(ended, "30s").Should(Receive(BeNil()))
}

// A permanent failure still ends the process, with an error.
func TestLeaderWithDatabaseOfAnotherInstallation(t *testing.T) {
	g := NewWithT(t)
	opened, err := store.Open(t.Context(), store.Config{URL: testenv.Postgres(t)}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(opened.Close()).To(Succeed()) }()
	g.Expect(opened.Migrate(t.Context())).To(Succeed())
	g.Expect(opened.SetInstallation(t.Context(), "there")).To(Succeed())
	d := &dependencies{store: opened, installation: "here", clock: clock.RealClock{}, log: logr.Discard()}
	g.Expect(d.keepStore(t.Context(), d.storeGate(func(string, string, string) {}))).To(MatchError(store.ErrOwnedElsewhere))
}
