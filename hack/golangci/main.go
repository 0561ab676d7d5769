// Command golangci-lint is golangci-lint with kube-api-linter compiled in.
//
// To add a plugin, "golangci-lint custom" clones its repository with git. This main package
// needs only the Go module proxy, and every version is pinned in this folder's go.mod and
// go.sum.
package main

import (
	"fmt"
	"os"

	"github.com/golangci/golangci-lint/v2/pkg/commands"
	"github.com/golangci/golangci-lint/v2/pkg/exitcodes"
	_ "sigs.k8s.io/kube-api-linter" // registers the linter "kubeapilinter"
)

// version is the version of golangci-lint in go.mod; the Makefile sets it with -X.
var version = "unknown"

func main() {
	info := commands.BuildInfo{GoVersion: "go", Version: version, Commit: "module proxy", Date: "pinned in hack/golangci/go.mod"}
	if err := commands.Execute(info); err != nil {
		fmt.Fprintln(os.Stderr, "golangci-lint:", err)
		os.Exit(exitcodes.Failure)
	}
}
