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
		"the same":               {proxy, true},
		"other credentials":      {"http://ben:secret@proxy.example:3128", true},
		"no credentials":         {"http://proxy.example:3128", true},
		"capitals":               {"http://PROXY.Example:3128", true},
		"a name with its root":   {"http://proxy.example.:3128", true},
		"another way to ask it":  {"socks5://proxy.example:3128", true},
		"a slash":                {"http://proxy.example:3128/", true},
		"another port":           {"http://proxy.example:3129", false},
		"another host":           {"http://proxy2.example:3128", false},
		"the port that is usual": {"http://proxy.example", false},
		"an address":             {"http://192.0.2.1:3128", false},
		"an address of IPv6":     {"http://[2001:db8::1]:3128", false},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(egressOf(parsed(row.other)) == egressOf(parsed(proxy))).To(Equal(row.same))
		})
	}

	g := NewWithT(t)
	g.Expect(egressOf(nil)).To(BeEmpty(), "the worker's own address")
	g.Expect(egressOf(parsed(proxy))).To(MatchRegexp("^[0-9a-f]{32}$"), "nothing of the URL is in it")
	for usual, explicit := range map[string]string{
		"http://p": "http://p:80", "https://p": "https://p:443", "socks5://p": "socks5://p:1080", "socks5h://p": "socks5h://p:1080",
	} {
		g.Expect(egressOf(parsed(usual))).To(Equal(egressOf(parsed(explicit))), usual)
	}
}

// behind begins with a session that goes out through a proxy, whose Secret
// cannot be read so many times.
func behind(t *testing.T, proxy string, unreadable int) *stage {
	u, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	obj := newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "one"}}
	})
	return newStage(t, obj, account{jid: jid, phone: phone}, func(w *world) { w.proxy, w.proxyDown = u, unreadable })
}

// asked are the ways out that tokens were waited for.
func (st *stage) asked() (egresses []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, l := range st.logins {
		egresses = append(egresses, l.Egress)
	}
	return egresses
}

// Two Secrets with one proxy have one pace: WhatsApp sees one address.
func TestThePaceIsThatOfTheProxysAddress(t *testing.T) {
	st := behind(t, "http://ann:hunter2@proxy.example:3128", 0)
	st.dials(1)
	other, err := url.Parse("http://ben@proxy.example:3128")
	st.Expect(err).NotTo(HaveOccurred())
	st.Expect(st.asked()).To(HaveExactElements(egressOf(other)), "before the claim, and not again for the connection")
}

// The token that was fetched before the claim is for another way out than the
// connection goes.
func TestATokenOfAnotherProxyIsNone(t *testing.T) {
	st := behind(t, "http://proxy.example:3128", 1)
	st.dials(1)
	st.Expect(st.asked()).To(HaveExactElements("tenant/one", egressOf(st.proxy)))
}
