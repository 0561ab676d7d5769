// Package benchenv is the environment for benchmarks of whole processes: a Kubernetes API
// server, Redis, PostgreSQL, a stand-in for Laravel, and the newly built program itself,
// each in its own process. The figures come from the kernel's statistics of a process and
// from the metrics of the API server and of the program.
package benchenv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Namespace is the operator's namespace; a session may be in any namespace.
const Namespace = "default"

// Environment is everything around the processes of the program.
type Environment struct {
	// Dir is for the logs and the state of the processes; Binary is the program.
	Dir, Binary string
	// Kubeconfig is the path of an administrator's kubeconfig.
	Kubeconfig string
	Config     *rest.Config
	Client     client.WithWatch
	// Redis is the host:port of Redis.
	Redis   string
	Laravel *laraveltest.Receiver

	ctx    context.Context //nolint:containedctx // a program's one context
	server program
	ends   []func() error
}

// New starts the servers and builds the program. The environment must be closed, even after
// an error. With keep the folder with the logs is kept.
func New(ctx context.Context, name string, keep bool) (e *Environment, err error) {
	ctrllog.SetLogger(logr.Discard()) // the processes print their own
	e = &Environment{ctx: ctx}
	if e.Dir, err = os.MkdirTemp("", "bench-"+name+"-"); err != nil {
		return e, fmt.Errorf("making a folder: %w", err)
	}
	if keep {
		Print("logs are in %s", e.Dir)
	} else {
		e.ends = append(e.ends, func() error { return os.RemoveAll(e.Dir) })
	}
	e.server = program{ctx: ctx, dir: e.Dir, environment: e}
	Print("building the program as in the image")
	e.Binary = filepath.Join(e.Dir, "whatsapp-operator")
	if err := Build(ctx, ".", e.Binary); err != nil {
		return e, err
	}
	Print("starting an API server, Redis, and a stand-in for Laravel")
	if err := e.startAPIServer(); err != nil {
		return e, err
	}
	if err := e.server.run(func(t testing.TB) { e.Redis = testenv.Redis(t) }); err != nil {
		return e, err
	}
	if e.Laravel, err = newLaravel(); err != nil {
		return e, err
	}
	e.ends = append(e.ends, e.Laravel.Close)
	return e, nil
}

// Redis starts a Redis alone, with its data in dir. stop ends it.
func Redis(ctx context.Context, dir string) (address string, stop func() error, err error) {
	e := &Environment{Dir: dir, ctx: ctx}
	e.server = program{ctx: ctx, dir: dir, environment: e}
	err = e.server.run(func(t testing.TB) { address = testenv.Redis(t) })
	return address, e.Close, err
}

// Build builds the program in a folder as the Dockerfile does, so that the shipped program is
// measured.
func Build(ctx context.Context, folder, path string) error {
	build := exec.CommandContext(ctx, "go", "build", "-tags=nodemo", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	build.Dir = folder
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the program: %w\n%s", err, out)
	}
	return nil
}

func (e *Environment) startAPIServer() error {
	server, err := testenv.NewAPIServer()
	if err != nil {
		return fmt.Errorf("starting an API server: %w", err)
	}
	e.ends = append(e.ends, server.Close)
	e.Config = server.Config
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return fmt.Errorf("registering the kinds: %w", err)
	}
	if e.Client, err = client.NewWithWatch(server.Config, client.Options{Scheme: scheme}); err != nil {
		return fmt.Errorf("connecting to the API server: %w", err)
	}
	e.Kubeconfig = filepath.Join(e.Dir, "kubeconfig")
	return server.WriteKubeconfig(e.Kubeconfig, "")
}

// Postgres returns the URL of an empty database in its own PostgreSQL.
func (e *Environment) Postgres() (url string, err error) {
	err = e.server.run(func(t testing.TB) { url = testenv.Postgres(t) })
	return url, err
}

// Database is a PostgreSQL server that a benchmark stops and starts again. It waits for its disk
// at each commit.
type Database struct {
	*testenv.PostgresProcess
	environment *Environment
}

// Database starts a PostgreSQL server of its own.
func (e *Environment) Database() (*Database, error) {
	d := &Database{environment: e}
	err := e.server.run(func(t testing.TB) {
		d.PostgresProcess = testenv.PostgresServer(t, "-c", "fsync=on", "-c", "full_page_writes=on")
	})
	return d, err
}

// Restart starts the server again, with its data.
func (d *Database) Restart() error {
	return d.environment.server.run(func(testing.TB) { d.PostgresProcess.Restart() })
}

// Close stops everything that was started; the last one is stopped first.
func (e *Environment) Close() error {
	var errs []error
	for i := len(e.ends) - 1; i >= 0; i-- {
		errs = append(errs, e.ends[i]())
	}
	e.ends = nil
	return errors.Join(errs...)
}

// Common returns the flags with which manager and worker connect to the servers. The list of
// processes shows the URL of PostgreSQL, but it contains no password.
func (e *Environment) Common(store string) []string {
	return []string{
		"--kubeconfig=" + e.Kubeconfig, "--namespace=" + Namespace, "--redis=" + e.Redis, "--store=" + store,
		"--health-bind-address=127.0.0.1:0",
	}
}

// Manager starts a manager without leader election.
func (e *Environment) Manager(store string, more ...string) (*Process, error) {
	return e.managerOf(e.Binary, store, more...)
}

func (e *Environment) managerOf(program, store string, more ...string) (*Process, error) {
	args := append([]string{"manager", "--leader-elect=false"}, e.Common(store)...)
	flags, err := e.Laravel.Flags(e.Dir)
	if err != nil {
		return nil, err
	}
	return e.StartServing("manager", program, append(append(args, flags...), more...)...)
}

// Print prints a line with the time.
func Print(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}

// Pause waits, or returns why ctx has ended.
func Pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// WaitUntil checks repeatedly whether something is done, and prints the progress every 15 s.
func WaitUntil(ctx context.Context, what string, timeout, interval time.Duration, progress func() (have, want int, err error)) error {
	deadline, printed := time.Now().Add(timeout), time.Now()
	for {
		have, want, err := progress()
		switch {
		case err != nil:
			return err
		case have >= want:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("only %d of %d %s after %s", have, want, what, timeout)
		case time.Since(printed) > 15*time.Second:
			Print("%d of %d %s", have, want, what)
			printed = time.Now()
		}
		if err := Pause(ctx, interval); err != nil {
			return err
		}
	}
}

// Write writes the figures as indented JSON.
func Write(path string, figures any) error {
	content, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the figures: %w", err)
	}
	err = os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, append(content, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	return nil
}

// program implements testing.TB, so that testenv's servers, which end with their test, end
// with this program.
type program struct {
	testing.TB
	ctx         context.Context //nolint:containedctx // testing.TB has one too
	dir         string
	environment *Environment
}

type failure struct{ text string }

// run calls f; a failure that would end a test is returned as an error.
func (p program) run(f func(testing.TB)) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			err = errors.New(r.text)
		default:
			panic(r)
		}
	}()
	f(p)
	return nil
}

// Helper implements testing.TB.
func (p program) Helper() {}

// Context implements testing.TB.
func (p program) Context() context.Context { return p.ctx }

// Fatal implements testing.TB.
func (p program) Fatal(args ...any) { panic(failure{fmt.Sprint(args...)}) }

// Fatalf implements testing.TB.
func (p program) Fatalf(format string, args ...any) { panic(failure{fmt.Sprintf(format, args...)}) }

// Errorf implements testing.TB.
func (p program) Errorf(format string, args ...any) { Print(format, args...) }

// Logf implements testing.TB.
func (p program) Logf(format string, args ...any) { Print(format, args...) }

// Cleanup implements testing.TB.
func (p program) Cleanup(f func()) {
	p.environment.ends = append(p.environment.ends, func() error { f(); return nil })
}

// TempDir implements testing.TB.
func (p program) TempDir() string {
	dir, err := os.MkdirTemp(p.dir, "server-")
	if err != nil {
		p.Fatalf("making a folder: %v", err)
	}
	return dir
}
