package whatsapp

import (
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/mod/module"
)

const libraryPath = "go.mau.fi/whatsmeow"

// Library is the version of whatsmeow in this build, and the time of its last commit.
// WhatsApp refuses clients that are too old, so its age is worth knowing.
func Library() (version string, built time.Time, err error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", time.Time{}, errors.New("this program was built without its module versions")
	}
	return libraryOf(info)
}

func libraryOf(info *debug.BuildInfo) (version string, built time.Time, err error) {
	for _, dependency := range info.Deps {
		if dependency.Path != libraryPath {
			continue
		}
		if dependency.Replace != nil {
			dependency = dependency.Replace
		}
		built, err := module.PseudoVersionTime(dependency.Version)
		if err != nil {
			return dependency.Version, time.Time{}, fmt.Errorf("reading the time of whatsmeow's version: %w", err)
		}
		return dependency.Version, built, nil
	}
	return "", time.Time{}, errors.New("this program was built without " + libraryPath)
}
