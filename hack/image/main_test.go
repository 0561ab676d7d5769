package main

import (
	"archive/tar"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	. "github.com/onsi/gomega"
)

// makeImage builds an image around a file that stands for the binary.
func makeImage(t *testing.T, more ...string) (archive string) {
	t.Helper()
	folder := t.TempDir()
	binary := filepath.Join(folder, "binary")
	g := NewWithT(t)
	g.Expect(os.WriteFile(binary, []byte("program"), 0o600)).To(Succeed())
	archive = filepath.Join(folder, "image.tar")
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	g.Expect(run(t.Context(), append([]string{"-o", archive, "-binary", binary, "-version", "v1.2.3", "-revision", "abc", "-name", "localhost/wa:v1.2.3"}, more...))).To(Succeed())
	return archive
}

func files(t *testing.T, r io.Reader) map[string]*tar.Header {
	t.Helper()
	all := map[string]*tar.Header{}
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all[strings.Trim(header.Name, "/")] = header
	}
}

func TestImage(t *testing.T) {
	g := NewWithT(t)
	image, err := tarball.ImageFromPath(makeImage(t), nil)
	g.Expect(err).NotTo(HaveOccurred())
	config, err := image.ConfigFile()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(config.Config.User).To(Equal("65532:65532"), "Kubernetes cannot check that a name is not root's")
	g.Expect(config.Config.Entrypoint).To(Equal([]string{"/whatsapp-operator"}))
	g.Expect(config.Created.Unix()).To(BeEquivalentTo(1700000000))
	g.Expect(config.Config.Labels).To(Equal(map[string]string{
		"org.opencontainers.image.title":    "whatsapp-operator",
		"org.opencontainers.image.version":  "v1.2.3",
		"org.opencontainers.image.revision": "abc",
		"org.opencontainers.image.source":   "https://github.com/whatsapp-operator/whatsapp-operator",
		"org.opencontainers.image.licenses": "GPL-3.0-only",
		"org.opencontainers.image.created":  "2023-11-14T22:13:20Z",
	}))
	inside := files(t, mutate.Extract(image))
	g.Expect(inside).To(HaveKey("licenses/NOTICE"))
	g.Expect(inside["whatsapp-operator"].Mode).To(BeEquivalentTo(0o755))
	g.Expect(inside["tmp"].Mode).To(BeEquivalentTo(0o1777))
	for name, header := range inside {
		g.Expect(header.Uid).To(BeZero(), "%s is not root's: the program could change it", name)
	}
}

func TestAuthorities(t *testing.T) {
	g := NewWithT(t)
	pool := x509.NewCertPool()
	g.Expect(pool.AppendCertsFromPEM(authorities())).To(BeTrue())
	g.Expect(authorities()).To(Equal(authorities()))
}

func TestSameSourcesSameBytes(t *testing.T) {
	for _, format := range []string{"docker", "oci"} {
		g := NewWithT(t)
		first, err := os.ReadFile(makeImage(t, "-format", format))
		g.Expect(err).NotTo(HaveOccurred())
		second, err := os.ReadFile(makeImage(t, "-format", format))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(first).To(Equal(second), format)
	}
}

func TestOCIArchive(t *testing.T) {
	g := NewWithT(t)
	file, err := os.Open(makeImage(t, "-format", "oci", "-demo", "-platform", "linux/arm64"))
	g.Expect(err).NotTo(HaveOccurred())
	defer file.Close()
	var index v1.IndexManifest
	for archive := tar.NewReader(file); ; {
		header, err := archive.Next()
		g.Expect(err).NotTo(HaveOccurred(), "there is an index.json")
		if header.Name == "index.json" {
			g.Expect(json.NewDecoder(archive).Decode(&index)).To(Succeed())
			break
		}
	}
	g.Expect(index.Manifests).To(HaveLen(1))
	g.Expect(index.Manifests[0].Platform.Architecture).To(Equal("arm64"))
	g.Expect(index.Manifests[0].Annotations).To(HaveKeyWithValue("io.containerd.image.name", "localhost/wa:v1.2.3"))
}

func TestWrongArguments(t *testing.T) {
	g := NewWithT(t)
	g.Expect(run(t.Context(), nil)).To(MatchError(ContainSubstring("-o")))
	g.Expect(run(t.Context(), []string{"-o", "x", "-format", "zip"})).To(MatchError(ContainSubstring("choose docker or oci")))
	g.Expect(run(t.Context(), []string{"-o", "x", "-platform", "plan9/arm"})).To(MatchError(ContainSubstring("choose linux/amd64 or linux/arm64")))
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	g.Expect(run(t.Context(), []string{"-o", "x", "-version", "1", "-revision", "1"})).To(MatchError(ContainSubstring("seconds since 1970")))
}
