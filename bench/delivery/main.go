// Command delivery measures the load and the delay at Laravel: how many requests it
// gets and how long an update takes, compared with the system before this project. It
// prints a table and writes bench/results/delivery.json, a flat JSON object in
// which every figure is measured in this run.
//
// This process stands in for Laravel: its HTTP receivers record when each update
// arrives, check the signatures, and answer after a delay. The senders are separate
// processes, so that their CPU time and memory can be measured:
//
//	steady  1,000 sessions, each with two QR codes per minute and some status
//	        changes; the same events on both sides at the same time:
//	        old   one POST per event, at once and without a bound on the number
//	              of requests, over connections that are kept open. (The old
//	              Node.js process had no bound either.)
//	        ours  the coalescing queue in a real Redis, the flusher, the client
//	burst   1,000 urgent changes at the same time
//	single  urgent changes one by one, so far apart that no window is open
//
// A code is valid until the next one of its session, as WhatsApp's are. So the rule of one
// code in 30 s (docs/architecture.md, "QR and status") delays none, and the numbers of
// requests are compared for all codes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
)

// options are the flags.
type options struct {
	sessions       int
	duration       time.Duration
	steadyAnswer   time.Duration
	urgentAnswer   time.Duration
	rounds         int
	samples        int
	qrInterval     time.Duration
	qrValid        time.Duration
	statusInterval time.Duration
	out            string
	side           string
	seed           uint64
	betweenSingle  time.Duration
	betweenRounds  time.Duration
}

func main() {
	if err := command(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-delivery:", err)
		os.Exit(1)
	}
}

func command() error {
	var o options
	flag.IntVar(&o.sessions, "sessions", 1000, "number of sessions")
	flag.DurationVar(&o.duration, "duration", 2*time.Minute, "how long the steady part lasts")
	flag.DurationVar(&o.steadyAnswer, "steady-answer", 500*time.Millisecond, "how long Laravel takes for a request in the steady part")
	flag.DurationVar(&o.urgentAnswer, "urgent-answer", 50*time.Millisecond, "how long Laravel takes for a request in the other parts")
	flag.IntVar(&o.rounds, "rounds", 3, "how often all sessions change at the same time; the worst round counts")
	flag.IntVar(&o.samples, "samples", 120, "how many urgent changes are made one by one")
	flag.DurationVar(&o.qrInterval, "qr-every", 30*time.Second, "how often a session gets a new QR code")
	flag.DurationVar(&o.qrValid, "qr-valid", 0, "how long a QR code is valid (default: until the next)")
	flag.DurationVar(&o.statusInterval, "status-every", 2*time.Minute, "how often a session changes its status in the steady part, on average")
	flag.StringVar(&o.out, "out", filepath.Join("bench", "results", "delivery.json"), "where to write the result")
	flag.Uint64Var(&o.seed, "seed", 1, "seed of the random times of the events")
	flag.StringVar(&o.side, "side", "", "internal: which side this process is")
	flag.Parse()
	if o.qrValid == 0 {
		o.qrValid = o.qrInterval
	}
	// Longer than a window and a request; longer than the longest window.
	o.betweenSingle, o.betweenRounds = 550*time.Millisecond, 1500*time.Millisecond

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.side != "" {
		return runSide(ctx, o.side)
	}
	return run(ctx, o)
}

// run is the benchmark.
func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "bench-delivery-")
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// Random secrets, as in production.
	token, secret := filepath.Join(dir, "token"), filepath.Join(dir, "secret")
	for _, name := range []string{token, secret} {
		if err := os.WriteFile(name, []byte(uuid.NewString()+uuid.NewString()), 0o600); err != nil {
			return fmt.Errorf("writing a secret: %w", err)
		}
	}
	address, stop, err := benchenv.Redis(ctx, dir)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	redis := goredis.NewClient(&goredis.Options{Addr: address})
	defer func() { err = errors.Join(err, redis.Close()) }()

	base := sideConfig{
		Redis: address, TokenFile: token, SecretFile: secret,
		Sessions: o.sessions, Duration: o.duration, Rounds: o.rounds, Samples: o.samples, Seed: o.seed,
		QRInterval: o.qrInterval, QRValid: o.qrValid, StatusInterval: o.statusInterval,
		BetweenSingle: o.betweenSingle, BetweenRounds: o.betweenRounds,
		Start: time.Now().Add(3 * time.Second), // when both processes have started
	}
	result := figures{o: o}

	fmt.Printf("steady: %d sessions, one QR code per %s, for %s, Laravel answers in %s\n", o.sessions, o.qrInterval, o.duration, o.steadyAnswer)
	before, err := usage(ctx, redis)
	if err != nil {
		return err
	}
	type finished struct {
		part part
		err  error
	}
	old, ours := make(chan finished, 1), make(chan finished, 1)
	for side, done := range map[string]chan finished{"old": old, "ours": ours} {
		c := base
		c.Name, c.Part = side, "steady"
		go func() {
			p, err := measure(ctx, c, o.steadyAnswer)
			done <- finished{p, err}
		}()
	}
	oldDone, oursDone := <-old, <-ours
	if err := errors.Join(oldDone.err, oursDone.err); err != nil {
		return err
	}
	result.old, result.ours = oldDone.part, oursDone.part
	after, err := usage(ctx, redis)
	if err != nil {
		return err
	}
	result.redisCPU, result.redisPeak = after.cpu-before.cpu, after.peak

	fmt.Printf("burst: %d urgent changes at the same time, %d times, Laravel answers in %s\n", o.sessions, o.rounds, o.urgentAnswer)
	c := base
	c.Name, c.Part = "ours", "burst"
	if result.burst, err = measure(ctx, c, o.urgentAnswer); err != nil {
		return err
	}
	fmt.Printf("single: %d urgent changes one by one, Laravel answers in %s\n", o.samples, o.urgentAnswer)
	c.Part = "single"
	if result.single, err = measure(ctx, c, o.urgentAnswer); err != nil {
		return err
	}
	return result.report(os.Stdout)
}
