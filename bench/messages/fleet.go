package main

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/bench/bare"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// workers is how many workers hold the sessions.
	workers = 2
	// phones begins the numbers of the sessions (benchenv.Pair).
	phones = "3461"
	// soon is how long after its end Laravel must have all messages of a step of the part rate,
	// and late how late the 99th percentile may be.
	soon, late = 5 * time.Second, 2 * time.Second
	// firstRate is the first step, and each next one is faster by stepUp.
	firstRate, stepUp = 50.0, 1.4
	// settle is a pause in which nothing happens.
	settle = 5 * time.Second
	// allTimeout bounds the wait for messages that come late.
	allTimeout = 3 * time.Minute
	// databaseAway is how long the database is away in the part refused.
	databaseAway = 10 * time.Second
)

// startFleet starts manager and workers and links all sessions.
func (b *bench) startFleet() (err error) {
	b.laravel.setAway(false)
	b.laravel.setAnswer(delivery.KindMessage, b.answer)
	b.laravel.setAnswer(delivery.KindStatus, b.answer)
	if b.database, err = b.Database(); err != nil {
		return err
	}
	if b.fleet, err = b.NewFleetOver(b.database.URL(), b.sessions); err != nil {
		return err
	}
	if err := b.fleet.StartManager(b.Binary); err != nil {
		return err
	}
	for range workers {
		if err := b.fleet.StartWorker(b.Binary, 1); err != nil {
			return err
		}
	}
	return b.fleet.PairAll()
}

// ledger is the messages that WhatsApp has queued for the sessions since an entry.
func (b *bench) ledger(after int64) (messages []simulator.LedgerEntry, last int64, err error) {
	return b.entries(simulator.LedgerQuery{After: after}, phones)
}

// entries are the messages that a query of the ledger selects, to devices whose numbers begin so.
func (b *bench) entries(q simulator.LedgerQuery, prefix string) (messages []simulator.LedgerEntry, last int64, err error) {
	for {
		page, err := b.fleet.Simulator.Ledger(q)
		if err != nil {
			return nil, 0, fmt.Errorf("reading the ledger: %w", err)
		}
		if len(page) == 0 {
			return messages, q.After, nil
		}
		for _, e := range page {
			if e.Stanza == "message" && e.Kind == simulator.KindText && strings.HasPrefix(e.Device, prefix) {
				messages = append(messages, e)
			}
		}
		q.After = page[len(page)-1].Number
	}
}

// traffic is what became of the messages of a flood.
type traffic struct {
	flood simulator.Flood
	// sent are the messages, missing how many of them Laravel does not have.
	sent    []simulator.LedgerEntry
	missing int
	// latencies are from WhatsApp to Laravel, see the function.
	latencies []time.Duration
	// span is from the first message at WhatsApp to the last at Laravel.
	span time.Duration
}

// latencies are how long messages took from WhatsApp to Laravel, sorted. For a message that has
// not arrived it is its age, so that lost messages do not make a percentile better.
func latencies(sent []simulator.LedgerEntry, arrival func(id string) time.Time, now time.Time) (all []time.Duration, missing int) {
	for _, e := range sent {
		arrived := arrival(e.ID)
		if arrived.IsZero() {
			missing++
			arrived = now
		}
		all = append(all, arrived.Sub(e.Queued))
	}
	slices.Sort(all)
	return all, missing
}

// write makes contacts write, and waits until they have.
func (b *bench) write(request simulator.FloodRequest) (f simulator.Flood, err error) {
	id, err := b.fleet.Simulator.StartFlood(request)
	if err != nil {
		return f, fmt.Errorf("starting a flood: %w", err)
	}
	total := int(request.Rate * request.Seconds)
	limit := time.Duration(request.Seconds*float64(time.Second)) + allTimeout
	err = benchenv.WaitUntil(b.ctx, "messages sent", limit, 50*time.Millisecond, func() (int, int, error) {
		f = b.fleet.Simulator.Floods()[id-1]
		if f.Ended.IsZero() {
			return min(int(f.Sent), total-1), total, nil
		}
		return total, total, nil
	})
	switch {
	case err != nil:
		return f, fmt.Errorf("%w: the simulator was late by %s", err, f.Late)
	case f.Failed > 0:
		return f, fmt.Errorf("%d messages could not be sent: %s", f.Failed, f.Problem)
	default:
		return f, nil
	}
}

// flood makes contacts write, and waits until Laravel has all messages, at most for the time-out
// after the last one.
func (b *bench) flood(request simulator.FloodRequest, timeout time.Duration) (traffic, error) {
	var f simulator.Flood
	t, err := b.observe(timeout, func() (err error) {
		f, err = b.write(request)
		return err
	})
	t.flood = f
	return t, err
}

// observe measures the messages that are sent while send runs.
func (b *bench) observe(timeout time.Duration, send func() error) (t traffic, err error) {
	_, before, err := b.ledger(0)
	if err != nil {
		return t, err
	}
	if err := send(); err != nil {
		return t, err
	}
	if t.sent, _, err = b.ledger(before); err != nil {
		return t, err
	}
	for deadline := time.Now().Add(timeout); ; {
		now := time.Now()
		if t.latencies, t.missing = latencies(t.sent, b.laravel.arrival, now); t.missing == 0 || now.After(deadline) {
			break
		}
		if err := benchenv.Pause(b.ctx, 50*time.Millisecond); err != nil {
			return t, err
		}
	}
	var first, last time.Time
	for _, e := range t.sent {
		if first.IsZero() || e.Queued.Before(first) {
			first = e.Queued
		}
		if arrived := b.laravel.arrival(e.ID); arrived.After(last) {
			last = arrived
		}
	}
	t.span = last.Sub(first)
	return t, nil
}

func (t traffic) ms(p int) float64 { return 1000 * benchenv.Percentile(t.latencies, p) }

// measureRate is the part rate.
func (b *bench) measureRate() error {
	for rate := firstRate; ; rate *= stepUp {
		t, err := b.flood(simulator.FloodRequest{Rate: rate, Seconds: b.seconds / 3}, soon)
		if err != nil {
			return err
		}
		held := t.missing == 0 && t.ms(99) <= 1000*late.Seconds()
		benchenv.Print("%.0f messages per second: p99 %.0f ms, %d of %d have not arrived, the simulator was late by %s", rate, t.ms(99), t.missing, len(t.sent), t.flood.Late.Round(time.Millisecond))
		if !held {
			break
		}
		b.In, b.InLate = float64(len(t.sent))/t.flood.Ended.Sub(t.flood.Started).Seconds(), 1000*t.flood.Late.Seconds()
	}
	return b.quiet()
}

// quiet waits until Laravel has everything, and a little more.
func (b *bench) quiet() error {
	sent, _, err := b.ledger(0)
	if err != nil {
		return err
	}
	err = benchenv.WaitUntil(b.ctx, "messages arrived", allTimeout, 100*time.Millisecond, func() (have, want int, err error) {
		for _, e := range sent {
			if !b.laravel.arrival(e.ID).IsZero() {
				have++
			}
		}
		return have, len(sent), nil
	})
	if err != nil {
		return err
	}
	return benchenv.Pause(b.ctx, settle)
}

// cpu is CPU time by what uses it.
type cpu struct{ workers, manager, database, bare time.Duration }

func (b *bench) spent(bare *benchenv.Process) (c cpu, err error) {
	all, err := benchenv.CPUTimes()
	if err != nil {
		return c, err
	}
	c.database = all["postgres"]
	if c.manager, err = b.fleet.Manager.CPU(); err != nil {
		return c, err
	}
	for _, w := range b.fleet.Workers {
		one, err := w.CPU()
		if err != nil {
			return c, err
		}
		c.workers += one
	}
	if bare != nil {
		c.bare, err = bare.CPU()
	}
	return c, err
}

func (c cpu) minus(before cpu) cpu {
	return cpu{c.workers - before.workers, c.manager - before.manager, c.database - before.database, c.bare - before.bare}
}

// perMessage measures what messages cost, in ms, without what is used when nothing happens.
func (b *bench) perMessage(bare *benchenv.Process, send func() (messages int, err error)) (perMessage func(time.Duration) float64, used cpu, err error) {
	start, err := b.spent(bare)
	if err != nil {
		return nil, used, err
	}
	begun := time.Now()
	if err := benchenv.Pause(b.ctx, 2*settle); err != nil {
		return nil, used, err
	}
	idle, err := b.spent(bare)
	if err != nil {
		return nil, used, err
	}
	idleFor, sending := time.Since(begun), time.Now()
	messages, err := send()
	if err != nil {
		return nil, used, err
	}
	sent, err := b.spent(bare)
	if err != nil {
		return nil, used, err
	}
	used, nothing, share := sent.minus(idle), idle.minus(start), float64(time.Since(sending))/float64(idleFor)
	without := func(with, nothing time.Duration) time.Duration {
		return with - time.Duration(share*float64(nothing))
	}
	used = cpu{without(used.workers, nothing.workers), without(used.manager, nothing.manager), without(used.database, nothing.database), without(used.bare, nothing.bare)}
	return func(d time.Duration) float64 { return 1000 * d.Seconds() / float64(max(1, messages)) }, used, nil
}

const (
	pushSeconds      = "whatsapp_operator_worker_inbox_push_seconds"
	connectionsEnded = "whatsapp_operator_worker_connections_ended_total"
)

// workerMetrics are those of each worker.
func (b *bench) workerMetrics() (all []benchenv.Metrics, err error) {
	for _, w := range b.fleet.Workers {
		m, err := w.Metrics(b.ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

// ended is how many connections of all workers have ended for a reason.
func ended(all []benchenv.Metrics, reason string) (n float64) {
	for _, m := range all {
		n += m.Sum(connectionsEnded, benchenv.Labels{"reason": reason})
	}
	return n
}

// measureLatency is the part latency.
func (b *bench) measureLatency() error {
	if b.In == 0 { // the part rate was not run
		b.In = 2 * firstRate
	}
	b.LatencyRate = b.In / 2
	benchenv.Print("%.0f messages per second", b.LatencyRate)
	before, err := b.workerMetrics()
	if err != nil {
		return err
	}
	var t traffic
	per, used, err := b.perMessage(nil, func() (_ int, err error) {
		t, err = b.flood(simulator.FloodRequest{Rate: b.LatencyRate, Seconds: b.seconds}, allTimeout)
		return len(t.sent), err
	})
	if err != nil {
		return err
	}
	after, err := b.workerMetrics()
	if err != nil {
		return err
	}
	for i, m := range after {
		b.HandOver = max(b.HandOver, 1000*m.Quantile(0.99, pushSeconds, nil, before[i]))
	}
	b.LatencyP50, b.LatencyP99 = t.ms(50), t.ms(99)
	b.CPU, b.WorkerCPU, b.DatabaseCPU = per(used.workers+used.manager), per(used.workers), per(used.database)
	return b.quiet()
}

// measureBare is the part bare.
func (b *bench) measureBare() (err error) {
	benchenv.Print("linking %d bare clients", b.bareSessions)
	url, err := b.bareDatabase()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("looking for this program: %w", err)
	}
	info := b.fleet.Simulator.Info()
	o := bare.Options{Database: url, Endpoint: info.Endpoint, Root: info.NoiseRoot, Control: b.fleet.Simulator.ControlURL(), Pair: b.bareSessions}
	pairing, err := b.Start("bare-pairing", self, nil, o.Args()...)
	if err != nil {
		return err
	}
	if err := pairing.WaitUntilEnded(b.ctx, 10*time.Minute); err != nil {
		return err
	}
	o.Pair = 0
	clients, err := b.Start("bare", self, nil, o.Args()...)
	if err != nil {
		return err
	}
	defer clients.Kill()
	var devices []string
	err = benchenv.WaitUntil(b.ctx, "bare clients connected", time.Minute, 100*time.Millisecond, func() (int, int, error) {
		devices = devices[:0]
		for _, d := range b.fleet.Simulator.Devices() {
			if d.Connected && strings.HasPrefix(d.JID, bare.Phones) {
				devices = append(devices, d.JID)
			}
		}
		return len(devices), b.bareSessions, clients.Running()
	})
	if err != nil {
		return err
	}
	if err := benchenv.Pause(b.ctx, settle); err != nil {
		return err
	}
	rate := b.LatencyRate
	if rate == 0 {
		rate = firstRate
	}
	per, used, err := b.perMessage(clients, func() (int, error) {
		_, before, err := b.ledger(0)
		if err != nil {
			return 0, err
		}
		f, err := b.write(simulator.FloodRequest{Devices: devices, Rate: rate, Seconds: b.seconds})
		if err != nil {
			return 0, err
		}
		return int(f.Sent), b.awaitReceipts(before, int(f.Sent), allTimeout, clients.Running)
	})
	if err != nil {
		return err
	}
	b.BareCPU, b.BareDatabaseCPU = per(used.bare), per(used.database)
	return nil
}

// awaitReceipts waits until the bare clients have acknowledged the messages after an entry of the
// ledger. The sessions' own messages do not count.
func (b *bench) awaitReceipts(after int64, sent int, timeout time.Duration, running func() error) error {
	var waiting []simulator.LedgerEntry
	err := benchenv.WaitUntil(b.ctx, "messages to bare clients acknowledged", timeout, 50*time.Millisecond, func() (_, _ int, err error) {
		waiting, _, err = b.entries(simulator.LedgerQuery{After: after, Waiting: true}, bare.Phones)
		return sent - len(waiting), sent, errors.Join(err, running())
	})
	if err != nil && len(waiting) > 0 {
		e := waiting[0]
		err = fmt.Errorf("%w: the first one that is not is %s to %s, delivered %d times, requested again %d times", err, e.ID, e.Device, e.Delivered, e.Retries)
	}
	return err
}

// bareDatabase makes a database in the server of the fleet.
func (b *bench) bareDatabase() (url string, err error) {
	db, err := sql.Open("pgx", b.database.URL())
	if err != nil {
		return "", fmt.Errorf("opening the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	if _, err := db.ExecContext(b.ctx, "CREATE DATABASE bare"); err != nil {
		return "", fmt.Errorf("making a database: %w", err)
	}
	return strings.Replace(b.database.URL(), "/postgres?", "/bare?", 1), nil
}

// device is the JID of the i-th session's device.
func (b *bench) device(i int) (string, error) {
	phone := fmt.Sprintf("%s%07d", phones, i)
	for _, d := range b.fleet.Simulator.Devices() {
		if strings.HasPrefix(d.JID, phone) {
			return d.JID, nil
		}
	}
	return "", fmt.Errorf("no device of %s is linked", phone)
}

// measureAlone is the part alone.
func (b *bench) measureAlone() error {
	t, err := b.observe(allTimeout, func() error {
		for i := range int(2 * b.seconds) {
			device, err := b.device(i % b.sessions)
			if err != nil {
				return err
			}
			if _, err := b.fleet.Simulator.Send(b.ctx, device, "+15560000000", "Are you open today?"); err != nil {
				return fmt.Errorf("sending a message: %w", err)
			}
			if err := benchenv.Pause(b.ctx, 600*time.Millisecond); err != nil { // longer than a window and a request
				return err
			}
		}
		return nil
	})
	b.AloneP50, b.AloneP99 = t.ms(50), t.ms(99)
	return err
}

// measureOne is the part one.
func (b *bench) measureOne() error {
	device, err := b.device(0)
	if err != nil {
		return err
	}
	t, err := b.flood(simulator.FloodRequest{Devices: []string{device}, Rate: 2000, Seconds: 1, Contacts: 5}, allTimeout)
	if err != nil {
		return err
	}
	b.One = float64(len(t.sent)-t.missing) / t.span.Seconds()
	return b.quiet()
}

// measureNeighbour is the part neighbour.
func (b *bench) measureNeighbour() error {
	flooded, err := b.device(0)
	if err != nil {
		return err
	}
	poisoned, err := b.device(1)
	if err != nil {
		return err
	}
	var others []string
	for i := 2; i < b.sessions; i++ {
		device, err := b.device(i)
		if err != nil {
			return err
		}
		others = append(others, device)
	}
	b.laravel.poison(benchenv.SessionName(1))
	rate := max(200, 1.5*b.One)
	for _, f := range []simulator.FloodRequest{
		{Devices: []string{flooded}, Rate: min(rate, 9000/b.seconds), Seconds: b.seconds, Contacts: 5}, // below the bound of its backlog
		{Devices: []string{poisoned}, Rate: 1, Seconds: b.seconds},
	} {
		if _, err := b.fleet.Simulator.StartFlood(f); err != nil {
			return fmt.Errorf("starting a flood: %w", err)
		}
	}
	neighbours := map[string]bool{}
	for _, jid := range others {
		neighbours[jid] = true
	}
	t, err := b.flood(simulator.FloodRequest{Devices: others, Rate: firstRate, Seconds: b.seconds}, soon)
	if err != nil {
		return err
	}
	sent := slices.DeleteFunc(t.sent, func(e simulator.LedgerEntry) bool { return !neighbours[e.Device] })
	all, missing := latencies(sent, b.laravel.arrival, time.Now())
	if missing > 0 {
		benchenv.Print("%d of %d messages of the others have not arrived", missing, len(sent))
	}
	b.Neighbour = 1000 * benchenv.Percentile(all, 99)
	b.laravel.poison("")
	return b.quiet()
}

// measureRefused is the part refused.
func (b *bench) measureRefused() error {
	logins := map[string]int64{}
	for _, d := range b.fleet.Simulator.Devices() {
		logins[d.JID] = d.Logins
	}
	before, err := b.workerMetrics()
	if err != nil {
		return err
	}
	// Each session gets a message while the database is away.
	seconds := databaseAway.Seconds()
	if _, err := b.fleet.Simulator.StartFlood(simulator.FloodRequest{Rate: float64(b.sessions) / seconds, Seconds: seconds}); err != nil {
		return fmt.Errorf("starting a flood: %w", err)
	}
	b.database.Kill()
	if err := benchenv.Pause(b.ctx, databaseAway); err != nil {
		return err
	}
	if err := b.database.Restart(); err != nil {
		return err
	}
	back := time.Now()
	var waits []time.Duration
	err = benchenv.WaitUntil(b.ctx, "sessions connected", allTimeout, 50*time.Millisecond, func() (connected, want int, err error) {
		waits = waits[:0]
		for _, d := range b.fleet.Simulator.Devices() {
			if !strings.HasPrefix(d.JID, phones) {
				continue
			}
			want++
			if d.Connected {
				connected++
			}
			if d.Logins > logins[d.JID] {
				waits = append(waits, max(0, d.LoggedIn.Sub(back)))
			}
		}
		return connected, want, nil
	})
	if err != nil {
		return err
	}
	slices.Sort(waits)
	b.Refused, b.RefusedBack, b.RefusedBackP50 = len(waits), benchenv.Percentile(waits, 100), benchenv.Percentile(waits, 50)
	after, err := b.workerMetrics()
	if err != nil {
		return err
	}
	b.RefusedKeys = ended(after, session.EndStoreFailed) - ended(before, session.EndStoreFailed)
	b.RefusedInbox = ended(after, session.EndInboxUnavailable) - ended(before, session.EndInboxUnavailable)
	return b.quiet()
}

// judge compares what WhatsApp had with what Laravel has.
func (b *bench) judge() error {
	sent, _, err := b.ledger(0)
	if err != nil {
		return err
	}
	number := map[string]int64{}
	for _, e := range sent {
		number[e.ID] = e.Number
		if b.laravel.arrival(e.ID).IsZero() {
			b.Lost++
		}
	}
	b.Disordered += b.laravel.outOfOrder(number)
	return nil
}
