package whatsapp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"go.mau.fi/whatsmeow/socket"
)

const (
	// maxFrame is the maximum size of one frame of WhatsApp, and of the websocket message that carries it.
	// The protocol allows 16 MB; the largest real ones are lists of some thousand devices,
	// some hundred kilobytes.
	maxFrame = 8 << 20
	// maxHello is the maximum size of the server's first frame, some hundred bytes with a certificate chain.
	maxHello = 64 << 10
)

// errMalformedStream: the server violates the framing. whatsmeow would panic on some
// violations, and misread all frames after the others.
var errMalformedStream = errors.New("WhatsApp's frames are malformed")

// stream lies between net/http and the websocket. It does three things that whatsmeow
// does not:
//
//   - It ends a connection if its frames would make whatsmeow panic or use unlimited memory.
//   - It keeps the server's first frame, from which the keys are derived again, see
//     receiver.go.
//   - It holds back the bytes after the first frame until the connection is set up: whatsmeow
//     sets its callbacks without a lock, and a socket that closes meanwhile would race with it.
type stream struct {
	io.ReadWriteCloser
	// malformed is called, once at most, before the read that fails.
	malformed func(error)

	// ready is closed by release.
	ready    chan struct{}
	released sync.Once

	mu sync.Mutex
	// hello is the server's first frame.
	hello []byte

	// framed is how many frames have come since the first one.
	framed atomic.Int64

	// Only the reader uses these. rest came after the first frame, in the same read.
	framing framing
	rest    []byte
}

func newStream(body io.ReadWriteCloser, malformed func(error)) *stream {
	return &stream{ReadWriteCloser: body, malformed: malformed, ready: make(chan struct{})}
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if s.framing.greeted {
		<-s.ready
	}
	var n int
	var err error
	if len(s.rest) > 0 {
		n = copy(p, s.rest)
		if s.rest = s.rest[n:]; len(s.rest) == 0 {
			s.rest = nil
		}
	} else {
		n, err = s.ReadWriteCloser.Read(p)
	}
	followed, wrong := s.framing.read(p[:n])
	if wrong != nil {
		n, err = 0, fmt.Errorf("%w: %w", errMalformedStream, wrong)
	}
	if errors.Is(err, errMalformedStream) {
		if s.malformed != nil {
			s.malformed(err)
			s.malformed = nil
		}
		return n, err
	}
	s.framed.Store(s.framing.frames)
	if followed < n { // once: the first frame ends there
		s.rest = append(slices.Clone(p[followed:n]), s.rest...)
		n, err = followed, nil // an error comes again
	}
	if s.framing.hello != nil {
		s.mu.Lock()
		s.hello, s.framing.hello = s.framing.hello, nil
		s.mu.Unlock()
	}
	return n, err
}

// release passes on the bytes that are held back. It may be called more than once.
func (s *stream) release() { s.released.Do(func() { close(s.ready) }) }

// takeFirstFrame returns the server's first frame and forgets it; nil: it has not come.
func (s *stream) takeFirstFrame() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	hello := s.hello
	s.hello = nil
	return hello
}

// The opcodes of websocket frames that matter here (RFC 6455, section 5.2).
const (
	opContinuation = 0
	opBinary       = 2
)

// framing follows a server's bytes after the upgrade: websocket frames, and in their
// binary messages WhatsApp's own frames, each with its length in three bytes before it.
// Each message must hold whole frames: whatsmeow miscounts the bytes of a frame that is
// split (socket/framesocket.go, processData).
type framing struct {
	header []byte // of a websocket frame, as far as it has come
	left   uint64 // of the websocket frame's payload
	binary bool   // the payload is part of a binary message
	final  bool   // the message ends with this frame
	// message is how much of a binary message has come; continued says that it goes on.
	message   int
	continued bool
	// inMessage is the number of frames that have ended in this message; frames is the number
	// in whole messages after the first one.
	inMessage, frames int64

	length []byte // of WhatsApp's frame, as far as it has come
	need   int    // of that frame

	collecting []byte // the first frame, as far as it has come
	collected  bool
	hello      []byte // the first frame, until it is taken
	greeted    bool   // the message with the first frame has ended
}

// read checks the received bytes, and returns an error if they are malformed. It stops after
// the message with the first frame, and returns how many bytes it has checked.
func (f *framing) read(data []byte) (followed int, err error) {
	all, greeted := len(data), f.greeted
	for len(data) > 0 && f.greeted == greeted {
		if f.left == 0 {
			if data, err = f.readHeader(data); err != nil {
				return 0, err
			}
			continue
		}
		part := data[:min(uint64(len(data)), f.left)]
		data = data[len(part):]
		f.left -= uint64(len(part))
		if f.binary {
			if err := f.readPayload(part); err != nil {
				return 0, err
			}
		}
		if err := f.ended(); err != nil {
			return 0, err
		}
	}
	return all - len(data), nil
}

// readHeader takes as much as there is of a websocket frame's header off the front of data.
func (f *framing) readHeader(data []byte) ([]byte, error) {
	want := 2
	for {
		if len(f.header) >= 2 {
			switch f.header[1] & 0x7f {
			case 126:
				want = 2 + 2
			case 127:
				want = 2 + 8
			}
		}
		if len(f.header) == want {
			break
		}
		if len(data) == 0 {
			return nil, nil
		}
		f.header, data = append(f.header, data[0]), data[1:]
	}
	f.left = uint64(f.header[1] & 0x7f)
	switch f.left {
	case 126:
		f.left = uint64(binary.BigEndian.Uint16(f.header[2:]))
	case 127:
		f.left = binary.BigEndian.Uint64(f.header[2:])
	}
	masked, opcode := f.header[1]&0x80 != 0, f.header[0]&0x0f
	f.final = f.header[0]&0x80 != 0
	f.binary = opcode == opBinary || opcode == opContinuation && f.continued
	f.header = f.header[:0]
	switch {
	case masked:
		return nil, errors.New("a masked websocket frame from a server")
	case f.left > maxFrame || f.binary && f.left+uint64(f.message) > maxFrame:
		return nil, fmt.Errorf("a websocket message of more than %d bytes", maxFrame)
	}
	return data, f.ended()
}

// ended checks, at the end of a binary message, whether WhatsApp's frame has ended too.
func (f *framing) ended() error {
	if f.left > 0 || !f.binary {
		return nil
	}
	f.continued = !f.final
	if f.continued {
		return nil
	}
	f.message, f.binary = 0, false
	if f.need > 0 || len(f.length) > 0 {
		return errors.New("a frame that is split over two websocket messages")
	}
	if f.greeted {
		f.frames += f.inMessage
	}
	f.greeted, f.inMessage = f.greeted || f.collected, 0
	return nil
}

// readPayload checks WhatsApp's frames in a part of a message.
func (f *framing) readPayload(part []byte) error {
	f.message += len(part)
	for len(part) > 0 {
		if f.need == 0 {
			if f.collected && !f.greeted {
				return errors.New("something after the first frame in its message")
			}
			f.length, part = append(f.length, part[0]), part[1:]
			if len(f.length) < socket.FrameLengthSize {
				continue
			}
			f.need = int(f.length[0])<<16 | int(f.length[1])<<8 | int(f.length[2])
			f.length = f.length[:0]
			if f.need == 0 {
				f.inMessage++
			}
			f.collect(nil)
			continue
		}
		n := min(f.need, len(part))
		if f.need -= n; f.need == 0 {
			f.inMessage++
		}
		f.collect(part[:n])
		part = part[n:]
	}
	return nil
}

// collect keeps the first frame.
func (f *framing) collect(part []byte) {
	if f.collected {
		return
	}
	if len(f.collecting)+len(part) > maxHello {
		f.collecting, f.collected = nil, true
		return
	}
	f.collecting = append(f.collecting, part...)
	if f.need == 0 {
		f.hello, f.collecting, f.collected = append([]byte{}, f.collecting...), nil, true
	}
}

// streamed adds a stream under the websocket that a request opens.
type streamed struct {
	inner  http.RoundTripper
	opened func(io.ReadWriteCloser) *stream
	// compressed: the server may compress what it sends, see compression.go.
	compressed bool
}

// RoundTrip implements http.RoundTripper.
func (s *streamed) RoundTrip(req *http.Request) (*http.Response, error) {
	if !s.compressed {
		req = req.Clone(req.Context())
		req.Header.Del(extensionsHeader)
	}
	resp, err := s.inner.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		return resp, err
	}
	body, ok := resp.Body.(io.ReadWriteCloser)
	if !ok {
		return nil, errors.Join(errors.New("the upgraded connection cannot be written to"), resp.Body.Close())
	}
	if s.compressed {
		if body, err = decompress(body, resp.Header); err != nil {
			return nil, errors.Join(err, body.Close())
		}
	}
	resp.Body = s.opened(body)
	return resp, nil
}
