//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// firstSessions is how many sessions are paired right after the installation.
const firstSessions = 50

// testInstall: without values everything is ready in a namespace that enforces "restricted",
// `helm test` passes, and sessions that are applied and scanned in the cluster are connected
// and known to Laravel.
func testInstall(t *testing.T, e *environment) {
	e.createNamespace(t, systemNamespace, nil)
	// An incomplete Secret, as somebody leaves one who has created some of its keys by hand.
	must(t, e.client.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: e.release.store("postgresql")}}))
	flags := e.ownershipFlags(t)
	began := time.Now()
	e.helm(t, "install", 0, baseValues(), flags...)
	e.results.InstallReady = time.Since(began).Seconds()
	t.Logf("Ready %.1f s after helm install", e.results.InstallReady)
	e.waitUntilReady(t)
	e.run(t, nil, "helm", "test", e.release.name, "-n", systemNamespace, "--timeout=2m")

	e.ensure(t, firstSessions)
	m := e.measure(t, "nothing happens")
	e.check(t, m)
	e.run(t, nil, "helm", "test", e.release.name, "-n", systemNamespace, "--timeout=2m")
}

// ensure prepares what the parts after the installation need: a release that is connected to
// the stand-ins, and n sessions.
func (e *environment) ensure(t *testing.T, n int) []*session {
	t.Helper()
	if !e.release.installed {
		e.createNamespace(t, systemNamespace, nil)
		e.createLaravelSecret(t, systemNamespace)
		e.startStandins(t)
		command := "upgrade"
		if e.release.values == nil {
			command = "install"
		}
		e.helm(t, command, e.release.version, e.standinValues(), e.ownershipFlags(t)...)
		for _, name := range []string{sessionNamespace, churnNamespace, timingNamespace} {
			e.createNamespace(t, name, nil)
		}
		e.createNamespace(t, tightNamespace, map[string]string{poolLabel: tightPool})
		e.watchSessions(e.test)
		e.release.installed = true
	}
	e.waitUntilReady(t)
	return e.pair(t, sessionNamespace, n)
}

// testMetrics: who may read the managers' metrics gets them, others do not.
func testMetrics(t *testing.T, e *environment) {
	e.ensure(t, firstSessions)
	url := e.forward(t, "service/"+e.release.manager()+"-metrics", 8443)
	for name, allowed := range map[string]bool{"prometheus": true, "stranger": false} {
		token := e.serviceAccountToken(t, name, allowed)
		e.eventually(t, "the metrics for "+name, func(ctx context.Context) error {
			status, body, err := get(ctx, "https://"+url+"/metrics", token)
			switch {
			case err != nil:
				return err
			case allowed && (status != 200 || !strings.Contains(body, "whatsapp_operator_")):
				return fmt.Errorf("answered %d: %s", status, tail(body, 200))
			case !allowed && status != 403:
				return fmt.Errorf("answered %d instead of 403", status)
			}
			return nil
		})
	}
}
