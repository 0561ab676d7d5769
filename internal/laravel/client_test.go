package laravel_test

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// vectorSecret is the secret of the specification's test vector.
const vectorSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

func secret(t *testing.T, text string) laravel.Secret {
	t.Helper()
	parsed, err := laravel.ParseSecret(text)
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	return parsed
}

const otherSecret = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

// write replaces a file at once, by a rename, as the kubelet does.
func write(t *testing.T, name, content string) string {
	t.Helper()
	g := NewWithT(t)
	g.Expect(os.WriteFile(name+".new", []byte(content), 0o600)).To(Succeed())
	g.Expect(os.Rename(name+".new", name)).To(Succeed())
	return name
}

func files(t *testing.T) laravel.Config {
	dir := t.TempDir()
	return laravel.Config{
		TokenFile:          write(t, filepath.Join(dir, "token"), "t0ken\n"),
		SigningSecretFiles: []string{write(t, filepath.Join(dir, "secret"), vectorSecret+"\n")},
	}
}

func newClient(t *testing.T, c laravel.Config) *laravel.Client {
	t.Helper()
	client, err := laravel.New(c, clock.RealClock{}, logr.Discard())
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	t.Cleanup(client.Close)
	return client
}

func aBatch(kind delivery.Kind) delivery.Batch {
	return delivery.Batch{ID: "msg_1", Kind: kind, Items: []delivery.Item{
		{SessionID: "a", Payload: json.RawMessage(`{"session_id":"a","qr":"2@x&y"}`)},
		{SessionID: "b", Payload: json.RawMessage(`{"session_id":"b"}`)},
	}}
}

// receive starts a receiver that knows the token and the first secret of files.
func receive(t *testing.T, answer http.HandlerFunc) *laraveltest.Receiver {
	return laraveltest.Start(t, laraveltest.Options{Token: "t0ken", Secret: vectorSecret, Decide: func(laraveltest.Request) laraveltest.Answer {
		return laraveltest.Answer{Accept: true, Write: answer}
	}})
}

func TestRequest(t *testing.T) {
	g := NewWithT(t)
	r := receive(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) })
	config := files(t)
	config.BaseURL, config.UserAgent = r.URL+"/api/", "whatsapp-operator/v1"
	client := newClient(t, config)

	g.Expect(client.Send(t.Context(), aBatch(delivery.KindQR))).To(Equal(delivery.Answer{Result: delivery.Delivered, StatusCode: 200}))
	got := r.Last()
	g.Expect(got.Method + " " + got.Path).To(Equal("POST /api/qr/batch"))
	g.Expect(got.Header).To(And(
		HaveKeyWithValue("Accept", []string{"application/json"}),
		HaveKeyWithValue("Content-Type", []string{"application/json"}),
		HaveKeyWithValue("Authorization", []string{"Bearer t0ken"}),
		HaveKeyWithValue("User-Agent", []string{"whatsapp-operator/v1"}),
		HaveKeyWithValue("Webhook-Id", []string{"msg_1"}),
		Not(HaveKey("Idempotency-Key")),
	))
	g.Expect(laravel.Verify(got.Header, []laravel.Secret{secret(t, vectorSecret)}, time.Now(), laravel.DefaultTolerance, got.Body)).To(Succeed())
	var body map[string]json.RawMessage
	g.Expect(json.Unmarshal(got.Body, &body)).To(Succeed())
	g.Expect(body).To(HaveLen(3))
	g.Expect(body["batch_id"]).To(MatchJSON(`"msg_1"`))
	g.Expect(string(body["sent_at"])).To(MatchRegexp(`^"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"$`))
	g.Expect(body["items"]).To(MatchJSON(`[{"session_id":"a","qr":"2@x&y"},{"session_id":"b"}]`))

	client.Send(t.Context(), aBatch(delivery.KindStatus))
	g.Expect(r.Last().Path).To(Equal("/api/whatsapp/status/batch"))

	answer := client.Send(t.Context(), aBatch("other"))
	g.Expect(answer.Result).To(Equal(delivery.Misconfigured))
}

// The size of a batch is bounded by the size of its items: a text of a stranger must not make
// the request six times as large.
func TestTheBodyIsAsLargeAsTheItems(t *testing.T) {
	g := NewWithT(t)
	r := receive(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) })
	config := files(t)
	config.BaseURL = r.URL
	item, err := delivery.MessageItem{SessionID: "a", Key: "k", Type: delivery.TypeText, Text: strings.Repeat("<&>\u2028", 10_000)}.Item()
	g.Expect(err).NotTo(HaveOccurred())
	batch := delivery.Batch{ID: "msg_1", Kind: delivery.KindMessage, Attempt: 1, Items: []delivery.Item{item}}
	g.Expect(newClient(t, config).Send(t.Context(), batch).Result).To(Equal(delivery.Delivered))
	got := r.Last()
	g.Expect(len(got.Body)).To(BeNumerically("<", len(item.Payload)+200))
	var body struct{ Items []struct{ Text string } }
	g.Expect(json.Unmarshal(got.Body, &body)).To(Succeed())
	g.Expect(body.Items[0].Text).To(Equal(strings.Repeat("<&>\u2028", 10_000)))
	g.Expect(laravel.Verify(got.Header, []laravel.Secret{secret(t, vectorSecret)}, time.Now(), laravel.DefaultTolerance, got.Body)).To(Succeed())
}

// A web server in front of Laravel compresses answers if the client asks for it.
func TestCompressedAnswer(t *testing.T) {
	g := NewWithT(t)
	r := receive(t, func(w http.ResponseWriter, request *http.Request) {
		if !strings.Contains(request.Header.Get("Accept-Encoding"), "gzip") {
			t.Error("the client does not ask for compression")
		}
		w.Header().Set("Content-Encoding", "gzip")
		compressed := gzip.NewWriter(w)
		_, _ = io.WriteString(compressed, `{"rejected":{"1":{"session_id":"B","reason":"no"}}}`)
		_ = compressed.Close()
	})
	config := files(t)
	config.BaseURL = r.URL
	g.Expect(newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR))).To(Equal(delivery.Answer{
		Result: delivery.Delivered, StatusCode: 200, Rejected: []delivery.Rejection{{SessionID: "b", Reason: "no"}},
	}))
}

func TestRedirectIsNotFollowed(t *testing.T) {
	g := NewWithT(t)
	target := receive(t, nil)
	for _, status := range []int{301, 302, 303, 307, 308} {
		r := receive(t, func(w http.ResponseWriter, request *http.Request) { http.Redirect(w, request, target.URL, status) })
		config := files(t)
		config.BaseURL = r.URL
		g.Expect(newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR)).Result).To(Equal(delivery.Misconfigured))
	}
	g.Expect(target.Count()).To(BeZero())
}

func TestAnswerIsBounded(t *testing.T) {
	r := receive(t, func(w http.ResponseWriter, request *http.Request) {
		for line := strings.Repeat(" ", 1<<16); request.Context().Err() == nil; {
			if _, err := io.WriteString(w, line); err != nil {
				return
			}
		}
	})
	config := files(t)
	config.BaseURL = r.URL
	answer := newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR))
	NewWithT(t).Expect(answer.Result).To(Equal(delivery.Misconfigured))
}

func TestTimeout(t *testing.T) {
	g := NewWithT(t)
	release := make(chan struct{})
	r := receive(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) })
	config := files(t)
	config.BaseURL, config.Timeout = r.URL, 50*time.Millisecond
	client := newClient(t, config)
	answer := client.Send(t.Context(), aBatch(delivery.KindQR))
	g.Expect(answer).To(Equal(delivery.Answer{Result: delivery.Retry, TimedOut: true, Detail: "no answer in time"}))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.Expect(client.Send(ctx, aBatch(delivery.KindQR)).Result).To(Equal(delivery.Retry))
}

func TestConnectionRefused(t *testing.T) {
	r := receive(t, nil)
	NewWithT(t).Expect(r.Close()).To(Succeed())
	config := files(t)
	config.BaseURL = r.URL
	answer := newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR))
	NewWithT(t).Expect(answer).To(Equal(delivery.Answer{Result: delivery.Retry, Detail: "the connection was refused"}))
}

func TestSecretsAreReadAgain(t *testing.T) {
	g := NewWithT(t)
	r := receive(t, nil)
	config := files(t)
	config.BaseURL = r.URL
	config.SigningSecretFiles = append(config.SigningSecretFiles, write(t, filepath.Join(t.TempDir(), "next"), otherSecret))
	client := newClient(t, config)
	send := func() laraveltest.Request {
		client.Send(t.Context(), aBatch(delivery.KindQR))
		return r.Last()
	}
	got := send()
	g.Expect(strings.Fields(got.Header.Get(laravel.HeaderSignature))).To(HaveLen(2))
	for _, known := range []string{vectorSecret, otherSecret} {
		g.Expect(laravel.Verify(got.Header, []laravel.Secret{secret(t, known)}, time.Now(), laravel.DefaultTolerance, got.Body)).To(Succeed())
	}

	write(t, config.TokenFile, "rotated-token")
	write(t, config.SigningSecretFiles[0], strings.Repeat("another ", 4)+"\n"+vectorSecret)
	got = send()
	g.Expect(got.Header.Get("Authorization")).To(Equal("Bearer rotated-token"))
	g.Expect(strings.Fields(got.Header.Get(laravel.HeaderSignature))).To(HaveLen(3), "one file may contain several secrets")

	write(t, config.TokenFile, "two\nlines")
	g.Expect(os.Remove(config.SigningSecretFiles[1])).To(Succeed())
	got = send()
	g.Expect(got.Header.Get("Authorization")).To(Equal("Bearer rotated-token"), "a broken file changes nothing")
	g.Expect(strings.Fields(got.Header.Get(laravel.HeaderSignature))).To(HaveLen(3))
}

func TestCertificates(t *testing.T) {
	g := NewWithT(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if request.ProtoMajor != 2 {
			w.WriteHeader(http.StatusHTTPVersionNotSupported)
		}
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = nil
	server.StartTLS()
	t.Cleanup(server.Close)
	own := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))

	config := files(t)
	config.BaseURL = server.URL
	answer := newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR))
	g.Expect(answer.Result).To(Equal(delivery.Misconfigured))
	g.Expect(answer.Detail).To(ContainSubstring("certificate"))

	config.CAFile = write(t, filepath.Join(t.TempDir(), "ca.pem"), own)
	g.Expect(newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR)).Result).To(Equal(delivery.Delivered))
}

// A machine in front of Laravel disappears without closing its connections: they are closed
// and replaced long before TCP gives them up.
func TestDeadConnectionIsReplaced(t *testing.T) {
	for _, row := range []struct {
		name    string
		http2   bool
		timeout time.Duration
	}{
		{"HTTP/2 is pinged", true, 50 * time.Second},
		{"HTTP/1.1 is replaced after a request without an answer", false, 10 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			const parallel = 4
			allConnected := make(chan struct{})
			var arrived atomic.Int64
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, request *http.Request) {
				if (request.ProtoMajor == 2) != row.http2 {
					t.Errorf("the protocol is %s", request.Proto)
				}
				if arrived.Add(1) == parallel {
					close(allConnected)
				}
				select { // one connection for each with HTTP/1.1
				case <-allConnected:
				case <-request.Context().Done():
				}
			}))
			server.EnableHTTP2 = row.http2
			server.StartTLS()
			t.Cleanup(server.Close)
			proxy := testenv.NewTCPProxy(t, server.Listener.Addr().String())

			config := files(t)
			config.BaseURL, config.Timeout = "https://"+proxy.Addr(), row.timeout
			config.CAFile = write(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
			client := newClient(t, config)
			var all sync.WaitGroup
			for range parallel {
				all.Go(func() {
					if got := client.Send(t.Context(), aBatch(delivery.KindQR)); got.Result != delivery.Delivered {
						t.Errorf("the connection does not work: %+v", got)
					}
				})
			}
			all.Wait()
			proxy.Abandon()
			answer := client.Send(t.Context(), aBatch(delivery.KindQR))
			g.Expect(answer.Result).To(Equal(delivery.Retry))
			if row.http2 {
				g.Expect(answer.Detail).NotTo(ContainSubstring("in time"), "it did not wait for the request's time-out")
			}
			g.Expect(client.Send(t.Context(), aBatch(delivery.KindQR)).Result).To(Equal(delivery.Delivered))
		})
	}
}

// Behind a load balancer a connection always leads to the same machine: after a failure the
// next request must not use the connection to the broken machine again.
func TestConnectionToAFailingMachineIsClosed(t *testing.T) {
	for _, row := range []struct {
		name  string
		http2 bool
		fail  http.HandlerFunc
	}{
		{"HTTP/1.1 and 500", false, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "Whoops", http.StatusInternalServerError) }},
		{"HTTP/2 and 500", true, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "Whoops", http.StatusInternalServerError) }},
		{"HTTP/1.1 and 404", false, http.NotFound},
		{"HTTP/2 and 421", true, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "another host", http.StatusMisdirectedRequest)
		}},
		{"HTTP/1.1 and a login page", false, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			var broken atomic.Pointer[string]
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
				if (request.ProtoMajor == 2) != row.http2 {
					t.Errorf("the protocol is %s", request.Proto)
				}
				broken.CompareAndSwap(nil, &request.RemoteAddr)
				if request.RemoteAddr == *broken.Load() {
					row.fail(w, request)
				}
			}))
			server.EnableHTTP2 = row.http2
			server.StartTLS()
			t.Cleanup(server.Close)

			config := files(t)
			config.BaseURL = server.URL
			config.CAFile = write(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
			client := newClient(t, config)
			g.Expect(client.Send(t.Context(), aBatch(delivery.KindQR)).Result).NotTo(Equal(delivery.Delivered))
			g.Expect(client.Send(t.Context(), aBatch(delivery.KindQR)).Result).To(Equal(delivery.Delivered))
		})
	}
}

// The body of a 101 is the connection itself: no context ends a read from it.
func TestAnswerThatSwitchesProtocols(t *testing.T) {
	r := receive(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
	})
	config := files(t)
	config.BaseURL, config.Timeout = r.URL, time.Second
	client := newClient(t, config)
	g := NewWithT(t)
	answers := make(chan delivery.Answer, 1)
	go func() { answers <- client.Send(t.Context(), aBatch(delivery.KindQR)) }()
	var answer delivery.Answer
	g.Eventually(answers, 30*time.Second).Should(Receive(&answer))
	g.Expect(answer.Result).To(Equal(delivery.Misconfigured))
	g.Expect(answer.Detail).To(ContainSubstring("101"))
}

// Errors of the environment's HTTP proxy are distinguished from Laravel's. The environment
// is read once in a process, so the test runs itself as a child process.
func TestProxyOfTheEnvironment(t *testing.T) {
	if target := os.Getenv("TEST_THROUGH_PROXY"); target != "" {
		config := files(t)
		config.BaseURL = target
		answer := newClient(t, config).Send(t.Context(), aBatch(delivery.KindQR))
		t.Logf("%s: %s", answer.Result, answer.Detail)
		return
	}
	through := func(proxy string) string {
		run := exec.Command(os.Args[0], "-test.run=^TestProxyOfTheEnvironment$", "-test.v")
		run.Env = append(os.Environ(), "HTTPS_PROXY="+proxy, "NO_PROXY=", "TEST_THROUGH_PROXY=https://laravel.example")
		out, err := run.CombinedOutput()
		NewWithT(t).Expect(err).NotTo(HaveOccurred(), string(out))
		return string(out)
	}
	var status atomic.Int32
	status.Store(http.StatusProxyAuthRequired)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(status.Load())) }))
	t.Cleanup(proxy.Close)
	withPassword := strings.Replace(proxy.URL, "://", "://me:hunter2@", 1)
	g := NewWithT(t)
	out := through(withPassword)
	g.Expect(out).To(ContainSubstring("Misconfigured: the HTTP proxy of the environment (HTTPS_PROXY) asks for a password"))
	g.Expect(out).NotTo(ContainSubstring("hunter2"))
	status.Store(http.StatusBadGateway)
	g.Expect(through(withPassword)).To(ContainSubstring("Retry: the HTTP proxy of the environment (HTTPS_PROXY) does not connect to Laravel: it answers 502"))
	proxy.Close()
	out = through(withPassword)
	g.Expect(out).To(ContainSubstring("Retry: the HTTP proxy of the environment (HTTPS_PROXY, HTTP_PROXY) cannot be used: the connection was refused"))
	g.Expect(out).NotTo(ContainSubstring("hunter2"))
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	short := write(t, filepath.Join(dir, "short"), "hunter2")
	empty := write(t, filepath.Join(dir, "empty"), "\n")
	for _, row := range []struct {
		name   string
		change func(*laravel.Config)
		want   []string
	}{
		{"https", func(*laravel.Config) {}, nil},
		{"http to a loopback address", func(c *laravel.Config) { c.BaseURL = "http://127.0.0.1:8080" }, nil},
		{"http to localhost", func(c *laravel.Config) { c.BaseURL = "http://localhost:8080" }, nil},
		{"http to a loopback address of IPv6", func(c *laravel.Config) { c.BaseURL = "http://[::1]:8080/api" }, nil},
		{"http to another host", func(c *laravel.Config) { c.BaseURL = "http://laravel.example" }, []string{"to host laravel.example with --insecure-laravel-http"}},
		{"http to another host, allowed", func(c *laravel.Config) { c.BaseURL, c.InsecureHTTP = "http://laravel.example", true }, nil},
		{"a host that only looks local", func(c *laravel.Config) { c.BaseURL = "http://127.0.0.1.example" }, []string{"not https"}},
		{"a password in the URL", func(c *laravel.Config) { c.BaseURL = "https://me:hunter2@laravel.example" }, []string{"holds a user or a password"}},
		{"a malformed URL with a password", func(c *laravel.Config) { c.BaseURL = "https://me:hunter2@laravel example" }, []string{"not a URL"}},
		{"an impossible port", func(c *laravel.Config) { c.BaseURL = "https://laravel.example:99999" }, []string{"the port 99999"}},
		{"port 0", func(c *laravel.Config) { c.BaseURL = "https://laravel.example:0" }, []string{"the port 0"}},
		{"a query", func(c *laravel.Config) { c.BaseURL = "https://laravel.example?token=hunter2" }, []string{"query"}},
		{"another scheme", func(c *laravel.Config) { c.BaseURL = "ftp://laravel.example" }, []string{"not a URL"}},
		{"no scheme", func(c *laravel.Config) { c.BaseURL = "laravel.example" }, []string{"not a URL"}},
		{"a path without a slash", func(c *laravel.Config) { c.QRPath = "qr" }, []string{"does not begin"}},
		{"the same path for both kinds", func(c *laravel.Config) { c.QRPath = laravel.DefaultStatusPath }, []string{"are the same"}},
		{"no token", func(c *laravel.Config) { c.TokenFile = "" }, []string{"--laravel-token-file"}},
		{"no signing secret", func(c *laravel.Config) { c.SigningSecretFiles = nil }, []string{"--laravel-signing-secret-file"}},
		{"an empty token", func(c *laravel.Config) { c.TokenFile = empty }, []string{"visible ASCII"}},
		{"a secret that is too short", func(c *laravel.Config) { c.SigningSecretFiles = []string{short} }, []string{"24 bytes"}},
		{"a file without secrets", func(c *laravel.Config) { c.SigningSecretFiles = []string{empty} }, []string{"24 bytes"}},
		{"a CA file without a certificate", func(c *laravel.Config) { c.CAFile = short }, []string{"certificate"}},
		{"a CA file although the URL is http", func(c *laravel.Config) { c.BaseURL, c.CAFile = "http://localhost", short }, []string{"not https", "certificate"}},
		{"a negative time-out", func(c *laravel.Config) { c.Timeout = -1 }, []string{"time-out"}},
		{"a time-out of an hour", func(c *laravel.Config) { c.Timeout = time.Hour }, []string{"choose up to 5m"}},
		{"everything at once", func(c *laravel.Config) { *c = laravel.Config{TokenFile: filepath.Join(dir, "missing"), Timeout: -1} },
			[]string{"base URL of Laravel is missing", "no such file", "signing secret", "time-out"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			config := files(t)
			config.BaseURL = "https://laravel.example/api"
			row.change(&config)
			err := config.Validate()
			if row.want == nil {
				g.Expect(err).NotTo(HaveOccurred())
				return
			}
			for _, part := range row.want {
				g.Expect(err).To(MatchError(ContainSubstring(part)))
			}
			var joined interface{ Unwrap() []error }
			g.Expect(errors.As(err, &joined)).To(BeTrue())
			g.Expect(joined.Unwrap()).To(HaveLen(len(row.want)))
			g.Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
		})
	}
}
