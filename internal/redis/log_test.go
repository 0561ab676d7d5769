package redis

import (
	"os"
	"testing"

	"github.com/go-logr/logr"
)

func TestMain(m *testing.M) {
	LogTo(logr.Discard())
	os.Exit(m.Run())
}
