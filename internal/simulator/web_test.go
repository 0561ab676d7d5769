package simulator

import (
	"net/http"
	"net/url"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types/events"
)

// The library reads the newest web version from the page, as from WhatsApp's page.
func TestWebVersion(t *testing.T) {
	g := wait(t)
	s := serve(t)
	inner := &http.Transport{}
	t.Cleanup(inner.CloseIdleConnections)
	endpoint, err := url.Parse(s.Endpoint())
	g.Expect(err).NotTo(HaveOccurred())
	page := &http.Client{Transport: redirected{to: endpoint, inner: inner}}
	control := Control{URL: s.ControlURL(), HTTP: &http.Client{Transport: inner}}
	for _, row := range []struct{ set, want uint32 }{
		{0, store.GetWAVersion()[2]},
		{4_000_000_000, 4_000_000_000},
		{0, store.GetWAVersion()[2]},
	} {
		g.Expect(control.SetWebVersion(t.Context(), row.set)).To(Succeed())
		g.Expect(control.WebVersion(t.Context())).To(Equal(row.want))
		newest, err := whatsmeow.GetLatestVersion(t.Context(), page)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(*newest).To(Equal(store.WAVersionContainer{2, 3000, row.want}))
	}
}

// setWebVersion makes a client report that web version.
func (c *client) setWebVersion(version uint32) {
	c.GetClientPayload = func() *waWa6.ClientPayload {
		p := c.Store.GetClientPayload()
		p.UserAgent.AppVersion.Tertiary = &version
		return p
	}
}

func TestOutdatedClientsAreRefused(t *testing.T) {
	g := wait(t)
	s := serve(t)
	other, c := paired(t, s, "15557654321"), paired(t, s, "15551234567")
	_, err := s.Inject(Fault{Kind: FaultMinVersion, Device: "15551234567", Version: 100})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(s.Stats().Connected).To(Equal(2), "open connections stay")
	again := func(c *client, version uint32) {
		c.Disconnect()
		g.Eventually(func() int { return s.Stats().Connected }).Should(BeNumerically("<", 2))
		c.forget()
		c.setWebVersion(version)
		g.Expect(c.Connect()).To(Succeed())
	}
	again(c, 99)
	first[*events.ClientOutdated](t, c)
	again(c, 100)
	first[*events.Connected](t, c)
	again(other, 99)
	first[*events.Connected](t, other)

	_, err = s.Inject(Fault{Kind: FaultMinVersion, Version: 100})
	g.Expect(err).NotTo(HaveOccurred())
	unpaired := newClient(t, s, newDevice())
	unpaired.setWebVersion(99)
	g.Expect(unpaired.Connect()).To(Succeed())
	first[*events.ClientOutdated](t, unpaired)
	unpaired.Disconnect()
	unpaired.setWebVersion(100)
	codes(t, unpaired)
}
