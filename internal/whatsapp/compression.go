package whatsapp

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// whatsmeow offers servers to compress websocket messages (permessage-deflate, RFC 7692), as
// browsers do. It would then keep a compressor for each connection: with the server's part
// 1.2 MB, which a thousand sessions cannot afford. So only a connection that offers codes
// makes the offer: iPhones are said to refuse to be linked with a client that does not. And
// what it receives is decompressed here, before the websocket: what it sends stays
// uncompressed, which the extension allows, and no compressor is made.

// extensionsHeader is where a websocket's extensions are offered and accepted.
const extensionsHeader = "Sec-WebSocket-Extensions"

// window is how far back compressed data may refer, in bytes.
const window = 32 << 10

// deflateTail ends a compressed message: the four bytes that its sender left out (RFC 7692,
// section 7.2.2), and an empty last block.
const deflateTail = "\x00\x00\xff\xff\x01\x00\x00\xff\xff"

// The bits of a websocket frame's first byte (RFC 6455, section 5.2; RFC 7692, section 6).
const (
	bitFinal      = 0x80
	bitCompressed = 0x40
	bitsOpcode    = 0x0f
	// opControl is the first opcode of a control frame, which is never compressed.
	opControl = 8
)

// decompress returns the server's side of a websocket without compression, and takes the
// extension out of the server's answer.
func decompress(body io.ReadWriteCloser, header http.Header) (io.ReadWriteCloser, error) {
	accepted := header.Values(extensionsHeader)
	if len(accepted) == 0 {
		return body, nil
	}
	header.Del(extensionsHeader)
	d := &decompressor{ReadWriteCloser: body, keeps: true}
	name, parameters, _ := strings.Cut(strings.Join(accepted, ","), ";")
	if strings.TrimSpace(name) != "permessage-deflate" {
		return body, fmt.Errorf("%w: an extension of the websocket that was not offered", errMalformedStream)
	}
	for parameter := range strings.SplitSeq(parameters, ";") {
		switch parameter, _, _ := strings.Cut(strings.TrimSpace(parameter), "="); parameter {
		case "server_no_context_takeover":
			d.keeps = false
		case "", "client_no_context_takeover", "server_max_window_bits":
		default:
			return body, fmt.Errorf("%w: a parameter of the websocket's compression that was not offered", errMalformedStream)
		}
	}
	return d, nil
}

// decompressor turns each compressed message of a server's websocket into one that is not.
// Everything else passes through unchanged.
type decompressor struct {
	io.ReadWriteCloser
	// keeps: a message may refer to the ones before it.
	keeps bool

	out []byte // ready to be read
	err error  // follows it

	header     []byte // of a frame, as far as it has come
	left       uint64 // of the frame's payload
	inside     bool   // the payload is part of a compressed message
	opcode     byte   // of that message
	final      bool   // that message ends with this frame
	compressed []byte // of that message, as far as it has come
	history    []byte // the end of what was decompressed
	inflater   io.ReadCloser
}

// Read implements io.Reader.
func (d *decompressor) Read(p []byte) (int, error) {
	for len(d.out) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		n, err := d.ReadWriteCloser.Read(p)
		if wrong := d.follow(p[:n]); wrong != nil {
			err = fmt.Errorf("%w: %w", errMalformedStream, wrong)
		}
		d.err = err
	}
	n := copy(p, d.out)
	d.out = d.out[n:]
	return n, nil
}

// follow decodes the received bytes and appends the result to out.
func (d *decompressor) follow(data []byte) error {
	for len(data) > 0 {
		if d.left == 0 {
			d.header, data = append(d.header, data[0]), data[1:]
			if err := d.frame(); err != nil {
				return err
			}
			continue
		}
		part := data[:min(uint64(len(data)), d.left)]
		data = data[len(part):]
		d.left -= uint64(len(part))
		if !d.inside {
			d.out = append(d.out, part...)
			continue
		}
		d.compressed = append(d.compressed, part...)
		if err := d.ended(); err != nil {
			return err
		}
	}
	return nil
}

// frame begins a frame when its header is complete.
func (d *decompressor) frame() error {
	if len(d.header) < 2 {
		return nil
	}
	var left uint64
	switch length := d.header[1] & 0x7f; {
	case length == 126 && len(d.header) < 4, length == 127 && len(d.header) < 10:
		return nil
	case length == 126:
		left = uint64(binary.BigEndian.Uint16(d.header[2:]))
	case length == 127:
		left = binary.BigEndian.Uint64(d.header[2:])
	default:
		left = uint64(length)
	}
	first := d.header[0]
	switch opcode := first & bitsOpcode; {
	case opcode >= opControl:
		d.inside = false
	case opcode != opContinuation:
		d.inside, d.opcode = first&bitCompressed != 0, opcode
	default:
		d.inside = d.compressed != nil
	}
	if !d.inside {
		d.out, d.header, d.left = append(d.out, d.header...), d.header[:0], left
		return nil
	}
	if d.header[1]&0x80 != 0 {
		return errors.New("a masked websocket frame from a server")
	}
	if left > maxFrame || uint64(len(d.compressed))+left > maxFrame {
		return fmt.Errorf("a websocket message of more than %d bytes", maxFrame)
	}
	d.header, d.left, d.final = d.header[:0], left, first&bitFinal != 0
	if d.compressed == nil {
		d.compressed = []byte{}
	}
	return d.ended()
}

// ended decompresses a message when its last frame is complete.
func (d *decompressor) ended() error {
	if d.left > 0 || !d.final {
		return nil
	}
	source := io.MultiReader(bytes.NewReader(d.compressed), strings.NewReader(deflateTail))
	d.compressed, d.final = nil, false
	if d.inflater == nil {
		d.inflater = flate.NewReaderDict(source, d.history)
	} else if err := d.inflater.(flate.Resetter).Reset(source, d.history); err != nil {
		return err
	}
	message, err := io.ReadAll(io.LimitReader(d.inflater, maxFrame+1))
	if err != nil {
		return fmt.Errorf("a malformed compressed websocket message: %w", err)
	}
	if len(message) > maxFrame {
		return fmt.Errorf("a websocket message of more than %d bytes", maxFrame)
	}
	if d.keeps {
		d.history = append(d.history, message...)
		d.history = append([]byte(nil), d.history[max(0, len(d.history)-window):]...)
	}
	d.out = append(d.out, bitFinal|d.opcode, 127)
	d.out = binary.BigEndian.AppendUint64(d.out, uint64(len(message)))
	d.out = append(d.out, message...)
	return nil
}
