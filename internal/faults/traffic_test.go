//go:build faults

package faults

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

var (
	messageRate = flag.Float64("messages", 20, "how many messages contacts send in a second, in each environment")
	floodRate   = flag.Float64("flood", 60, "how many more they send in a second during a flood")
)

const (
	// contacts is how many contacts write; each has its own ratchet with each device.
	contacts = 3
	// groupSize is how many sessions are members of a group, and grouped which part of the
	// sessions is in groups.
	groupSize, grouped = 3, 4
	// lastTexts is how many texts of a chat can still be edited, or reacted to. The simulator
	// knows at least the newest 32 messages of a device.
	lastTexts = 4
)

// traffic simulates contacts that always write to random sessions: texts, and everything else
// that WhatsApp delivers.
type traffic struct {
	w      *environment
	random *rand.Rand
	// lids are the contacts' other addresses.
	lids   [contacts]string
	groups []string

	// hold is locked by a check while no other messages may be sent.
	hold  sync.Mutex
	sent  int
	texts map[chat][]string // the ids of the newest texts
}

// chat is a session and the contact who writes to it.
type chat struct {
	jid     string
	contact int
}

func newTraffic(w *environment) *traffic {
	t := &traffic{w: w, random: rand.New(rand.NewPCG(w.seed, 1)), texts: map[chat][]string{}}
	for i := range t.lids {
		var err error
		t.lids[i], err = w.simulator.LID(number(i))
		w.must(err)
	}
	for n := 0; n < max(groupSize, len(w.sessions)/grouped) && n < len(w.sessions); n += groupSize {
		members := []string{number(0)}
		for i := 1; i < contacts; i++ {
			members = append(members, number(i))
		}
		for _, s := range w.sessions[n:min(n+groupSize, len(w.sessions))] {
			members = append(members, s.phone)
		}
		group, err := w.simulator.CreateGroup(simulator.GroupRequest{Subject: "faults", Members: members, ByNumber: n%2 == 1})
		w.must(err)
		t.groups = append(t.groups, group)
	}
	for _, s := range w.sessions { // from now on the device can ask its phone for messages
		_, err := w.simulator.SendHistory(w.t.Context(), s.jid)
		w.must(err)
	}
	if *messageRate > 0 {
		w.every(time.Duration(float64(time.Second) / *messageRate), func(ctx context.Context) {
			t.hold.Lock()
			defer t.hold.Unlock()
			t.sendAny(ctx, w.sessions[t.random.IntN(len(w.sessions))])
		})
	}
	return t
}

// number is the phone number of a contact.
func number(contact int) string { return fmt.Sprintf("1555000%04d", 1+contact) }

// from names a contact by its number or by its LID, as both occur.
func (t *traffic) from(contact int) string {
	if t.random.IntN(2) == 0 {
		return t.lids[contact]
	}
	return number(contact)
}

// send sends a text to a session. The caller holds t.hold.
func (t *traffic) send(ctx context.Context, s *session) {
	t.sent++
	t.text(ctx, s, t.sent%contacts)
}

// sendAny sends a message of a random kind. The caller holds t.hold.
func (t *traffic) sendAny(ctx context.Context, s *session) {
	t.sent++
	contact := t.random.IntN(contacts)
	r := simulator.SendRequest{Device: s.jid, From: t.from(contact), Text: fmt.Sprintf("message %d", t.sent)}
	target := ""
	if texts := t.texts[chat{s.jid, contact}]; len(texts) > 0 {
		target = texts[t.random.IntN(len(texts))]
	}
	switch n := t.random.IntN(100); {
	case n < 10:
		r.Device, r.Chat = "", t.groups[t.random.IntN(len(t.groups))]
	case n < 18 && target != "":
		r.Kind, r.Target, r.Text = simulator.KindReaction, target, "👍"
	case n < 24 && target != "":
		r.Kind, r.Target, r.Encrypted = simulator.KindEdit, target, n%2 == 0
	case n < 26 && target != "":
		r.Kind, r.Target, r.Text = simulator.KindRevoke, target, ""
	case n < 36:
		kinds := []string{simulator.KindImage, simulator.KindVideo, simulator.KindVoice, simulator.KindAudio, simulator.KindDocument, simulator.KindSticker}
		r.Kind, r.File = kinds[n%len(kinds)], &simulator.File{Size: 500 + t.random.IntN(2000), Seconds: 2}
	case n < 39:
		r.Kind, r.Latitude, r.Longitude = simulator.KindLocation, 40.4, -3.7
	case n < 41:
		r.Kind, r.Names = simulator.KindContact, []string{"Ana"}
	case n < 43:
		r.Kind, r.Options = simulator.KindPoll, []string{"yes", "no"}
	case n < 47: // the account writes on its phone
		r.From, r.Chat = s.phone, number(contact)
	case n < 48:
		r.Unavailable = "view_once"
	case n < 49: // the device asks for it again
		r.Malformed = "once"
	case n < 54: // of a message that the device is said to have sent
		receipt := simulator.ReceiptRequest{Device: s.jid, From: []string{number(contact)}, IDs: []string{fmt.Sprintf("3EB0%016X", t.sent)}, Type: "read"}
		if _, err := t.w.simulator.Receipt(ctx, receipt); err != nil && ctx.Err() == nil {
			t.w.reportViolation("failed to send a receipt to %s: %v", s.name, err)
		}
		return
	default:
		t.text(ctx, s, contact)
		return
	}
	switch _, err := t.w.simulator.Write(ctx, r); {
	case err == nil || ctx.Err() != nil:
	case r.Target != "" && errors.Is(err, simulator.ErrNotFound): // there were too many others since
		t.text(ctx, s, contact)
	default:
		t.w.reportViolation("failed to send a message of the kind %s to %s: %v", r.Kind, s.name, err)
	}
}

// text sends a text, which later messages may be about.
func (t *traffic) text(ctx context.Context, s *session, contact int) {
	id, err := t.w.simulator.Send(ctx, s.jid, t.from(contact), fmt.Sprintf("message %d", t.sent))
	if err != nil {
		if ctx.Err() == nil {
			t.w.reportViolation("failed to send a message to %s: %v", s.name, err)
		}
		return
	}
	at := chat{s.jid, contact}
	t.texts[at] = append(t.texts[at], id)
	t.texts[at] = t.texts[at][max(0, len(t.texts[at])-lastTexts):]
}

// flood makes contacts write to sessions, or to all, at floodRate until heal is called.
func (w *environment) flood(sessions ...*session) {
	if len(sessions) == 0 {
		sessions = w.sessions
	}
	r := simulator.FloodRequest{Rate: *floodRate, Seconds: recoveryTimeout.Seconds()}
	for _, s := range sessions {
		r.Devices = append(r.Devices, s.jid)
	}
	_, err := w.simulator.StartFlood(r)
	w.must(err)
	w.record("a flood begins: %.0f messages a second to %d sessions", r.Rate, len(sessions))
}

// endFloods ends the floods, and returns when their last messages have been sent.
func (w *environment) endFloods() {
	w.simulator.StopFloods()
	all := w.simulator.Floods()
	for _, f := range all[w.floods:] {
		w.record("flood %d has ended: %d messages, the latest %s late", f.ID, f.Sent, f.Late.Round(time.Millisecond))
		if f.Failed > 0 && !strings.Contains(f.Problem, context.Canceled.Error()) {
			w.reportViolation("flood %d: %d messages were not sent: %s", f.ID, f.Failed, f.Problem)
		}
	}
	w.floods = len(all)
}
