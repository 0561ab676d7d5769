package app

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// TestSessionLifecycle follows sessions from their creation to their deletion, on each database.
func TestSessionLifecycle(t *testing.T) {
	databases := map[string]func(*testing.T) string{
		"SQLite":     func(*testing.T) string { return "" },
		"PostgreSQL": func(t *testing.T) string { return testenv.Postgres(t) },
	}
	for name, database := range databases {
		t.Run(name, func(t *testing.T) {
			s := newEnvironment(t, database(t))
			s.manager()
			first := s.worker("worker-1")
			s.worker("worker-2")

			names := []string{"a", "b", "c"}
			for i, name := range names {
				s.apply(name)
				s.Eventually(func() *v1alpha1.QRStatus { return s.get(name).Status.QR }).ShouldNot(BeNil())
				obj := s.get(name)
				s.Expect(obj.Status.Phase).To(Equal(v1alpha1.PhasePairing))
				s.Eventually(func() (string, error) { return s.redis.Get(t.Context(), "session:"+name+":qr").Result() }).
					Should(ContainSubstring(`"session_id":"`+name+`"`), "the code is in Redis")
				s.Eventually(func() string { return s.laravel.Code(name).QR }).Should(Equal(obj.Status.QR.Code), "Laravel has the code")
				s.scan(name, fmt.Sprintf("+3460011122%d", i))
			}
			workers := map[string]bool{}
			for i, name := range names {
				obj := s.phase(name, v1alpha1.PhaseConnected)
				s.Expect(obj.Status.PhoneNumber).To(Equal(fmt.Sprintf("+3460011122%d", i)))
				s.Expect(obj.Status.QR).To(BeNil(), "a used code is cleared")
				s.Expect(obj.Status.HeldBy).To(Equal(obj.Status.Worker))
				s.Expect(meta.IsStatusConditionTrue(obj.Status.Conditions, v1alpha1.ConditionReady)).To(BeTrue())
				last := s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
				s.Expect(last.JID).To(Equal(obj.Status.JID))
				s.Expect(last.Epoch).To(Equal(obj.Status.Epoch))
				s.Eventually(func() (string, error) { return s.redis.Get(t.Context(), "session:"+name+":connection").Result() }).
					Should(ContainSubstring(`"connected":true`))
				s.Expect(s.redis.Get(t.Context(), "session:"+name+":qr").Err()).To(HaveOccurred(), "a used code is not in Redis")
				workers[obj.Status.Worker] = true
			}
			s.Expect(workers).To(HaveLen(2), "the sessions are spread")

			t.Log("a message is received and acknowledged")
			_, err := s.simulator.Send(t.Context(), s.get("a").Status.JID, "34911000000@s.whatsapp.net", "hello")
			s.Expect(err).NotTo(HaveOccurred())
			s.Eventually(func() int { return s.simulator.Stats().Unacknowledged }).Should(BeZero())

			t.Log("a worker is shut down: its sessions move, and nobody scans again")
			logins := s.simulator.Stats().Logins
			first.stop()
			for _, name := range names {
				s.Eventually(func() string { return s.get(name).Status.HeldBy }).Should(Equal("worker-2"))
				s.phase(name, v1alpha1.PhaseConnected)
				s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
			}
			s.Expect(s.simulator.Stats().Logins-logins).To(BeNumerically("<=", len(names)), "each session moves at most once")

			t.Log("suspended and resumed")
			s.change("a", func(o *v1alpha1.WhatsAppSession) { o.Spec.Suspend = true })
			obj := s.phase("a", v1alpha1.PhaseSuspended)
			s.Expect(obj.Status.HeldBy).To(BeEmpty())
			s.Expect(obj.Status.JID).NotTo(BeEmpty(), "the keys are kept")
			s.expectPublished("a", delivery.Inactive, v1alpha1.PhaseSuspended)
			s.change("a", func(o *v1alpha1.WhatsAppSession) { o.Spec.Suspend = false })
			s.phase("a", v1alpha1.PhaseConnected)
			s.expectPublished("a", delivery.Active, v1alpha1.PhaseConnected)

			t.Log("deleted with Logout: the device is unlinked")
			devices := s.simulator.Stats().Devices
			s.Expect(s.client.Delete(t.Context(), s.get("a"))).To(Succeed())
			s.gone("a")
			s.Expect(s.simulator.Stats().Devices).To(Equal(devices - 1))
			s.expectPublished("a", delivery.Inactive, v1alpha1.PhaseTerminating)
			s.Expect(s.redis.Keys(t.Context(), "session:a:*").Val()).To(BeEmpty())

			t.Log("deleted with Retain and applied again: connected without a scan")
			s.change("b", func(o *v1alpha1.WhatsAppSession) { o.Spec.DeletionPolicy = v1alpha1.DeletionRetain })
			before := s.get("b")
			s.Expect(s.client.Delete(t.Context(), before)).To(Succeed())
			s.gone("b")
			s.expectPublished("b", delivery.Inactive, v1alpha1.PhaseTerminating)
			s.apply("b")
			obj = s.phase("b", v1alpha1.PhaseConnected)
			s.Expect(obj.Status.JID).To(Equal(before.Status.JID))
			s.Expect(obj.Status.Epoch).To(BeNumerically(">", before.Status.Epoch))
			s.expectPublished("b", delivery.Active, v1alpha1.PhaseConnected)
		})
	}
}

func (s *environment) gone(name string) {
	s.t.Helper()
	s.Eventually(func() bool {
		err := s.client.Get(s.t.Context(), client.ObjectKey{Namespace: s.namespace, Name: name}, &v1alpha1.WhatsAppSession{})
		return apierrors.IsNotFound(err)
	}).Should(BeTrue())
}

// event waits for an Event beside a session and returns its sentence.
func (s *environment) event(name, reason string) (note string) {
	s.t.Helper()
	s.Eventually(func() bool {
		var all eventsv1.EventList
		s.Expect(s.client.List(s.t.Context(), &all, client.InNamespace(s.namespace))).To(Succeed())
		for _, e := range all.Items {
			if e.Regarding.Name == name && e.Reason == reason {
				note = e.Note
				return true
			}
		}
		return false
	}).Should(BeTrue(), "an Event %s beside %s", reason, name)
	return note
}

func restart(value string) func(*v1alpha1.WhatsAppSession) {
	return func(o *v1alpha1.WhatsAppSession) {
		o.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: value}
	}
}

// TestSessionsEndedByWhatsApp has the servers end sessions in each way.
func TestSessionsEndedByWhatsApp(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	s.worker("worker-1")
	names := []string{"dropped", "unlinked", "banned", "outdated", "replaced", "wrong"}
	for i, name := range names {
		s.apply(name, func(o *v1alpha1.WhatsAppSession) {
			if name == "wrong" {
				o.Spec.Pairing.PhoneNumber = "+34999999999"
			}
		})
		s.scan(name, fmt.Sprintf("+3470011122%d", i))
	}
	device := func(name string) string { return s.get(name).Status.JID }
	for _, name := range names[:5] {
		s.phase(name, v1alpha1.PhaseConnected)
		s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
	}
	inject := func(f simulator.Fault) {
		t.Helper()
		_, err := s.simulator.Inject(f)
		s.Expect(err).NotTo(HaveOccurred())
	}

	t.Run("a dropped socket comes back by itself", func(*testing.T) {
		inject(simulator.Fault{Kind: simulator.FaultDrop, Device: device("dropped")})
		s.Eventually(func() int64 { return s.get("dropped").Status.Reconnects }).Should(BeEquivalentTo(1))
		s.phase("dropped", v1alpha1.PhaseConnected)
		s.expectPublished("dropped", delivery.Active, v1alpha1.PhaseConnected)
	})
	t.Run("unlinked on the phone: logged out, and scanned again on request", func(*testing.T) {
		inject(simulator.Fault{Kind: simulator.FaultStreamError, Code: "device_removed", Device: device("unlinked")})
		obj := s.phase("unlinked", v1alpha1.PhaseLoggedOut)
		s.Expect(meta.IsStatusConditionTrue(obj.Status.Conditions, v1alpha1.ConditionStalled)).To(BeTrue())
		s.expectPublished("unlinked", delivery.Inactive, v1alpha1.PhaseLoggedOut)
		s.Expect(s.event("unlinked", v1alpha1.ReasonLoggedOut)).To(ContainSubstring(v1alpha1.RestartedAtAnnotation))
		s.change("unlinked", restart("again"))
		s.scan("unlinked", "+34700111221")
		s.phase("unlinked", v1alpha1.PhaseConnected)
		s.expectPublished("unlinked", delivery.Active, v1alpha1.PhaseConnected)
	})
	t.Run("banned until", func(*testing.T) {
		inject(simulator.Fault{Kind: simulator.FaultFailure, Reason: 402, Expire: metav1.Duration{Duration: time.Hour}, Device: device("banned")})
		obj := s.phase("banned", v1alpha1.PhaseBanned)
		s.Expect(obj.Status.RetryAfter.Time).To(BeTemporally("~", time.Now().Add(time.Hour), 5*time.Minute))
		s.expectPublished("banned", delivery.Inactive, v1alpha1.PhaseBanned)
		s.event("banned", v1alpha1.ReasonBanned)
	})
	t.Run("outdated", func(*testing.T) {
		inject(simulator.Fault{Kind: simulator.FaultFailure, Reason: 405, Device: device("outdated")})
		s.phase("outdated", v1alpha1.PhaseOutdated)
		s.expectPublished("outdated", delivery.Inactive, v1alpha1.PhaseOutdated)
		s.event("outdated", v1alpha1.ReasonOutdated)
	})
	t.Run("replaced is not fought", func(*testing.T) {
		inject(simulator.Fault{Kind: simulator.FaultStreamError, Code: "replaced", Device: device("replaced")})
		obj := s.phase("replaced", v1alpha1.PhaseReplaced)
		s.Expect(obj.Status.RetryAfter.Time).To(BeTemporally("~", time.Now().Add(5*time.Minute), 2*time.Minute))
		s.expectPublished("replaced", delivery.Inactive, v1alpha1.PhaseReplaced)
		s.event("replaced", v1alpha1.ReasonReplaced)
	})
	t.Run("the wrong phone is logged out", func(*testing.T) {
		s.phase("wrong", v1alpha1.PhaseLoggedOut)
		s.Expect(s.event("wrong", v1alpha1.ReasonWrongPhone)).To(ContainSubstring("+34999999999"))
		last := s.expectPublished("wrong", delivery.Inactive, v1alpha1.PhaseLoggedOut)
		s.Expect(last.Reason).To(Equal(v1alpha1.ReasonWrongPhone))
		for _, d := range s.simulator.Devices() {
			s.Expect(d.JID).NotTo(ContainSubstring("34700111225"))
		}
	})
}

// TestBadInput ends each in a sentence where a person looks.
func TestBadInput(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	s.worker("worker-1")

	reason := func(name, condition string) func() string {
		return func() string {
			if c := meta.FindStatusCondition(s.get(name).Status.Conditions, condition); c != nil && c.Status == metav1.ConditionTrue {
				return c.Reason
			}
			return ""
		}
	}
	t.Run("an id that another namespace holds", func(t *testing.T) {
		s.apply("shop")
		s.phase("shop", v1alpha1.PhasePairing)
		other := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "other-"}}
		s.Expect(s.client.Create(t.Context(), other)).To(Succeed())
		thief := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: other.Name, Name: "shop"}}
		s.Expect(s.client.Create(t.Context(), thief)).To(Succeed())
		s.Eventually(func() string {
			s.Expect(s.client.Get(t.Context(), client.ObjectKeyFromObject(thief), thief)).To(Succeed())
			if c := meta.FindStatusCondition(thief.Status.Conditions, v1alpha1.ConditionStalled); c != nil && c.Status == metav1.ConditionTrue {
				s.Expect(c.Message).NotTo(ContainSubstring(s.namespace))
				return c.Reason
			}
			return ""
		}).Should(Equal(v1alpha1.ReasonSessionIDTaken))
		s.Expect(thief.Status.Epoch).To(BeZero())
		s.Expect(s.client.Delete(t.Context(), thief)).To(Succeed())
		s.Eventually(func() bool {
			return apierrors.IsNotFound(s.client.Get(t.Context(), client.ObjectKeyFromObject(thief), thief))
		}).Should(BeTrue())
	})
	t.Run("a proxy Secret that is missing, then malformed, then right", func(t *testing.T) {
		s.apply("proxied", func(o *v1alpha1.WhatsAppSession) {
			o.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "out"}}
		})
		s.Eventually(reason("proxied", v1alpha1.ConditionStalled)).Should(Equal(v1alpha1.ReasonProxySecretMissing))
		secret := &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "out"}, Type: v1alpha1.ProxySecretType,
			StringData: map[string]string{v1alpha1.ProxySecretKey: "socks5://user:hunter2@%zz"},
		}
		s.Expect(s.client.Create(t.Context(), secret)).To(Succeed())
		s.change("proxied", restart("1"))
		s.Eventually(reason("proxied", v1alpha1.ConditionStalled)).Should(Equal(v1alpha1.ReasonProxySecretInvalid))
		obj := s.get("proxied")
		for _, c := range obj.Status.Conditions {
			s.Expect(c.Message).NotTo(ContainSubstring("hunter2"))
		}
		s.Expect(s.event("proxied", v1alpha1.ReasonProxySecretInvalid)).NotTo(ContainSubstring("hunter2"))
	})
	t.Run("Laravel answers HTML, then a redirect; nothing is lost", func(*testing.T) {
		s.laravel.AnswerWith(func(laraveltest.Request) laraveltest.Answer {
			return laraveltest.Refuse(http.StatusOK, "<html>login</html>")
		})
		s.apply("html")
		s.phase("html", v1alpha1.PhasePairing)
		s.scan("html", "+34600999001")
		s.phase("html", v1alpha1.PhaseConnected)
		s.laravel.AnswerWith(func(laraveltest.Request) laraveltest.Answer {
			return laraveltest.Answer{Write: func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://example.com/login", http.StatusFound)
			}}
		})
		s.laravel.AnswerWith(nil)
		s.expectPublished("html", delivery.Active, v1alpha1.PhaseConnected)
	})
}

// TestRedisLosesData: the present state is published again, and the cache is filled again.
func TestRedisLosesData(t *testing.T) {
	s := newEnvironment(t, "")
	server := testenv.RedisServer(t)
	s.redisAddr = server.Addr()
	s.manager()
	s.worker("worker-1")
	s.apply("a")
	s.scan("a", "+34600111220")
	s.phase("a", v1alpha1.PhaseConnected)
	before := s.expectPublished("a", delivery.Active, v1alpha1.PhaseConnected)
	server.RestartEmpty()
	s.Eventually(func() bool { return s.laravel.Status("a").Newer(before.Numbers) }).Should(BeTrue())
	s.expectPublished("a", delivery.Active, v1alpha1.PhaseConnected)
	s.Expect(s.get("a").Status.Reconnects).To(BeZero(), "a Redis outage drops no connection")
}

// refused starts a worker that gives up: it has a start-timeout.
func (s *environment) refused(redisAddr string, more ...string) *process {
	return s.start("worker", append([]string{
		"--kubeconfig=" + s.kube, "--namespace=" + s.namespace, "--redis=" + redisAddr, "--store=" + s.store,
		"--metrics-bind-address=0", "--health-bind-address=0", "--name=w", "--state-dir=" + s.t.TempDir(), "--start-timeout=20s",
	}, more...)...)
}

// TestRestartInPlace: a process that comes back in its state folder takes up its
// own sessions, under the same epoch, and nothing moves.
func TestRestartInPlace(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	first := s.worker("worker-1")
	for i, name := range []string{"a", "b"} {
		s.apply(name)
		s.scan(name, fmt.Sprintf("+3480011122%d", i))
		s.phase(name, v1alpha1.PhaseConnected)
	}
	s.apply("unscanned")
	s.phase("unscanned", v1alpha1.PhasePairing)
	before := s.get("a").Status
	s.worker("worker-2") // has room, but nothing is to move

	first.Kill()
	s.worker("worker-1")
	for _, name := range []string{"a", "b"} {
		s.Eventually(func() int64 { return s.get(name).Status.Reconnects }).Should(BeEquivalentTo(1))
		s.phase(name, v1alpha1.PhaseConnected)
		s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
	}
	after := s.get("a").Status
	s.Expect(after.Worker).To(Equal("worker-1"))
	s.Expect(after.Epoch).To(Equal(before.Epoch))
	s.Expect(after.HolderStart).NotTo(Equal(before.HolderStart), "another process, another claim")
	s.Eventually(func() int64 { return s.laravel.Status("a").Seq }).Should(BeNumerically(">", delivery.FirstSeq(2)), "its numbers rise over the restart")
	s.scan("unscanned", "+34800111229")
	s.phase("unscanned", v1alpha1.PhaseConnected)
}

// TestLaravelUnreachableAtStart: updates from before are delivered when it answers.
func TestLaravelUnreachableAtStart(t *testing.T) {
	s := newEnvironment(t, "")
	s.laravel.AnswerWith(func(laraveltest.Request) laraveltest.Answer {
		return laraveltest.Refuse(http.StatusServiceUnavailable, "")
	})
	s.manager()
	s.worker("worker-1")
	for i, name := range []string{"a", "b", "c"} {
		s.apply(name)
		s.scan(name, fmt.Sprintf("+3490011122%d", i))
		s.phase(name, v1alpha1.PhaseConnected)
	}
	s.laravel.AnswerWith(nil)
	for _, name := range []string{"a", "b", "c"} {
		s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
	}
}

// TestStartIsRefused: the program refuses to start with an error that says what to change.
func TestStartIsRefused(t *testing.T) {
	s := newEnvironment(t, "")
	volatile := testenv.Redis(t, "--maxmemory-policy", "allkeys-lru", "--appendonly", "no", "--save", "")
	tests := []struct {
		name string
		run  func() *process
		want []string
	}{
		{
			name: "every error of the configuration at once",
			run: func() *process {
				return s.start("manager", "--redis=nonsense", "--store=postgres://u:hunter2@h/d", "--laravel-url=gopher://x", "--namespace=x")
			},
			want: []string{"host:port", "--store-file", "Laravel"},
		},
		{
			name: "a database's URL that is none, and a bound below zero",
			run: func() *process {
				return s.start("manager", "--redis=nonsense", "--store=mysql://h/d", "--store-max-connections=-1", "--laravel-url=gopher://x", "--namespace=x")
			},
			want: []string{"host:port", "the URL of the store must be", "--store-max-connections is -1", "Laravel"},
		},
		{
			name: "a file with a database's URL that is none",
			run: func() *process {
				return s.refused(s.redisAddr, "--store=", "--store-file="+s.file("bad", "postgres://u:hunter2@h:port/d"), "--capacity=0")
			},
			want: []string{"the URL of the store must be", "--capacity"},
		},
		{
			name: "Redis is not there",
			run: func() *process {
				return s.refused("127.0.0.1:1", "--start-timeout=2s")
			},
			want: []string{"Redis cannot be reached"},
		},
		{
			name: "a Redis that evicts",
			run: func() *process {
				return s.refused(volatile)
			},
			want: []string{"noeviction", "--allow-volatile-redis"},
		},
		{
			name: "a Redis user without two commands and the channel",
			run: func() *process {
				return s.refused(s.redisAddr, s.redisUser(redis.Worker, "-type", "-zadd", "resetchannels")...)
			},
			want: []string{"worker", "TYPE, ZADD", "batch:{queue}:wake", "redis-acl"},
		},
		{
			name: "the database is not there",
			run: func() *process {
				return s.refused(s.redisAddr, "--store=", "--start-timeout=2s", "--store-file="+s.file("store", "postgres://u:hunter2@127.0.0.1:1/d"))
			},
			want: []string{"the store cannot be reached"},
		},
		{
			name: "Redis belongs to another installation",
			run: func() *process {
				s.Expect(s.redis.Set(context.Background(), "operator:installation", "cluster-x/prod/whatsapp-operator", 0).Err()).To(Succeed())
				t.Cleanup(func() { s.redis.Del(context.Background(), "operator:installation") })
				return s.refused(s.redisAddr)
			},
			want: []string{"cluster-x/prod/whatsapp-operator", "store adopt"},
		},
		{
			name: "the store belongs to another installation",
			run: func() *process {
				s.store = "sqlite:" + filepath.Join(s.dir, "others.db")
				other := s.manager("--release=other", "--redis-key-prefix=other:")
				s.Eventually(func() (string, error) {
					opened, err := store.Open(t.Context(), store.Config{URL: s.store}, logr.Discard())
					if err != nil {
						return "", err
					}
					defer func() { _ = opened.Close() }()
					return opened.Installation(t.Context())
				}).Should(HaveSuffix("/other"))
				other.stop()
				return s.refused(s.redisAddr)
			},
			want: []string{"StoreOwnedElsewhere", "/other", "store adopt"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(*testing.T) {
			out := tt.run().fails()
			for _, sentence := range tt.want {
				s.Expect(out).To(ContainSubstring(sentence))
			}
			s.Expect(out).NotTo(ContainSubstring("hunter2"))
		})
	}
}
