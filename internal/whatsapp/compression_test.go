package whatsapp

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// Only a connection that offers codes compresses its messages.
func TestCompressionWhileUnpaired(t *testing.T) {
	w := newEnvironment(t, func(o *simulator.Options) { o.Compression = true })
	taking := w.take()
	s := w.connect(taking)
	codes := s.event(EventQR).Codes
	w.g.Expect(codes).To(HaveLen(6))
	w.g.Expect(w.simulator.Stats().Compressed).To(BeEquivalentTo(1))
	_, err := w.simulator.Scan(t.Context(), codes[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	s.event(EventDisconnected)
	s.Close()

	s = w.connect(taking)
	s.event(EventConnected)
	w.send("hello")
	w.g.Eventually(s.texts).Should(Equal([]string{"hello"}))
	w.settled()
	w.g.Expect(w.simulator.Stats().Compressed).To(BeEquivalentTo(1), "the login is not compressed")
}

// fakeBody is the server's side of a websocket; it returns its content in parts.
type fakeBody struct {
	parts [][]byte
}

func (f *fakeBody) Read(p []byte) (int, error) {
	if len(f.parts) == 0 {
		return 0, io.EOF
	}
	n := copy(p, f.parts[0])
	if f.parts[0] = f.parts[0][n:]; len(f.parts[0]) == 0 {
		f.parts = f.parts[1:]
	}
	return n, nil
}

func (f *fakeBody) Write(p []byte) (int, error) { return len(p), nil }
func (f *fakeBody) Close() error                { return nil }

// websocketFrame is a frame of a server.
func websocketFrame(first byte, payload []byte) []byte {
	header := []byte{first, byte(len(payload))}
	if len(payload) > 125 {
		header = []byte{first, 126, byte(len(payload) >> 8), byte(len(payload))}
	}
	return append(header, payload...)
}

// messages are the payloads of a server's websocket messages.
func messagesIn(t *testing.T, data []byte) (out []string) {
	t.Helper()
	var message []byte
	for len(data) > 0 {
		length, at := int(data[1]), 2
		switch length {
		case 126:
			length, at = int(data[2])<<8|int(data[3]), 4
		case 127:
			length, at = int(data[6])<<24|int(data[7])<<16|int(data[8])<<8|int(data[9]), 10
		}
		if data[0]&bitCompressed != 0 {
			t.Fatal("a compressed frame")
		}
		if data[0]&bitsOpcode < opControl {
			message = append(message, data[at:at+length]...)
			if data[0]&bitFinal != 0 {
				out, message = append(out, string(message)), nil
			}
		} else {
			out = append(out, "control "+string(data[at:at+length]))
		}
		data = data[at+length:]
	}
	return out
}

func TestDecompress(t *testing.T) {
	var buffer bytes.Buffer
	writer, _ := flate.NewWriter(&buffer, flate.BestCompression)
	compress := func(text string) []byte {
		buffer.Reset()
		_, _ = writer.Write([]byte(text))
		_ = writer.Flush()
		return bytes.Clone(bytes.TrimSuffix(buffer.Bytes(), []byte("\x00\x00\xff\xff")))
	}
	long := strings.Repeat("once upon a time ", 5000)
	first, second, third := compress(long), compress("once upon a time again"), compress(long)
	fresh := func(text string) []byte {
		writer.Reset(&buffer)
		return compress(text)
	}
	bomb := fresh(strings.Repeat("\x00", maxFrame+1))
	if len(second) > 20 {
		t.Fatalf("the second message takes %d bytes: it does not refer to the first", len(second))
	}
	const (
		binary     = bitFinal | opBinary
		compressed = bitFinal | bitCompressed | opBinary
	)
	for name, row := range map[string]struct {
		answer string
		frames [][]byte
		want   []string
		wrong  string
	}{
		"not compressed": {answer: "permessage-deflate", frames: [][]byte{websocketFrame(binary, []byte("plain"))}, want: []string{"plain"}},
		"each refers to the ones before": {answer: "permessage-deflate", frames: [][]byte{
			websocketFrame(compressed, first), websocketFrame(compressed, second), websocketFrame(compressed, third),
		}, want: []string{long, "once upon a time again", long}},
		"each for itself": {answer: "permessage-deflate; server_no_context_takeover; server_max_window_bits=15", frames: [][]byte{
			websocketFrame(compressed, fresh("one")), websocketFrame(compressed, fresh("two")),
		}, want: []string{"one", "two"}},
		"in parts, with a ping between": {answer: "permessage-deflate", frames: [][]byte{
			websocketFrame(bitCompressed|opBinary, first[:10]), websocketFrame(bitFinal|9, []byte("ping")), websocketFrame(bitFinal, first[10:]),
			websocketFrame(opBinary, []byte("pl")), websocketFrame(bitFinal, []byte("ain")),
		}, want: []string{"control ping", long, "plain"}},
		"empty":        {answer: "permessage-deflate", frames: [][]byte{websocketFrame(compressed, fresh(""))}, want: []string{""}},
		"a bomb":       {answer: "permessage-deflate", frames: [][]byte{websocketFrame(compressed, bomb)}, wrong: "more than"},
		"garbage":      {answer: "permessage-deflate", frames: [][]byte{websocketFrame(compressed, []byte("garbage"))}, wrong: "malformed"},
		"masked":       {answer: "permessage-deflate", frames: [][]byte{{compressed, 0x81, 0, 0, 0, 0, 1}}, wrong: "masked"},
		"giant":        {answer: "permessage-deflate", frames: [][]byte{{compressed, 127, 255, 255, 255, 255, 255, 255, 255, 255}}, wrong: "more than"},
		"not offered":  {answer: "x-webkit-deflate-frame", wrong: "not offered"},
		"two of them":  {answer: "permessage-deflate, permessage-deflate", wrong: "not offered"},
		"a new option": {answer: "permessage-deflate; zstd", wrong: "not offered"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 3, 1 << 20} {
				g := NewWithT(t)
				header := http.Header{}
				header.Set(extensionsHeader, row.answer)
				data := slices.Concat(row.frames...)
				body, err := decompress(&fakeBody{parts: slices.Collect(slices.Chunk(data, size))}, header)
				var got []byte
				if err == nil {
					g.Expect(header).To(BeEmpty(), "the websocket must not get it")
					got, err = io.ReadAll(body)
				}
				if row.wrong != "" {
					g.Expect(err).To(MatchError(ContainSubstring(row.wrong)))
					continue
				}
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(messagesIn(t, got)).To(Equal(row.want))
			}
		})
	}
	body := &fakeBody{}
	if got, err := decompress(body, http.Header{}); got != io.ReadWriteCloser(body) || err != nil {
		t.Errorf("a websocket without compression is changed: %v", errors.Join(err))
	}
}
