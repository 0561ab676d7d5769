package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// resolve returns the commit of a revision of a clone.
func resolve(ctx context.Context, clone, revision string) (string, error) {
	if revision == "" {
		return "", errors.New("-from is not set: it is the commit, tag or branch to upgrade from")
	}
	out, err := git(ctx, clone, "rev-parse", "--verify", "--quiet", "--end-of-options", revision+"^{commit}")
	if err != nil {
		return "", fmt.Errorf("this clone has no revision %q. A shallow clone has only the newest commits: `git fetch --unshallow --tags` gets all (%w)", revision, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// extract writes the files of a commit into a folder.
func extract(ctx context.Context, clone, commit, folder string) error {
	archive := filepath.Join(filepath.Dir(folder), filepath.Base(folder)+".tar")
	if _, err := git(ctx, clone, "archive", "--format=tar", "--output="+archive, commit); err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o755); err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	if out, err := exec.CommandContext(ctx, "tar", "-x", "-f", archive, "-C", folder).CombinedOutput(); err != nil {
		return fmt.Errorf("extracting revision %s: %w: %s", commit, err, bytes.TrimSpace(out))
	}
	return nil
}

func git(ctx context.Context, clone string, args ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, "git", append([]string{"-C", clone}, args...)...)
	var problem bytes.Buffer
	command.Stderr = &problem
	out, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("git %s: %w: %s", args[0], err, bytes.TrimSpace(problem.Bytes()))
	}
	return out, nil
}
