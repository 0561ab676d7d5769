package worker

import (
	"net/url"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestEgressOf(t *testing.T) {
	parsed := func(text string) *url.URL {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	const proxy = "http://ann:hunter2@proxy.example:3128"
	for name, row := range map[string]struct {
		other string
		same  bool
	}{
		"the same URL":      {proxy, true},
		"other credentials": {"http://ben:secret@proxy.example:3128", true},
		"no credentials":    {"http://proxy.example:3128", true},
		"capital letters":   {"http://PROXY.Example:3128", true},
		"a trailing dot":    {"http://proxy.example.:3128", true},
		"another protocol":  {"socks5://proxy.example:3128", true},
		"a trailing slash":  {"http://proxy.example:3128/", true},
		"another port":      {"http://proxy.example:3129", false},
		"another host":      {"http://proxy2.example:3128", false},
		"the default port":  {"http://proxy.example", false},
		"an IPv4 address":   {"http://192.0.2.1:3128", false},
		"an IPv6 address":   {"http://[2001:db8::1]:3128", false},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(egressOf(parsed(row.other)) == egressOf(parsed(proxy))).To(Equal(row.same))
		})
	}

	g := NewWithT(t)
	g.Expect(egressOf(nil)).To(BeEmpty(), "the worker's own address")
	g.Expect(egressOf(parsed(proxy))).To(MatchRegexp("^[0-9a-f]{32}$"), "a hash that contains nothing of the URL")
	for byDefault, explicit := range map[string]string{
		"http://p": "http://p:80", "https://p": "https://p:443", "socks5://p": "socks5://p:1080", "socks5h://p": "socks5h://p:1080",
	} {
		g.Expect(egressOf(parsed(byDefault))).To(Equal(egressOf(parsed(explicit))), byDefault)
	}
}

// newProxyTest starts a supervisor of a session with a proxy. The first reads of the
// proxy's Secret fail, as many as failures says.
func newProxyTest(t *testing.T, proxy string, failures int) *supervisorTest {
	u, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	obj := newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "one"}}
	})
	return newSupervisorTest(t, obj, account{jid: jid, phone: phone}, func(env *environment) { env.proxy, env.proxyFailures = u, failures })
}

// loginEgresses has the egress of each login that waited for a token.
func (st *supervisorTest) loginEgresses() (egresses []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, l := range st.logins {
		egresses = append(egresses, l.Egress)
	}
	return egresses
}

// Secrets with the same proxy share one pace, because WhatsApp sees one address.
func TestProxiesWithTheSameAddressShareOnePace(t *testing.T) {
	st := newProxyTest(t, "http://ann:hunter2@proxy.example:3128", 0)
	st.eventuallyDials(1)
	other, err := url.Parse("http://ben@proxy.example:3128")
	st.Expect(err).NotTo(HaveOccurred())
	st.Expect(st.loginEgresses()).To(HaveExactElements(egressOf(other)), "a token before the claim, and no second one for the connection")
}

// The token that was granted before the claim is for another egress than that of the
// connection.
func TestATokenForAnotherProxyDoesNotCount(t *testing.T) {
	st := newProxyTest(t, "http://proxy.example:3128", 1)
	st.eventuallyDials(1)
	st.Expect(st.loginEgresses()).To(HaveExactElements("tenant/one", egressOf(st.proxy)))
}
