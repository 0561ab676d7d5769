package redis

import (
	"context"
	"fmt"

	"github.com/go-logr/logr"
	goredis "github.com/redis/go-redis/v9"
)

// LogTo sends the log of the client library (failed dials, for example) to log at V(1),
// instead of to the standard error. The caller of a command gets the error anyway. It
// holds for the whole process and must be called before the first client is made.
func LogTo(log logr.Logger) { goredis.SetLogger(libraryLog{log}) }

type libraryLog struct{ log logr.Logger }

// Printf implements the library's interface.
func (l libraryLog) Printf(_ context.Context, format string, v ...any) {
	l.log.V(1).Info("Redis client", "detail", fmt.Sprintf(format, v...))
}
