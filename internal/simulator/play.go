package simulator

import (
	"context"
	"errors"
	"fmt"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"google.golang.org/protobuf/proto"
)

// Methods for tests of a client: they send nodes that this server never sends on its own.

// Play sends a frame with that plaintext (a flag byte and an encoded node, possibly
// malformed) to a device's connection or, without a device, to each client that is not
// paired. It returns ErrNotNow if there is no connection.
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

// AnswerWith makes f answer the requests (iq) of all clients, until AnswerWith is called
// again; nil restores the server's own answers. If f returns nil for a request, the server
// answers it. AnswerWith sets the request's id in the answer.
func (s *Server) AnswerWith(f func(request *waBinary.Node) (answer *waBinary.Node)) {
	if f == nil {
		s.script.Store(nil)
		return
	}
	s.script.Store(&f)
}

// scripted returns the answer of AnswerWith's function to a request, or nil.
func (s *Server) scripted(request *waBinary.Node) *waBinary.Node {
	f := s.script.Load()
	if f == nil {
		return nil
	}
	answer := (*f)(request)
	if answer != nil {
		if answer.Attrs == nil {
			answer.Attrs = waBinary.Attrs{}
		}
		answer.Attrs["id"] = request.Attrs["id"]
	}
	return answer
}

// SendMessage is [Server.Send] for any message. From may also be the device's own phone,
// whose messages change the device's settings.
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

// correspondents returns a device and the account that writes to it.
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
