package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// noTables: this process's user may not use the tables, or they do not exist, as after a
// restore without privileges, or into another schema, or they are those of an older release.
func noTables(code string) bool {
	switch code {
	case "42501", // insufficient_privilege
		"42P01", // undefined_table
		"42703", // undefined_column
		"3F000": // invalid_schema_name
		return true
	}
	return false
}

// isEmptied reports whether an error means that the database has no tables of this program.
func isEmptied(err error) bool {
	var answer *pgconn.PgError
	return errors.As(err, &answer) && (answer.Code == "42P01" || answer.Code == "3F000")
}

// IsUnreachable reports whether an error means that the database cannot be reached, or
// does not serve queries. An error about stored data is different: the next session may
// not have it.
func IsUnreachable(err error) bool {
	var connecting *pgconn.ConnectError
	var answer *pgconn.PgError
	var network net.Error
	switch {
	case err == nil:
		return false
	case errors.As(err, &connecting): // also a refused password
		return true
	case errors.As(err, &answer):
		// Class 53: connections, memory or disk are used up.
		return leadsElsewhere(answer.Code) || broken(answer.Code) || strings.HasPrefix(answer.Code, "53") || noTables(answer.Code)
	}
	return errors.As(err, &network) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrReadOnly) ||
		errors.Is(err, ErrNoAnswer) || errors.Is(err, ErrAway) ||
		errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
