//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// churnSessions are the sessions whose states change during an upgrade.
	churnSessions = 20
	// churnInterval is the pause between two changes, sendInterval between two messages.
	churnInterval = 300 * time.Millisecond
	sendInterval  = 100 * time.Millisecond
)

// testUpgrade: another build rolls through managers and workers while customers write and
// states change. Each session moves once, nothing is lost, and nothing is doubled.
func testUpgrade(t *testing.T, e *environment) {
	all := e.ensure(t, e.sessionCount())
	e.pair(t, churnNamespace, churnSessions)
	m := e.measure(t, "upgrade")
	stop := e.churn(t)
	e.helm(t, "upgrade", 1, e.standinValues())
	e.waitUntilReady(t)
	e.checkVersion(t, 1)
	stop()
	v := e.check(t, m)
	logins := int64(0)
	for _, s := range all {
		logins += v.logins[s.key()]
		if n := v.logins[s.key()]; n != 1 {
			t.Errorf("%s logged in %d times and was moved %d times; once each was expected", s.name, n, v.moves[s.key()])
		}
	}
	e.results.UpgradeLost, e.results.UpgradeDouble, e.results.UpgradeGap = v.lost, v.doubled, v.gapP99()
	e.results.UpgradeMoves = float64(logins) / float64(len(all))
}

// testRollback: `helm rollback` with sessions alive keeps every field of their statuses that
// does not say where they are connected, and loses nothing.
func testRollback(t *testing.T, e *environment) {
	e.ensure(t, e.sessionCount())
	if e.release.version == 0 {
		e.helm(t, "upgrade", 1, e.standinValues())
		e.waitUntilReady(t)
	}
	e.pair(t, churnNamespace, churnSessions)
	before, err := e.list(t.Context(), sessionNamespace)
	must(t, err)
	m := e.measure(t, "rollback")
	stop := e.churn(t)
	e.run(t, nil, "helm", "rollback", e.release.name, "-n", systemNamespace, "--wait", "--timeout=5m")
	e.release.version = 0
	e.waitUntilReady(t)
	e.checkVersion(t, 0)
	stop()
	v := e.check(t, m)
	after, err := e.list(t.Context(), sessionNamespace)
	must(t, err)
	for name, was := range before {
		if is := after[name]; is == nil || !equality.Semantic.DeepEqual(kept(was), kept(is)) {
			v.lost++
			t.Errorf("the status of %s was %+v", name, was.Status)
			if is != nil {
				t.Errorf("… and is %+v", is.Status)
			}
		}
	}
	e.results.RollbackLost = v.lost
}

// testUpgradeFromRelease: back to the last release, and from there to the present build, with
// the release's own chart and image. Before the first release there is nothing to try.
func testUpgradeFromRelease(t *testing.T, e *environment) {
	tag := e.lastRelease(t)
	if tag == "" {
		t.Log("no release is tagged yet")
		return
	}
	e.ensure(t, e.sessionCount())
	e.buildRelease(t, tag)
	for _, version := range []int{released, 0} {
		m := e.measure(t, "to "+versions[version]+" ("+tag+" is "+versions[released]+")")
		e.helm(t, "upgrade", version, e.standinValues())
		e.waitUntilReady(t)
		e.checkVersion(t, version)
		e.check(t, m)
	}
}

// kept is the part of a status that a move does not change.
func kept(s *v1alpha1.WhatsAppSession) v1alpha1.WhatsAppSessionStatus {
	status := *s.Status.DeepCopy()
	status.Worker, status.HeldBy, status.HolderStart, status.Epoch = "", "", "", 0
	status.LastConnectedTime, status.LastDisconnectedTime, status.LastDisconnectReason = nil, nil, ""
	status.Reconnects, status.Conditions = 0, nil
	return status
}

// checkVersion checks that every pod of managers and workers runs an image.
func (e *environment) checkVersion(t *testing.T, version int) {
	t.Helper()
	want := repository + ":" + versions[version]
	for _, component := range []string{"manager", "worker"} {
		pods, err := e.pods(t.Context(), component)
		must(t, err)
		for i := range pods {
			if image := pods[i].Spec.Containers[0].Image; image != want {
				t.Errorf("%s runs %s instead of %s", pods[i].Name, image, want)
			}
		}
	}
}

// testReinstall: `helm uninstall` with sessions alive keeps keys, definition, claims and
// Secrets, and a new installation connects the sessions without a scan.
func testReinstall(t *testing.T, e *environment) {
	e.ensure(t, e.sessionCount())
	version, values := e.release.version, e.release.values
	m := e.measure(t, "uninstall and reinstall")
	e.run(t, nil, "helm", "uninstall", e.release.name, "-n", systemNamespace, "--wait", "--timeout=5m")
	e.eventually(t, "the pods to end", func(ctx context.Context) error {
		var pods corev1.PodList
		if err := e.client.List(ctx, &pods, client.InNamespace(systemNamespace)); err != nil {
			return err
		}
		if len(pods.Items) > 0 {
			return fmt.Errorf("%d are left, the first is %s", len(pods.Items), pods.Items[0].Name)
		}
		stats, err := e.standins.control.Stats(ctx)
		if err == nil && stats.Connected > 0 {
			err = fmt.Errorf("%d devices are still connected", stats.Connected)
		}
		return err
	})
	must(t, e.client.Get(t.Context(), client.ObjectKey{Name: crdName}, crdObject()))
	for _, store := range []string{"valkey", "postgresql"} {
		must(t, e.client.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: e.release.claim(store)}, &corev1.PersistentVolumeClaim{}))
		must(t, e.client.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: e.release.store(store)}, &corev1.Secret{}))
	}
	byName, err := e.list(t.Context(), sessionNamespace)
	must(t, err)
	if len(byName) < e.sessionCount() {
		t.Errorf("%d sessions are left", len(byName))
	}
	e.helm(t, "install", version, values, e.ownershipFlags(t)...)
	e.waitUntilReady(t)
	e.check(t, m)
}

// churn lets contacts write to random sessions and changes the states of the sessions of
// churnNamespace, until the function that it returns is called. Then all are as before.
func (e *environment) churn(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	random := rand.New(rand.NewPCG(e.seed, 1))
	var churning []*session
	for _, s := range e.sessions {
		if s.namespace == churnNamespace {
			churning = append(churning, s)
		}
	}
	var group sync.WaitGroup
	every := func(interval time.Duration, f func(ctx context.Context) error) {
		group.Go(func() {
			ticker := time.NewTicker(interval)
			defer ticker.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-ticker.C:
				}
				if err := f(ctx); err != nil && ctx.Err() == nil {
					t.Errorf("During the upgrade: %v", err)
				}
			}
		})
	}
	all := append([]*session(nil), e.sessions...)
	writers := rand.New(rand.NewPCG(e.seed, 2))
	sent, changed := 0, 0
	every(sendInterval, func(ctx context.Context) error {
		sent++
		return e.send(ctx, all[writers.IntN(len(all))])
	})
	every(churnInterval, func(ctx context.Context) error {
		s := churning[random.IntN(len(churning))]
		changed++
		switch random.IntN(3) {
		case 0:
			return e.suspend(ctx, s, true)
		case 1:
			return e.suspend(ctx, s, false)
		default:
			_, err := e.standins.control.Inject(ctx, simulator.Fault{Kind: simulator.FaultDrop, Device: s.jid})
			return err
		}
	})
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		group.Wait()
		for _, s := range churning {
			if err := e.suspend(context.WithoutCancel(t.Context()), s, false); err != nil {
				t.Errorf("Resuming %s: %v", s.name, err)
			}
		}
		t.Logf("%d messages were sent, and %d states were changed", sent, changed)
	}
	t.Cleanup(stop)
	return stop
}

func (e *environment) suspend(ctx context.Context, s *session, suspend bool) error {
	o := &v1alpha1.WhatsAppSession{}
	o.Namespace, o.Name = s.namespace, s.name
	return e.client.Patch(ctx, o, jsonMergePatch(`{"spec":{"suspend":%t}}`, suspend))
}
