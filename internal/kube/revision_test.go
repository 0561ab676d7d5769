package kube

import (
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

func TestRevision(t *testing.T) {
	owned := metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "workers-1", UID: "rs", Controller: ptr.To(true)}
	pod := func(owners ...metav1.OwnerReference) client.Object {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: "w", UID: "uid", OwnerReferences: owners}}
	}
	set := func(revision string) client.Object {
		return &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: "workers-1", Annotations: map[string]string{deploymentRevision: revision}}}
	}
	tests := []struct {
		name    string
		flag    int64
		inPod   bool
		objects []client.Object
		want    int64
	}{
		{name: "the flag is set", flag: 7, inPod: true, objects: []client.Object{pod(owned), set("3")}, want: 7},
		{name: "the worker does not run in a pod", objects: []client.Object{pod(owned), set("3")}, want: 0},
		{name: "a pod of a Deployment", inPod: true, objects: []client.Object{pod(owned), set("3")}, want: 3},
		{name: "a pod without a ReplicaSet", inPod: true, objects: []client.Object{pod()}, want: 0},
		{name: "the annotation is not a number", inPod: true, objects: []client.Object{pod(owned), set("three")}, want: 0},
		{name: "the ReplicaSet is gone", inPod: true, objects: []client.Object{pod(owned)}, want: 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(tt.objects...).Build()
			r := NewRevision(c, RevisionOptions{Fixed: tt.flag, Namespace: "ops", Pod: "w", InPod: tt.inPod}, logr.Discard())
			r.refresh(t.Context())
			NewWithT(t).Expect(r.Number()).To(Equal(tt.want))
		})
	}

	t.Run("a rollback gives a running pod the newest number", func(t *testing.T) {
		g := NewWithT(t)
		c := fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(pod(owned), set("1")).Build()
		r := NewRevision(c, RevisionOptions{Namespace: "ops", Pod: "w", InPod: true}, logr.Discard())
		r.refresh(t.Context())
		g.Expect(r.Number()).To(BeEquivalentTo(1))
		newer := set("4")
		g.Expect(c.Update(t.Context(), newer)).To(Succeed())
		r.refresh(t.Context())
		g.Expect(r.Number()).To(BeEquivalentTo(4))
	})
}
