package laravel

import (
	"fmt"
	"os"
	"time"
)

// watched is a file whose meaning is kept until it changes. Looking at it
// before each request costs one stat, needs no goroutine, and also sees the
// symbolic links that the kubelet swaps under a mounted Secret.
type watched[T any] struct {
	name  string
	parse func([]byte) (T, error)

	value    T
	modified time.Time
	size     int64
	loaded   bool
}

// get returns what the file means now, and whether that is new. A file that
// cannot be read or parsed, as in the middle of being replaced, leaves the
// last good value in place; the error says what is wrong with it.
func (w *watched[T]) get() (value T, changed bool, err error) {
	info, err := os.Stat(w.name)
	if err != nil {
		return w.value, false, fmt.Errorf("reading a file for Laravel: %w", err)
	}
	if w.loaded && info.ModTime().Equal(w.modified) && info.Size() == w.size {
		return w.value, false, nil
	}
	content, err := os.ReadFile(w.name)
	if err != nil {
		return w.value, false, fmt.Errorf("reading a file for Laravel: %w", err)
	}
	parsed, err := w.parse(content)
	if err != nil {
		return w.value, false, fmt.Errorf("file %s for Laravel: %w", w.name, err)
	}
	w.value, w.modified, w.size, w.loaded = parsed, info.ModTime(), info.Size(), true
	return w.value, true, nil
}
