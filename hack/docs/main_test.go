package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

// TestReferenceIsUpToDate fails if a command, a flag or a metric is missing in the page, and
// if the page has one that does not exist any more.
func TestReferenceIsUpToDate(t *testing.T) {
	g := NewWithT(t)
	page, err := reference()
	g.Expect(err).NotTo(HaveOccurred())
	committed, err := os.ReadFile("../../docs/reference.md")
	g.Expect(err).NotTo(HaveOccurred())
	if string(committed) == page {
		return
	}
	was, is := strings.Split(string(committed), "\n"), strings.Split(page, "\n")
	for _, line := range is {
		if !slices.Contains(was, line) {
			t.Error("missing:", line)
		}
	}
	for _, line := range was {
		if !slices.Contains(is, line) {
			t.Error("does not exist any more:", line)
		}
	}
	t.Error("docs/reference.md is out of date: run `make docs` and commit it")
}

// TestPagesNameExistingFlags checks that the other pages name only existing flags and metrics.
func TestPagesNameExistingFlags(t *testing.T) {
	g := NewWithT(t)
	page, err := reference()
	g.Expect(err).NotTo(HaveOccurred())
	metric := regexp.MustCompile(`whatsapp_operator_[a-z_]+`)
	flag := regexp.MustCompile("`(--[a-z][a-z-]+)")
	pages, err := filepath.Glob("../../docs/*.md")
	g.Expect(err).NotTo(HaveOccurred())
	for _, name := range append(pages, "../../README.md") {
		text, err := os.ReadFile(name)
		g.Expect(err).NotTo(HaveOccurred())
		for _, found := range metric.FindAllString(string(text), -1) {
			g.Expect(page).To(ContainSubstring("`"+found+"`"), "%s names a metric that does not exist", name)
		}
		for _, found := range flag.FindAllStringSubmatch(string(text), -1) {
			if !slices.Contains(notOurs, found[1]) {
				g.Expect(page).To(ContainSubstring("`"+found[1]+"`"), "%s names a flag that does not exist", name)
			}
		}
	}
}

// TestPagesNameExistingTargets checks that the pages name only existing targets of make.
func TestPagesNameExistingTargets(t *testing.T) {
	g := NewWithT(t)
	target := regexp.MustCompile("(?m)(?:`|^\\s*)make ([a-z][a-z0-9-]*)")
	exist := map[string]bool{}
	for _, found := range regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`).FindAllStringSubmatch(read(t, "Makefile"), -1) {
		exist[found[1]] = true
	}
	pages, err := filepath.Glob(root + "/docs/*.md")
	g.Expect(err).NotTo(HaveOccurred())
	named := 0
	for _, name := range append(pages, root+"/README.md", root+"/CONTRIBUTING.md") {
		text, err := os.ReadFile(name)
		g.Expect(err).NotTo(HaveOccurred())
		for _, found := range target.FindAllStringSubmatch(string(text), -1) {
			named++
			g.Expect(exist).To(HaveKey(found[1]), "%s names a target that does not exist", name)
		}
	}
	g.Expect(named).To(BeNumerically(">", 10))
}

// notOurs are flags of other programs that pages name.
var notOurs = []string{"--reset-then-reuse-values", "--reuse-values", "--set", "--take-ownership"}
