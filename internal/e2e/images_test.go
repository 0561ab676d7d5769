//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// repository is the name of the images without a tag. No registry has it, so a node that was
// not given the image cannot run another one of the same name.
const (
	repository     = "localhost/whatsapp-operator-e2e"
	demoRepository = "localhost/whatsapp-operator-e2e-demo"
)

// versions are two builds of the product. The second differs in its version, which is
// compiled into the binary, so it is another program in another image. The third is the last
// release, built under this version.
var versions = [3]string{"0.0.1-e2e.1", "0.0.1-e2e.2", "0.0.1-e2e.0"}

// released is the place of the last release in versions.
const released = 2

// buildImages builds the images, and loads them into the nodes.
func (e *environment) buildImages(t *testing.T) {
	t.Helper()
	e.buildImage(t, e.root, repository, versions[0])
	e.buildImage(t, e.root, repository, versions[1])
	e.buildImage(t, e.root, demoRepository, versions[0], "-demo")
}

// buildImage builds an image from the sources in root.
func (e *environment) buildImage(t *testing.T, root, repository, version string, flags ...string) {
	t.Helper()
	archive := filepath.Join(e.dir, filepath.Base(repository)+"-"+version+".tar")
	if _, err := os.Stat(archive); err != nil || !*diskOnly {
		args := append([]string{"-C", filepath.Join(root, "hack", "image"), "run", ".", "-root", "../..", "-version", version, "-name", repository + ":" + version, "-o", archive}, flags...)
		e.run(t, nil, "go", args...)
	}
	t.Logf("Loading %s", archive)
	e.run(t, nil, "sh", "-c", fmt.Sprintf("%s \"$0\"", os.Getenv(loadVariable)), archive)
}

// lastRelease returns the newest release that the present commit contains; empty: there is none.
func (e *environment) lastRelease(t *testing.T) string {
	t.Helper()
	if *from != "" {
		return *from
	}
	tags := strings.Fields(e.run(t, nil, "git", "tag", "--list", "v[0-9]*", "--merged", "HEAD", "--sort=-version:refname"))
	if len(tags) == 0 {
		return ""
	}
	return tags[0]
}

// buildRelease builds the image and the chart of a release from its own sources.
func (e *environment) buildRelease(t *testing.T, tag string) {
	t.Helper()
	sources := filepath.Join(t.TempDir(), "release")
	e.run(t, nil, "git", "worktree", "add", "--detach", sources, tag)
	t.Cleanup(func() {
		if _, err := e.tryAll(t, "git", "worktree", "remove", "--force", sources); err != nil {
			t.Error(err)
		}
	})
	e.buildImage(t, sources, repository, versions[released])
	e.packageChart(t, sources, released)
}
