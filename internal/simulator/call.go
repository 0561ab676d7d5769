package simulator

import (
	"context"
	"fmt"
	"maps"
	"slices"

	waBinary "go.mau.fi/whatsmeow/binary"
)

// CallRequest is a call of a contact to a device's account.
type CallRequest struct {
	Device string `json:"device"`
	From   string `json:"from,omitempty"`
	// End is how the call ends, one of [CallEnds].
	End string `json:"end"`
	// Video makes it a video call.
	Video bool `json:"video,omitempty"`
	// Group is the group that a group call is for.
	Group string `json:"group,omitempty"`
}

// callEnds are the last stanzas of a call, by how it ends.
var callEnds = map[string]waBinary.Node{
	// Nobody has answered it.
	"missed": {Tag: "terminate", Attrs: waBinary.Attrs{"reason": "timeout"}},
	// The contact has ended it before an answer.
	"cancelled": {Tag: "terminate", Attrs: waBinary.Attrs{"reason": ""}},
	// The account has rejected it, on this device or on another.
	"rejected":           {Tag: "reject", Attrs: waBinary.Attrs{}},
	"rejected_elsewhere": {Tag: "terminate", Attrs: waBinary.Attrs{"reason": "rejected_elsewhere"}},
	"accepted_elsewhere": {Tag: "terminate", Attrs: waBinary.Attrs{"reason": "accepted_elsewhere"}},
}

// CallEnds lists the ends of a call.
func CallEnds() []string { return sortedKeys(callEnds) }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// Call makes a contact call a device's account, ends the call, and returns its id. A group
// call is announced only (offer_notice).
func (s *Server) Call(ctx context.Context, r CallRequest) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	end, ok := callEnds[r.End]
	if !ok {
		return "", fmt.Errorf("%w: a call ends in one of the ways %q", ErrBadInput, CallEnds())
	}
	d, caller, err := s.correspondents(r.Device, r.From)
	if err != nil {
		return "", err
	}
	id := newID()
	attrs := waBinary.Attrs{"call-id": id, "call-creator": caller.account.lidJID(), "caller_pn": caller.account.jid()}
	if r.Group != "" {
		s.mu.Lock()
		g, err := s.groupLocked(r.Group)
		s.mu.Unlock()
		if err != nil {
			return "", err
		}
		attrs["group-jid"] = g.jid()
	}
	step := func(tag string, more waBinary.Attrs, media ...waBinary.Node) {
		child := waBinary.Node{Tag: tag, Attrs: maps.Clone(attrs)}
		maps.Copy(child.Attrs, more)
		if len(media) > 0 {
			child.Content = media
		}
		s.sendStanza(d, waBinary.Node{
			Tag: "call", Attrs: waBinary.Attrs{"from": caller.account.lidJID(), "platform": "android", "version": "2.26.1.1"},
			Content: []waBinary.Node{child},
		})
	}
	media := []waBinary.Node{{Tag: "audio", Attrs: waBinary.Attrs{"enc": "opus", "rate": "16000"}}}
	kind := "audio"
	if r.Video {
		media, kind = append(media, waBinary.Node{Tag: "video", Attrs: waBinary.Attrs{"enc": "h.264"}}), "video"
	}
	if r.Group != "" {
		step("offer_notice", waBinary.Attrs{"media": kind, "type": "group"})
	} else {
		step("offer", nil, media...)
	}
	step(end.Tag, end.Attrs)
	return id, nil
}
