package whatsapp

import (
	"context"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/serialize"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/appstate"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waServerSync"
	wastore "go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// TestInputThatMakesTheLibrariesPanic: as long as it passes, what works around each row is needed.
// Where a row fails after a move to another version, that part of the connector can go.
func TestInputThatMakesTheLibrariesPanic(t *testing.T) {
	var keeps struct {
		wastore.NoopStore
		keptDevice
	}
	client := func() *whatsmeow.DangerousInternalClient {
		device := &wastore.Device{ID: &types.JID{User: phone, Device: 1, Server: types.DefaultUserServer}}
		device.SetAllStores(&keeps.NoopStore)
		return whatsmeow.NewClient(device, nil).DangerousInternals() //nolint:staticcheck // "deprecated" only says that it is dangerous
	}
	signal := wastore.SignalProtobufSerializer
	for name, row := range map[string]struct {
		guard string
		panic func()
	}{
		"a login that is refused with 413": {"setCallbacks", func() {
			client().HandleConnectFailure(t.Context(), &waBinary.Node{Tag: "failure", Attrs: attrs{"reason": "413"}})
		}},
		"a pairing without an id": {"handleIQ", func() {
			client().HandlePairSuccess(t.Context(), &waBinary.Node{Tag: "iq", Attrs: attrs{}})
		}},
		"a record of the phone's settings that is too short": {"appStates", func() {
			processor := appstate.NewProcessor(&wastore.Device{AppState: &keeps.NoopStore}, nil)
			short := &waServerSync.SyncdMutation{Operation: waServerSync.SyncdMutation_SET.Enum(), Record: &waServerSync.SyncdRecord{Value: &waServerSync.SyncdValue{Blob: []byte{1}}}}
			_, _, _ = processor.DecodePatches(t.Context(), &appstate.PatchList{Patches: []*waServerSync.SyncdPatch{{Mutations: []*waServerSync.SyncdMutation{short}}}}, appstate.HashState{}, true)
		}},
		"a node without a tag": {"decodeNode", func() {
			_, _ = waBinary.Unmarshal([]byte{248, 1, 0})
		}},
		"an encrypted message with an empty key": {"guard", func() {
			empty, _ := proto.Marshal(&serialize.SignalMessage{RatchetKey: []byte{}, Ciphertext: []byte{}})
			inner := signal.SignalMessage.(guarded[protocol.SignalMessageStructure]).serializer
			_, _ = protocol.NewSignalMessageFromBytes(append(append([]byte{0x33}, empty...), make([]byte, protocol.MacLength)...), inner)
		}},
		"a first encrypted message with empty keys": {"guard", func() {
			empty, _ := proto.Marshal(&serialize.PreKeySignalMessage{BaseKey: []byte{}, IdentityKey: []byte{}, Message: []byte{}})
			inner := signal.PreKeySignalMessage.(guarded[protocol.PreKeySignalMessageStructure]).serializer
			_, _ = protocol.NewPreKeySignalMessageFromBytes(append([]byte{0x33}, empty...), inner, signal.SignalMessage)
		}},
		"an empty key of a group": {"guard", func() {
			empty, _ := proto.Marshal(&serialize.SenderKeyDistributionMessage{ChainKey: []byte{}, SigningKey: []byte{}})
			inner := signal.SenderKeyDistributionMessage.(guarded[protocol.SenderKeyDistributionMessageStructure]).serializer
			_, _ = protocol.NewSenderKeyDistributionMessageFromBytes(append([]byte{0x33}, empty...), inner)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			NewWithT(t).Expect(row.panic).To(Panic(), "%s is not needed for it any more", row.guard)
		})
	}
}

// TestADeletedDeviceLosesItsStores: that is why watchedContainer answers with an error.
func TestADeletedDeviceLosesItsStores(t *testing.T) {
	g := NewWithT(t)
	stores := &wastore.NoopStore{}
	d := &wastore.Device{Container: stores}
	d.SetAllStores(stores)
	g.Expect(d.Delete(context.Background())).To(Succeed())
	g.Expect(d.Sessions).NotTo(BeIdenticalTo(stores))
}
