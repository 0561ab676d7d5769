package app

import (
	"bytes"
	"testing"

	. "github.com/onsi/gomega"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
)

// TestLogTimesAreReadable: a line can be compared with an Event without a calculator.
func TestLogTimesAreReadable(t *testing.T) {
	g := NewWithT(t)
	var out bytes.Buffer
	zap.New(logFormat(), zap.WriteTo(&out)).Info("Starting")
	g.Expect(out.String()).To(MatchRegexp(`"ts":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"`))
}
