package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-logr/logr/funcr"
	"golang.org/x/sync/errgroup"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

// sideConfig is what a sending process gets on its standard input.
type sideConfig struct {
	Name, Part                        string
	URL, Redis, TokenFile, SecretFile string
	Sessions, Rounds, Samples         int
	Seed                              uint64
	// Start is when the steady part begins; it is also the epoch of the updates.
	Start                                         time.Time
	Duration, QRInterval, QRValid, StatusInterval time.Duration
	BetweenSingle, BetweenRounds                  time.Duration
}

// sideResult is what that process writes to its standard output.
type sideResult struct {
	Events []event
	// PeakMemory is its highest resident memory in bytes.
	PeakMemory int64
	Durability string
}

// part is a part of the benchmark on one side.
type part struct {
	sideResult
	summary
	requests []request
	bytes    int64
	cpu      time.Duration
}

// measure runs a side in its own process against its own receiver.
func measure(ctx context.Context, c sideConfig, answer time.Duration) (p part, err error) {
	r, err := newReceiver(c, answer)
	if err != nil {
		return part{}, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	c.URL = r.URL
	self, err := os.Executable()
	if err != nil {
		return part{}, fmt.Errorf("looking for this program: %w", err)
	}
	config, err := json.Marshal(c)
	if err != nil {
		return part{}, fmt.Errorf("encoding a configuration: %w", err)
	}
	child := exec.CommandContext(ctx, self, "-side="+c.Name)
	child.Cancel = func() error { return child.Process.Signal(syscall.SIGTERM) }
	child.WaitDelay = 20 * time.Second
	child.Stderr = os.Stderr
	var out bytes.Buffer
	child.Stdout = &out
	// It closes when this process ends, which the child notices.
	stdin, err := child.StdinPipe()
	if err != nil {
		return part{}, fmt.Errorf("starting a side: %w", err)
	}
	if err := child.Start(); err != nil {
		return part{}, fmt.Errorf("starting a side: %w", err)
	}
	if _, err := stdin.Write(append(config, '\n')); err != nil {
		return part{}, errors.Join(fmt.Errorf("configuring a side: %w", err), child.Wait())
	}
	if err := child.Wait(); err != nil {
		return part{}, fmt.Errorf("the side %s of part %s: %w", c.Name, c.Part, err)
	}
	if err := json.Unmarshal(out.Bytes(), &p.sideResult); err != nil {
		return part{}, fmt.Errorf("reading the result of a side: %w", err)
	}
	if wrong := r.wrong(); len(wrong) > 0 {
		return part{}, fmt.Errorf("%d requests were wrong, the first: %s", len(wrong), wrong[0])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p.requests, p.bytes = r.requests, r.bytes.Load()
	p.cpu = child.ProcessState.UserTime() + child.ProcessState.SystemTime()
	p.summary = count(p.Events, p.requests)
	return p, nil
}

// runSide is the child process.
func runSide(ctx context.Context, name string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	var c sideConfig
	if err := json.Unmarshal(line, &c); err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		cancel(errors.New("the benchmark has ended"))
	}()
	var result sideResult
	switch name {
	case "old":
		result, err = oldSide(ctx, c)
	case "ours":
		result, err = ourSide(ctx, c)
	default:
		err = fmt.Errorf("there is no side %q", name)
	}
	if err != nil {
		return err
	}
	if result.PeakMemory, err = peakMemory(); err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		return fmt.Errorf("writing the result: %w", err)
	}
	return nil
}

// oldSide posts each event at once in a separate request.
func oldSide(ctx context.Context, c sideConfig) (sideResult, error) {
	token, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return sideResult{}, fmt.Errorf("reading the token: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = 0, c.Sessions
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	post := func(ctx context.Context, e event, item delivery.Item) error {
		path := oldStatusPath
		if e.Kind == delivery.KindQR {
			path = oldQRPath
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL+path, bytes.NewReader(item.Payload))
		if err != nil {
			return fmt.Errorf("making a request: %w", err)
		}
		request.Header.Set("Content-Type", "application/json")
		request.Header.Set("Accept", "application/json")
		request.Header.Set("Authorization", "Bearer "+string(token))
		response, err := client.Do(request)
		if err != nil {
			return fmt.Errorf("posting an event: %w", err)
		}
		defer func() { _ = response.Body.Close() }()
		if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
			return fmt.Errorf("an event was answered with %d: %w", response.StatusCode, err)
		}
		return nil
	}
	events, err := steady(ctx, c, post)
	return sideResult{Events: events}, err
}

// ourSide puts updates into the queue as a worker does, and delivers them as the manager does.
func ourSide(ctx context.Context, c sideConfig) (sideResult, error) {
	config := redis.Config{Addresses: []string{c.Redis}, KeyPrefix: c.Part + ":"}
	client, err := redis.New(config)
	if err != nil {
		return sideResult{}, fmt.Errorf("connecting to Redis: %w", err)
	}
	defer func() { _ = client.Close() }()
	durability := redis.NewDurability(client, config.Keys(), redis.DurabilityAuto)
	level, err := durability.Detect(ctx)
	if err != nil {
		return sideResult{}, fmt.Errorf("reading the durability of Redis: %w", err)
	}
	queue := batch.NewQueue(client, config.Keys(), clock.RealClock{}, batch.Options{Durability: durability})
	log := funcr.New(func(prefix, args string) { fmt.Fprintln(os.Stderr, prefix, args) }, funcr.Options{})
	sender, err := laravel.New(laravel.Config{BaseURL: c.URL, TokenFile: c.TokenFile, SigningSecretFiles: []string{c.SecretFile}}, clock.RealClock{}, log)
	if err != nil {
		return sideResult{}, fmt.Errorf("making the client: %w", err)
	}
	defer sender.Close()
	flusher, err := batch.NewFlusher(queue, sender, clock.RealClock{}, log, batch.FlusherOptions{})
	if err != nil {
		return sideResult{}, fmt.Errorf("making the flusher: %w", err)
	}
	flushing, stop := context.WithCancel(ctx)
	defer stop()
	var group errgroup.Group
	group.Go(func() error { return flusher.Start(flushing) })

	enqueue := func(ctx context.Context, e event, item delivery.Item) error {
		_, err := queue.Enqueue(ctx, e.Kind, item)
		return err
	}
	drain := func() error { return drained(ctx, queue) }
	var events []event
	switch c.Part {
	case "steady":
		events, err = steady(ctx, c, enqueue)
		err = errors.Join(err, drain())
	case "burst":
		events, err = burst(ctx, c, enqueue, drain)
	case "single":
		events, err = oneByOne(ctx, c, enqueue, drain)
	default:
		err = fmt.Errorf("there is no part %q", c.Part)
	}
	stop()
	err = errors.Join(err, group.Wait())
	return sideResult{Events: events, Durability: level.String()}, err
}

// drained waits until no item waits or is in flight.
func drained(ctx context.Context, queue *batch.Queue) error {
	for {
		left := 0
		for _, kind := range delivery.StateKinds {
			p, err := queue.Backlog(ctx, kind)
			if err != nil {
				return fmt.Errorf("waiting for the queue: %w", err)
			}
			left += p.Waiting + p.InFlight
		}
		if left == 0 {
			return nil
		}
		if err := benchenv.Pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// emitter emits events, each in its own goroutine like a session's supervisor, and waits for
// them.
type emitter struct {
	c     sideConfig
	emit  func(context.Context, event, delivery.Item) error
	group *errgroup.Group
	ctx   context.Context

	mu     sync.Mutex
	events []event
}

func newEmitter(ctx context.Context, c sideConfig, emit func(context.Context, event, delivery.Item) error) *emitter {
	group, ctx := errgroup.WithContext(ctx)
	return &emitter{c: c, emit: emit, group: group, ctx: ctx}
}

func (m *emitter) wait() ([]event, error) {
	err := m.group.Wait()
	return m.events, err
}

// start emits the planned event at the time that at returns. If ready is not nil, it first
// waits until ready is closed.
func (m *emitter) start(p planned, ready <-chan struct{}, at func() time.Time) {
	m.group.Go(func() error {
		if ready != nil {
			<-ready
		}
		now := at()
		e := event{key: key{p.kind, fmt.Sprintf("session-%04d", p.session), delivery.Numbers{Epoch: m.c.Start.Unix(), Seq: delivery.FirstSeq(1) + p.n}}, Priority: p.priority, At: now}
		item, err := itemOf(e, m.c.QRValid)
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.events = append(m.events, e)
		m.mu.Unlock()
		return m.emit(m.ctx, e, item)
	})
}

// steady emits the planned events at their times.
func steady(ctx context.Context, c sideConfig, emit func(context.Context, event, delivery.Item) error) ([]event, error) {
	m := newEmitter(ctx, c, emit)
	for _, p := range plan(c) {
		if err := benchenv.Pause(m.ctx, time.Until(c.Start.Add(p.at))); err != nil {
			_, failed := m.wait()
			return nil, errors.Join(err, failed)
		}
		m.start(p, nil, time.Now)
	}
	return m.wait()
}

// burst changes all sessions at the same time, several times.
func burst(ctx context.Context, c sideConfig, emit func(context.Context, event, delivery.Item) error, drain func() error) ([]event, error) {
	var all []event
	for round := range c.Rounds {
		if err := benchenv.Pause(ctx, c.BetweenRounds); err != nil {
			return nil, err
		}
		m := newEmitter(ctx, c, emit)
		ready := make(chan struct{})
		var instant time.Time
		for session := range c.Sessions {
			m.start(planned{kind: delivery.KindStatus, session: session, n: int64(round) + 1, priority: delivery.High}, ready, func() time.Time { return instant })
		}
		instant = time.Now()
		close(ready)
		events, err := m.wait()
		if err := errors.Join(err, drain()); err != nil {
			return nil, err
		}
		all = append(all, events...)
	}
	return all, nil
}

// oneByOne changes one session after the other.
func oneByOne(ctx context.Context, c sideConfig, emit func(context.Context, event, delivery.Item) error, drain func() error) ([]event, error) {
	var all []event
	for n := range c.Samples {
		// A little longer each time, so that it is not synchronous with a timer.
		if err := benchenv.Pause(ctx, c.BetweenSingle+time.Duration(n)*1700*time.Microsecond); err != nil {
			return nil, err
		}
		m := newEmitter(ctx, c, emit)
		m.start(planned{kind: delivery.KindStatus, session: n % c.Sessions, n: int64(n) + 1, priority: delivery.High}, nil, time.Now)
		events, err := m.wait()
		if err := errors.Join(err, drain()); err != nil {
			return nil, err
		}
		all = append(all, events...)
	}
	return all, nil
}

// peakMemory is the highest resident memory of this process. On Linux the figure of
// getrusage includes the parent's memory at the time of the fork, so /proc is read.
func peakMemory() (int64, error) {
	if runtime.GOOS == "linux" {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return 0, fmt.Errorf("reading the memory of this process: %w", err)
		}
		for line := range strings.Lines(string(status)) {
			if value, found := strings.CutPrefix(line, "VmHWM:"); found {
				kilobytes, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
				if err != nil {
					return 0, fmt.Errorf("reading the memory of this process: %w", err)
				}
				return kilobytes << 10, nil
			}
		}
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0, fmt.Errorf("reading the memory of this process: %w", err)
	}
	return usage.Maxrss, nil // bytes on macOS
}
