package simulator

import (
	"fmt"
	"testing"

	. "github.com/onsi/gomega"
)

// BenchmarkWrite measures what a message to a device costs the simulator, without the client:
// encryption, stanza, queue and ledger.
func BenchmarkWrite(b *testing.B) {
	for _, kind := range []string{"device", "group"} {
		b.Run(kind, func(b *testing.B) {
			g := NewWithT(b)
			s, err := New(Options{RootKey: &testRoot})
			g.Expect(err).NotTo(HaveOccurred())
			b.Cleanup(func() { _ = s.Close() })
			const devices = 10
			var members []string
			s.mu.Lock()
			for i := range devices {
				a, err := s.accountLocked(fmt.Sprintf("1555111%04d", i))
				g.Expect(err).NotTo(HaveOccurred())
				client := newDevice()
				d := &device{account: a, index: 1, identity: *client.IdentityKey.Pub, signed: preKey{
					id: 1, public: *client.SignedPreKey.Pub, signature: *client.SignedPreKey.Signature,
				}}
				a.devices[1] = d
				members = append(members, a.phone)
			}
			s.mu.Unlock()
			chat, err := s.CreateGroup(GroupRequest{Subject: "All", Members: append([]string{DefaultContact}, members...)})
			g.Expect(err).NotTo(HaveOccurred())
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				r := SendRequest{Text: "hello, is the pizza ready?", Device: members[n%devices]}
				if kind == "group" {
					r.Device, r.Chat = "", chat
				}
				if _, err := s.Write(b.Context(), r); err != nil {
					b.Fatal(err)
				}
				n++
			}
		})
	}
}
