// Command whatsmeow prints which version of the WhatsApp client library this project uses,
// how old it is, and which newer one other public projects use. `make whatsmeow` runs it.
//
// WhatsApp refuses clients that are too old. The library has no releases, and the module
// proxy learns of a commit only when somebody asks for it: what the proxy calls the latest
// version may be months old. So this program also reads the go.mod files of public modules
// that depend on the library, and prints the newest version that one of them requires.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/semver"
)

const library = "go.mau.fi/whatsmeow"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Stdout, "go.mod", dependents, time.Now())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "whatsmeow:", err)
		os.Exit(1)
	}
}

// named is a version of the library and who names it.
type named struct {
	version, by string
}

// run prints the report. It fails if the project's own go.mod cannot be read, or if there
// is no answer at all.
func run(ctx context.Context, out io.Writer, goMod string, dependents []string, now time.Time) error {
	content, err := os.ReadFile(goMod)
	if err != nil {
		return fmt.Errorf("reading this project's go.mod: %w", err)
	}
	used, err := usedVersion(content)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "This project uses %s %s%s.\n", library, used, age(used, now))
	newest := named{version: used}
	answered := false
	for _, m := range append([]string{library}, dependents...) {
		n, err := ask(ctx, m)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Fprintf(out, "  %s: %v\n", m, err)
			continue
		}
		answered = true
		fmt.Fprintf(out, "  %s: %s\n", n.by, n.version)
		if semver.Compare(n.version, newest.version) > 0 {
			newest = n
		}
	}
	switch {
	case !answered:
		return errors.New("no module proxy answered any question: check the network and `go env GOPROXY`")
	case newest.version == used:
		fmt.Fprintln(out, "No answer names a newer version.")
	default:
		fmt.Fprintf(out, "A newer version exists: %s%s, named by %s. To use it:\n  go get %s@%s && go mod tidy\n",
			newest.version, age(newest.version, now), newest.by, library, newest.version)
	}
	return nil
}

// ask returns the version that a module names: the library's own latest version, or the
// version that the latest version of a dependent requires.
func ask(ctx context.Context, path string) (named, error) {
	r, err := latest(ctx, path)
	if err != nil {
		return named{}, err
	}
	if path == library {
		return named{version: r.Version, by: "the latest version of the module proxy"}, nil
	}
	content, err := os.ReadFile(r.GoMod)
	if err != nil {
		return named{}, fmt.Errorf("reading the go.mod of %s: %w", r.Version, err)
	}
	version, err := requiredVersion(content)
	if err != nil {
		return named{}, fmt.Errorf("%s: %w", r.Version, err)
	}
	return named{version: version, by: path + " " + r.Version}, nil
}

// usedVersion returns the version that this project's own go.mod builds with.
func usedVersion(goMod []byte) (string, error) {
	file, err := modfile.Parse("go.mod", goMod, nil)
	if err != nil {
		return "", fmt.Errorf("reading this project's go.mod: %w", err)
	}
	if r := replacement(file); r != nil {
		return "", fmt.Errorf("this project replaces %s by %s, whose age is not known", library, r.New)
	}
	return requirement(file)
}

// requiredVersion returns the version of the library that the go.mod of a dependent requires.
func requiredVersion(goMod []byte) (string, error) {
	file, err := modfile.Parse("go.mod", goMod, nil)
	if err != nil {
		return "", fmt.Errorf("its go.mod cannot be read: %w", err)
	}
	if r := replacement(file); r != nil {
		return "", fmt.Errorf("it replaces %s by %s, so the version that it requires may not exist", library, r.New)
	}
	return requirement(file)
}

func replacement(file *modfile.File) *modfile.Replace {
	for _, r := range file.Replace {
		if r.Old.Path == library {
			return r
		}
	}
	return nil
}

// requirement returns the highest version that a go.mod requires, as the command go does.
func requirement(file *modfile.File) (version string, err error) {
	for _, r := range file.Require {
		if r.Mod.Path == library && semver.Compare(r.Mod.Version, version) > 0 {
			version = r.Mod.Version
		}
	}
	if version == "" {
		return "", fmt.Errorf("no requirement of %s in go.mod", library)
	}
	return version, nil
}

// age describes when a version was made; a release has no time in its name.
func age(version string, now time.Time) string {
	built, err := module.PseudoVersionTime(version)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(", %d days old (%s)", int(now.Sub(built).Hours())/24, built.Format(time.DateOnly))
}
