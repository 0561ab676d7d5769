package simulator

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
)

// These tests read the library's source, so that its next version cannot bring requests and
// stanzas that the simulator does not know without a test that fails.

// librarySource parses the source of the client library that the tests are built with.
func librarySource(t *testing.T) []*ast.File {
	t.Helper()
	g := wait(t)
	pc := reflect.ValueOf(whatsmeow.NewClient).Pointer()
	path, _ := runtime.FuncForPC(pc).FileLine(pc)
	names, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*.go"))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(names).NotTo(BeEmpty(), "the source of the library in "+path)
	var out []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		g.Expect(err).NotTo(HaveOccurred())
		out = append(out, file)
	}
	return out
}

// inspect calls f for each node of that type in the source.
func inspect[T ast.Node](files []*ast.File, f func(T)) {
	for _, file := range files {
		ast.Inspect(file, func(node ast.Node) bool {
			if n, ok := node.(T); ok {
				f(n)
			}
			return true
		})
	}
}

// literal returns the value of a string literal, or nothing.
func literal(e ast.Expr) string {
	if l, ok := e.(*ast.BasicLit); ok {
		if value, err := strconv.Unquote(l.Value); err == nil {
			return value
		}
	}
	return ""
}

// Each request that the library sends (sendIQ) is known.
func TestRequestsOfTheLibraryAreKnown(t *testing.T) {
	g := wait(t)
	found := 0
	inspect(librarySource(t), func(query *ast.CompositeLit) {
		if name, ok := query.Type.(*ast.Ident); !ok || name.Name != "infoQuery" {
			return
		}
		namespace, kinds := "", []string{"get", "set"} // both, if the source has a variable
		for _, field := range query.Elts {
			pair, ok := field.(*ast.KeyValueExpr)
			g.Expect(ok).To(BeTrue())
			switch pair.Key.(*ast.Ident).Name {
			case "Namespace":
				namespace = literal(pair.Value)
			case "Type":
				if name, ok := pair.Value.(*ast.Ident); ok && name.Name == "iqGet" || literal(pair.Value) == "get" {
					kinds = kinds[:1]
				} else if ok && name.Name == "iqSet" || literal(pair.Value) == "set" {
					kinds = kinds[1:]
				}
			}
		}
		if namespace == "" {
			return // a variable: a picture of a person (w:profile:picture) or of a group (w:g2)
		}
		found++
		for _, kind := range kinds {
			g.Expect(known).To(HaveKey(namespace + "/" + kind))
		}
	})
	g.Expect(found).To(BeNumerically(">", 30), "the test still finds the requests")
}

// The server can send each notification and each stanza that the library handles.
func TestStanzasOfTheLibraryCanBeSent(t *testing.T) {
	g := wait(t)
	source := librarySource(t)
	elsewhere := []string{
		"notification/link_code_companion_reg", "notification/passkey_prologue_request", "notification/crsc_continuation",
		"notification/companion_reg_refresh",       // during a pairing
		"success", "failure", "stream:error", "iq", // of a connection
		"appdata", // an encrypted message of the phone; WhatsApp does not send it to web clients
	}
	canSend := func(name string) bool {
		return slices.Contains(elsewhere, name) || slices.ContainsFunc(Stanzas(), func(s string) bool { return s == name || strings.HasPrefix(s, name+"/") })
	}
	found := 0
	check := func(name string) {
		found++
		g.Expect(canSend(name)).To(BeTrue(), name)
	}
	inspect(source, func(f *ast.FuncDecl) {
		if f.Name.Name != "handleNotification" {
			return
		}
		ast.Inspect(f, func(node ast.Node) bool {
			if clause, ok := node.(*ast.CaseClause); ok {
				for _, kind := range clause.List {
					check("notification/" + literal(kind))
				}
			}
			return true
		})
	})
	g.Expect(found).To(BeNumerically(">", 15), "the test still finds the notifications")
	found = 0
	inspect(source, func(handlers *ast.CompositeLit) {
		kind, ok := handlers.Type.(*ast.MapType)
		if !ok {
			return
		}
		if value, ok := kind.Value.(*ast.Ident); !ok || value.Name != "nodeHandler" {
			return
		}
		for _, handler := range handlers.Elts {
			check(literal(handler.(*ast.KeyValueExpr).Key))
		}
	})
	g.Expect(found).To(BeNumerically(">", 10), "the test still finds the stanzas")
}
