// Package membership decides which workers are alive. A worker has an incarnation and
// renews two heartbeats, a Lease and a key in Redis; observers read both and decide which
// workers are dead; the self-fence ends a worker that could renew neither.
package membership

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Incarnation is the identity of a worker's state folder. A process that gets the
// lock on an existing file is the same incarnation, restarted: the kernel keeps the
// lock as long as the old process lives, so that process has certainly ended.
type Incarnation struct {
	// ID is random and stays with the folder.
	ID string
	// Restarted says that the folder had an ID already.
	Restarted bool

	file *os.File
}

// OpenIncarnation locks the folder for this process, until Close or the end of the
// process. A folder that another process has locked is an error.
func OpenIncarnation(folder string) (*Incarnation, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("making the state folder: %w", err)
	}
	path := filepath.Join(folder, "incarnation")
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the incarnation's file: %w", err)
	}
	inc := &Incarnation{file: file}
	if err := inc.load(path); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return inc, nil
}

func (i *Incarnation) load(path string) error {
	if err := syscall.Flock(int(i.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("another process uses the state folder %s: give each worker its own --state-dir", filepath.Dir(path))
		}
		return fmt.Errorf("locking the incarnation's file: %w", err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("reading the incarnation's file: %w", err)
	}
	// A line without its end was cut short by a crash: it is not an ID.
	if id, complete := strings.CutSuffix(string(content), "\n"); complete && id != "" {
		i.ID, i.Restarted = id, true
		return nil
	}
	i.ID = strings.ToLower(rand.Text())
	if err := i.file.Truncate(0); err != nil {
		return fmt.Errorf("writing the incarnation's file: %w", err)
	}
	if _, err := i.file.WriteAt([]byte(i.ID+"\n"), 0); err != nil {
		return fmt.Errorf("writing the incarnation's file: %w", err)
	}
	if err := i.file.Sync(); err != nil {
		return fmt.Errorf("writing the incarnation's file: %w", err)
	}
	return nil
}

// Close releases the folder, so that another process can lock it.
func (i *Incarnation) Close() error {
	if err := i.file.Close(); err != nil {
		return fmt.Errorf("closing the incarnation's file: %w", err)
	}
	return nil
}
