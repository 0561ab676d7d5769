package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// queryTimeout bounds the query for one module. `go` has no time-out of its own.
const queryTimeout = time.Minute

// release is the newest version of a module, as the module proxy serves it.
type release struct {
	Version string
	// GoMod is the path of its go.mod in the module cache.
	GoMod string
}

// latest asks the module proxies of $GOPROXY for the newest version of a module. It uses the
// command go, so that the settings of this machine apply (GOPROXY, GOPRIVATE, .netrc), and
// the checksum database is asked.
func latest(ctx context.Context, module string) (release, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	list := exec.CommandContext(ctx, "go", "list", "-m", "-json", module+"@latest")
	// Outside this module, whose go.mod would add requirements; and without flags that are
	// meant for builds.
	list.Dir = os.TempDir()
	list.Env = append(os.Environ(), "GO111MODULE=on", "GOWORK=off", "GOFLAGS=")
	var problem bytes.Buffer
	list.Stderr = &problem
	out, err := list.Output()
	switch {
	case ctx.Err() != nil:
		return release{}, fmt.Errorf("no answer within %s", queryTimeout)
	case err != nil:
		return release{}, errors.New(cmp.Or(oneLine(problem.String()), err.Error()))
	}
	var r release
	if err := json.Unmarshal(out, &r); err != nil {
		return release{}, fmt.Errorf("reading the answer of go list: %w", err)
	}
	return r, nil
}

// oneLine joins the lines of a message of the command go.
func oneLine(message string) string {
	return strings.Join(strings.Fields(strings.TrimPrefix(message, "go: ")), " ")
}
