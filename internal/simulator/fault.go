package simulator

import (
	"fmt"
	"slices"
	"time"

	"go.mau.fi/whatsmeow/types"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// FaultKind says what goes wrong.
type FaultKind string

// Faults that happen once, to the present connections.
const (
	// FaultDrop closes the socket without an explanation.
	FaultDrop FaultKind = "drop"
	// FaultFreeze makes the connection half-open: no data passes in either direction,
	// and neither end is informed. It ends after Fault.For, or with [Server.Clear].
	FaultFreeze FaultKind = "freeze"
	// FaultStreamError ends the connection with Fault.Code: 515 (reconnect), 503
	// (the server restarts), device_removed (unlinked on the phone, and here),
	// replaced (a second login), unacknowledged (a stanza was never acknowledged, as the
	// statuses that clients until 2025 did not know).
	FaultStreamError FaultKind = "stream-error"
)

// Faults that last: for Fault.For, or until they are cleared.
const (
	// FaultMute leaves keep-alives (w:p) without an answer.
	FaultMute FaultKind = "mute"
	// FaultSlowHandshake makes the noise handshake take Fault.Delay longer. For a
	// named device, which is known only when the handshake is over, the delay
	// comes before the login's answer.
	FaultSlowHandshake FaultKind = "slow-handshake"
	// FaultSlowUpgrade makes the websocket's upgrade take Fault.Delay longer. It
	// applies to all: the device is not known yet.
	FaultSlowUpgrade FaultKind = "slow-upgrade"
	// FaultRefuse drops the connections and refuses new ones: the upgrade with
	// status 503, or, for a named device, the login with a closed socket.
	FaultRefuse FaultKind = "refuse"
	// FaultFailure drops the connections and refuses logins with Fault.Reason: 401
	// (logged out), 402 (banned, for Fault.Expire), 403 (locked), 405 (client
	// outdated), 406 (banned), or another.
	FaultFailure FaultKind = "failure"
	// FaultMinVersion refuses clients that name a web version below Fault.Version
	// with 405 (client outdated): their logins and, without a device, their pairings.
	// Open connections are left alone.
	FaultMinVersion FaultKind = "min-version"
	// FaultCloseAtOnce closes a connection right after its last node (a stream
	// error, a failure), so that the client can lose that node.
	FaultCloseAtOnce FaultKind = "close-at-once"
	// FaultLoseEnd closes a connection without sending its last node. A client that
	// has just paired then receives no 515.
	FaultLoseEnd FaultKind = "lose-end"
	// FaultSlowEnd sends the last node of a connection Fault.Delay later, for example the 515
	// after a pairing.
	FaultSlowEnd FaultKind = "slow-end"
	// FaultLosePairing loses a client's answer to a scan: the client has stored a device
	// that the server has not linked, and its connection is closed.
	FaultLosePairing FaultKind = "lose-pairing"
	// FaultBadHMAC and FaultBadSignature make scans answer with a device identity
	// that a client must refuse.
	FaultBadHMAC      FaultKind = "bad-hmac"
	FaultBadSignature FaultKind = "bad-signature"
	// FaultRetireCode invalidates the code that a phone scans: the client is informed that
	// its codes need another secret, and the phone must scan again.
	FaultRetireCode FaultKind = "retire-code"
	// FaultPasskey asks the accounts that scan or type a code for their passkey.
	FaultPasskey FaultKind = "passkey"
	// FaultSlowPasskey makes the phone continue a pairing Fault.Delay after the answer of
	// its passkey.
	FaultSlowPasskey FaultKind = "slow-passkey"
	// FaultRefuseCode refuses clients a code to type on the phone, with Fault.Reason:
	// 429 (asked too often), 400 (malformed), or another.
	FaultRefuseCode FaultKind = "refuse-code"
	// FaultSenderOffline leaves requests for a message that could not be decrypted
	// without an answer.
	FaultSenderOffline FaultKind = "sender-offline"
	// FaultPhoneOffline leaves the requests of devices to their own phone without an answer:
	// for a message that they could not decrypt or that is unavailable, and for a media file
	// that has expired.
	FaultPhoneOffline FaultKind = "phone-offline"
	// FaultReachOutLock refuses messages to strangers with error 463, and informs the
	// devices that their account is locked until the fault ends. A stranger is a person who
	// has not written to the account; a message with a valid token is accepted.
	FaultReachOutLock FaultKind = "reach-out-lock"
	// FaultMalformed makes the messages of contacts malformed, by Fault.Code, see
	// [Malformations].
	FaultMalformed FaultKind = "malformed"
)

// Fault is a failure that the server simulates.
type Fault struct {
	Kind FaultKind `json:"kind"`
	// Device is a JID, or a phone number for all its devices; empty for all. It
	// need not be linked yet.
	Device string `json:"device,omitempty"`
	// For is how long a lasting fault or a freeze lasts; 0: until it is cleared.
	For metav1.Duration `json:"for,omitzero"`
	// Delay is for [FaultSlowHandshake], [FaultSlowUpgrade], [FaultSlowEnd] and
	// [FaultSlowPasskey].
	Delay metav1.Duration `json:"delay,omitzero"`
	// Reason is for [FaultFailure] and [FaultRefuseCode].
	Reason int `json:"reason,omitempty"`
	// Expire is how long a ban (reason 402) lasts, in whole seconds.
	Expire metav1.Duration `json:"expire,omitzero"`
	// Code is for [FaultStreamError] and [FaultMalformed].
	Code string `json:"code,omitempty"`
	// Version is for [FaultMinVersion]: the last of the three numbers.
	Version uint32 `json:"version,omitempty"`
}

// streamCodes are the codes of a stream error.
var streamCodes = []string{"515", "503", "device_removed", "replaced", "unacknowledged"}

// activeFault is a fault that lasts.
type activeFault struct {
	Fault
	target types.JID // the zero value for all
	until  time.Time // the zero value until it is cleared
}

// check validates f, and returns the device that it concerns.
func (f Fault) check() (target types.JID, once bool, err error) {
	bad := func(format string, args ...any) (types.JID, bool, error) {
		return types.JID{}, false, fmt.Errorf("%w: "+format, append([]any{ErrBadInput}, args...)...)
	}
	if f.Device != "" {
		if target, err = parseDeviceName(f.Device); err != nil {
			return types.JID{}, false, err
		}
	}
	if f.For.Duration < 0 || f.Delay.Duration < 0 || f.Expire.Duration < 0 {
		return bad("a duration cannot be negative")
	}
	switch f.Kind {
	case FaultDrop, FaultFreeze:
		once = true
	case FaultStreamError:
		once = true
		if !slices.Contains(streamCodes, f.Code) {
			return bad("the code of a stream error is one of %q", streamCodes)
		}
	case FaultMalformed:
		if !slices.Contains(Malformations(), f.Code) {
			return bad("the code of %s is one of %q", f.Kind, Malformations())
		}
	case FaultSlowUpgrade, FaultSlowHandshake, FaultSlowEnd, FaultSlowPasskey:
		if f.Delay.Duration == 0 {
			return bad("%s needs a delay", f.Kind)
		}
		if f.Kind == FaultSlowUpgrade && f.Device != "" {
			return bad("%s concerns all: a device is not known before the handshake", f.Kind)
		}
	case FaultFailure:
		if f.Reason < 400 || f.Reason > 599 {
			return bad("a failure needs a reason: 401, 402, 403, 405, 406 or another from 400 to 599")
		}
	case FaultRefuseCode:
		if f.Device != "" {
			return bad("%s concerns all: there is no device yet", f.Kind)
		}
		if f.Reason < 400 || f.Reason > 599 {
			return bad("%s needs a reason: 429, 400 or another from 400 to 599", f.Kind)
		}
	case FaultMinVersion:
		if f.Version == 0 {
			return bad("%s needs a version", f.Kind)
		}
	case FaultBadHMAC, FaultBadSignature:
		if f.Device != "" {
			return bad("%s concerns all scans: there is no device yet", f.Kind)
		}
	case FaultMute, FaultRefuse, FaultCloseAtOnce, FaultLoseEnd, FaultSenderOffline, FaultPhoneOffline, FaultReachOutLock,
		FaultRetireCode, FaultPasskey, FaultLosePairing:
	default:
		return bad("there is no fault %q", string(f.Kind))
	}
	return target, once, nil
}

// concerns reports whether a fault with that target concerns a device. A fault for a
// named device does not concern a connection without a device.
func concerns(target types.JID, d *device) bool {
	switch {
	case target.User == "":
		return true
	case d == nil, target.Device != 0 && target.Device != d.index:
		return false
	case target.Server == types.HiddenUserServer:
		return target.User == d.account.lid
	default:
		return target.User == d.account.phone
	}
}

// Inject starts a fault, and returns how many connections it affected
// immediately. An active fault of the same kind and device is replaced.
func (s *Server) Inject(f Fault) (int, error) {
	target, once, err := f.check()
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	if !once {
		s.faults = slices.DeleteFunc(s.faults, func(x activeFault) bool { return x.Kind == f.Kind && x.target == target })
		added := activeFault{Fault: f, target: target}
		if f.For.Duration > 0 {
			added.until = s.clock.Now().Add(f.For.Duration)
		}
		s.faults = append(s.faults, added)
	}
	hit := s.concernedLocked(target)
	s.mu.Unlock()

	switch f.Kind {
	case FaultReachOutLock:
		var until time.Time
		if f.For.Duration > 0 {
			until = s.clock.Now().Add(f.For.Duration)
		}
		s.sendReachOutLock(target, true, until)
	case FaultDrop, FaultRefuse, FaultFailure:
		for _, c := range hit {
			c.close()
		}
	case FaultFreeze:
		hit = slices.DeleteFunc(hit, func(c *conn) bool { return c.socket == nil || !c.socket.pause() })
		if f.For.Duration > 0 {
			s.after(f.For.Duration, func() { thaw(hit) })
		}
	case FaultStreamError:
		for _, c := range hit {
			s.mu.Lock()
			d := c.device
			s.mu.Unlock()
			if f.Code == "device_removed" && d != nil {
				s.unlink(d)
			}
			c.end(streamError(f.Code))
		}
	default:
		hit = nil
	}
	s.log.Info("Injected a fault", "kind", f.Kind, "device", f.Device, "connections", len(hit))
	return len(hit), nil
}

// sendReachOutLock informs the devices that a fault with that target concerns.
func (s *Server) sendReachOutLock(target types.JID, active bool, until time.Time) {
	var devices []*device
	s.mu.Lock()
	for _, a := range s.byPhone {
		for _, d := range a.devices {
			if concerns(target, d) {
				devices = append(devices, d)
			}
		}
	}
	s.mu.Unlock()
	for _, d := range devices {
		s.sendStanza(d, reachOutLock(active, until))
	}
}

func thaw(conns []*conn) int {
	n := 0
	for _, c := range conns {
		if c.socket != nil && c.socket.resume() {
			n++
		}
	}
	return n
}

// concernedLocked returns the connections that a fault with that target concerns and
// that have a write key. The caller holds s.mu.
func (s *Server) concernedLocked(target types.JID) []*conn {
	var out []*conn
	for c := range s.conns {
		if (c.device != nil || c.pairing != nil) && concerns(target, c.device) {
			out = append(out, c)
		}
	}
	return out
}

// active finds an active fault that concerns the device, or all devices.
func (s *Server) active(kind FaultKind, d *device) (Fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.activeLocked(kind, d)
}

func (s *Server) activeLocked(kind FaultKind, d *device) (Fault, bool) {
	if len(s.faults) == 0 {
		return Fault{}, false
	}
	s.expireLocked()
	for _, f := range s.faults {
		if f.Kind == kind && concerns(f.target, d) {
			return f.Fault, true
		}
	}
	return Fault{}, false
}

func (s *Server) expireLocked() {
	now := s.clock.Now()
	s.faults = slices.DeleteFunc(s.faults, func(f activeFault) bool { return !f.until.IsZero() && !now.Before(f.until) })
}

// Faults lists the active faults.
func (s *Server) Faults() []Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expireLocked()
	out := []Fault{}
	for _, f := range s.faults {
		out = append(out, f.Fault)
	}
	return out
}

// Clear ends the faults of that kind for that device, and thaws its connections;
// an empty kind means every kind, an empty device every device. It returns the number
// of faults that it ended and connections that it thawed.
func (s *Server) Clear(kind FaultKind, device string) (int, error) {
	var target types.JID
	if device != "" {
		var err error
		if target, err = parseDeviceName(device); err != nil {
			return 0, err
		}
	}
	s.mu.Lock()
	s.expireLocked()
	before := len(s.faults)
	unlocked := false
	s.faults = slices.DeleteFunc(s.faults, func(f activeFault) bool {
		ended := (kind == "" || f.Kind == kind) && (device == "" || f.target == target)
		unlocked = unlocked || ended && f.Kind == FaultReachOutLock
		return ended
	})
	cleared := before - len(s.faults)
	hit := s.concernedLocked(target)
	s.mu.Unlock()
	if unlocked {
		s.sendReachOutLock(target, false, time.Time{})
	}
	if kind == "" || kind == FaultFreeze {
		cleared += thaw(hit)
	}
	return cleared, nil
}
