//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// repository is the name of the images without a tag. No registry has it, so a node that was
// not given the image cannot run another one of the same name.
const (
	repository     = "localhost/whatsapp-operator-e2e"
	demoRepository = "localhost/whatsapp-operator-e2e-demo"
)

// versions are two builds of the product. The second differs in its version, which is
// compiled into the binary, so it is another program in another image.
var versions = [2]string{"0.0.1-e2e.1", "0.0.1-e2e.2"}

// buildImages builds the images, and loads them into the nodes.
func (e *environment) buildImages(t *testing.T) {
	t.Helper()
	e.buildImage(t, repository, versions[0])
	e.buildImage(t, repository, versions[1])
	e.buildImage(t, demoRepository, versions[0], "-demo")
}

func (e *environment) buildImage(t *testing.T, repository, version string, flags ...string) {
	t.Helper()
	archive := filepath.Join(e.dir, filepath.Base(repository)+"-"+version+".tar")
	if _, err := os.Stat(archive); err != nil || !*diskOnly {
		args := append([]string{"-C", "hack/image", "run", ".", "-root", "../..", "-version", version, "-name", repository + ":" + version, "-o", archive}, flags...)
		e.run(t, nil, "go", args...)
	}
	t.Logf("Loading %s", archive)
	e.run(t, nil, "sh", "-c", fmt.Sprintf("%s \"$0\"", os.Getenv(loadVariable)), archive)
}
