package laravel

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// errNotSent says that a request could not be built, so nothing was sent.
var errNotSent = errors.New("the request could not be made")

// Client posts batches. Its methods may be called from many goroutines at once.
type Client struct {
	config Config
	urls   map[delivery.Kind]string
	clock  clock.PassiveClock
	log    logr.Logger

	mu      sync.Mutex
	token   watched[string]
	secrets []watched[[]Secret]
	ca      *watched[*x509.CertPool]
	http    *http.Client
	// broken is the last logged error about a file: each error is logged once.
	broken string
}

// New makes a client. It does no I/O beyond reading files. Close it when done.
func New(c Config, clk clock.PassiveClock, log logr.Logger) (*Client, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of Laravel: %w", err)
	}
	base, err := url.Parse(c.BaseURL)
	if err != nil {
		return nil, errNotSent // cannot happen: Validate has parsed it
	}
	client := &Client{
		config: c, clock: clk, log: log,
		urls: map[delivery.Kind]string{
			delivery.KindQR:      base.JoinPath(c.qrPath()).String(),
			delivery.KindStatus:  base.JoinPath(c.statusPath()).String(),
			delivery.KindMessage: base.JoinPath(c.messagePath()).String(),
		},
		token: watched[string]{name: c.TokenFile, parse: parseToken},
	}
	for _, name := range c.SigningSecretFiles {
		client.secrets = append(client.secrets, watched[[]Secret]{name: name, parse: parseSecrets})
	}
	if c.CAFile != "" {
		client.ca = &watched[*x509.CertPool]{name: c.CAFile, parse: parseCA}
	}
	if _, _, _, err := client.load(); err != nil {
		return nil, err
	}
	return client, nil
}

// Close closes the idle connections.
func (c *Client) Close() { c.closeIdle() }

func (c *Client) closeIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
}

// envelope is the body of a batch.
type envelope struct {
	BatchID string            `json:"batch_id"`
	SentAt  delivery.Time     `json:"sent_at"`
	Items   []json.RawMessage `json:"items"`
}

// Send posts a batch once and returns what the answer means. It does not repeat a request.
// It ends when ctx ends, or after the configured time-out.
func (c *Client) Send(parent context.Context, batch delivery.Batch) delivery.Answer {
	ctx, cancel := context.WithTimeout(parent, cmp.Or(c.config.Timeout, DefaultTimeout))
	defer cancel()
	status, header, body, err := c.post(ctx, batch)
	answer := Classify(status, header, body, err, c.clock.Now())
	if (answer.Result == delivery.Retry || answer.Result == delivery.Misconfigured) && parent.Err() == nil {
		// The idle connections may lead to a dead machine, or to a broken one of several behind a
		// load balancer, and each connection always leads to the same machine.
		c.closeIdle()
	}
	answer, unknown := inBatch(batch, answer)
	if len(unknown) > 0 {
		c.log.Info("Ignored rejected items that are not in the batch", "batch", batch.ID, "kind", batch.Kind, "items", unknown[:min(len(unknown), 10)], "count", len(unknown))
	}
	return answer
}

func (c *Client) post(ctx context.Context, batch delivery.Batch) (status int, header http.Header, answer []byte, err error) {
	target, known := c.urls[batch.Kind]
	if !known {
		return 0, nil, nil, fmt.Errorf("%w: Laravel has no path for batches of kind %q", errNotSent, batch.Kind)
	}
	now := c.clock.Now()
	items := make([]json.RawMessage, len(batch.Items))
	for i := range batch.Items {
		items[i] = batch.Items[i].Payload
	}
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false) // the escapes of <, > and & are six times as long
	if err := encoder.Encode(envelope{BatchID: batch.ID, SentAt: delivery.Time{Time: now}, Items: items}); err != nil {
		return 0, nil, nil, fmt.Errorf("%w: an item of the batch is not JSON", errNotSent)
	}
	body := bytes.TrimSuffix(encoded.Bytes(), []byte("\n"))
	client, token, secrets := c.current()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, fmt.Errorf("%w: the URL of Laravel is malformed", errNotSent)
	}
	request.Header.Set("Content-Type", "application/json")
	// Without it Laravel answers a failed validation with a redirect.
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", cmp.Or(c.config.UserAgent, DefaultUserAgent))
	request.Header.Set("Authorization", "Bearer "+token)
	// A batch may be repeated. This entry, which is not sent, lets net/http repeat the
	// request when an idle connection turns out to be closed.
	request.Header["Idempotency-Key"] = nil
	Sign(request.Header, secrets, batch.ID, now, body)

	response, err := client.Do(request)
	if err != nil {
		return 0, nil, nil, fmt.Errorf("posting a batch: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode == http.StatusSwitchingProtocols {
		return response.StatusCode, response.Header, nil, nil // its body is the connection itself, which no context ends
	}
	answer, err = io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err == nil && len(answer) > maxAnswer {
		err = errAnswerTooLong
	}
	return response.StatusCode, response.Header, answer, err
}

// current checks the files and returns the client, the token and the secrets for the next
// request. If a file cannot be read any more, its last good content is used.
func (c *Client) current() (*http.Client, string, []Secret) {
	c.mu.Lock()
	defer c.mu.Unlock()
	client, token, secrets, err := c.load()
	switch {
	case err == nil:
		c.broken = ""
	case c.broken != err.Error():
		c.broken = err.Error()
		c.log.Error(err, "Failed to read a file again, its previous content stays in use")
	}
	return client, token, secrets
}

func (c *Client) load() (*http.Client, string, []Secret, error) {
	var errs []error
	token, _, err := c.token.get()
	errs = append(errs, err)
	var secrets []Secret
	for i := range c.secrets {
		some, _, err := c.secrets[i].get()
		errs = append(errs, err)
		secrets = append(secrets, some...)
	}
	var roots *x509.CertPool
	changed := false
	if c.ca != nil {
		roots, changed, err = c.ca.get()
		errs = append(errs, err)
	}
	if c.http == nil || changed {
		if c.http != nil {
			c.http.CloseIdleConnections()
		}
		c.http = newHTTP(roots)
	}
	return c.http, token, secrets, errors.Join(errs...)
}

const (
	// idleTimeout is how long an unused connection is kept. It is shorter than the idle
	// time-out of most load balancers (60 s and more), which could close the connection
	// just when a request begins.
	idleTimeout = 30 * time.Second
	// An HTTP/2 connection on which nothing arrived for pingAfter is pinged, and closed if no
	// answer arrives within pingTimeout: together less than the default time of a request.
	// Otherwise, if a machine disappears without closing its connections, requests use the
	// dead connection until TCP gives it up a quarter of an hour later.
	pingAfter, pingTimeout = 5 * time.Second, 5 * time.Second
)

// unansweredTimeout is how long sent data may stay without TCP's acknowledgement before the
// connection is closed: this also finds a dead connection of HTTP/1.1.
const unansweredTimeout = 10 * time.Second

func newHTTP(roots *x509.CertPool) *http.Client {
	dialer := &net.Dialer{
		Timeout: 5 * time.Second,
		// An idle connection is probed, and closed after three probes without an answer.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3},
		Control:         boundUnanswered,
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           dialer.DialContext,
			TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
			TLSHandshakeTimeout:   5 * time.Second,
			MaxIdleConnsPerHost:   128, // the most requests that both flushers may have at a time
			IdleConnTimeout:       idleTimeout,
			ForceAttemptHTTP2:     true,
			HTTP2:                 &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, WriteByteTimeout: unansweredTimeout},
			ResponseHeaderTimeout: 0, // the request's own context bounds it
			OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
				if answer.StatusCode != http.StatusOK {
					return &proxyRefusal{status: answer.StatusCode}
				}
				return nil
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
