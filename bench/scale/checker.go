package main

import (
	_ "embed"
	"fmt"
	"os"
	"slices"

	"sigs.k8s.io/yaml"
)

//go:embed ranges.yaml
var defaultRanges []byte

// limits are the lowest and the highest value of a figure.
type limits struct {
	Min *float64 `json:"min,omitempty"`
	Max *float64 `json:"max,omitempty"`
}

// readRanges reads a file; an empty path means the embedded one.
func readRanges(path string) (map[string]limits, error) {
	content := defaultRanges
	if path != "" {
		var err error
		if content, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("reading the ranges: %w", err)
		}
	}
	var ranges map[string]limits
	if err := yaml.UnmarshalStrict(content, &ranges); err != nil {
		return nil, fmt.Errorf("reading the ranges: %w", err)
	}
	return ranges, nil
}

// check describes each figure that is out of its range. It is pure.
func check(figures map[string]float64, ranges map[string]limits) (wrong []string) {
	for name, within := range ranges {
		value, measured := figures[name]
		switch {
		case !measured:
			wrong = append(wrong, name+" was not measured")
		case within.Min != nil && value < *within.Min:
			wrong = append(wrong, fmt.Sprintf("%s is %.4g: %.4g below the minimum of %.4g", name, value, *within.Min-value, *within.Min))
		case within.Max != nil && value > *within.Max:
			wrong = append(wrong, fmt.Sprintf("%s is %.4g: %.4g above the maximum of %.4g", name, value, value-*within.Max, *within.Max))
		}
	}
	slices.Sort(wrong)
	return wrong
}
