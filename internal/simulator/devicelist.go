package simulator

import (
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// A client caches the list of an account's devices, to which it encrypts its messages.
// When a device is linked or unlinked, the server sends the change to the account's
// other devices (account_sync) and to the devices of others that have asked for the list
// (devices). A client whose list was wrong learns it from the acknowledgement of its
// next message (phash).

// devicesLocked returns the devices of an account, by their number. The caller holds Server.mu.
func devicesLocked(a *account) []*device {
	out := make([]*device, 0, len(a.devices))
	for _, d := range a.devices {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b *device) int { return int(a.index) - int(b.index) })
	return out
}

// addressesLocked returns the JIDs of an account's phone and devices, with its number or
// its LID. The caller holds Server.mu.
func addressesLocked(a *account, server string) []types.JID {
	jid := a.jid()
	if server == types.HiddenUserServer {
		jid = a.lidJID()
	}
	out := []types.JID{jid}
	for _, d := range devicesLocked(a) {
		jid.Device = d.index
		out = append(out, jid)
	}
	return out
}

// listHash is the hash of a list of devices (whatsmeow's send.go, participantListHashV2).
func listHash(devices []types.JID) string {
	names := make([]string, len(devices))
	for i, jid := range devices {
		names[i] = jid.ADString()
	}
	slices.Sort(names)
	sum := sha256.Sum256([]byte(strings.Join(names, "")))
	return "2:" + base64.RawStdEncoding.EncodeToString(sum[:6])
}

// publishDevices sends the change ("add" or "remove") of a device to the clients that
// have the list.
func (s *Server) publishDevices(changed *device, change string) {
	a := changed.account
	s.mu.Lock()
	list := addressesLocked(a, types.DefaultUserServer)
	own := waBinary.Node{
		Tag:     "notification",
		Attrs:   waBinary.Attrs{"from": a.jid(), "type": "account_sync"},
		Content: []waBinary.Node{ownDevices(list)},
	}
	entry := waBinary.Attrs{"jid": changed.jid(), "lid": changed.lidJID()}
	if change == "add" {
		entry["key-index"] = int(changed.index)
	}
	other := waBinary.Node{
		Tag:   "notification",
		Attrs: waBinary.Attrs{"from": a.jid(), "lid": a.lidJID(), "type": "devices"},
		Content: []waBinary.Node{{
			Tag:     change,
			Attrs:   waBinary.Attrs{"device_hash": listHash(list), "device_lid_hash": listHash(addressesLocked(a, types.HiddenUserServer))},
			Content: []waBinary.Node{{Tag: "device", Attrs: entry}},
		}},
	}
	companions := devicesLocked(a)
	var watchers []*device
	for d := range a.watchers {
		if d.account.devices[d.index] == d {
			watchers = append(watchers, d)
		} else {
			delete(a.watchers, d) // unlinked
		}
	}
	s.mu.Unlock()
	for _, d := range companions {
		if d != changed {
			s.sendStanza(d, own)
		}
	}
	for _, d := range watchers {
		s.sendStanza(d, other)
	}
}

// ownDevices is the list of an account's devices, for the account itself.
func ownDevices(list []types.JID) waBinary.Node {
	var children []waBinary.Node
	for _, jid := range list {
		attributes := waBinary.Attrs{"jid": jid}
		if jid.Device != 0 {
			attributes["key-index"] = int(jid.Device)
		}
		children = append(children, waBinary.Node{Tag: "device", Attrs: attributes})
	}
	return waBinary.Node{Tag: "devices", Attrs: waBinary.Attrs{"dhash": listHash(list)}, Content: children}
}

// listProblem returns the hash of the devices that should have received a message to a
// person, or nothing if exactly these did.
func (s *Server) listProblem(from *device, to types.JID, sent []types.JID) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.accountOfLocked(to)
	if a == nil {
		return ""
	}
	wanted := addressesLocked(a, to.Server)
	own := from.jid()
	if to.Server == types.HiddenUserServer {
		own = from.lidJID()
	}
	if a != from.account {
		wanted = append(wanted, addressesLocked(from.account, to.Server)...)
	}
	if listHash(wanted) == listHash(append(sent, own)) {
		return ""
	}
	return listHash(wanted)
}
