package simulator

import (
	"context"
	"errors"
	"fmt"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"google.golang.org/protobuf/proto"
)

// What tests of a client play to it: nodes that this server would never send by itself.

// Play sends a frame with that plaintext (a flag byte and an encoded node, or what looks
// like them) to a device's connection, or, without a device, to each client that is not
// paired. ErrNotNow: there is no connection.
func (s *Server) Play(device string, plaintext []byte) error {
	var conns []*conn
	s.mu.Lock()
	if device == "" {
		for _, p := range s.pairings {
			conns = append(conns, p.conn)
		}
	} else {
		d, err := s.deviceLocked(device)
		if err != nil {
			s.mu.Unlock()
			return err
		}
		if d.conn != nil {
			conns = append(conns, d.conn)
		}
	}
	s.mu.Unlock()
	if len(conns) == 0 {
		return fmt.Errorf("%w: there is no connection to play it to", ErrNotNow)
	}
	var errs []error
	for _, c := range conns {
		errs = append(errs, c.sendPlaintext(plaintext))
	}
	return errors.Join(errs...)
}

// AnswerWith has f answer the questions (iq) of all clients, until it is called again; nil:
// the server's own answers. A node that f does not answer with one (nil) gets the
// server's own. The question's id is put into the answer.
func (s *Server) AnswerWith(f func(question *waBinary.Node) (answer *waBinary.Node)) {
	if f == nil {
		s.script.Store(nil)
		return
	}
	s.script.Store(&f)
}

// scripted is the answer that AnswerWith has for a question.
func (s *Server) scripted(question *waBinary.Node) *waBinary.Node {
	f := s.script.Load()
	if f == nil {
		return nil
	}
	answer := (*f)(question)
	if answer != nil {
		if answer.Attrs == nil {
			answer.Attrs = waBinary.Attrs{}
		}
		answer.Attrs["id"] = question.Attrs["id"]
	}
	return answer
}

// SendMessage is [Server.Send] for any message. From may be the device's own phone too,
// whose messages change a device's settings.
func (s *Server) SendMessage(ctx context.Context, device, from string, message *waE2E.Message) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	d, sender, err := s.correspondents(device, from)
	if err != nil {
		return "", err
	}
	return s.sendTo(d, sender, message)
}

// correspondents are a device and the account that writes to it.
func (s *Server) correspondents(device, from string) (*device, *account, error) {
	if from == "" {
		from = DefaultContact
	}
	phone, err := parsePhone(from)
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceLocked(device)
	if err != nil {
		return nil, nil, err
	}
	sender, err := s.accountLocked(phone)
	return d, sender, err
}

// sendTo encrypts a message for a device and queues it.
func (s *Server) sendTo(d *device, sender *account, message *waE2E.Message) (string, error) {
	plaintext, err := proto.Marshal(message)
	if err != nil {
		return "", fmt.Errorf("encode a message: %w", err)
	}
	id := newID()
	s.mu.Lock()
	d.queue.sent = append(d.queue.sent, sentMessage{id: id, from: sender, plaintext: plaintext})
	d.queue.sent = d.queue.sent[max(0, len(d.queue.sent)-maxSent):]
	s.counts.sent++
	s.mu.Unlock()
	if err := s.push(d, sender, id, plaintext, "", 0); err != nil {
		return "", err
	}
	return id, nil
}
