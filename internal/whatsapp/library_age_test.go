package whatsapp

import (
	"runtime/debug"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

func TestLibrary(t *testing.T) {
	used := func(version string, replace *debug.Module) *debug.BuildInfo {
		return &debug.BuildInfo{Deps: []*debug.Module{{Path: "example.com/other", Version: "v1.0.0"}, {Path: libraryPath, Version: version, Replace: replace}}}
	}
	const pseudo = "v0.0.0-20260921121126-35ae40906e74"
	built := time.Date(2026, 9, 21, 12, 11, 26, 0, time.UTC)
	for name, tt := range map[string]struct {
		info    *debug.BuildInfo
		version string
		built   time.Time
	}{
		"a commit":           {info: used(pseudo, nil), version: pseudo, built: built},
		"another in place":   {info: used("v0.0.0-20251217143725-11cf47c62d32", &debug.Module{Path: "example.com/fork", Version: pseudo}), version: pseudo, built: built},
		"a release":          {info: used("v1.0.0", nil), version: "v1.0.0"},
		"a folder":           {info: used(pseudo, &debug.Module{Path: "../whatsmeow"})},
		"not in the program": {info: &debug.BuildInfo{}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			version, built, err := libraryOf(tt.info)
			g.Expect(version).To(Equal(tt.version))
			g.Expect(built).To(Equal(tt.built))
			g.Expect(err == nil).To(Equal(!tt.built.IsZero()))
		})
	}
}
