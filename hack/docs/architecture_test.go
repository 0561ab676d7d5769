package main

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

const root = "../.."

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestEveryPackageIsInTheArchitecture checks that the page lists exactly the existing packages.
func TestEveryPackageIsInTheArchitecture(t *testing.T) {
	g := NewWithT(t)
	list := exec.CommandContext(t.Context(), "go", "list", "./...")
	list.Dir = root
	out, err := list.Output()
	g.Expect(err).NotTo(HaveOccurred())
	exist := map[string]bool{}
	for _, name := range strings.Fields(string(out)) {
		if _, inner, found := strings.Cut(name, "/whatsapp-operator/whatsapp-operator/"); found {
			exist[inner] = true
		}
	}
	page := read(t, "docs/architecture.md")
	_, page, _ = strings.Cut(page, "## The packages")
	page, _, _ = strings.Cut(page, "\n## ")
	described := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(page, -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			described[strings.Trim(name, "`")] = true
		}
	}
	for name := range exist {
		g.Expect(described).To(HaveKey(name), "docs/architecture.md does not describe this package")
	}
	for name := range described {
		g.Expect(exist).To(HaveKey(name), "docs/architecture.md describes a package that does not exist")
	}
}

// TestCommentsCiteExistingPages checks that comments cite only pages of the repository, by
// their path, and their sections, by their headline.
func TestCommentsCiteExistingPages(t *testing.T) {
	outside := regexp.MustCompile(`\b(DESIGN|STYLE|WHATSAPP)(\.md| sections?\b)`)
	cited := regexp.MustCompile(`(docs/[a-zA-Z0-9/_-]+\.md)(?:,\s+(?:(?://|--)\s+)?"([^"\n]+)")?`)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "bin"):
			return filepath.SkipDir
		case entry.IsDir() || !slices.Contains([]string{".go", ".lua", ".sql", ".yaml", ".yml", ".md"}, filepath.Ext(path)) || strings.HasSuffix(path, "architecture_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, found := range outside.FindAllString(string(text), -1) {
			t.Errorf("%s cites %s, which is not in the repository", path, found)
		}
		for _, found := range cited.FindAllStringSubmatch(string(text), -1) {
			page, err := os.ReadFile(filepath.Join(root, found[1]))
			switch {
			case err != nil:
				t.Errorf("%s cites %s, which does not exist", path, found[1])
			case found[2] != "" && !regexp.MustCompile(`(?m)^#+ .*`+regexp.QuoteMeta(found[2])).Match(page):
				t.Errorf("%s cites a section %q of %s, which does not exist", path, found[2], found[1])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLinksAreValid checks the links between pages and to their headlines.
func TestLinksAreValid(t *testing.T) {
	pages, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	decisions, err := filepath.Glob(root + "/docs/decisions/*.md")
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#\s]*)(?:#([^)\s]*))?\)`)
	for _, page := range append(append(pages, decisions...), root+"/README.md", root+"/CONTRIBUTING.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range link.FindAllStringSubmatch(string(text), -1) {
			target := page
			switch {
			case strings.Contains(found[1], "://"):
				continue
			case found[1] != "":
				target = filepath.Join(filepath.Dir(page), found[1])
			}
			linked, err := os.ReadFile(target)
			if err != nil {
				if info, statErr := os.Stat(target); statErr != nil || !info.IsDir() {
					t.Errorf("%s links to %s, which does not exist", page, found[1])
				}
				continue
			}
			if found[2] != "" && !hasAnchor(string(linked), found[2]) {
				t.Errorf("%s links to #%s in %s, which has no such headline", page, found[2], target)
			}
		}
	}
}

// hasAnchor reports whether a page has a headline with this anchor, as GitHub makes it.
func hasAnchor(page, anchor string) bool {
	for line := range strings.Lines(page) {
		if !strings.HasPrefix(line, "#") {
			continue
		}
		headline := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "# ")))
		made := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(headline, "")
		if strings.ReplaceAll(made, " ", "-") == anchor {
			return true
		}
	}
	return false
}
