package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	. "github.com/onsi/gomega"
)

func TestIsUnreachable(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		err  error
		want bool
	}{
		"no error":                       {nil, false},
		"nothing listens":                {&net.OpError{Op: "dial", Err: errors.New("connection refused")}, true},
		"the password is refused":        {&pgconn.ConnectError{}, true},
		"a standby":                      {&pgconn.PgError{Code: "25006"}, true},
		"it shuts down":                  {&pgconn.PgError{Code: "57P01"}, true},
		"it has no connections left":     {&pgconn.PgError{Code: "53300"}, true},
		"its disk is full":               {&pgconn.PgError{Code: "53100"}, true},
		"it allows nothing":              {&pgconn.PgError{Code: "42501"}, true},
		"its tables are gone":            {&pgconn.PgError{Code: "42P01"}, true},
		"its tables are older":           {&pgconn.PgError{Code: "42703"}, true},
		"it does not answer":             {context.DeadlineExceeded, true},
		"it did not answer in time":      {late(expired(), errors.New("timeout")), true},
		"it did not answer a moment ago": {ErrAway, true},
		"it takes no writes":             {ErrReadOnly, true},
		"the connection broke":           {driver.ErrBadConn, true},
		"it hung up":                     {io.ErrUnexpectedEOF, true},
		"the attempt was given up":       {context.Canceled, false},
		"a constraint":                   {&pgconn.PgError{Code: "23505"}, false},
		"a query that was cancelled":     {&pgconn.PgError{Code: "57014"}, false},
		"there is no record":             {ErrNoRecord, false},
		"a higher epoch":                 {&EpochBehindError{Stored: 7}, false},
		"keys that cannot be made sense": {errors.New("unsealing"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			g.Expect(IsUnreachable(tt.err)).To(Equal(tt.want))
			if tt.err != nil {
				g.Expect(IsUnreachable(fmt.Errorf("taking the keys: %w", tt.err))).To(Equal(tt.want))
			}
		})
	}
}

// expired is the context of a query that was not answered in time.
func expired() context.Context {
	ctx, cancel := within(context.Background(), -1)
	cancel()
	return ctx
}
