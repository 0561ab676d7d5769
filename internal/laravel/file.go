package laravel

import (
	"fmt"
	"os"
	"time"
)

// watched is a file whose parsed content is kept until the file changes. It is checked
// before each request: this costs one stat, needs no goroutine, and also notices that the
// kubelet has replaced the symbolic links of a mounted Secret.
type watched[T any] struct {
	name  string
	parse func([]byte) (T, error)

	value    T
	modified time.Time
	size     int64
	loaded   bool
}

// get returns the parsed content of the file, and whether it has changed. If the file
// cannot be read or parsed, for example while it is being replaced, get returns the last
// good value and an error that says what is wrong.
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
