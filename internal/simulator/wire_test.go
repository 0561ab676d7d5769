package simulator

import (
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/socket"
	clocktesting "k8s.io/utils/clock/testing"
)

// The server closes the connection of a client that does not speak the protocol.
func TestMalformedDataClosesTheConnection(t *testing.T) {
	header := string(socket.WAConnHeader)
	for _, row := range []struct {
		name     string
		kind     websocket.MessageType
		messages []string
	}{
		{"a text message", websocket.MessageText, []string{"hello"}},
		{"another header", websocket.MessageBinary, []string{"WA\x06\x02\x00\x00\x01x"}},
		{"an empty message", websocket.MessageBinary, []string{""}},
		{"a hello that is not protobuf", websocket.MessageBinary, []string{header + "\x00\x00\x04\xff\xff\xff\xff"}},
		{"a hello without a key", websocket.MessageBinary, []string{header + "\x00\x00\x00"}},
		{"a frame in two messages", websocket.MessageBinary, []string{header + "\x00\x00", "\x04\xff\xff\xff\xff"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			ws, _, err := websocket.Dial(t.Context(), s.Endpoint()+chatPath, nil)
			g.Expect(err).NotTo(HaveOccurred())
			defer func() { _ = ws.CloseNow() }()
			for _, m := range row.messages {
				g.Expect(ws.Write(t.Context(), row.kind, []byte(m))).To(Succeed())
			}
			_, _, err = ws.Read(t.Context())
			g.Expect(err).To(HaveOccurred())
			g.Eventually(func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.conns) }).Should(BeZero())
		})
	}
}

// The server closes the connection of a client that sends nothing, after a timeout.
func TestSilentClientTimesOut(t *testing.T) {
	g := wait(t)
	clock := clocktesting.NewFakeClock(time.Now())
	s := serve(t, func(o *Options) { o.Clock = clock })
	ws, _, err := websocket.Dial(t.Context(), s.Endpoint()+chatPath, nil)
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = ws.CloseNow() }()
	g.Eventually(clock.HasWaiters).Should(BeTrue())
	clock.Step(handshakeTimeout)
	_, _, err = ws.Read(t.Context())
	g.Expect(err).To(HaveOccurred())
}

func TestNewRefusesBadOptions(t *testing.T) {
	for name, opts := range map[string]Options{
		"a negative lifetime":      {RefLifetime: -1},
		"a negative code lifetime": {CodeLifetime: -1},
		"a negative delay":         {CloseDelay: -1},
		"a bad address":            {Listen: "nowhere"},
		"a bad control address":    {ControlListen: "nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(opts)
			wait(t).Expect(err).To(HaveOccurred())
		})
	}
}

func TestEndpointOnAllInterfaces(t *testing.T) {
	g := wait(t)
	for want, opts := range map[string]Options{
		"ws://127.0.0.1:":  {Listen: ":0"},
		"wss://simulator:": {Listen: ":0", TLS: true, Hosts: []string{"simulator"}},
	} {
		s, err := New(opts)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(s.Endpoint()).To(HavePrefix(want))
		g.Expect(s.Close()).To(Succeed())
	}
}

func FuzzParseCode(f *testing.F) {
	key := base64.StdEncoding.EncodeToString(make([]byte, 32))
	f.Add("2@ref," + key + "," + key + "," + key)
	f.Add("2@ref," + key + "," + key)
	f.Add(",,,")
	f.Add("a,b,c,d")
	f.Add("")
	s, err := New(Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	good := s.ref(pairingID{1}, 3)
	f.Add(good + "," + key + "," + key + "," + key)
	f.Add(codePrefix + good + "," + key + "," + key + "," + key + ",9")
	f.Add(codePrefix)
	f.Fuzz(func(t *testing.T, qr string) {
		c, err := parseCode(qr)
		if err != nil {
			if secret := strings.TrimPrefix(qr, codePrefix); len(secret) > 10 && strings.Contains(err.Error(), secret) {
				t.Errorf("the error quotes the code: %v", err)
			}
			return
		}
		if n := strings.Count(qr, ","); n != 3 && n != 4 || c.ref == "" {
			t.Errorf("%q was accepted as a code", qr)
		}
		if id, index, ok := s.refParts(c.ref); ok && c.ref != s.ref(id, index) {
			t.Errorf("%q was accepted as a ref of this server", c.ref)
		}
	})
}

func FuzzDecode(f *testing.F) {
	good, err := waBinary.Marshal(waBinary.Node{Tag: "iq", Attrs: waBinary.Attrs{"id": "1"}, Content: []waBinary.Node{{Tag: "ping"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte{0, 248, 1})
	f.Add([]byte{2, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		if node, err := decode(data); err == nil && node == nil {
			t.Error("neither a node nor an error")
		}
	})
}
