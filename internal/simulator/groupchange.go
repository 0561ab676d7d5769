package simulator

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	waBinary "go.mau.fi/whatsmeow/binary"
)

// GroupChange is a change that a member makes in a group.
type GroupChange struct {
	Group string `json:"group"`
	// By is the member; the creator if it is empty.
	By string `json:"by,omitempty"`
	// Change is one of [GroupChanges].
	Change string `json:"change"`
	// Members are whom add, remove, promote and demote concern.
	Members []string `json:"members,omitempty"`
	// Value is the new subject or description, the code of an invite link, or the seconds after
	// which messages disappear.
	Value string `json:"value,omitempty"`
}

// applyChange applies a change to a group and returns the child of the notification about it.
// The caller holds Server.mu.
type applyChange func(s *Server, g *group, by *account, r GroupChange, members []*account) (waBinary.Node, error)

// groupChanges are the changes by their names.
var groupChanges = map[string]applyChange{
	"subject": func(s *Server, g *group, by *account, r GroupChange, _ []*account) (waBinary.Node, error) {
		g.subject = r.Value
		return waBinary.Node{Tag: "subject", Attrs: waBinary.Attrs{
			"subject": r.Value, "s_t": s.seconds(), "s_o": g.correspondent(by).address(by), "s_o_pn": by.jid(),
		}}, nil
	},
	"description": func(_ *Server, g *group, _ *account, r GroupChange, _ []*account) (waBinary.Node, error) {
		g.description = r.Value
		node := waBinary.Node{Tag: "description", Attrs: waBinary.Attrs{"id": newID()}}
		if r.Value == "" {
			node.Content = []waBinary.Node{{Tag: "delete"}}
		} else {
			node.Content = []waBinary.Node{{Tag: "body", Content: []byte(r.Value)}}
		}
		return node, nil
	},
	"add": func(_ *Server, g *group, _ *account, _ GroupChange, members []*account) (waBinary.Node, error) {
		for _, a := range members {
			if slices.Contains(g.members, a) {
				return waBinary.Node{}, fmt.Errorf("%w: %s is a member already", ErrNotNow, a.phone)
			}
		}
		g.members = append(g.members, members...)
		return g.participants("add", members), nil
	},
	"remove": func(_ *Server, g *group, _ *account, _ GroupChange, members []*account) (waBinary.Node, error) {
		g.members = slices.DeleteFunc(g.members, func(a *account) bool { return slices.Contains(members, a) })
		g.removals.Add(1)
		for _, a := range members {
			delete(g.admins, a)
		}
		return g.participants("remove", members), nil
	},
	"promote": func(_ *Server, g *group, _ *account, _ GroupChange, members []*account) (waBinary.Node, error) {
		for _, a := range members {
			g.admins[a] = struct{}{}
		}
		return g.participants("promote", members), nil
	},
	"demote": func(_ *Server, g *group, _ *account, _ GroupChange, members []*account) (waBinary.Node, error) {
		for _, a := range members {
			delete(g.admins, a)
		}
		return g.participants("demote", members), nil
	},
	"announcement": func(_ *Server, g *group, _ *account, _ GroupChange, _ []*account) (waBinary.Node, error) {
		g.announce = true
		return waBinary.Node{Tag: "announcement", Attrs: waBinary.Attrs{"v_id": "1"}}, nil
	},
	"not_announcement": func(_ *Server, g *group, _ *account, _ GroupChange, _ []*account) (waBinary.Node, error) {
		g.announce = false
		return waBinary.Node{Tag: "not_announcement", Attrs: waBinary.Attrs{"v_id": "2"}}, nil
	},
	"locked": func(_ *Server, g *group, _ *account, _ GroupChange, _ []*account) (waBinary.Node, error) {
		g.locked = true
		return waBinary.Node{Tag: "locked"}, nil
	},
	"unlocked": func(_ *Server, g *group, _ *account, _ GroupChange, _ []*account) (waBinary.Node, error) {
		g.locked = false
		return waBinary.Node{Tag: "unlocked"}, nil
	},
	"ephemeral": func(_ *Server, g *group, _ *account, r GroupChange, _ []*account) (waBinary.Node, error) {
		seconds, err := strconv.ParseUint(r.Value, 10, 31)
		if err != nil {
			return waBinary.Node{}, fmt.Errorf("%w: messages disappear after a number of seconds", ErrBadInput)
		}
		if g.ephemeral = int(seconds); seconds == 0 {
			return waBinary.Node{Tag: "not_ephemeral"}, nil
		}
		return waBinary.Node{Tag: "ephemeral", Attrs: waBinary.Attrs{"expiration": r.Value}}, nil
	},
	"invite": func(_ *Server, _ *group, _ *account, r GroupChange, _ []*account) (waBinary.Node, error) {
		return waBinary.Node{Tag: "invite", Attrs: waBinary.Attrs{"code": r.Value}}, nil
	},
}

// membersChanges are the changes that concern members.
var membersChanges = []string{"add", "remove", "promote", "demote"}

// GroupChanges lists the names of the changes that [Server.ChangeGroup] makes.
func GroupChanges() []string { return sortedKeys(groupChanges) }

// participants is the child of a notification about members. The caller holds Server.mu.
func (g *group) participants(tag string, members []*account) waBinary.Node {
	node := waBinary.Node{Tag: tag, Attrs: waBinary.Attrs{}}
	var children []waBinary.Node
	for _, a := range members {
		attrs := waBinary.Attrs{"jid": g.correspondent(a).address(a)}
		if g.byNumber {
			attrs["lid"] = a.lidJID()
		} else {
			attrs["phone_number"] = a.jid()
		}
		children = append(children, waBinary.Node{Tag: "participant", Attrs: attrs})
	}
	node.Content = children
	return node
}

// ChangeGroup makes a change in a group and informs the linked devices of its members. Those
// who are added are informed that they have joined, and those who are removed are informed too.
func (s *Server) ChangeGroup(ctx context.Context, r GroupChange) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	apply := groupChanges[r.Change]
	if apply == nil {
		return fmt.Errorf("%w: there is no change %q of a group; the changes are %q", ErrBadInput, r.Change, GroupChanges())
	}
	if slices.Contains(membersChanges, r.Change) != (len(r.Members) > 0) {
		return fmt.Errorf("%w: the changes %q, and no others, concern members", ErrBadInput, membersChanges)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g, err := s.groupLocked(r.Group)
	if err != nil {
		return err
	}
	by := g.creator
	if r.By != "" {
		if by, err = s.memberLocked(r.By); err != nil {
			return err
		}
	}
	var members []*account
	for _, name := range r.Members {
		a, err := s.memberLocked(name)
		if err != nil {
			return err
		}
		members = append(members, a)
	}
	before := g.devicesLocked()
	change, err := apply(s, g, by, r, members)
	if err != nil {
		return err
	}
	node := s.groupNoticeLocked(g, by, change)
	for _, d := range before {
		s.sendStanzaLocked(d, node)
	}
	if r.Change == "add" {
		joined := s.joinedLocked(g, by)
		for _, a := range members {
			for _, d := range devicesLocked(a) {
				s.sendStanzaLocked(d, joined)
			}
		}
	}
	return nil
}
