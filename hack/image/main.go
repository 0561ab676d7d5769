// Command image builds the container image and writes it as an archive, without a container
// engine and without a registry: a static binary, the authorities of the internet's
// certificates, an empty /tmp, and a user that is not root. The same sources give the same
// bytes. For those who have an engine there is the Dockerfile.
//
//	go run . -o whatsapp-operator.tar                      # for docker load, ctr images import, kind load image-archive
//	go run . -demo -o whatsapp-operator-demo.tar           # with the commands of the demo
//	go run . -format oci -platform linux/arm64 -o oci.tar  # an OCI archive
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	repository = "github.com/whatsapp-operator/whatsapp-operator"
	// user has no name in most images; a number is what Kubernetes can check.
	user = 65532
)

// options are the flags.
type options struct {
	output, format, name, platform, binary string
	version, revision                      string
	demo                                   bool
	created                                time.Time
	root                                   string // the repository
}

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	o, err := parse(ctx, args)
	if err != nil {
		return err
	}
	if o.binary == "" {
		folder, err := os.MkdirTemp("", "image-")
		if err != nil {
			return fmt.Errorf("making a folder for the binary: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
		o.binary = filepath.Join(folder, "whatsapp-operator")
		if err := build(ctx, o); err != nil {
			return err
		}
	}
	image, err := assemble(o)
	if err != nil {
		return err
	}
	if err := save(o, image); err != nil {
		return err
	}
	digest, err := image.Digest()
	if err != nil {
		return fmt.Errorf("reading the digest: %w", err)
	}
	fmt.Printf("%s %s@%s\n", o.output, o.name, digest)
	return nil
}

func parse(ctx context.Context, args []string) (options, error) {
	o := options{}
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.StringVar(&o.output, "o", "", "archive to write")
	f.StringVar(&o.format, "format", "docker", "docker (as docker save writes it) or oci")
	f.StringVar(&o.name, "name", "", "name and tag of the image; empty: whatsapp-operator:VERSION, or whatsapp-operator-demo:VERSION")
	f.StringVar(&o.platform, "platform", "linux/amd64", "linux/amd64 or linux/arm64")
	f.StringVar(&o.binary, "binary", "", "static binary to use; empty: it is built")
	f.StringVar(&o.version, "version", "", "version; empty: what git describe says")
	f.StringVar(&o.revision, "revision", "", "commit; empty: the one that is checked out")
	f.BoolVar(&o.demo, "demo", false, "include the commands of the demo")
	f.StringVar(&o.root, "root", "../..", "the repository")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.output == "" || f.NArg() > 0 {
		return o, errors.New("name the archive with -o, and give no other arguments")
	}
	if o.format != "docker" && o.format != "oci" {
		return o, fmt.Errorf("-format is %q: choose docker or oci", o.format)
	}
	if o.platform != "linux/amd64" && o.platform != "linux/arm64" {
		return o, fmt.Errorf("-platform is %q: choose linux/amd64 or linux/arm64", o.platform)
	}
	for value, ask := range map[*string][]string{
		&o.version:  {"describe", "--tags", "--always", "--dirty"},
		&o.revision: {"rev-parse", "HEAD"},
	} {
		if *value != "" {
			continue
		}
		answer, err := git(ctx, o.root, ask...)
		if err != nil {
			return o, err
		}
		*value = answer
	}
	if o.name == "" {
		o.name = map[bool]string{false: "whatsapp-operator", true: "whatsapp-operator-demo"}[o.demo] + ":" + o.version
	}
	seconds, given := os.LookupEnv("SOURCE_DATE_EPOCH")
	if !given {
		var err error
		if seconds, err = git(ctx, o.root, "log", "-1", "--format=%ct"); err != nil {
			return o, err
		}
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return o, fmt.Errorf("SOURCE_DATE_EPOCH is %q: give seconds since 1970", seconds)
	}
	o.created = time.Unix(n, 0).UTC()
	return o, nil
}

func git(ctx context.Context, root string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", root}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("asking git for the version: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// build builds the binary as `make build` does, but without the demo in the product's image.
func build(ctx context.Context, o options) error {
	tags := "nodemo"
	if o.demo {
		tags = ""
	}
	_, architecture, _ := strings.Cut(o.platform, "/")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", tags,
		"-ldflags", "-s -w -X "+repository+"/internal/app.Version="+o.version, "-o", o.binary, ".")
	cmd.Dir, cmd.Stdout, cmd.Stderr = o.root, os.Stderr, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+architecture, "GOWORK=off")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building the binary: %w", err)
	}
	return nil
}

// entry is a file or a folder of the image.
type entry struct {
	path    string
	mode    int64
	content []byte
}

// assemble makes the image: one layer of what seldom changes, one of the program.
func assemble(o options) (v1.Image, error) {
	program, err := os.ReadFile(o.binary)
	if err != nil {
		return nil, fmt.Errorf("reading the binary: %w", err)
	}
	base := []entry{
		{path: "etc/", mode: 0o755},
		{path: "etc/passwd", mode: 0o644, content: fmt.Appendf(nil, "root:x:0:0::/:/sbin/nologin\nnonroot:x:%d:%d::/:/sbin/nologin\n", user, user)},
		{path: "etc/group", mode: 0o644, content: fmt.Appendf(nil, "root:x:0:\nnonroot:x:%d:\n", user)},
		{path: "etc/ssl/", mode: 0o755},
		{path: "etc/ssl/certs/", mode: 0o755},
		{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, content: authorities()},
		{path: "tmp/", mode: 0o1777},
	}
	own := []entry{{path: "licenses/", mode: 0o755}}
	for _, file := range []string{"LICENSE", "NOTICE"} {
		content, err := os.ReadFile(filepath.Join(o.root, file))
		if err != nil {
			return nil, fmt.Errorf("reading the licence: %w", err)
		}
		own = append(own, entry{path: "licenses/" + file, mode: 0o644, content: content})
	}
	own = append(own, entry{path: "whatsapp-operator", mode: 0o755, content: program})

	title := "whatsapp-operator"
	if o.demo {
		title = "whatsapp-operator-demo"
	}
	_, architecture, _ := strings.Cut(o.platform, "/")
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	if image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		Architecture: architecture, OS: "linux", Created: v1.Time{Time: o.created},
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       fmt.Sprintf("%d:%d", user, user),
			Entrypoint: []string{"/whatsapp-operator"},
			Env:        []string{"PATH=/", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"},
			WorkingDir: "/",
			Labels: map[string]string{
				"org.opencontainers.image.title":    title,
				"org.opencontainers.image.version":  o.version,
				"org.opencontainers.image.revision": o.revision,
				"org.opencontainers.image.source":   "https://" + repository,
				"org.opencontainers.image.created":  o.created.Format(time.RFC3339),
				// The binary contains libsignal (GPL-3.0): see NOTICE.
				"org.opencontainers.image.licenses": "GPL-3.0-only",
			},
		},
	}); err != nil {
		return nil, fmt.Errorf("making the image: %w", err)
	}
	for _, entries := range [][]entry{base, own} {
		archive, err := pack(entries, o.created)
		if err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil },
			tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, fmt.Errorf("making a layer: %w", err)
		}
		if image, err = mutate.Append(image, mutate.Addendum{
			Layer: layer, History: v1.History{Created: v1.Time{Time: o.created}, CreatedBy: "hack/image"},
		}); err != nil {
			return nil, fmt.Errorf("adding a layer: %w", err)
		}
	}
	return image, nil
}

// authorities are those that Mozilla trusts without a restriction, from a Go module: what
// this machine trusts must not decide what the image does.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // into memory
		}
	}
	return b.Bytes()
}

// pack writes a layer: owned by root, every time the same.
func pack(entries []entry, at time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		header := &tar.Header{Name: e.path, Mode: e.mode, Size: int64(len(e.content)), ModTime: at, Typeflag: tar.TypeReg}
		if strings.HasSuffix(e.path, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, fmt.Errorf("writing a layer: %w", err)
		}
		if _, err := w.Write(e.content); err != nil {
			return nil, fmt.Errorf("writing a layer: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("writing a layer: %w", err)
	}
	return b.Bytes(), nil
}

// save writes the archive. An archive that is cut off has another name.
func save(o options, image v1.Image) (err error) {
	tag, err := name.NewTag(o.name)
	if err != nil {
		return fmt.Errorf("-name: %w", err)
	}
	temporary := o.output + ".tmp"
	file, err := os.Create(temporary)
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close(), os.Remove(temporary))
		}
	}()
	if o.format == "docker" {
		err = tarball.Write(tag, image, file)
	} else {
		err = writeOCI(file, image, o)
	}
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	return os.Rename(temporary, o.output)
}

// writeOCI writes an OCI layout as a tar archive.
func writeOCI(w io.Writer, image v1.Image, o options) (err error) {
	folder, err := os.MkdirTemp("", "oci-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	path, err := layout.Write(folder, empty.Index)
	if err != nil {
		return err
	}
	_, architecture, _ := strings.Cut(o.platform, "/")
	if err := path.AppendImage(image, layout.WithPlatform(v1.Platform{OS: "linux", Architecture: architecture}), layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": o.name[strings.LastIndex(o.name, ":")+1:],
		"io.containerd.image.name":          o.name, // what ctr images import names it
	})); err != nil {
		return err
	}
	var entries []entry
	err = filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error { // in the order of the names
		if err != nil || path == folder {
			return err
		}
		inside := filepath.ToSlash(strings.TrimPrefix(path, folder+string(filepath.Separator)))
		if d.IsDir() {
			entries = append(entries, entry{path: inside + "/", mode: 0o755})
			return nil
		}
		content, err := os.ReadFile(path) //nolint:gosec // a folder of this process alone
		entries = append(entries, entry{path: inside, mode: 0o644, content: content})
		return err
	})
	if err != nil {
		return err
	}
	archive, err := pack(entries, o.created)
	if err != nil {
		return err
	}
	_, err = w.Write(archive)
	return err
}
