// Command golangci-lint is golangci-lint with kube-api-linter compiled in.
//
// golangci-lint's own way to add a plugin ("golangci-lint custom") clones its
// repository with git; this main package does the same from the Go module proxy
// alone, with every version pinned and summed in this folder's go.mod.
package main

import (
	"fmt"
	"os"

	"github.com/golangci/golangci-lint/v2/pkg/commands"
	"github.com/golangci/golangci-lint/v2/pkg/exitcodes"
	_ "sigs.k8s.io/kube-api-linter" // registers the linter "kubeapilinter"
)

// version is golangci-lint's in go.mod; the Makefile hands it over with -X.
var version = "unknown"

func main() {
	info := commands.BuildInfo{GoVersion: "go", Version: version, Commit: "module proxy", Date: "pinned in hack/golangci/go.mod"}
	if err := commands.Execute(info); err != nil {
		fmt.Fprintln(os.Stderr, "golangci-lint:", err)
		os.Exit(exitcodes.Failure)
	}
}
