package simulator

import (
	_ "embed"
	"slices"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
)

// knownText lists the stanzas of clients, see known.txt.
//
//go:embed known.txt
var knownText string

// known holds the stanzas that clients send, by tag; requests (iq) by "namespace/type" as
// in answers, and the answers to the server's requests as "answer".
var known = parseKnown(knownText)

// shape holds the attributes and the children that a node can have.
type shape struct {
	attributes []string
	children   map[string]*shape
}

// parseKnown reads known.txt. Each line is a tag and its attributes; a line that is
// indented further is a child of the line above.
func parseKnown(text string) map[string]*shape {
	parents := []*shape{{children: map[string]*shape{}}}
	var request []string // the attributes that every request can have
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		depth := (len(line) - len(strings.TrimLeft(line, " "))) / 2
		name, attributes := words[0], words[1:]
		switch {
		case depth == 0 && name == "requests":
			request = attributes
			continue
		case depth == 0 && name == "iq":
			name, attributes = words[1]+"/"+words[2], request
		}
		added := &shape{attributes: attributes, children: map[string]*shape{}}
		parents[depth].children[name] = added
		parents = append(parents[:depth+1], added)
	}
	return parents[0].children
}

// unknownIn names the attributes and children of a node that its shape does not have.
func (s *shape) unknownIn(node *waBinary.Node) []string {
	var out []string
	for name := range node.Attrs {
		if !slices.Contains(s.attributes, name) {
			out = append(out, "@"+name)
		}
	}
	children := node.GetChildren()
	for i := range children {
		child := s.children[children[i].Tag]
		if child == nil {
			out = append(out, "/"+children[i].Tag)
			continue
		}
		for _, name := range child.unknownIn(&children[i]) {
			out = append(out, "/"+children[i].Tag+name)
		}
	}
	return out
}

// checkKnown counts the parts of a stanza that the simulator does not know. It returns
// false if the stanza itself is not known.
func (s *Server) checkKnown(name string, node *waBinary.Node) bool {
	shape := known[name]
	if shape == nil {
		return false
	}
	for _, part := range shape.unknownIn(node) {
		s.countUnknown(name + part)
	}
	return true
}
