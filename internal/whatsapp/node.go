package whatsapp

import (
	"bytes"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/binary/token"
	"go.mau.fi/whatsmeow/types"
)

const (
	// maxUnpacked is the maximum size of an unpacked node.
	maxUnpacked = 2 * maxFrame
	// maxDepth is how deep nodes may be nested; real ones are six deep or so. The decoder
	// is recursive, and a stack overflow ends the process.
	maxDepth = 64
	// maxParts is the maximum number of nodes and attributes in a node. Each is a few bytes on
	// the wire and some hundred in memory. The keys of a thousand devices are about 20,000.
	maxParts = 200_000
)

// decodeNode turns the plaintext of a frame into a node. It is whatsmeow's decoder with
// limits and without its panics: whatsmeow's decoder checks no length and no type, and
// runs in a goroutine without a recover.
func decodeNode(plaintext []byte) (node *waBinary.Node, err error) {
	defer func() {
		if r := recover(); r != nil {
			node, err = nil, fmt.Errorf("a malformed node: %v", r)
		}
	}()
	if len(plaintext) == 0 {
		return nil, errors.New("an empty frame")
	}
	data := plaintext[1:len(plaintext):len(plaintext)] // no slice of it can grow past its end
	if plaintext[0]&2 != 0 {
		if data, err = unpack(data); err != nil {
			return nil, err
		}
	}
	s := nodeScanner{data: data}
	if err := s.node(0); err != nil {
		return nil, err
	}
	if node, err = waBinary.Unmarshal(data); err != nil {
		return nil, fmt.Errorf("a malformed node: %w", err)
	}
	cleanNode(node)
	return node, nil
}

// unpack decompresses a frame, up to the limit: a small frame can hold gigabytes of zeros.
func unpack(data []byte) ([]byte, error) {
	r, err := zlib.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("a malformed compressed frame: %w", err)
	}
	unpacked, err := io.ReadAll(io.LimitReader(r, maxUnpacked+1))
	if err != nil {
		return nil, fmt.Errorf("a malformed compressed frame: %w", err)
	}
	if len(unpacked) > maxUnpacked {
		return nil, fmt.Errorf("a compressed frame of more than %d bytes", maxUnpacked)
	}
	return unpacked, nil
}

// nodeScanner reads an encoded node without decoding it, to check whether it can be
// decoded within the limits. It mirrors whatsmeow's binary/decoder.go.
type nodeScanner struct {
	data  []byte
	at    int
	parts int
}

var errCutNode = errors.New("a node that ends too early")

// number reads a number of n bytes.
func (s *nodeScanner) number(n int) (int, error) {
	if n > len(s.data)-s.at {
		return 0, errCutNode
	}
	value := 0
	for _, b := range s.data[s.at : s.at+n] {
		value = value<<8 | int(b)
	}
	s.at += n
	return value, nil
}

// skip skips n bytes.
func (s *nodeScanner) skip(n int) error {
	if n < 0 || n > len(s.data)-s.at {
		return errCutNode
	}
	s.at += n
	return nil
}

// count counts parts that the decoder will allocate.
func (s *nodeScanner) count(n int) error {
	if s.parts += n; s.parts > maxParts {
		return fmt.Errorf("a node of more than %d parts", maxParts)
	}
	return nil
}

// listSize reads the size of a list after its tag.
func (s *nodeScanner) listSize(tag int) (int, error) {
	switch tag {
	case token.ListEmpty:
		return 0, nil
	case token.List8:
		return s.number(1)
	case token.List16:
		return s.number(2)
	default:
		return 0, errors.New("a node that is no list")
	}
}

// node skips a node.
func (s *nodeScanner) node(depth int) error {
	tag, err := s.number(1)
	if err != nil {
		return err
	}
	size, err := s.listSize(tag)
	if err != nil {
		return err
	}
	if size == 0 {
		return errors.New("an empty node")
	}
	if err := s.count(1 + (size-1)/2); err != nil {
		return err
	}
	for range size { // the tag, keys and values of the attributes, the content
		if err := s.value(depth); err != nil {
			return err
		}
	}
	return nil
}

// value skips the next value.
func (s *nodeScanner) value(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("nodes nested more than %d deep", maxDepth)
	}
	tag, err := s.number(1)
	if err != nil {
		return err
	}
	switch tag {
	case token.ListEmpty:
		return nil
	case token.List8, token.List16:
		size, err := s.listSize(tag)
		if err != nil {
			return err
		}
		if err := s.count(size); err != nil { // the whole list is allocated at once
			return err
		}
		for range size {
			if err := s.node(depth + 1); err != nil {
				return err
			}
		}
		return nil
	case token.Binary8:
		return s.bytes(1)
	case token.Binary20:
		return s.bytes(3)
	case token.Binary32:
		return s.bytes(4)
	case token.Dictionary0, token.Dictionary1, token.Dictionary2, token.Dictionary3:
		return s.skip(1)
	case token.FBJID:
		return s.address(0, 2, true, depth)
	case token.InteropJID:
		return s.address(0, 4, true, depth)
	case token.JIDPair:
		return s.address(0, 0, true, depth)
	case token.ADJID:
		return s.address(2, 0, false, depth)
	case token.Nibble8, token.Hex8:
		n, err := s.number(1)
		if err != nil {
			return err
		}
		return s.skip(n & 0x7f)
	default:
		return nil
	}
}

// bytes skips a string with a length of n bytes before it.
func (s *nodeScanner) bytes(n int) error {
	length, err := s.number(n)
	if err != nil {
		return err
	}
	if n == 3 {
		length &= 1<<20 - 1
	}
	return s.skip(length)
}

// address skips a JID: some bytes, the user, some bytes, and perhaps the server.
func (s *nodeScanner) address(before, between int, server bool, depth int) error {
	err := s.skip(before)
	if err == nil {
		err = s.value(depth + 1)
	}
	if err == nil {
		err = s.skip(between)
	}
	if err == nil && server {
		err = s.value(depth + 1)
	}
	return err
}

// cleanNode removes from the attributes what PostgreSQL cannot store in a text: it would
// refuse the write, and the first write that fails ends the connection. So a name that a
// stranger chose would end the connection at each delivery.
func cleanNode(node *waBinary.Node) {
	for key, value := range node.Attrs {
		switch v := value.(type) {
		case string:
			if clean := withoutNUL(v); clean != v {
				node.Attrs[key] = clean
			}
		case types.JID:
			if user, server := withoutNUL(v.User), withoutNUL(v.Server); user != v.User || server != v.Server {
				v.User, v.Server = user, server
				node.Attrs[key] = v
			}
		}
	}
	children := node.GetChildren()
	for i := range children {
		cleanNode(&children[i])
	}
}

// withoutNUL makes a text valid UTF-8 without U+0000.
func withoutNUL(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}
