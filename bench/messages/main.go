// Command messages measures how messages reach Laravel, and writes bench/results/messages.json.
//
// Manager and workers are processes of the program as it is shipped, with their own API server,
// Redis and PostgreSQL, which waits for its disk at each commit. This process contains the
// WhatsApp simulator and the stand-in for Laravel, which record when each message was sent and
// when it arrived. All of them share the machine. The parts, in this order:
//
//	backlog    100,000 messages are stored while Laravel is away, for ten minutes more; then it
//	           answers in 100 ms. They are pushed by this process, without WhatsApp, as fast as the
//	           database takes them.
//	rate       contacts write to all sessions, faster and faster, as long as Laravel receives each
//	           message soon
//	latency    they write half as fast
//	bare       they write to bare clients, as fast and with the same database server
//	alone      one message at a time
//	one        2,000 messages to one session at once
//	neighbour  one session gets messages faster than it can take them, and Laravel fails at those
//	           of another one: the messages of all others
//	refused    PostgreSQL crashes while messages come, and is back after ten seconds
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/bench/bare"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
)

// result is bench/results/messages.json.
type result struct {
	Sessions int `json:"sessions"`
	// Waiting is how many messages wait in the part backlog, Drain how many of them Laravel then
	// accepts in a second, from the first to the last.
	Waiting int     `json:"backlog"`
	Drain   float64 `json:"drain_per_s"`
	// Resumed is the time from Laravel's return to the first message that it accepts.
	Resumed float64 `json:"drain_resumed_after_s"`
	// StatusHigh is from an urgent change, made while the backlog is drained, to its arrival.
	StatusHigh    float64 `json:"status_high_p99_ms_in_backlog"`
	StatusSamples int     `json:"status_high_samples_in_backlog"`
	// ManagerRSS is the manager's highest memory while 100,000 messages wait and are drained.
	ManagerRSS float64 `json:"manager_rss_mb_backlog_100000"`
	// BytesPerMessage are those of the tables and indexes of the database, divided by the
	// messages that wait; BytesAfter are those of all of them together when all are delivered.
	BytesPerMessage float64 `json:"bytes_per_waiting_message"`
	PayloadBytes    float64 `json:"payload_bytes_per_message"`
	BytesAfter      int64   `json:"database_bytes_after_all_is_delivered"`
	// PushPerSecond is how fast this process stored them.
	PushPerSecond float64 `json:"backlog_pushed_per_s"`
	// In is the highest rate at which all sessions together got messages, InLate by how much the
	// simulator was late then: if that is much, the simulator was the limit.
	In     float64 `json:"in_per_s"`
	InLate float64 `json:"in_simulator_late_ms"`
	// LatencyRate is half of it; from the time when WhatsApp has a message to Laravel.
	LatencyRate float64 `json:"latency_in_per_s"`
	LatencyP50  float64 `json:"latency_p50_ms"`
	LatencyP99  float64 `json:"latency_p99_ms"`
	// CPU is that of workers and manager together in the part latency, without what they need
	// when nothing happens. BareCPU is that of the bare clients.
	CPU             float64 `json:"cpu_ms_per_message"`
	WorkerCPU       float64 `json:"worker_cpu_ms_per_message"`
	DatabaseCPU     float64 `json:"database_cpu_ms_per_message"`
	BareCPU         float64 `json:"bare_cpu_ms_per_message"`
	BareDatabaseCPU float64 `json:"bare_database_cpu_ms_per_message"`
	// HandOver is how long WhatsApp's client waits until a message is stored, in the part latency.
	HandOver  float64 `json:"hand_over_p99_ms"`
	AloneP50  float64 `json:"alone_p50_ms"`
	AloneP99  float64 `json:"alone_p99_ms"`
	One       float64 `json:"one_session_in_per_s"`
	Neighbour float64 `json:"neighbour_latency_p99_ms"`
	// RefusedBack is from the time when the database is back until the last session is connected
	// whose connection ended because of it, RefusedBackP50 until half of them are. Refused is how
	// many there were. RefusedKeys ended because keys could not be read, RefusedInbox because a
	// message could not be stored; their workers connect both again.
	RefusedBack    float64 `json:"refused_back_last_s"`
	RefusedBackP50 float64 `json:"refused_back_p50_s"`
	Refused        int     `json:"refused_sessions"`
	RefusedKeys    float64 `json:"refused_connections_store_failed"`
	RefusedInbox   float64 `json:"refused_connections_inbox_unavailable"`
	Lost           int     `json:"lost"`
	Doubled        int     `json:"doubled"`
	Disordered     int     `json:"disordered"`
}

// options are the flags.
type options struct {
	sessions, backlog int
	away, slowAnswer  time.Duration
	answer            time.Duration
	bareSessions      int
	seconds           float64
	parts, out        string
	keep              bool
}

const allParts = "backlog,rate,latency,bare,alone,one,neighbour,refused"

func main() {
	var o options
	flag.IntVar(&o.sessions, "sessions", 1000, "how many sessions")
	flag.IntVar(&o.backlog, "backlog", 100_000, "how many messages wait in the part backlog")
	flag.DurationVar(&o.away, "away", 10*time.Minute, "how long Laravel stays away when they are stored")
	flag.DurationVar(&o.slowAnswer, "slow-answer", 100*time.Millisecond, "how long Laravel takes for a request in the part backlog")
	flag.DurationVar(&o.answer, "answer", 50*time.Millisecond, "how long Laravel takes for a request in the other parts")
	flag.IntVar(&o.bareSessions, "bare-sessions", 200, "how many bare clients")
	flag.Float64Var(&o.seconds, "seconds", 30, "how long contacts write in each part; a step of the part rate takes a third of it")
	clients := bare.Flags(flag.CommandLine)
	flag.StringVar(&o.parts, "parts", allParts, "which parts")
	flag.StringVar(&o.out, "out", "bench/results/messages.json", "where the figures are written")
	flag.BoolVar(&o.keep, "keep", false, "keep the folder with the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if clients.Database != "" {
		err = bare.Run(ctx, *clients)
	} else {
		err = run(ctx, o)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench messages:", err)
		os.Exit(1)
	}
}

type bench struct {
	*benchenv.Environment
	options
	result
	ctx     context.Context //nolint:containedctx // a program's one context
	laravel *recorder
	// fleet is nil until a part needs it, and database is its server.
	fleet    *benchenv.Fleet
	database *benchenv.Database
}

func run(ctx context.Context, o options) (err error) {
	s, err := benchenv.New(ctx, "messages", o.keep)
	defer func() { err = errors.Join(err, s.Close()) }()
	if err != nil {
		return err
	}
	b := &bench{Environment: s, options: o, ctx: ctx, laravel: newRecorder(), result: result{Sessions: o.sessions, Waiting: o.backlog}}
	s.Laravel.AnswerWith(b.laravel.answer)
	known := map[string]func() error{
		"backlog": b.measureBacklog, "rate": b.measureRate, "latency": b.measureLatency, "bare": b.measureBare, "alone": b.measureAlone,
		"one": b.measureOne, "neighbour": b.measureNeighbour, "refused": b.measureRefused,
	}
	for name := range strings.SplitSeq(o.parts, ",") {
		if known[name] == nil {
			return fmt.Errorf("there is no part %q", name)
		}
		if name != "backlog" && b.fleet == nil {
			if err := b.startFleet(); err != nil {
				return err
			}
		}
		if err := known[name](); err != nil {
			return fmt.Errorf("the part %s: %w", name, err)
		}
	}
	if b.fleet != nil {
		if err := b.judge(); err != nil {
			return err
		}
	}
	b.Doubled += b.laravel.doubledMessages()
	breaches := s.Laravel.Breaches()
	b.Disordered += len(breaches)
	for _, breach := range breaches[:min(len(breaches), 5)] {
		benchenv.Print("a breach of the contract: %s", breach)
	}
	if err := b.show(); err != nil {
		return err
	}
	if o.parts == allParts { // figures that were not measured are not written
		return benchenv.Write(o.out, b.result)
	}
	return nil
}

// show prints the figures for people, and then under the names that they have in the file.
func (b *bench) show() error {
	fmt.Printf("\n%d sessions, PostgreSQL\n\n", b.Sessions)
	row := func(name, format string, value float64, target string) {
		fmt.Printf("%-64s %12s  %s\n", name, fmt.Sprintf(format, value), target)
	}
	row(fmt.Sprintf("a backlog of %d messages, Laravel answers in %s: messages per second", b.Waiting, b.slowAnswer), "%.0f", b.Drain, "≥ 10000")
	row("  from Laravel's return to the first message, s", "%.1f", b.Resumed, "")
	row(fmt.Sprintf("  an urgent status meanwhile, p99 ms (%d)", b.StatusSamples), "%.0f", b.StatusHigh, "≤ 500")
	row("  the manager's highest memory, MB", "%.0f", b.ManagerRSS, "")
	row("  the database's bytes of a waiting message", "%.0f", b.BytesPerMessage, "")
	row("  its payload", "%.0f", b.PayloadBytes, "")
	row("  the database's bytes when all are delivered", "%.0f", float64(b.BytesAfter), "")
	row("  stored per second", "%.0f", b.PushPerSecond, "")
	row("the highest rate of messages to all sessions, per second", "%.0f", b.In, "")
	row("  the simulator was late by, ms", "%.0f", b.InLate, "")
	row("at half of it: from WhatsApp to Laravel, p50 ms", "%.0f", b.LatencyP50, "")
	row("  p99 ms", "%.0f", b.LatencyP99, "≤ 500")
	row("  CPU of workers and manager for a message, ms", "%.2f", b.CPU, "≤ 2 × the bare client's")
	row("  of the workers alone", "%.2f", b.WorkerCPU, "")
	row("  of a bare client", "%.2f", b.BareCPU, "")
	row("  of the database", "%.2f", b.DatabaseCPU, "")
	row("  of the database with a bare client", "%.2f", b.BareDatabaseCPU, "")
	row("  until a message is stored, p99 ms", "%.1f", b.HandOver, "")
	row("one message alone, p50 ms", "%.0f", b.AloneP50, "")
	row("  p99 ms", "%.0f", b.AloneP99, "≤ 60")
	row("one session alone, messages per second", "%.0f", b.One, "≥ 100")
	row("beside one flooded and one poisoned session, p99 ms", "%.0f", b.Neighbour, "")
	row(fmt.Sprintf("the database is back: the last of %d sessions is, s", b.Refused), "%.1f", b.RefusedBack, "")
	row("  half of them, s", "%.1f", b.RefusedBackP50, "")
	row("  connections that ended because keys could not be read", "%.0f", b.RefusedKeys, "")
	row("  and because a message could not be stored", "%.0f", b.RefusedInbox, "")
	row("messages that were lost", "%.0f", float64(b.Lost), "0")
	row("  that came twice", "%.0f", float64(b.Doubled), "0")
	row("  that came out of order", "%.0f", float64(b.Disordered), "0")
	content, err := json.MarshalIndent(b.result, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the figures: %w", err)
	}
	fmt.Printf("\n%s\n", content)
	return nil
}
