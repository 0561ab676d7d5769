// Command upgrade checks that an upgrade from an older revision of this project, the way back,
// and the upgrade again need no phone to scan a code, and writes the counts and times.
//
// It builds the older revision from this clone, pairs the sessions with its manager and
// workers, and then does what an administrator does, three times:
//
//	upgrade        the newer CustomResourceDefinition, the newer manager, and the newer
//	               workers one by one
//	rollback       the older manager, and the older workers one by one, with the newer
//	               CustomResourceDefinition and the newer tables
//	upgrade again  as the first time
//
// The API server, Redis, PostgreSQL, the stand-in for Laravel and the WhatsApp simulator
// continue to run. During each step, and after it, a contact writes to all sessions: a
// session whose keys were lost or are out of step could not decrypt the messages.
package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
)

// workers is how many workers hold the sessions.
const workers = 4

// result is what is written, for example bench/results/upgrade.json.
type result struct {
	// From and To are the versions of whatsmeow in the older and the newer program.
	FromRevision string  `json:"from_revision"`
	From         string  `json:"from_whatsmeow"`
	To           string  `json:"to_whatsmeow"`
	Sessions     int     `json:"sessions"`
	Pairing      float64 `json:"pairing_s"`
	Upgrade      step    `json:"upgrade"`
	Rollback     step    `json:"rollback"`
	Again        step    `json:"upgrade_again"`
	Doubled      int64   `json:"doubled"`
	// Lost counts the states that Laravel did not receive.
	Lost int `json:"lost"`
}

// step is what happened in an upgrade or a rollback.
type step struct {
	Seconds  float64 `json:"seconds"`
	GapP50   float64 `json:"gap_p50_s"`
	GapP99   float64 `json:"gap_p99_s"`
	GapMax   float64 `json:"gap_max_s"`
	Moves    float64 `json:"moves_per_session"`
	Scans    int64   `json:"scans"`
	Logouts  int64   `json:"logouts"`
	Codes    int     `json:"sessions_that_showed_a_code"`
	LIDs     int     `json:"sessions_with_lid"`
	Messages int64   `json:"messages"`
	Retries  int64   `json:"messages_encrypted_again"`
	Unread   int     `json:"messages_without_receipt"`
}

type check struct {
	*benchenv.Fleet
	result
	ctx context.Context //nolint:containedctx // a program's one context
	// older is the older program; revision counts the revisions of the workers' Deployment.
	older    string
	revision int
}

func main() {
	var from, out string
	var sessions int
	var keep bool
	flag.StringVar(&from, "from", "", "the older revision: a commit, a tag or a branch of this clone")
	flag.IntVar(&sessions, "sessions", 50, "how many sessions")
	flag.StringVar(&out, "out", "", "where the figures are written; empty: nowhere")
	flag.BoolVar(&keep, "keep", false, "keep the folder with the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, from, sessions, out, keep)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "upgrade:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, from string, sessions int, out string, keep bool) (err error) {
	commit, err := resolve(ctx, ".", from)
	if err != nil {
		return err
	}
	e, err := benchenv.New(ctx, "upgrade", keep)
	defer func() { err = errors.Join(err, e.Close()) }()
	if err != nil {
		return err
	}
	fleet, err := e.NewFleet(sessions)
	if err != nil {
		return err
	}
	// The first worker of a new revision gets most sessions until the others have joined.
	fleet.WorkerFlags = []string{"--drain-timeout=55s"}
	c := &check{Fleet: fleet, ctx: ctx, result: result{FromRevision: commit, Sessions: sessions}}
	parts := []func() error{
		c.buildOlder,
		c.pair,
		func() error { return c.replace("upgrade", c.Binary, "config/crd/bases", &c.Upgrade) },
		func() error { return c.replace("rollback", c.older, "", &c.Rollback) },
		func() error { return c.replace("upgrade again", c.Binary, "config/crd/bases", &c.Again) },
	}
	for _, part := range parts {
		if err := part(); err != nil {
			return err
		}
	}
	c.Doubled, c.Lost = c.Simulator.Stats().Doubled, c.Undelivered
	c.show()
	if out != "" {
		if err := benchenv.Write(out, c.result); err != nil {
			return err
		}
	}
	return errors.Join(c.Failures(), c.failures())
}

// buildOlder builds the older program, and installs its CustomResourceDefinition.
func (c *check) buildOlder() error {
	benchenv.Print("building revision %.12s", c.FromRevision)
	source := filepath.Join(c.Dir, "older")
	if err := extract(c.ctx, ".", c.FromRevision, source); err != nil {
		return err
	}
	c.older = filepath.Join(c.Dir, "whatsapp-operator-older")
	if err := benchenv.Build(c.ctx, source, c.older); err != nil {
		return err
	}
	for program, version := range map[string]*string{c.older: &c.From, c.Binary: &c.To} {
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return fmt.Errorf("reading the versions in a program: %w", err)
		}
		for _, dependency := range info.Deps {
			if dependency.Path == "go.mau.fi/whatsmeow" {
				*version = dependency.Version
			}
		}
	}
	return c.install(filepath.Join(source, "config", "crd", "bases"))
}

// install creates or replaces the CustomResourceDefinition, as kubectl does.
func (c *check) install(folder string) error {
	_, err := envtest.InstallCRDs(c.Config, envtest.CRDInstallOptions{Paths: []string{folder}, ErrorIfPathMissing: true})
	if err != nil {
		return fmt.Errorf("installing the CustomResourceDefinition: %w", err)
	}
	return nil
}

// pair pairs the sessions with the older program.
func (c *check) pair() error {
	begun := time.Now()
	if err := c.StartManager(c.older); err != nil {
		return err
	}
	c.revision = 1
	for range workers {
		if err := c.StartWorker(c.older, c.revision); err != nil {
			return err
		}
	}
	if err := c.PairAll(); err != nil {
		return err
	}
	if err := c.writeToAll(); err != nil {
		return err
	}
	unread, err := c.unread()
	if err != nil {
		return err
	}
	if unread > 0 {
		return fmt.Errorf("%d messages have no receipt before the upgrade", unread)
	}
	c.Pairing = time.Since(begun).Seconds()
	return nil
}

// replace replaces the manager and the workers by those of a program. An empty crd leaves
// the CustomResourceDefinition as it is.
func (c *check) replace(name, program, crd string, s *step) (err error) {
	benchenv.Print("%s: replacing the manager and the %d workers", name, workers)
	codes, err := c.watchCodes()
	if err != nil {
		return err
	}
	before, stats := c.Observe(), c.Simulator.Stats()
	if crd != "" {
		if err := c.install(crd); err != nil {
			return err
		}
	}
	c.Manager.Terminate()
	if err := c.Manager.WaitUntilEnded(c.ctx, time.Minute); err != nil {
		return err
	}
	if err := c.StartManager(program); err != nil {
		return err
	}
	c.revision++ // a rollback of a Deployment is a new revision, too
	stopWriting := c.writeMeanwhile()
	err = c.RollWorkers(program, c.revision)
	if err := errors.Join(err, stopWriting()); err != nil {
		return err
	}
	change, err := c.WaitUntilBack(before, true)
	if err != nil {
		return err
	}
	s.Seconds = time.Since(before.At).Seconds()
	s.GapP50, s.GapP99, s.GapMax = benchenv.Percentile(change.Gaps, 50), benchenv.Percentile(change.Gaps, 99), benchenv.Percentile(change.Gaps, 100)
	s.Moves = float64(change.Moves) / float64(c.Sessions)
	if err := c.WaitUntilDelivered(); err != nil {
		return err
	}
	if err := c.writeToAll(); err != nil {
		return err
	}
	if s.Unread, err = c.unread(); err != nil {
		return err
	}
	now := c.Simulator.Stats()
	s.Scans, s.Logouts = now.Pairings-stats.Pairings, now.Logouts-stats.Logouts
	s.Messages, s.Retries = now.Sent-stats.Sent, now.Retries-stats.Retries
	if s.LIDs, err = c.countLIDs(); err != nil {
		return err
	}
	s.Codes, err = codes()
	return err
}

// watchCodes watches the sessions. The returned function ends the watch, and returns how many
// sessions needed a scan at any time.
func (c *check) watchCodes() (stop func() (int, error), err error) {
	// An informer, because the API server ends all watches when the definition is replaced.
	informers, err := cache.New(c.Config, cache.Options{
		Scheme: c.Client.Scheme(), DefaultNamespaces: map[string]cache.Config{benchenv.Namespace: {}},
	})
	if err != nil {
		return nil, fmt.Errorf("watching the sessions: %w", err)
	}
	informer, err := informers.GetInformer(c.ctx, &v1alpha1.WhatsAppSession{}, cache.BlockUntilSynced(false))
	if err != nil {
		return nil, fmt.Errorf("watching the sessions: %w", err)
	}
	var mu sync.Mutex
	showed := map[string]bool{}
	record := func(object any) {
		if s, isSession := object.(*v1alpha1.WhatsAppSession); isSession && scanNeeded(s.Status) {
			mu.Lock()
			defer mu.Unlock()
			showed[s.Name] = true
		}
	}
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc: record, UpdateFunc: func(_, now any) { record(now) }, DeleteFunc: record,
	})
	if err != nil {
		return nil, fmt.Errorf("watching the sessions: %w", err)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	ended := make(chan error, 1)
	go func() { ended <- informers.Start(ctx) }()
	if !informers.WaitForCacheSync(ctx) {
		cancel()
		return nil, errors.Join(errors.New("the watch on the sessions does not start"), <-ended)
	}
	return func() (int, error) {
		cancel()
		if err := <-ended; err != nil {
			return 0, fmt.Errorf("watching the sessions: %w", err)
		}
		sessions, err := c.List() // the informer may not have the last changes
		for i := range sessions {
			record(&sessions[i])
		}
		return len(showed), err
	}, nil
}

// scanNeeded reports whether a person must link the phone of a session.
func scanNeeded(s v1alpha1.WhatsAppSessionStatus) bool {
	switch s.Phase {
	case v1alpha1.PhasePairing, v1alpha1.PhasePairingExpired, v1alpha1.PhaseLoggedOut:
		return true
	}
	return s.QR != nil || s.PairingCode != ""
}

// countLIDs counts the sessions whose LID is reported. A wrong one is an error.
func (c *check) countLIDs() (n int, err error) {
	sessions, err := c.List()
	if err != nil {
		return 0, err
	}
	lids := map[string]string{}
	for _, d := range c.Simulator.Devices() {
		lids[d.JID] = d.LID
	}
	for i := range sessions {
		s := sessions[i].Status
		switch s.LID {
		case "":
		case lids[s.JID]:
			n++
		default:
			return 0, fmt.Errorf("session %s reports the LID %s; the one of its device is %s", sessions[i].Name, s.LID, lids[s.JID])
		}
	}
	return n, nil
}

// show prints the figures.
func (r result) show() {
	fmt.Printf("\n%d sessions, PostgreSQL, from %s to %s\n\n", r.Sessions, r.From, r.To)
	fmt.Printf("%-40s %14s %14s %14s\n", "", "upgrade", "rollback", "upgrade again")
	row := func(name, format string, value func(step) any) {
		fmt.Printf("%-40s", name)
		for _, s := range []step{r.Upgrade, r.Rollback, r.Again} {
			fmt.Printf(" %14s", fmt.Sprintf(format, value(s)))
		}
		fmt.Println()
	}
	row("all connected after, s", "%.1f", func(s step) any { return s.Seconds })
	row("gap p50, s", "%.2f", func(s step) any { return s.GapP50 })
	row("gap p99, s", "%.2f", func(s step) any { return s.GapP99 })
	row("gap max, s", "%.2f", func(s step) any { return s.GapMax })
	row("moves per session", "%.3f", func(s step) any { return s.Moves })
	row("scans", "%d", func(s step) any { return s.Scans })
	row("logouts", "%d", func(s step) any { return s.Logouts })
	row("sessions that showed a code", "%d", func(s step) any { return s.Codes })
	row("sessions with a LID in the status", "%d", func(s step) any { return s.LIDs })
	row("messages to them", "%d", func(s step) any { return s.Messages })
	row("  encrypted again, on request", "%d", func(s step) any { return s.Retries })
	row("  without a receipt", "%d", func(s step) any { return s.Unread })
	fmt.Printf("%-40s %14d\n", "doubled connections", r.Doubled)
	fmt.Printf("%-40s %14d\n", "states lost at Laravel", r.Lost)
}

// failures returns an error for each count that must be another.
func (r result) failures() error {
	var errs []error
	for _, s := range []struct {
		name string
		step
	}{{"upgrade", r.Upgrade}, {"rollback", r.Rollback}, {"upgrade again", r.Again}} {
		for _, must := range []struct {
			what    string
			is, be  int64
			ignored bool
		}{
			{what: "scans", is: s.Scans},
			{what: "logouts", is: s.Logouts},
			{what: "sessions that showed a code", is: int64(s.Codes)},
			{what: "messages without a receipt", is: int64(s.Unread)},
			{what: "messages that had to be encrypted again", is: s.Retries},
			// The older program may report none.
			{what: "sessions with a LID in the status", is: int64(s.LIDs), be: int64(r.Sessions), ignored: s.name == "rollback"},
		} {
			if must.is != must.be && !must.ignored {
				errs = append(errs, fmt.Errorf("%s: %d %s, not %d", s.name, must.is, must.what, must.be))
			}
		}
	}
	return errors.Join(errs...)
}
