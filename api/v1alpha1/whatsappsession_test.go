package v1alpha1_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// session reads a manifest without its first lines, apiVersion and kind.
func session(t *testing.T, namespace, manifest string) *unstructured.Unstructured {
	t.Helper()
	object := &unstructured.Unstructured{}
	head := "apiVersion: whatsapp-operator.io/v1alpha1\nkind: WhatsAppSession\n"
	if err := yaml.Unmarshal([]byte(head+manifest), &object.Object); err != nil {
		t.Fatal(err)
	}
	object.SetNamespace(namespace)
	return object
}

func TestManifestsThatAreRefused(t *testing.T) {
	ns := namespace(t)
	long := func(n int) string { return strings.Repeat("a", n) }
	for _, row := range []struct {
		name     string
		manifest string
		want     string
	}{
		{
			"a name that is too long to be the session's id",
			"metadata: {name: " + long(64) + "}",
			"metadata.name is the session's id when spec.sessionID is not set, so it must be at most 63 letters, digits, '.' or '-': shorten the name or set spec.sessionID",
		},
		{
			"an id with a slash",
			"metadata: {name: bad}\nspec: {sessionID: shop/7}",
			"spec.sessionID must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a letter or digit",
		},
		{
			"an id with a colon, which separates the parts of a Redis key",
			"metadata: {name: bad}\nspec: {sessionID: 'shop:qr'}",
			"spec.sessionID must be 1 to 63 letters, digits",
		},
		{
			"an id that ends with a dash",
			"metadata: {name: bad}\nspec: {sessionID: shop-}",
			"begin and end with a letter or digit",
		},
		{
			"an id followed by a line break",
			"metadata: {name: bad}\nspec: {sessionID: \"shop\\n\"}",
			"spec.sessionID must be 1 to 63 letters, digits",
		},
		{
			"an empty id",
			"metadata: {name: bad}\nspec: {sessionID: ''}",
			"spec.sessionID in body should be at least 1 chars long",
		},
		{
			"an id of 64 letters",
			"metadata: {name: bad}\nspec: {sessionID: " + long(64) + "}",
			"spec.sessionID: Too long: may not be more than 63",
		},
		{
			"an unknown pairing method",
			"metadata: {name: bad}\nspec: {pairing: {method: Sms}}",
			`spec.pairing.method: Unsupported value: "Sms": supported values: "QRCode", "PhoneCode"`,
		},
		{
			"PhoneCode without a phone number",
			"metadata: {name: bad}\nspec: {pairing: {method: PhoneCode}}",
			"spec.pairing.phoneNumber is required when spec.pairing.method is PhoneCode: set it to the phone's number, for example \"+34600111222\", in quotes",
		},
		{
			"a phone number without the plus sign",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: '34600111222'}}",
			"spec.pairing.phoneNumber must be in E.164 form: '+', the country code and the number, 7 to 15 digits and nothing else, in quotes, for example \"+34600111222\"",
		},
		{
			"a phone number without quotes, which YAML reads as an integer",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: +34600111222}}",
			`spec.pairing.phoneNumber must be in quotes, because YAML reads it as a number and drops the '+': for example "+34600111222"`,
		},
		{
			"a phone number without quotes that the method requires",
			"metadata: {name: bad}\nspec: {pairing: {method: PhoneCode, phoneNumber: +34600111222}}",
			"spec.pairing.phoneNumber must be in quotes",
		},
		{
			"an empty phone number",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: ''}}",
			"spec.pairing.phoneNumber must be in E.164 form",
		},
		{
			"a phone number of 33 characters",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: '+" + strings.Repeat("1", 32) + "'}}",
			"spec.pairing.phoneNumber: Too long: may not be more than 32",
		},
		{
			"a phone number as a list",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: ['+34600111222']}}",
			"spec.pairing.phoneNumber in body must be of type integer,string",
		},
		{
			"an id of digits without quotes",
			"metadata: {name: bad}\nspec: {sessionID: 42}",
			`spec.sessionID must be in quotes, because YAML reads it as a number: for example "42"`,
		},
		{
			"a device name of digits without quotes",
			"metadata: {name: bad}\nspec: {deviceName: 7}",
			"spec.deviceName in body must be of type string",
		},
		{
			"an empty device name",
			"metadata: {name: bad}\nspec: {deviceName: ''}",
			"spec.deviceName in body should be at least 1 chars long",
		},
		{
			"an empty pairing timeout",
			"metadata: {name: bad}\nspec: {pairing: {timeout: ''}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a proxy whose Secret has an empty name",
			"metadata: {name: bad}\nspec: {proxy: {secretRef: {name: ''}}}",
			"spec.proxy.secretRef.name in body should be at least 1 chars long",
		},
		{
			"a proxy whose Secret has a name that is too long",
			"metadata: {name: bad}\nspec: {proxy: {secretRef: {name: " + long(254) + "}}}",
			"spec.proxy.secretRef.name: Too long: may not be more than 253",
		},
		{
			"a class of messages that is a number",
			"metadata: {name: bad}\nspec: {messages: {ignore: [1]}}",
			"spec.messages.ignore[0] in body must be of type string",
		},
		{
			"a phone number with spaces",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: '+34 600 111'}}",
			"spec.pairing.phoneNumber must be in E.164 form",
		},
		{
			"a phone number that begins with a zero",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: '+0034600111'}}",
			"spec.pairing.phoneNumber must be in E.164 form",
		},
		{
			"a phone number of 16 digits with spaces, longer than any phone number",
			"metadata: {name: bad}\nspec: {pairing: {phoneNumber: '+34 600 111 222 333 4'}}",
			"spec.pairing.phoneNumber must be in E.164 form",
		},
		{
			"a pairing timeout under a minute",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 59s}}",
			"spec.pairing.timeout must be between 1m and 1h, for example 10m",
		},
		{
			"a pairing timeout over an hour",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 61m}}",
			"spec.pairing.timeout must be between 1m and 1h, for example 10m",
		},
		{
			"a negative pairing timeout",
			"metadata: {name: bad}\nspec: {pairing: {timeout: -10m}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a pairing timeout that is not a duration",
			"metadata: {name: bad}\nspec: {pairing: {timeout: soon}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a pairing timeout in days, which Go does not read",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 1d}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a pairing timeout in words, which Go does not read",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 10 minutes}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a pairing timeout too large for any duration",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 99999999999999h}}",
			"spec.pairing.timeout must be a duration like 90s, 10m or 1h",
		},
		{
			"a pairing timeout that is a number",
			"metadata: {name: bad}\nspec: {pairing: {timeout: 10}}",
			"spec.pairing.timeout in body must be of type string",
		},
		{
			"a proxy without the Secret's name",
			"metadata: {name: bad}\nspec: {proxy: {secretRef: {}}}",
			"spec.proxy.secretRef.name: Required value",
		},
		{
			"a proxy without a Secret",
			"metadata: {name: bad}\nspec: {proxy: {}}",
			"spec.proxy.secretRef: Required value",
		},
		{
			"a proxy whose URL is in the manifest",
			"metadata: {name: bad}\nspec: {proxy: {secretRef: {name: 'http://user:secret@proxy'}}}",
			"spec.proxy.secretRef.name must be the name of a Secret: lower case letters, digits, '-' and '.'",
		},
		{
			"an unknown class of messages",
			"metadata: {name: bad}\nspec: {messages: {ignore: [Stories]}}",
			`spec.messages.ignore[0]: Unsupported value: "Stories": supported values: "Status", "Channels", "Groups", "Broadcasts"`,
		},
		{
			"a class of messages named twice",
			"metadata: {name: bad}\nspec: {messages: {ignore: [Groups, Groups]}}",
			`spec.messages.ignore[1]: Duplicate value: "Groups"`,
		},
		{
			"an unknown deletion policy",
			"metadata: {name: bad}\nspec: {deletionPolicy: Keep}",
			`spec.deletionPolicy: Unsupported value: "Keep": supported values: "Logout", "Retain"`,
		},
		{
			"a device name of 51 letters",
			"metadata: {name: bad}\nspec: {deviceName: " + long(51) + "}",
			"spec.deviceName: Too long: may not be more than 50",
		},
		{
			"a device name with a control character",
			"metadata: {name: bad}\nspec: {deviceName: \"shop\\e[31m\"}",
			"spec.deviceName must not contain control characters",
		},
		{
			"a device name with a line break",
			"metadata: {name: bad}\nspec: {deviceName: \"a\\nb\"}",
			"spec.deviceName must not contain control characters",
		},
		{
			"metadata of 17 pairs",
			"metadata: {name: bad}\nspec: {metadata: {" + strings.Join(pairs(17), ", ") + "}}",
			"spec.metadata: Too many: 17: must have at most 16 items",
		},
		{
			"a key of the metadata of 65 letters",
			"metadata: {name: bad}\nspec: {metadata: {" + long(65) + ": a}}",
			"a key of spec.metadata must have 1 to 64 characters",
		},
		{
			"a value of the metadata of 257 letters",
			"metadata: {name: bad}\nspec: {metadata: {a: " + long(257) + "}}",
			"a value of spec.metadata must have at most 256 characters",
		},
		{
			"a number in the metadata",
			"metadata: {name: bad}\nspec: {metadata: {tenant: 7}}",
			"spec.metadata.tenant in body must be of type string",
		},
		{
			"a field that does not exist",
			"metadata: {name: bad}\nspec: {suspended: true}",
			`unknown field "spec.suspended"`,
		},
		{
			"suspend as a string",
			"metadata: {name: bad}\nspec: {suspend: 'yes'}",
			"spec.suspend in body must be of type boolean",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			err := k8s.Create(context.Background(), session(t, ns, row.manifest))
			g.Expect(err).To(MatchError(ContainSubstring(row.want)))
			g.Expect(apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)).To(BeTrue(), "refused for another reason: %v", err)
		})
	}
}

func TestManifestsThatAreAccepted(t *testing.T) {
	ns := namespace(t)
	defaults := v1alpha1.WhatsAppSessionSpec{
		Pairing:        v1alpha1.PairingSpec{Method: v1alpha1.PairingQRCode, Timeout: metav1.Duration{Duration: 10 * time.Minute}},
		Messages:       v1alpha1.MessagesSpec{Ignore: []v1alpha1.IgnoredMessages{v1alpha1.IgnoreStatus}},
		DeletionPolicy: v1alpha1.DeletionLogout,
	}
	with := func(change func(*v1alpha1.WhatsAppSessionSpec)) v1alpha1.WhatsAppSessionSpec {
		spec := *defaults.DeepCopy()
		change(&spec)
		return spec
	}
	for _, row := range []struct {
		name     string
		manifest string
		id       string
		want     v1alpha1.WhatsAppSessionSpec
	}{
		{"only a name", "metadata: {name: bare}", "bare", defaults},
		{"an empty spec", "metadata: {name: empty}\nspec: {}", "empty", defaults},
		{"null for the spec", "metadata: {name: nulls}\nspec: null", "nulls", defaults},
		{"null for parts of the spec", "metadata: {name: null-parts}\nspec: {sessionID: null, pairing: null, messages: null, proxy: null, deletionPolicy: null}", "null-parts", defaults},
		{"empty parts of the spec", "metadata: {name: parts}\nspec: {pairing: {}, messages: {}}", "parts", defaults},
		{"a name of 63 letters", "metadata: {name: " + strings.Repeat("b", 63) + "}", strings.Repeat("b", 63), defaults},
		{
			"a long name with an id",
			"metadata: {name: " + strings.Repeat("c", 200) + "}\nspec: {sessionID: Tenant_7.main}", "Tenant_7.main",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.SessionID = "Tenant_7.main" }),
		},
		{
			"the shortest timeout, in seconds",
			"metadata: {name: short}\nspec: {pairing: {timeout: 60s}}", "short",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.Pairing.Timeout.Duration = time.Minute }),
		},
		{
			"the longest timeout, in parts",
			"metadata: {name: longest}\nspec: {pairing: {timeout: 59m60s}}", "longest",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.Pairing.Timeout.Duration = time.Hour }),
		},
		{
			"a timeout as Go prints it",
			"metadata: {name: printed}\nspec: {pairing: {timeout: 1m30.5s}}", "printed",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.Pairing.Timeout.Duration = 90500 * time.Millisecond }),
		},
		{
			"QR codes for one phone only",
			"metadata: {name: fixed}\nspec: {pairing: {phoneNumber: '+34600111222'}}", "fixed",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.Pairing.PhoneNumber = "+34600111222" }),
		},
		{
			"a code to type, and the longest possible number",
			"metadata: {name: code}\nspec: {pairing: {method: PhoneCode, phoneNumber: '+123456789012345'}}", "code",
			with(func(s *v1alpha1.WhatsAppSessionSpec) {
				s.Pairing.Method, s.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, "+123456789012345"
			}),
		},
		{
			"an id of digits, in quotes",
			"metadata: {name: digits}\nspec: {sessionID: '42'}", "42",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.SessionID = "42" }),
		},
		{
			"every message forwarded",
			"metadata: {name: all}\nspec: {messages: {ignore: []}}", "all",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.Messages.Ignore = []v1alpha1.IgnoredMessages{} }),
		},
		{
			"a device name in another script, 50 characters long",
			"metadata: {name: named}\nspec: {deviceName: " + strings.Repeat("ñ", 50) + "}", "named",
			with(func(s *v1alpha1.WhatsAppSessionSpec) { s.DeviceName = strings.Repeat("ñ", 50) }),
		},
		{
			"the largest metadata",
			"metadata: {name: described}\nspec: {metadata: {" + strings.Repeat("k", 64) + ": " + strings.Repeat("v", 256) + "}}", "described",
			with(func(s *v1alpha1.WhatsAppSessionSpec) {
				s.Metadata = map[string]string{strings.Repeat("k", 64): strings.Repeat("v", 256)}
			}),
		},
		{
			"everything at once",
			`
metadata: {name: everything}
spec:
  sessionID: shop-7
  pairing: {method: PhoneCode, phoneNumber: "+34600111222", timeout: 5m}
  suspend: true
  proxy: {secretRef: {name: proxy.example-1}}
  messages: {ignore: [Status, Channels, Groups, Broadcasts]}
  deletionPolicy: Retain
  deviceName: Shop 7`,
			"shop-7",
			v1alpha1.WhatsAppSessionSpec{
				SessionID: "shop-7",
				Pairing:   v1alpha1.PairingSpec{Method: v1alpha1.PairingPhoneCode, PhoneNumber: "+34600111222", Timeout: metav1.Duration{Duration: 5 * time.Minute}},
				Suspend:   true,
				Proxy:     &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "proxy.example-1"}},
				Messages: v1alpha1.MessagesSpec{Ignore: []v1alpha1.IgnoredMessages{
					v1alpha1.IgnoreStatus, v1alpha1.IgnoreChannels, v1alpha1.IgnoreGroups, v1alpha1.IgnoreBroadcasts,
				}},
				DeletionPolicy: v1alpha1.DeletionRetain,
				DeviceName:     "Shop 7",
			},
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			ctx := context.Background()
			object := session(t, ns, row.manifest)
			g.Expect(k8s.Create(ctx, object)).To(Succeed())

			var got v1alpha1.WhatsAppSession
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(object), &got)).To(Succeed())
			g.Expect(got.Spec).To(Equal(row.want))
			g.Expect(got.SessionID()).To(Equal(row.id))
			g.Expect(got.Status.ObservedGeneration).To(Equal(int64(-1)), "kstatus must read a new session as in progress")

			// The manager adds its finalizer with a merge patch of the object that it read: nothing else may change.
			before := got.DeepCopy()
			got.Finalizers = append(got.Finalizers, v1alpha1.Finalizer)
			g.Expect(k8s.Patch(ctx, &got, client.MergeFrom(before))).To(Succeed())
			g.Expect(got.Generation).To(Equal(int64(1)), "writing back what was read changed the spec")

			// A program that writes the whole object back does not change it either.
			g.Expect(k8s.Update(ctx, &got)).To(Succeed())
			g.Expect(got.Spec).To(Equal(row.want))
		})
	}
}

func TestSessionIDCannotBeChanged(t *testing.T) {
	ns := namespace(t)
	const refusal = "spec.sessionID cannot be changed: Laravel and Redis know the session by it; delete the session and create one with the other id"
	for _, row := range []struct {
		name          string
		before, after string // spec
		refused       bool
	}{
		{"another id", "{sessionID: one}", "{sessionID: two}", true},
		{"an id where the name was the id", "{}", "{sessionID: two}", true},
		{"the id is removed", "{sessionID: one}", "{}", true},
		{"no spec where an id was", "{sessionID: one}", "null", true},
		{"null where an id was", "{sessionID: one}", "{sessionID: null}", true},
		{"the same id", "{sessionID: one}", "{sessionID: one, suspend: true}", false},
		{"no id before and after", "{}", "{suspend: true}", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			ctx := context.Background()
			object := session(t, ns, "metadata: {generateName: session-}\nspec: "+row.before)
			g.Expect(k8s.Create(ctx, object)).To(Succeed())

			changed := session(t, ns, "metadata: {name: "+object.GetName()+"}\nspec: "+row.after)
			changed.SetResourceVersion(object.GetResourceVersion())
			err := k8s.Update(ctx, changed)
			if row.refused {
				g.Expect(err).To(MatchError(ContainSubstring(refusal)))
			} else {
				g.Expect(err).NotTo(HaveOccurred())
			}
		})
	}
}

func TestStatusIsBounded(t *testing.T) {
	ns := namespace(t)
	object := session(t, ns, "metadata: {name: bounded}")
	if err := k8s.Create(context.Background(), object); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name  string
		patch string
		want  string // empty: accepted
	}{
		{"an unknown phase", `{"phase":"Sleeping"}`, `status.phase: Unsupported value: "Sleeping"`},
		{"a QR code over 1024 characters", `{"qr":{"code":"` + strings.Repeat("x", 1025) + `","expiresAt":"2026-01-01T00:00:00Z"}}`, "status.qr.code: Too long"},
		{"a QR code without its end", `{"qr":{"code":"x"}}`, "status.qr.expiresAt: Required value"},
		{"a passkey's request over 8192 characters", `{"passkey":{"requestOptions":"` + strings.Repeat("x", 8193) + `","expiresAt":"2026-01-01T00:00:00Z"}}`, "status.passkey.requestOptions: Too long"},
		{"a passkey's request without its end", `{"passkey":{"requestOptions":"{}"}}`, "status.passkey.expiresAt: Required value"},
		{"a push name over 128 characters", `{"pushName":"` + strings.Repeat("x", 129) + `"}`, "status.pushName: Too long"},
		{"a negative epoch", `{"epoch":-1}`, "epoch in body should be greater than or equal to 0"},
		{"a condition's message over 512 characters", condition(strings.Repeat("x", 513)), "the message of a condition must have at most 512 characters"},
		{"a condition's message of 512 characters", condition(strings.Repeat("x", 512)), ""},
		{"the largest numbers", `{"phase":"Connected","worker":"w-1","epoch":9007199254740991,"storedEpoch":9007199254740991,"observedGeneration":1}`, ""},
		{"an epoch that JSON does not keep", `{"epoch":9007199254740992}`, "epoch in body should be less than or equal to 9007199254740991"},
		{"a stored epoch that JSON does not keep", `{"storedEpoch":9223372036854775807}`, "storedEpoch in body should be less than or equal to 9007199254740991"},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := k8s.Status().Patch(context.Background(), object.DeepCopy(), client.RawPatch("application/merge-patch+json", []byte(`{"status":`+row.patch+`}`)))
			g := NewWithT(t)
			if row.want != "" {
				g.Expect(err).To(MatchError(ContainSubstring(row.want)))
			} else {
				g.Expect(err).NotTo(HaveOccurred())
			}
		})
	}
}

func condition(message string) string {
	return `{"conditions":[{"type":"Ready","status":"False","reason":"Placed","lastTransitionTime":"2026-01-01T00:00:00Z","message":"` + message + `"}]}`
}

// placed creates a session with a status as the manager and a worker write it.
func placed(t *testing.T, ns, name, worker, heldBy string) *v1alpha1.WhatsAppSession {
	t.Helper()
	ctx := context.Background()
	s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	if err := k8s.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	s.Status = v1alpha1.WhatsAppSessionStatus{
		Phase: v1alpha1.PhaseConnected, SessionID: name, Worker: worker, HeldBy: heldBy, Epoch: 1,
		PhoneNumber: "+34600111222", JID: "34600111222.0:7@s.whatsapp.net", Reconnects: 3,
		ObservedGeneration: s.Generation,
	}
	meta.SetStatusCondition(&s.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonConnected, ObservedGeneration: s.Generation,
	})
	if err := k8s.Status().Update(ctx, s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSessionsAreSelectedByTheirStatus(t *testing.T) {
	ns := namespace(t)
	placed(t, ns, "a", "worker-1", "worker-1")
	placed(t, ns, "b", "worker-2", "worker-1")
	placed(t, ns, "c", "worker-2", "")
	for _, row := range []struct {
		fields client.MatchingFields
		want   []string
	}{
		{client.MatchingFields{"status.worker": "worker-1"}, []string{"a"}},
		{client.MatchingFields{"status.worker": "worker-2"}, []string{"b", "c"}},
		{client.MatchingFields{"status.heldBy": "worker-1"}, []string{"a", "b"}},
		{client.MatchingFields{"status.worker": "worker-2", "status.heldBy": "worker-1"}, []string{"b"}},
		{client.MatchingFields{"status.sessionID": "c"}, []string{"c"}},
	} {
		t.Run(fmt.Sprint(row.fields), func(t *testing.T) {
			g := NewWithT(t)
			var list v1alpha1.WhatsAppSessionList
			g.Expect(k8s.List(context.Background(), &list, client.InNamespace(ns), row.fields)).To(Succeed())
			var names []string
			for _, s := range list.Items {
				names = append(names, s.Name)
			}
			g.Expect(names).To(ConsistOf(row.want))
		})
	}
	var list v1alpha1.WhatsAppSessionList
	err := k8s.List(context.Background(), &list, client.InNamespace(ns), client.MatchingFields{"status.phase": "Connected"})
	NewWithT(t).Expect(err).To(MatchError(ContainSubstring("field label not supported: status.phase")))
}

func TestColumnsThatKubectlPrints(t *testing.T) {
	g := NewWithT(t)
	ns := namespace(t)
	placed(t, ns, "shop-7", "worker-1", "worker-1")

	clientset, err := kubernetes.NewForConfig(restConfig)
	g.Expect(err).NotTo(HaveOccurred())
	body, err := clientset.RESTClient().Get().
		AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", ns, "whatsappsessions").
		SetHeader("Accept", "application/json;as=Table;g=meta.k8s.io;v=v1").
		DoRaw(context.Background())
	g.Expect(err).NotTo(HaveOccurred())
	var table metav1.Table
	g.Expect(json.Unmarshal(body, &table)).To(Succeed())

	var columns, wide, cells []string
	for i, column := range table.ColumnDefinitions {
		if column.Priority == 0 {
			columns = append(columns, column.Name)
			cells = append(cells, fmt.Sprint(table.Rows[0].Cells[i]))
		} else {
			wide = append(wide, fmt.Sprintf("%s=%v", column.Name, table.Rows[0].Cells[i]))
		}
	}
	g.Expect(columns).To(Equal([]string{"Name", "Phase", "Phone", "Worker", "Ready", "Age"}))
	g.Expect(cells[:5]).To(Equal([]string{"shop-7", "Connected", "+34600111222", "worker-1", "True"}))
	g.Expect(wide).To(Equal([]string{"Reason=Connected", "Session-ID=shop-7", "JID=34600111222.0:7@s.whatsapp.net", "Reconnects=3"}))
}

func TestNamesThatKubectlAccepts(t *testing.T) {
	g := NewWithT(t)
	d, err := discovery.NewDiscoveryClientForConfig(restConfig)
	g.Expect(err).NotTo(HaveOccurred())
	resources, err := d.ServerResourcesForGroupVersion(v1alpha1.GroupVersion.String())
	g.Expect(err).NotTo(HaveOccurred())
	names := map[string]metav1.APIResource{}
	for _, r := range resources.APIResources {
		names[r.Name] = r
	}
	g.Expect(names).To(HaveKey("whatsappsessions/status"))
	r := names["whatsappsessions"]
	g.Expect(r.ShortNames).To(Equal([]string{"wa"}))
	g.Expect(r.Categories).To(Equal([]string{"whatsapp"}))
	g.Expect(r.SingularName).To(Equal("whatsappsession"))
	g.Expect(r.Namespaced).To(BeTrue())
}

func TestSamplesApply(t *testing.T) {
	files, err := filepath.Glob("../../config/samples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	NewWithT(t).Expect(len(files)).To(BeNumerically(">=", 8), "there is a sample for each way of using a session")
	for _, file := range files {
		if filepath.Base(file) == "kustomization.yaml" {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			g := NewWithT(t)
			ns := namespace(t)
			f, err := os.Open(file)
			g.Expect(err).NotTo(HaveOccurred())
			defer f.Close()
			sessions := 0
			for decoder := yaml.NewYAMLOrJSONDecoder(f, 4096); ; {
				object := &unstructured.Unstructured{}
				if err := decoder.Decode(&object.Object); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				object.SetNamespace(ns)
				g.Expect(k8s.Create(context.Background(), object)).To(Succeed())
				if object.GetKind() == "WhatsAppSession" {
					sessions++
				}
			}
			g.Expect(sessions).To(BeNumerically(">=", 1))
		})
	}
}

func TestRestartedAtFitsIntoTheStatus(t *testing.T) {
	for annotation, want := range map[string]string{
		"":                            "",
		"2026-01-01T00:00:00Z":        "2026-01-01T00:00:00Z",
		strings.Repeat("9", 100):      strings.Repeat("9", 64),
		strings.Repeat("9", 63) + "é": strings.Repeat("9", 63),
	} {
		s := v1alpha1.WhatsAppSession{}
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: annotation}
		NewWithT(t).Expect(s.RestartedAt()).To(Equal(want))
	}
}

// pairs are n pairs of a map in YAML.
func pairs(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("k%d: v", i)
	}
	return list
}
