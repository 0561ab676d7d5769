package whatsapp

import (
	"bytes"
	"compress/gzip"
	"slices"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"google.golang.org/protobuf/proto"
)

// settings is a copy of the settings as a phone sends it.
func settings(content []byte) *waE2E.Message {
	kind := waE2E.PeerDataOperationRequestType_COMPANION_SYNCD_SNAPSHOT_FATAL_RECOVERY
	return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		PeerDataOperationRequestResponseMessage: &waE2E.PeerDataOperationRequestResponseMessage{
			PeerDataOperationRequestType: &kind,
			PeerDataOperationResult: []*waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult{{
				SyncdSnapshotFatalRecoveryResponse: &waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult_SyncDSnapshotFatalRecoveryResponse{
					CollectionSnapshot: content, IsCompressed: proto.Bool(true),
				},
			}},
		},
	}}
}

// A phone sends a few kilobytes that would take gigabytes of the memory of all sessions.
func TestSettingsThatAreTooLarge(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	for range 128 {
		_, _ = z.Write(make([]byte, 1<<20))
	}
	_ = z.Close()
	w, _, s := linked(t)
	_, err := w.simulator.SendMessage(t.Context(), phone, phone, settings(bomb.Bytes()))
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Eventually(func() int64 { return w.simulator.Stats().Retries }).Should(BeNumerically(">", 0), "it is refused like a message that cannot be decrypted")
	w.send("after")
	w.g.Eventually(s.texts).Should(ContainElement("after"))
	w.settled()
	w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
}

func TestVetContent(t *testing.T) {
	padded := func(m *waE2E.Message) []byte {
		content, err := proto.Marshal(m)
		NewWithT(t).Expect(err).NotTo(HaveOccurred())
		return append(content, 1)
	}
	large := make([]byte, maxCompressed+1)
	for name, row := range map[string]struct {
		plaintext []byte
		refused   bool
	}{
		"empty":           {nil, false},
		"a long text":     {padded(&waE2E.Message{Conversation: proto.String(string(bytes.Repeat([]byte("a"), 2*maxCompressed)))}), false},
		"small settings":  {padded(settings(large[:maxCompressed-100])), false},
		"large settings":  {padded(settings(large)), true},
		"of a device":     {padded(&waE2E.Message{DeviceSentMessage: &waE2E.DeviceSentMessage{Message: settings(large)}}), true},
		"no message":      {bytes.Repeat([]byte{0xff}, 2*maxCompressed), false},
		"only of padding": {bytes.Repeat([]byte{0xff}, maxCompressed+2), false},
	} {
		t.Run(name, func(t *testing.T) {
			err := vetContent(row.plaintext)
			NewWithT(t).Expect(err != nil).To(Equal(row.refused), "%v", err)
		})
	}
}
