package cache

import (
	"context"
	_ "embed" // the script
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

const (
	// goneTTL is how long a deletion is remembered. A paused worker loses its sessions
	// within seconds and its connection to Redis soon after, so what it wrote before
	// cannot arrive later than that.
	goneTTL = 10 * time.Minute
	// refreshChunk bounds a pipeline, so that the answers for all sessions of a large
	// worker are not in memory at once.
	refreshChunk = 500
)

//go:embed scripts/write.lua
var writeLua string

var writeScript = goredis.NewScript(writeLua)

// WriteResult is the result of a write.
type WriteResult int

const (
	// Stale: a newer value is there, or a deletion that is not older; nothing was written.
	Stale WriteResult = iota
	// Written: the value is there now. Also the answer to a repetition.
	Written
	// Unchanged: this QR code is there already under older numbers; nothing was written.
	Unchanged
)

// Connection is the value of session:<sid>:connection.
type Connection struct {
	delivery.Numbers
	SessionID string `json:"session_id"`
	Connected bool   `json:"connected"`
	// Worker is the name of the worker that holds the session.
	Worker string `json:"worker,omitempty"`
	// Since is when it was connected, or was disconnected.
	Since delivery.Time `json:"since"`
}

// Entry is what RefreshAll rewrites of one session; nil is left alone.
type Entry struct {
	QR         *delivery.QRItem
	Status     *delivery.StatusItem
	Connection *Connection
}

// Cache writes the values. It may be used by many goroutines.
type Cache struct {
	client goredis.UniversalClient
	keys   redis.Keys
	clock  clock.PassiveClock
}

// New makes a cache over client; it does no I/O. clk is compared with the expiry of
// QR codes.
func New(client goredis.UniversalClient, keys redis.Keys, clk clock.PassiveClock) *Cache {
	return &Cache{client: client, keys: keys, clock: clk}
}

// SetQR writes a code until it expires and reports whether it is new: not the
// one that is there, not older than what is there, and not expired. The
// repetition of a write whose answer was lost is new again, so that the caller
// continues as after the first.
func (c *Cache) SetQR(ctx context.Context, qr delivery.QRItem) (isNew bool, err error) {
	w, err := c.qr(qr)
	if err != nil || w.ttl <= 0 {
		return false, err
	}
	result, err := c.write(ctx, w)
	return result == Written, err
}

// ClearQR removes the code, which was used or has expired, unless a newer one is there.
func (c *Cache) ClearQR(ctx context.Context, sessionID string, numbers delivery.Numbers) error {
	_, err := c.write(ctx, c.deletion(c.keys.QR(sessionID), numbers))
	return err
}

// Delete removes all values of a session that are not newer. A write with the same or
// older numbers that arrives later is refused.
func (c *Cache) Delete(ctx context.Context, sessionID string, numbers delivery.Numbers) error {
	_, err := c.writeAll(ctx, []write{
		c.deletion(c.keys.QR(sessionID), numbers),
		c.deletion(c.keys.Status(sessionID), numbers),
		c.deletion(c.keys.Connection(sessionID), numbers),
	})
	return err
}

// RefreshAll rewrites the values of all sessions of a worker, so that they live
// for another CacheTTL, and are there again where Redis had lost them. A newer value
// stays. It continues after an error and returns all errors.
func (c *Cache) RefreshAll(ctx context.Context, entries []Entry) error {
	var errs []error
	var writes []write
	add := func(w write, err error) {
		if err != nil {
			errs = append(errs, err)
		} else if w.ttl > 0 {
			writes = append(writes, w)
		}
	}
	for _, e := range entries {
		if e.QR != nil {
			add(c.qr(*e.QR))
		}
		if e.Status != nil {
			add(c.status(*e.Status))
		}
		if e.Connection != nil {
			add(c.connection(*e.Connection))
		}
	}
	for chunk := range slices.Chunk(writes, refreshChunk) {
		if _, err := c.writeAll(ctx, chunk); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// write is one run of the script.
type write struct {
	key     string
	numbers delivery.Numbers
	// value is empty for a deletion.
	value []byte
	ttl   time.Duration
	// same is the text that an equal value contains.
	same string
}

func (w write) keys(k redis.Keys) []string { return []string{w.key, k.Sibling(w.key, "gone")} }

func (w write) args() []any {
	return []any{
		strconv.FormatInt(w.numbers.Epoch, 10), strconv.FormatInt(w.numbers.Seq, 10),
		w.value, max(1, w.ttl.Milliseconds()), w.same,
	}
}

func (c *Cache) qr(qr delivery.QRItem) (write, error) {
	content, err := qr.Content()
	if err != nil {
		return write{}, err
	}
	w, err := valueWrite(c.keys.QR(qr.SessionID), qr.Numbers, qr, qr.ExpiresAt.Sub(c.clock.Now()))
	w.same = content
	return w, err
}

func (c *Cache) status(s delivery.StatusItem) (write, error) {
	return valueWrite(c.keys.Status(s.SessionID), s.Numbers, s, delivery.CacheTTL)
}

func (c *Cache) connection(v Connection) (write, error) {
	return valueWrite(c.keys.Connection(v.SessionID), v.Numbers, v, delivery.CacheTTL)
}

func (c *Cache) deletion(key string, numbers delivery.Numbers) write {
	return write{key: key, numbers: numbers, ttl: goneTTL}
}

func valueWrite(key string, numbers delivery.Numbers, value any, ttl time.Duration) (write, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return write{}, fmt.Errorf("encoding a value for the session cache: %w", err)
	}
	return write{key: key, numbers: numbers, value: text, ttl: ttl}, nil
}

func (c *Cache) write(ctx context.Context, w write) (WriteResult, error) {
	results, err := c.writeAll(ctx, []write{w})
	if err != nil {
		return Stale, err
	}
	return results[0], nil
}

// writeAll runs the script for each write, in one pipeline (one per node of a cluster).
func (c *Cache) writeAll(ctx context.Context, writes []write) ([]WriteResult, error) {
	for _, w := range writes {
		if w.numbers.Epoch < 0 || w.numbers.Seq < 0 {
			return nil, errors.New("writing to the session cache: negative numbers")
		}
	}
	run := func(eval func(context.Context, goredis.Scripter, []string, ...any) *goredis.Cmd) ([]*goredis.Cmd, error) {
		answers := make([]*goredis.Cmd, len(writes))
		_, err := c.client.Pipelined(ctx, func(p goredis.Pipeliner) error {
			for i, w := range writes {
				answers[i] = eval(ctx, p, w.keys(c.keys), w.args()...)
			}
			return nil
		})
		return answers, err
	}
	answers, err := run(writeScript.EvalSha)
	if slices.ContainsFunc(answers, func(a *goredis.Cmd) bool { return goredis.HasErrorPrefix(a.Err(), "NOSCRIPT") }) {
		// A node was restarted or never saw the script. To repeat the writes that worked
		// does no harm.
		if err = writeScript.Load(ctx, c.client).Err(); err == nil {
			answers, err = run(writeScript.EvalSha)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("writing to the session cache: %w", err)
	}
	results := make([]WriteResult, len(writes))
	for i, answer := range answers {
		code, err := answer.Int()
		if err != nil {
			return nil, fmt.Errorf("writing to the session cache: %w", err)
		}
		results[i] = WriteResult(code)
	}
	return results, nil
}
