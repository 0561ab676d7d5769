package whatsapp

import (
	"slices"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/serialize"
	"go.mau.fi/whatsmeow/store"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// TestAMalformedMessageDoesNotEndTheProcess: whatever a stranger sends, the connection
// goes on, the message is acknowledged, and the next one is read.
func TestAMalformedMessageDoesNotEndTheProcess(t *testing.T) {
	for _, what := range []string{"keys", "sender-key"} {
		t.Run(what, func(t *testing.T) {
			w, _, s := linked(t)
			_, err := w.simulator.Send(t.Context(), phone, "", "before")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(s.texts).Should(Equal([]string{"before"}))
			_, err = w.simulator.Inject(simulator.Fault{Kind: simulator.FaultMalformed, Code: what})
			w.g.Expect(err).NotTo(HaveOccurred())
			_, err = w.simulator.Send(t.Context(), phone, "", "malformed")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(func() int { return w.simulator.Stats().Unacknowledged }).WithTimeout(time.Minute).Should(BeZero())
			_, err = w.simulator.Clear(simulator.FaultMalformed, "")
			w.g.Expect(err).NotTo(HaveOccurred())
			_, err = w.simulator.Send(t.Context(), phone, "", "after")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(s.texts).Should(ContainElement("after"))
			w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
			w.settled()
		})
	}
}

// FuzzMalformed reads what anybody may send with what the client reads it with.
func FuzzMalformed(f *testing.F) {
	marshal := func(m proto.Message) []byte {
		content, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		return append([]byte{0x33}, content...)
	}
	mac := make([]byte, 64)
	empty := []byte{}
	f.Add(empty)
	f.Add([]byte{0x33})
	f.Add(append(marshal(&serialize.SignalMessage{RatchetKey: empty, Ciphertext: empty}), mac[:protocol.MacLength]...))
	f.Add(append(marshal(&serialize.SignalMessage{RatchetKey: []byte{5}, Ciphertext: empty}), mac[:protocol.MacLength]...))
	f.Add(marshal(&serialize.PreKeySignalMessage{BaseKey: empty, IdentityKey: empty, Message: empty}))
	f.Add(marshal(&serialize.PreKeySignalMessage{BaseKey: slices.Repeat([]byte{5}, keySize), IdentityKey: slices.Repeat([]byte{5}, keySize), Message: empty}))
	f.Add(append(marshal(&serialize.SenderKeyMessage{Ciphertext: empty}), mac...))
	f.Add(marshal(&serialize.SenderKeyDistributionMessage{ChainKey: empty, SigningKey: empty}))
	s := store.SignalProtobufSerializer
	f.Fuzz(func(t *testing.T, content []byte) {
		g := NewWithT(t)
		signal, err := protocol.NewSignalMessageFromBytes(content, s.SignalMessage)
		g.Expect(signal == nil).To(Equal(err != nil))
		preKey, err := protocol.NewPreKeySignalMessageFromBytes(content, s.PreKeySignalMessage, s.SignalMessage)
		g.Expect(preKey == nil).To(Equal(err != nil))
		group, err := protocol.NewSenderKeyMessageFromBytes(content, s.SenderKeyMessage)
		g.Expect(group == nil).To(Equal(err != nil))
		key, err := protocol.NewSenderKeyDistributionMessageFromBytes(content, s.SenderKeyDistributionMessage)
		g.Expect(key == nil).To(Equal(err != nil))
	})
}
