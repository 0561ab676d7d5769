package simulator

import (
	"context"
	"fmt"
	"slices"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// SendRequest is a message that a contact writes, or the own account on its phone.
type SendRequest struct {
	// Device is the linked device that gets the message. In a group it can be empty: the
	// linked devices of all members get it.
	Device string `json:"device,omitempty"`
	// From is the sender: a phone number or a LID ([DefaultContact] if it is empty). The account
	// is created if it does not exist. A message of an account that is named by its LID names
	// the sender so too. The device's own account writes on its phone or, if From is the JID of
	// a device ("15551234567:77@s.whatsapp.net"), on a simulated linked device.
	From string `json:"from,omitempty"`
	// Chat is a group, or the person to whom the own account writes.
	Chat string `json:"chat,omitempty"`
	// Kind is one of [Kinds]; text if it is empty.
	Kind string `json:"kind,omitempty"`
	// Text is the text, the caption, the name of a place, the question of a poll, the new text of
	// an edit, or the emoji of a reaction (empty: the reaction is removed).
	Text string `json:"text,omitempty"`
	// Target is the id of the message that is edited, revoked, voted on or reacted to, Quote the
	// id of the message that this one answers. Both are among the newest of the device.
	Target string `json:"target,omitempty"`
	Quote  string `json:"quote,omitempty"`
	// Mentions are phone numbers.
	Mentions []string `json:"mentions,omitempty"`
	// Options are those of a poll, or those that a vote selects; Names those of contacts.
	Options   []string `json:"options,omitempty"`
	Names     []string `json:"names,omitempty"`
	Latitude  float64  `json:"latitude,omitempty"`
	Longitude float64  `json:"longitude,omitempty"`
	// File is the media file of an image, video, voice, audio, document or sticker.
	File *File `json:"file,omitempty"`
	// Encrypted encrypts an edit with the secret of its message, as newer phones do.
	Encrypted bool `json:"encrypted,omitempty"`
	Forwarded bool `json:"forwarded,omitempty"`
	Ephemeral bool `json:"ephemeral,omitempty"`
	ViewOnce  bool `json:"view_once,omitempty"`
	// Advert is the address of an advert that the message answers.
	Advert string `json:"advert,omitempty"`
	// Unavailable sends the device only the information that there is a message, which it can
	// ask the phone for; it is the kind of the message, for example view_once.
	Unavailable string `json:"unavailable,omitempty"`
	// Again is the id of a message to the device that its sender encrypts again, with the same
	// id; only Device, From and Alone count then.
	Again string `json:"again,omitempty"`
	// Alone leaves out the sender's other address (LID or phone number).
	Alone bool `json:"alone,omitempty"`
	// Malformed sends a message that no client can read, see [Malformations].
	Malformed string `json:"malformed,omitempty"`
}

// Write sends a message, encrypted with the device's own keys, and returns its id. A device
// that is not connected gets it at its next login. Each message is sent again at each login
// until the device sends a receipt.
func (s *Server) Write(ctx context.Context, r SendRequest) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if r.Kind == "" {
		r.Kind = KindText
	}
	if err := r.check(); err != nil {
		return "", err
	}
	s.mu.Lock()
	l, devices, err := s.draftLocked(r)
	s.mu.Unlock()
	if err != nil {
		return "", err
	}
	if r.Again != "" {
		return r.Again, s.again(devices[0], l)
	}
	if slices.Contains(mediaKinds, r.Kind) {
		if l.file, err = s.media.add(r.Kind, r.File); err != nil {
			return "", err
		}
	}
	message, err := l.content()
	if err != nil {
		return "", err
	}
	return s.send(l, devices, message)
}

// check validates what does not depend on the state of the server.
func (r *SendRequest) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrBadInput}, args...)...)
	}
	if r.Again != "" {
		return nil
	}
	if !slices.Contains(Kinds(), r.Kind) {
		return bad("there is no kind of message %q; the kinds are %q", r.Kind, Kinds())
	}
	if r.Malformed != "" && !slices.Contains(Malformations(), r.Malformed) {
		return bad("a message is malformed in one of the ways %q", Malformations())
	}
	if slices.Contains(targetKinds, r.Kind) != (r.Target != "") {
		return bad("the kinds %q, and no others, need the id of their target", targetKinds)
	}
	switch {
	case slices.Contains([]string{KindText, KindPoll, KindEdit}, r.Kind) && r.Text == "":
		return bad("a message needs a text")
	case r.Kind == KindPoll && len(r.Options) < 2:
		return bad("a poll needs at least two options")
	case r.Kind == KindContact && len(r.Names) == 0:
		return bad("a message of the kind contact needs names")
	case r.Encrypted && r.Kind != KindEdit:
		return bad("only an edit can be encrypted with the secret of its message")
	}
	return nil
}

// draftLocked finds the accounts, devices and messages that a request names. The caller
// holds s.mu.
func (s *Server) draftLocked(r SendRequest) (*draft, []*device, error) {
	l := &draft{SendRequest: r, now: s.clock.Now().UnixMilli()}
	var err error
	if l.from, err = s.correspondentLocked(r.From); err != nil {
		return nil, nil, err
	}
	l.from.alone = r.Alone
	var person *account
	if r.Chat != "" {
		if chat, parseErr := types.ParseJID(r.Chat); parseErr == nil && chat.Server == types.GroupServer {
			if l.group, err = s.groupLocked(r.Chat); err != nil {
				return nil, nil, err
			}
		} else if person, err = s.memberLocked(r.Chat); err != nil {
			return nil, nil, err
		}
	}
	var devices []*device
	switch {
	case r.Device != "":
		d, err := s.deviceLocked(r.Device)
		if err != nil {
			return nil, nil, err
		}
		devices = []*device{d}
	case l.group != nil:
		if devices = l.group.devicesLocked(); len(devices) == 0 {
			return nil, nil, fmt.Errorf("%w: no member of the group has a linked device", ErrNotFound)
		}
	default:
		return nil, nil, fmt.Errorf("%w: a message needs a device or a group", ErrBadInput)
	}
	d := devices[0]
	own := l.from.account == d.account
	switch {
	case l.group != nil:
		if !slices.Contains(l.group.members, l.from.account) {
			return nil, nil, fmt.Errorf("%w: the sender is not a member of the group", ErrNotFound)
		}
		l.from.byLID = !l.group.byNumber
	case own && (person == nil || person == d.account) && r.Again == "":
		return nil, nil, fmt.Errorf("%w: a contact writes from another number than the device's own, and the own account to another person or to a group", ErrBadInput)
	case !own && person != nil:
		return nil, nil, fmt.Errorf("%w: a contact writes to the device or to a group", ErrBadInput)
	}
	l.recipient = d.account
	if own && person != nil {
		l.recipient = person
	}
	for _, reference := range []struct {
		id string
		to **sentMessage
	}{{r.Target, &l.target}, {r.Quote, &l.quoted}, {r.Again, &l.target}} {
		if reference.id == "" {
			continue
		}
		if *reference.to = d.queue.message(reference.id); *reference.to == nil {
			return nil, nil, fmt.Errorf("%w: %s is not among the newest messages of the device", ErrNotFound, reference.id)
		}
	}
	for _, name := range r.Mentions {
		a, err := s.memberLocked(name)
		if err != nil {
			return nil, nil, err
		}
		l.mentioned = append(l.mentioned, l.from.address(a).String())
	}
	return l, devices, nil
}

// correspondentLocked returns the sender that a phone number, a JID or a LID names. The caller
// holds s.mu.
func (s *Server) correspondentLocked(from string) (correspondent, error) {
	if from == "" {
		from = DefaultContact
	}
	name, err := parseDeviceName(from)
	if err != nil {
		return correspondent{}, err
	}
	a, err := s.memberLocked(from)
	if err != nil {
		return correspondent{}, err
	}
	h, err := a.handsetLocked(name.Device)
	return correspondent{account: a, byLID: name.Server == types.HiddenUserServer, device: name.Device, handset: h}, err
}

// send sends a message to devices, and returns its id.
func (s *Server) send(l *draft, devices []*device, message *waE2E.Message) (string, error) {
	content, err := proto.Marshal(message)
	if err != nil {
		return "", fmt.Errorf("encode a message: %w", err)
	}
	id, sent := newID(), s.clock.Now().Unix()
	messages := make([]*sentMessage, len(devices))
	s.mu.Lock()
	for i, d := range devices {
		m := &sentMessage{
			id: id, sent: sent, from: l.from, group: l.group, description: describe(message), content: content,
			unavailable: l.Unavailable, malformed: l.Malformed, file: l.file,
		}
		if l.group == nil && l.from.account == d.account {
			m.to = l.recipient
		}
		if l.from.account != d.account {
			d.account.contactLocked(l.from.account).wrote = true
			if f, active := s.activeLocked(FaultMalformed, d); active {
				m.malformed = f.Code
			}
		}
		messages[i] = m
		s.counts.sent++
	}
	s.mu.Unlock()
	if l.group != nil && l.Unavailable == "" && messages[0].malformed == "" {
		return id, s.pushToGroup(devices, messages)
	}
	for i, d := range devices {
		if err := s.push(d, messages[i], 0, 0); err != nil {
			return "", err
		}
	}
	return id, nil
}

// again encrypts a message that was sent before again, with the same id.
func (s *Server) again(d *device, l *draft) error {
	m := *l.target
	m.entry = nil
	if l.From != "" {
		if l.from.account != m.from.account {
			return fmt.Errorf("%w: another account has written this message", ErrBadInput)
		}
		m.from = l.from
	}
	m.from.alone = l.Alone
	if m.from.handset == nil {
		return fmt.Errorf("%w: the device itself has written this message", ErrBadInput)
	}
	s.count(func(c *counts) { c.sent++ })
	if m.group != nil {
		return s.pushToGroup([]*device{d}, []*sentMessage{&m})
	}
	return s.push(d, &m, 0, 0)
}
