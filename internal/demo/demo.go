// Package demo runs the whole product on one machine, for a person who wants to
// see it work before installing anything: `make demo`.
//
// It starts a Kubernetes API server with etcd, Redis (embedded), the WhatsApp
// simulator, and a stand-in for Laravel, and then, as child processes of the same
// binary, one manager and two workers on a SQLite file. It applies sessions,
// draws their QR codes, scans them as a simulated phone, writes to each session as a
// contact, and shows the sessions, the messages that reach Laravel, and how many
// requests to Laravel were saved. When it ends, it leaves no process and no file.
//
// # The parts
//
//   - demo.go: options, and the run from start to end.
//   - cluster.go: the API server and the sessions in it.
//   - laravel.go: the stand-in for Laravel that the tests use as well, with lines of
//     text for each request.
//   - phones.go: which phone scans which code, and when; the contact.
//   - table.go: the text for the person, as pure functions; screen.go writes it to a
//     terminal or a log.
package demo

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/process"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// Simulated is the value of [Options.WhatsApp] for the built-in simulator.
	Simulated = "simulated"
	// Real is the value of [Options.WhatsApp] for WhatsApp's own servers.
	Real = "real"

	namespace = "default"
	workers   = 2
	// maxDrawn is the highest number of sessions whose QR codes are drawn: a code is 35 lines high.
	maxDrawn = 4
	// maxSessions is how many sessions a laptop can run.
	maxSessions = 5000
	// interval is how often the screen is drawn and the end condition is checked.
	interval = 250 * time.Millisecond
)

// Options say what the demo runs.
type Options struct {
	// Sessions to apply, 1 to 5000.
	Sessions int
	// Exit ends the demo once every session is Connected and Laravel has every
	// last state and, with simulated phones, a message of each session; without
	// it the demo runs until it is interrupted.
	Exit bool
	// WhatsApp is Simulated (default) or Real: the real servers, where a person
	// scans the codes with a real phone.
	WhatsApp string
	// Redis is the address (host:port) of a Redis to use; empty: an embedded one.
	Redis string
	// Timeout bounds the run when Exit is set.
	Timeout time.Duration
	// ScanAfter is how long a code is shown before the simulated phone scans it.
	ScanAfter time.Duration
	// Passkey: WhatsApp asks each account for its passkey after the scan.
	Passkey bool
	// Assets is the folder with etcd and kube-apiserver; default: $KUBEBUILDER_ASSETS.
	Assets string
	// Out is where the output goes; default: standard output.
	Out *os.File
}

// Defaults are the options of `make demo` without ARGS.
func Defaults() Options {
	return Options{Sessions: 3, WhatsApp: Simulated, Timeout: 5 * time.Minute, ScanAfter: 4 * time.Second}
}

// Validate returns all faults of the options, joined in one error.
func (o Options) Validate() error {
	var problems []error
	if o.Sessions < 1 || o.Sessions > maxSessions {
		problems = append(problems, fmt.Errorf("--sessions must be between 1 and %d", maxSessions))
	}
	if o.WhatsApp != Simulated && o.WhatsApp != Real {
		problems = append(problems, fmt.Errorf("--whatsapp must be %s or %s", Simulated, Real))
	}
	if o.Passkey && o.WhatsApp == Real {
		problems = append(problems, errors.New("--passkey needs --whatsapp=simulated: the real WhatsApp decides which accounts it asks"))
	}
	if o.Timeout <= 0 {
		problems = append(problems, errors.New("--timeout must be positive"))
	}
	if o.ScanAfter < 0 {
		problems = append(problems, errors.New("--scan-after must not be negative"))
	}
	if o.Assets == "" {
		problems = append(problems, errors.New("KUBEBUILDER_ASSETS is not set: use `make demo`, or set it to the folder that hack/envtest-assets prints"))
	}
	return errors.Join(problems...)
}

// Run runs the demo until ctx or the process is interrupted (then it returns
// nil), until it is done (Exit), or until something fails. It returns when
// everything that it started has ended.
func Run(ctx context.Context, o Options) (err error) {
	if o.Assets == "" {
		o.Assets = os.Getenv("KUBEBUILDER_ASSETS")
	}
	if o.Out == nil {
		o.Out = os.Stdout
	}
	if err := o.Validate(); err != nil {
		return err
	}
	// A closed terminal is an interruption too: no process and no file may remain.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The libraries' own logs would disturb the table; the children's logs are in files.
	ctrllog.SetLogger(logr.Discard())
	klog.SetLogger(logr.Discard())

	dir, err := os.MkdirTemp("", "whatsapp-operator-demo-")
	if err != nil {
		return fmt.Errorf("making a temporary folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	screen := newScreen(o.Out)
	d := &demo{Options: o, dir: dir, screen: screen, started: time.Now()}
	defer func() {
		screen.close()
		err = errors.Join(err, d.stop())
	}()
	if err = d.start(ctx); err == nil {
		err = d.watch(ctx)
	}
	if ctx.Err() != nil { // an interruption is the normal end of a demo
		screen.println("Stopping everything …")
		return nil
	}
	if err != nil {
		d.printLogs()
	}
	return err
}

// stopTimeout is how long a child may take to end before it is killed.
const stopTimeout = 10 * time.Second

// child is a process of this same program.
type child struct {
	*process.Process
	log string // path
}

// demo is one run. Its fields are set by start and read afterwards.
type demo struct {
	Options
	dir     string
	screen  *screen
	started time.Time

	cluster  *cluster
	laravel  *laraveltest.Receiver
	phones   *phones // nil with the real servers
	children []child
	// closers stop what start has started; the last one is called first.
	closers []func() error
}

// start starts everything, each part after those that it needs.
func (d *demo) start(ctx context.Context) error {
	d.screen.println("Starting a Kubernetes API server, Redis, " + map[string]string{
		Simulated: "a WhatsApp simulator", Real: "a connection to WhatsApp"}[d.WhatsApp] + ", a stand-in for Laravel, a manager and " + fmt.Sprint(workers) + " workers …")
	var err error
	if d.cluster, err = startCluster(d.Assets, d.dir); err != nil {
		return err
	}
	d.closers = append(d.closers, d.cluster.stop)
	if err := ctx.Err(); err != nil {
		return err
	}

	redis, prefix := d.Redis, ""
	if redis == "" {
		if redis, err = d.startRedis(); err != nil {
			return err
		}
	} else {
		// Each demo is a separate installation, and leaves nothing in a Redis that continues to run.
		prefix = "demo-" + strings.ToLower(rand.Text()) + ":"
		d.closers = append(d.closers, func() error { return clearRedis(redis, prefix) })
	}
	flags := []string{
		"--kubeconfig=" + d.cluster.kubeconfig, "--namespace=" + namespace,
		"--redis=" + redis, "--redis-key-prefix=" + prefix, "--allow-volatile-redis", "--store=sqlite:" + filepath.Join(d.dir, "keys.db"),
		"--metrics-bind-address=127.0.0.1:0", "--health-bind-address=127.0.0.1:0",
	}

	secrets, err := d.startLaravel()
	if err != nil {
		return err
	}
	toWhatsApp, err := d.startWhatsApp(ctx)
	if err != nil {
		return err
	}

	if err := d.spawn("manager", slices.Concat([]string{"manager", "--leader-elect=false", "--metrics-secure=false"}, flags, secrets)...); err != nil {
		return err
	}
	for i := 1; i <= workers; i++ {
		name := fmt.Sprintf("worker-%d", i)
		state := filepath.Join(d.dir, name)
		if err := os.Mkdir(state, 0o700); err != nil {
			return fmt.Errorf("making the state folder of %s: %w", name, err)
		}
		own := []string{
			"worker", "--name=" + name, "--state-dir=" + state,
			"--pool=" + v1alpha1.DefaultPool, fmt.Sprintf("--capacity=%d", d.Sessions),
		}
		if err := d.spawn(name, slices.Concat(own, flags, toWhatsApp)...); err != nil {
			return err
		}
	}
	if err := d.cluster.watch(ctx); err != nil {
		return err
	}
	if err := d.cluster.apply(ctx, d.Sessions); err != nil {
		return err
	}
	d.screen.println(d.introduction()...)
	return nil
}

// startRedis starts an embedded Redis, which keeps nothing on disk.
func (d *demo) startRedis() (address string, err error) {
	server := miniredis.NewMiniRedis()
	if err := server.Start(); err != nil {
		return "", fmt.Errorf("starting the embedded Redis: %w", err)
	}
	// Keys in miniredis expire only when FastForward is called.
	done := make(chan struct{})
	ticker := time.NewTicker(time.Second)
	go func() {
		last := time.Now()
		for {
			select {
			case now := <-ticker.C:
				server.FastForward(now.Sub(last))
				last = now
			case <-done:
				return
			}
		}
	}()
	d.closers = append(d.closers, func() error {
		ticker.Stop()
		close(done)
		server.Close()
		return nil
	})
	return server.Addr(), nil
}

// startLaravel starts the stand-in and returns the flags that connect a manager to it.
func (d *demo) startLaravel() ([]string, error) {
	receiver, err := newLaravel(d.screen.println)
	if err != nil {
		return nil, err
	}
	d.laravel = receiver
	d.closers = append(d.closers, receiver.Close)
	return receiver.Flags(d.dir)
}

// startWhatsApp starts the simulator and returns the flags that connect a worker to it; with
// the real servers it does nothing.
func (d *demo) startWhatsApp(ctx context.Context) ([]string, error) {
	if d.WhatsApp == Real {
		return nil, nil
	}
	server, err := simulator.New(simulator.Options{})
	if err != nil {
		return nil, fmt.Errorf("starting the simulator: %w", err)
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var group errgroup.Group
	group.Go(func() error { return server.Run(running) })
	d.closers = append(d.closers, func() error {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			return fmt.Errorf("running the simulator: %w", err)
		}
		return nil
	})
	if d.Passkey {
		if _, err := server.Inject(simulator.Fault{Kind: simulator.FaultPasskey}); err != nil {
			return nil, fmt.Errorf("making the accounts ask for their passkeys: %w", err)
		}
	}
	d.phones = newPhones(server, d.ScanAfter, d.givePasskey)
	d.closers = append(d.closers, d.phones.close)
	info := server.Info()
	return []string{"--whatsapp-endpoint=" + info.Endpoint, "--whatsapp-noise-root=" + info.NoiseRoot}, nil
}

// spawn starts a child of this binary; its log is a file of the temporary folder.
func (d *demo) spawn(name string, args ...string) error {
	log, err := os.Create(filepath.Join(d.dir, name+".log"))
	if err != nil {
		return fmt.Errorf("making the log of %s: %w", name, err)
	}
	defer log.Close() // the child has its own descriptor
	p, err := process.Start(process.Options{Name: name, Args: args, Output: log})
	if err != nil {
		return err
	}
	d.children = append(d.children, child{Process: p, log: log.Name()})
	d.closers = append(d.closers, func() error {
		_ = p.Stop(stopTimeout) // its error is ignored: a child that was killed has ended too
		return nil
	})
	return nil
}

// watch draws the screen and checks the end condition until the demo is done, interrupted or failed.
func (d *demo) watch(ctx context.Context) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	timeout := make(<-chan time.Time)
	if d.Exit {
		timer := time.NewTimer(d.Timeout)
		defer timer.Stop()
		timeout = timer.C
	}
	drawn := map[string]string{}
	for {
		v := d.view()
		d.drawCodes(v, drawn)
		d.screen.show(v)
		if d.phones != nil {
			d.phones.scan(ctx, v.sessions)
			d.phones.write(ctx, v.sessions)
		}
		missing := missing(v)
		if d.Exit && len(missing) == 0 {
			d.screen.println(summary(v, time.Since(d.started)))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return fmt.Errorf("not done after %s:\n  %s", d.Timeout, strings.Join(missing, "\n  "))
		case <-ticker.C:
		}
		for _, c := range d.children {
			if err := c.Running(); err != nil {
				return err
			}
		}
	}
}

// givePasskey does what a person does with the answer of a passkey, and prints the steps.
func (d *demo) givePasskey(ctx context.Context, s *v1alpha1.WhatsAppSession, answer string) {
	base := s.DeepCopy()
	metav1.SetMetaDataAnnotation(&s.ObjectMeta, v1alpha1.PasskeyResponseAnnotation, answer)
	d.screen.println(
		"",
		"WhatsApp asks for the passkey of the phone that scanned "+s.Name+": status.passkey.requestOptions has the request.",
		"A browser on https://web.whatsapp.com asks the passkey; here the simulated phone answers. Then:",
		"  "+d.cluster.kubectl()+" annotate wa "+s.Name+" "+v1alpha1.PasskeyResponseAnnotation+"='"+answer[:min(len(answer), 40)]+"…'",
	)
	if err := d.cluster.client.Patch(ctx, s, client.MergeFrom(base)); err != nil {
		d.screen.println("The answer could not be given: " + err.Error())
	}
}

func (d *demo) view() view {
	sessions, events := d.cluster.sessions()
	laravel := laravelState{Status: d.laravel.Statuses(), Requests: d.laravel.Count(), Messages: d.laravel.CountMessages(), HasMessage: map[string]bool{}}
	for i := range sessions {
		name := sessions[i].SessionID()
		laravel.HasMessage[name] = len(d.laravel.Messages(name)) > 0
	}
	return view{sessions: sessions, events: events, laravel: laravel, total: d.Sessions, messages: d.phones != nil}
}

// drawCodes draws each session's first code; with the real servers every code, because a person scans them.
func (d *demo) drawCodes(v view, drawn map[string]string) {
	if d.Sessions > maxDrawn {
		return
	}
	for i := range v.sessions {
		s := &v.sessions[i]
		qr := s.Status.QR
		if qr == nil || drawn[s.Name] == qr.Code || (drawn[s.Name] != "" && d.WhatsApp == Simulated) {
			continue
		}
		drawn[s.Name] = qr.Code
		d.screen.println(codeLines(s)...)
	}
}

// introduction prints the addresses and commands to use, once everything runs.
func (d *demo) introduction() []string {
	lines := []string{
		"",
		"To watch the sessions in another terminal:",
		"  export KUBECONFIG=" + d.cluster.kubeconfig,
		"  " + d.cluster.kubectl() + " get wa --watch",
	}
	if d.WhatsApp == Real {
		lines = append(lines, "", "These are WhatsApp's real servers: scan with a phone (Settings, Linked devices, Link a device).")
	}
	return append(lines, "")
}

// printLogs shows the end of each child's log, for a demo that failed.
func (d *demo) printLogs() {
	for _, c := range d.children {
		if lines := process.Tail(c.log, 20); len(lines) > 0 {
			d.screen.println("", "--- the end of the log of "+c.Name)
			d.screen.println(lines...)
		}
	}
}

// stop stops everything, in reverse order, and returns the errors.
func (d *demo) stop() error {
	var problems []error
	for _, closer := range slices.Backward(d.closers) {
		if err := closer(); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// randomText is a secret of 32 random bytes in base64.
func randomText() string {
	b := make([]byte, 32)
	_, _ = io.ReadFull(rand.Reader, b) // never fails
	return base64.StdEncoding.EncodeToString(b)
}
