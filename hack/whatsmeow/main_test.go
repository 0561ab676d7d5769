package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

const (
	older  = "v0.0.0-20251217143725-11cf47c62d32"
	newer  = "v0.0.0-20260916100317-2375e1751bbd"
	newest = "v0.0.0-20260929112325-8b41cfe6d9c4"
)

func TestRequiredVersion(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		goMod, version, err string
	}{
		"one line":  {goMod: "module a\nrequire go.mau.fi/whatsmeow " + newer, version: newer},
		"a block":   {goMod: "module a\ngo 1.99\ntool x/y\nrequire (\n\tx/y v1.0.0\n\tgo.mau.fi/whatsmeow " + newer + "\n)", version: newer},
		"indirect":  {goMod: "module a\nrequire go.mau.fi/whatsmeow " + newer + " // indirect", version: newer},
		"a release": {goMod: "module a\nrequire go.mau.fi/whatsmeow v0.1.0", version: "v0.1.0"},
		"twice, and the higher one counts": {
			goMod:   "module a\nrequire go.mau.fi/whatsmeow " + newest + "\nrequire go.mau.fi/whatsmeow " + newer,
			version: newest,
		},
		"another module is replaced": {
			goMod:   "module a\nrequire go.mau.fi/whatsmeow " + newer + "\nreplace x/y => ../y",
			version: newer,
		},
		"replaced by a copy": {
			goMod: "module a\nrequire go.mau.fi/whatsmeow " + newest + "\nreplace go.mau.fi/whatsmeow => github.com/a/whatsmeow " + newest,
			err:   "it replaces go.mau.fi/whatsmeow by github.com/a/whatsmeow@" + newest,
		},
		"replaced by a folder": {
			goMod: "module a\nrequire go.mau.fi/whatsmeow " + newest + "\nreplace go.mau.fi/whatsmeow => ./whatsmeow",
			err:   "it replaces go.mau.fi/whatsmeow by ./whatsmeow",
		},
		"not required":    {goMod: "module a\nrequire go.mau.fi/util v0.10.1", err: "no requirement of go.mau.fi/whatsmeow"},
		"only excluded":   {goMod: "module a\nexclude go.mau.fi/whatsmeow " + newer, err: "no requirement of go.mau.fi/whatsmeow"},
		"no version":      {goMod: "module a\nrequire go.mau.fi/whatsmeow", err: "cannot be read"},
		"a branch":        {goMod: "module a\nrequire go.mau.fi/whatsmeow main", err: "cannot be read"},
		"not a go.mod":    {goMod: "<html>not found</html>", err: "cannot be read"},
		"an open bracket": {goMod: "module a\nrequire (\n\tgo.mau.fi/whatsmeow " + newer, err: "cannot be read"},
		"empty":           {goMod: "", err: "no requirement of go.mau.fi/whatsmeow"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			version, err := requiredVersion([]byte(test.goMod))
			if test.err != "" {
				g.Expect(err).To(MatchError(ContainSubstring(test.err)))
				return
			}
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(version).To(Equal(test.version))
		})
	}
}

func TestUsedVersion(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	content, err := os.ReadFile("../../go.mod")
	g.Expect(err).NotTo(HaveOccurred())
	version, err := usedVersion(content)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(age(version, time.Now())).To(ContainSubstring("days old"), "the version of this project has a time")

	_, err = usedVersion([]byte("module a\nrequire go.mau.fi/whatsmeow " + newer + "\nreplace go.mau.fi/whatsmeow => ./whatsmeow"))
	g.Expect(err).To(MatchError(ContainSubstring("this project replaces")))
	_, err = usedVersion([]byte("require"))
	g.Expect(err).To(MatchError(ContainSubstring("reading this project's go.mod")))
}

func TestAge(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	g.Expect(age(older, time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC))).To(Equal(", 345 days old (2025-12-17)"))
	g.Expect(age("v0.1.0", time.Now())).To(BeEmpty(), "a release has no time in its name")
}

// proxy is a module proxy: the go.mod of the only version of each module.
type proxy map[string]struct{ version, goMod string }

// ServeHTTP implements http.Handler.
func (p proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for path, m := range p {
		file, found := strings.CutPrefix(r.URL.Path, "/"+path+"/")
		switch {
		case !found:
		case file == "@v/list" && !strings.HasPrefix(m.version, "v0.0.0-"): // the protocol lists no pseudo-versions
			fmt.Fprintln(w, m.version)
			return
		case file == "@v/list":
			return
		case file == "@latest", file == "@v/"+m.version+".info":
			fmt.Fprintf(w, `{"Version":%q,"Time":"2026-10-01T00:00:00Z"}`, m.version)
			return
		case file == "@v/"+m.version+".mod":
			fmt.Fprint(w, m.goMod)
			return
		}
	}
	http.Error(w, "This module version is not available.", http.StatusForbidden)
}

// report runs the program with a module proxy. This project uses the version newer.
func report(t *testing.T, proxy proxy, dependents ...string) (string, error) {
	t.Helper()
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	for name, value := range map[string]string{
		"GOPROXY": server.URL, "GONOPROXY": "none", "GOPRIVATE": "", "GOSUMDB": "off", "GOMODCACHE": t.TempDir(), "GOTOOLCHAIN": "local",
	} {
		t.Setenv(name, value)
	}
	own := filepath.Join(t.TempDir(), "go.mod")
	if err := os.WriteFile(own, []byte("module a\nrequire go.mau.fi/whatsmeow "+newer), 0o600); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	err := run(t.Context(), &out, own, dependents, time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC))
	return out.String(), err
}

func TestNewerVersionOfADependent(t *testing.T) {
	g := NewWithT(t)
	text, err := report(t, proxy{
		library:           {older, "module " + library},
		"example.com/new": {"v1.2.0", "module example.com/new\ngo 1.99\nrequire go.mau.fi/whatsmeow " + newest},
		"example.com/old": {"v0.0.0-20260101000000-0123456789ab", "module example.com/old\nrequire go.mau.fi/whatsmeow " + older},
		"example.com/bad": {"v1.0.0", "module example.com/bad\nrequire go.mau.fi/whatsmeow"},
	}, "example.com/new", "example.com/old", "example.com/bad", "example.com/gone")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(text).To(And(
		ContainSubstring("This project uses go.mau.fi/whatsmeow "+newer+", 73 days old (2026-09-16)."),
		ContainSubstring("the latest version of the module proxy: "+older),
		ContainSubstring("example.com/new v1.2.0: "+newest),
		ContainSubstring("example.com/old v0.0.0-20260101000000-0123456789ab: "+older),
		MatchRegexp("example.com/bad: .*go.mod"),
		MatchRegexp("example.com/gone: .*403 Forbidden.*This module version is not available"),
		ContainSubstring("A newer version exists: "+newest+", 60 days old (2026-09-29), named by example.com/new v1.2.0."),
		ContainSubstring("go get go.mau.fi/whatsmeow@"+newest),
	))
}

func TestLatestVersionOfTheProxyIsNewer(t *testing.T) {
	g := NewWithT(t)
	text, err := report(t, proxy{library: {newest, "module " + library}})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(text).To(ContainSubstring("A newer version exists: " + newest + ", 60 days old (2026-09-29), named by the latest version of the module proxy."))
}

func TestNoNewerVersion(t *testing.T) {
	g := NewWithT(t)
	text, err := report(t, proxy{
		library:            {older, "module " + library},
		"example.com/copy": {"v1.0.0", "module example.com/copy\nrequire go.mau.fi/whatsmeow " + newest + "\nreplace go.mau.fi/whatsmeow => ./whatsmeow"},
	}, "example.com/copy")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(text).To(And(
		ContainSubstring("example.com/copy: v1.0.0: it replaces go.mau.fi/whatsmeow by ./whatsmeow"),
		ContainSubstring("No answer names a newer version."),
	))
}

func TestNoAnswer(t *testing.T) {
	g := NewWithT(t)
	text, err := report(t, proxy{}, "example.com/gone")
	g.Expect(err).To(MatchError(ContainSubstring("no module proxy answered any question")))
	g.Expect(text).To(And(ContainSubstring(newer), ContainSubstring("go.mau.fi/whatsmeow: "), ContainSubstring("example.com/gone: ")))
}

func TestGoModIsMissing(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	err := run(t.Context(), &strings.Builder{}, filepath.Join(t.TempDir(), "go.mod"), nil, time.Now())
	g.Expect(err).To(MatchError(ContainSubstring("reading this project's go.mod")))
}
