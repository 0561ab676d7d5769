//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const (
	poolLabel = v1alpha1.PoolLabel
	// tightPool is the pool whose worker runs out of memory.
	tightPool     = "tight"
	tightSessions = 3
	// outOfService is how a cloud, or a person, says that a node is lost for good.
	outOfService = corev1.TaintNodeOutOfService
)

// event is something that happens to pods and nodes in the life of an installation. After each,
// every session is connected again, nothing is lost and nothing is doubled.
type event struct {
	name  string
	smoke bool
	// prepare, which may be nil, comes before everything is counted.
	prepare func(t *testing.T, e *environment)
	do      func(t *testing.T, e *environment)
	// after, which may be nil, comes when everything has been counted.
	after func(t *testing.T, e *environment, v assessment)
}

var events = []event{
	{name: "a worker is deleted", smoke: true, do: func(t *testing.T, e *environment) {
		e.deletePod(t, e.busiest(t))
	}},
	{name: "a worker is deleted by force", do: func(t *testing.T, e *environment) {
		e.deletePod(t, e.busiest(t), client.GracePeriodSeconds(0))
	}},
	{name: "a worker is evicted", do: func(t *testing.T, e *environment) {
		pod := e.busiest(t)
		must(t, e.kube.CoreV1().Pods(systemNamespace).EvictV1(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: pod.Name}}))
		e.waitUntilGone(t, pod)
	}},
	{name: "a worker's process dies", do: func(t *testing.T, e *environment) {
		e.killProcess(t, e.busiest(t))
	}},
	{name: "a worker runs out of memory", prepare: addTightPool, do: outOfMemory, after: removeTightPool},
	{name: "the leading manager is deleted", do: func(t *testing.T, e *environment) {
		name, err := e.leader(t.Context())
		must(t, err)
		pod := &corev1.Pod{}
		must(t, e.client.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: name}, pod))
		e.deletePod(t, pod)
		e.eventually(t, "another manager to lead", func(ctx context.Context) error {
			now, err := e.leader(ctx)
			if err == nil && now == name {
				err = fmt.Errorf("%s still leads", name)
			}
			return err
		})
	}},
	{name: "the workers are scaled from 3 to 5 and to 2", do: func(t *testing.T, e *environment) {
		for _, replicas := range []int32{5, 2, workerCount} {
			e.scaleWorkers(t, replicas)
		}
	}},
	{name: "Valkey's pod is deleted", do: func(t *testing.T, e *environment) { e.deletePod(t, e.storePod(t, "valkey")) }},
	{name: "Valkey's pod is deleted while states change", prepare: func(t *testing.T, e *environment) {
		e.pair(t, churnNamespace, churnSessions)
	}, do: func(t *testing.T, e *environment) {
		// Laravel gets no state twice: the receiver reports it.
		stop := e.churn(t)
		for range 2 {
			e.deletePod(t, e.storePod(t, "valkey"))
			e.waitUntilReady(t)
		}
		stop()
	}},
	{name: "PostgreSQL's pod is deleted", do: func(t *testing.T, e *environment) { e.deletePod(t, e.storePod(t, "postgresql")) }},
	{name: "a node is drained", do: func(t *testing.T, e *environment) {
		node := e.needOther(t)
		e.run(t, nil, "kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=5m")
		e.cordon(t, node, false)
	}, after: func(_ *testing.T, e *environment, v assessment) { e.results.DrainNodeGap = v.gapP99() }},
	{name: "a kubelet stops until its node is not ready, and starts again", do: func(t *testing.T, e *environment) {
		node := e.needOther(t)
		e.node(t, "stop", "kubelet", node)
		defer func() {
			e.node(t, "start", "kubelet", node)
			e.waitForNode(t, node, true)
		}()
		e.waitForNode(t, node, false)
	}},
	{name: "a node is lost for good together with the only Valkey", prepare: func(t *testing.T, e *environment) {
		e.moveStores(t, e.needOther(t), "valkey")
	}, do: loseNode},
}

// testLife: what happens to pods and nodes while sessions are connected.
func testLife(t *testing.T, e *environment) {
	for _, v := range events {
		if *onlySmoke && !v.smoke {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			e.ensure(t, e.sessionCount())
			if e.other != "" {
				e.keepStoresOn(t, e.stable)
				e.useBothNodes(t)
			}
			if v.prepare != nil {
				v.prepare(t, e)
			}
			m := e.measure(t, v.name)
			v.do(t, e)
			e.waitUntilReady(t)
			got := e.check(t, m)
			if v.after != nil {
				v.after(t, e, got)
			}
		})
	}
}

// busiest returns the worker with the most sessions.
func (e *environment) busiest(t *testing.T) *corev1.Pod {
	t.Helper()
	byName, err := e.list(t.Context(), sessionNamespace)
	must(t, err)
	load := map[string]int{}
	for _, s := range byName {
		load[s.Status.Worker]++
	}
	pods, err := e.pods(t.Context(), "worker")
	must(t, err)
	if len(pods) == 0 {
		t.Fatal("there is no worker")
	}
	busiest := slices.MaxFunc(pods, func(a, b corev1.Pod) int { return load[a.Name] - load[b.Name] })
	t.Logf("%s on %s has %d sessions", busiest.Name, busiest.Spec.NodeName, load[busiest.Name])
	return &busiest
}

func (e *environment) storePod(t *testing.T, store string) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{}
	must(t, e.client.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: e.release.store(store) + "-0"}, pod))
	return pod
}

// deletePod deletes a pod and waits until it is gone.
func (e *environment) deletePod(t *testing.T, pod *corev1.Pod, options ...client.DeleteOption) {
	t.Helper()
	must(t, e.client.Delete(t.Context(), pod, options...))
	e.waitUntilGone(t, pod)
}

func (e *environment) waitUntilGone(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	e.eventually(t, pod.Name+" to be gone", func(ctx context.Context) error {
		now := &corev1.Pod{}
		err := e.client.Get(ctx, client.ObjectKeyFromObject(pod), now)
		if err == nil && now.UID == pod.UID {
			return errors.New("it is still there")
		}
		return client.IgnoreNotFound(err)
	})
}

// killProcess ends the worker's process without a warning. SIGQUIT, because the kernel keeps
// SIGKILL from the first process of a namespace when it comes from inside; Go's runtime ends
// at once, without any of the program's own endings.
func (e *environment) killProcess(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	yes, no := true, false
	before := pod.Status.ContainerStatuses[0].RestartCount
	pod.Spec.EphemeralContainers = append(pod.Spec.EphemeralContainers, corev1.EphemeralContainer{
		TargetContainerName: "worker",
		EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "kill", Image: e.storePod(t, "valkey").Spec.Containers[0].Image, ImagePullPolicy: corev1.PullIfNotPresent,
			Command: []string{"/bin/sh", "-c", "kill -QUIT 1"},
			SecurityContext: &corev1.SecurityContext{
				AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
				Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			},
		},
	})
	_, err := e.kube.CoreV1().Pods(systemNamespace).UpdateEphemeralContainers(t.Context(), pod.Name, pod, metav1.UpdateOptions{})
	must(t, err)
	e.eventually(t, pod.Name+" to be restarted in place", func(ctx context.Context) error {
		now := &corev1.Pod{}
		if err := e.client.Get(ctx, client.ObjectKeyFromObject(pod), now); err != nil {
			return err
		}
		if now.Status.ContainerStatuses[0].RestartCount == before {
			return errors.New("its container has not ended")
		}
		return nil
	})
}

// addTightPool adds a pool whose worker collects no garbage and has little memory.
func addTightPool(t *testing.T, e *environment) {
	values := e.standinValues()
	worker, _ := values["worker"].(map[string]any)
	env, _ := worker["extraEnv"].([]any)
	values["pools"] = map[string]any{tightPool: map[string]any{
		"replicas": 1, "resources": map[string]any{"requests": map[string]any{"memory": "64Mi"}, "limits": map[string]any{"memory": "192Mi"}},
		"serviceAccount": map[string]any{"create": false, "name": e.release.worker()},
		"extraEnv": append(slices.Clone(env),
			map[string]any{"name": "GOGC", "value": "off"}, map[string]any{"name": "GOMEMLIMIT", "value": "off"}),
	}}
	e.helm(t, "upgrade", e.release.version, values)
	e.waitUntilReady(t)
	e.pair(t, tightNamespace, tightSessions)
}

// outOfMemory sends messages to the sessions of the tight pool until the kernel ends its
// worker, which is then restarted in place and takes its sessions up again.
func outOfMemory(t *testing.T, e *environment) {
	var tight []*session
	for _, s := range e.sessions {
		if s.namespace == tightNamespace {
			tight = append(tight, s)
		}
	}
	var workers corev1.PodList
	must(t, e.client.List(t.Context(), &workers, client.InNamespace(systemNamespace), client.MatchingLabels{poolLabel: tightPool}))
	if len(workers.Items) != 1 {
		t.Fatalf("the pool %s has %d workers", tightPool, len(workers.Items))
	}
	pod := &workers.Items[0]
	e.eventually(t, pod.Name+" to run out of memory", func(ctx context.Context) error {
		if err := each(ctx, 0, 100, func(ctx context.Context, i int) error { return e.send(ctx, tight[i%len(tight)]) }); err != nil {
			return err
		}
		now := &corev1.Pod{}
		if err := e.client.Get(ctx, client.ObjectKeyFromObject(pod), now); err != nil {
			return err
		}
		status := now.Status.ContainerStatuses[0]
		for _, ended := range []*corev1.ContainerStateTerminated{status.State.Terminated, status.LastTerminationState.Terminated} {
			if ended != nil && ended.Reason == "OOMKilled" {
				t.Logf("OOMKilled, %d restarts", status.RestartCount)
				return nil
			}
		}
		return fmt.Errorf("it has not: %d restarts", status.RestartCount)
	})
}

// removeTightPool removes the pool and its sessions.
func removeTightPool(t *testing.T, e *environment, _ assessment) {
	e.remove(t, tightNamespace)
	e.helm(t, "upgrade", e.release.version, e.standinValues())
}

// scaleWorkers changes the number of workers and waits until they are there, and all sessions
// are connected.
func (e *environment) scaleWorkers(t *testing.T, replicas int32) {
	t.Helper()
	patch := jsonMergePatch(`{"spec":{"replicas":%d}}`, replicas)
	deployment := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: e.release.worker()}}
	must(t, e.client.Patch(t.Context(), deployment, patch))
	e.waitUntilReady(t)
	if err := testenv.Await(t.Context(), settleTimeout, e.notConnected); err != nil {
		e.dump(t)
		t.Fatalf("With %d workers: %v", replicas, err)
	}
}

// keepStoresOn moves the stores to a node, if they are elsewhere.
func (e *environment) keepStoresOn(t *testing.T, node string) {
	t.Helper()
	e.moveStores(t, node, "valkey", "postgresql")
}

func (e *environment) moveStores(t *testing.T, node string, stores ...string) {
	t.Helper()
	avoid := e.stable
	if node == e.stable {
		avoid = e.other
	}
	for _, store := range stores {
		pod := e.storePod(t, store)
		if pod.Spec.NodeName == node {
			continue
		}
		t.Logf("Moving %s to %s", pod.Name, node)
		e.cordon(t, avoid, true)
		e.deletePod(t, pod)
		e.waitUntilReady(t)
		e.cordon(t, avoid, false)
	}
}

// useBothNodes makes sure that each node has workers: after a drain all are on one.
func (e *environment) useBothNodes(t *testing.T) {
	t.Helper()
	pods, err := e.pods(t.Context(), "worker")
	must(t, err)
	on := map[string]int{}
	for i := range pods {
		on[pods[i].Spec.NodeName]++
	}
	for _, node := range []string{e.stable, e.other} {
		if on[node] > 0 {
			continue
		}
		t.Logf("%s has no worker", node)
		e.deletePod(t, &pods[0]) // its successor is spread
		e.waitUntilReady(t)
	}
}

// loseNode: a node with workers and the only Valkey loses its power, and is declared lost as
// Kubernetes asks for it. Nothing of it comes back before its sessions are connected.
func loseNode(t *testing.T, e *environment) {
	node := e.needOther(t)
	e.node(t, "stop", "node", node)
	defer func() {
		e.node(t, "start", "node", node)
		e.waitForNode(t, node, true)
		e.taint(t, node, false)
	}()
	e.waitForNode(t, node, false)
	e.taint(t, node, true)
	e.waitUntilReady(t)
	if err := testenv.Await(t.Context(), settleTimeout, e.notConnected); err != nil {
		e.dump(t)
		t.Errorf("While the node is lost: %v", err)
	}
}

// taint declares a node lost, or takes that back.
func (e *environment) taint(t *testing.T, name string, lost bool) {
	t.Helper()
	e.eventually(t, "the node to be tainted", func(ctx context.Context) error {
		node, err := e.kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == outOfService })
		if lost {
			node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: outOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute})
		}
		_, err = e.kube.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{})
		return err
	})
}
