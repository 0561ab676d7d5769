package simulator

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// group is a group of accounts. A member encrypts each of its messages once for all, with a
// key of its own (the sender key), which each device gets with the first message.
type group struct {
	id       string
	creator  *account
	created  time.Time
	byNumber bool

	// sending is held while a message is encrypted and queued; given holds the devices that
	// have the sender key of a phone.
	sending sync.Mutex
	given   map[*handset]*keyHolders
	// removals counts the members who were removed: after each, all use new sender keys.
	removals atomic.Int64

	// Guarded by Server.mu.
	subject     string
	description string
	members     []*account
	admins      map[*account]struct{}
	announce    bool
	locked      bool
	ephemeral   int
}

// firstGroup is the number of the first group that is created.
const firstGroup = 120363000000100000

func (g *group) jid() types.JID { return types.NewJID(g.id, types.GroupServer) }

// mode says whether the group names its members by their LIDs, as new groups do.
func (g *group) mode() types.AddressingMode {
	if g.byNumber {
		return types.AddressingModePN
	}
	return types.AddressingModeLID
}

// correspondent is a member as the group names it.
func (g *group) correspondent(a *account) correspondent {
	return correspondent{account: a, byLID: !g.byNumber}
}

// keyHolders are the devices that have a sender key.
type keyHolders struct {
	name    string // of the key
	devices map[*device]struct{}
}

// keyName names the present sender keys in the store of a phone.
func (g *group) keyName() string { return g.id + "/" + strconv.FormatInt(g.removals.Load(), 10) }

// holders returns the devices that have the key with that name of a sender. The caller holds
// g.sending.
func (g *group) holders(sender *handset, name string) map[*device]struct{} {
	h := g.given[sender]
	if h == nil || h.name != name {
		h = &keyHolders{name: name, devices: map[*device]struct{}{}}
		g.given[sender] = h
	}
	return h.devices
}

// distribution is the part of a message that gives a sender key to a device.
func (g *group) distribution(key []byte) *waE2E.SenderKeyDistributionMessage {
	return &waE2E.SenderKeyDistributionMessage{GroupID: proto.String(g.jid().String()), AxolotlSenderKeyDistributionMessage: key}
}

// devicesLocked returns the linked devices of all members. The caller holds Server.mu.
func (g *group) devicesLocked() []*device {
	var out []*device
	for _, a := range g.members {
		out = append(out, devicesLocked(a)...)
	}
	return out
}

// GroupRequest describes a new group.
type GroupRequest struct {
	Subject string `json:"subject"`
	// Members are phone numbers; the first is the creator and an admin.
	Members []string `json:"members"`
	// ByNumber makes the group name its members by phone numbers, as older groups do.
	ByNumber bool `json:"by_number,omitempty"`
}

// CreateGroup creates a group and returns its JID. The devices of all members but the creator
// are informed. Accounts that do not exist are created.
func (s *Server) CreateGroup(r GroupRequest) (string, error) {
	if r.Subject == "" || len(r.Members) < 2 {
		return "", fmt.Errorf("%w: a group needs a subject and at least two members", ErrBadInput)
	}
	g := &group{subject: r.Subject, byNumber: r.ByNumber, created: s.clock.Now(), given: map[*handset]*keyHolders{}, admins: map[*account]struct{}{}}
	s.mu.Lock()
	for _, name := range r.Members {
		a, err := s.memberLocked(name)
		if err != nil {
			s.mu.Unlock()
			return "", err
		}
		if !slices.Contains(g.members, a) {
			g.members = append(g.members, a)
		}
	}
	g.creator = g.members[0]
	g.admins[g.creator] = struct{}{}
	g.id = strconv.Itoa(firstGroup + len(s.groups))
	s.groups[g.id] = g
	devices := slices.DeleteFunc(g.devicesLocked(), func(d *device) bool { return d.account == g.creator })
	node := s.joinedLocked(g, g.creator)
	s.mu.Unlock()
	for _, d := range devices {
		s.sendStanza(d, node)
	}
	return g.jid().String(), nil
}

// memberLocked returns the account with that phone number, JID or LID; it creates an account
// for a new number. The caller holds s.mu.
func (s *Server) memberLocked(name string) (*account, error) {
	jid, err := parseDeviceName(name)
	if err != nil {
		return nil, err
	}
	if jid.Server == types.HiddenUserServer {
		if a := s.byLID[jid.User]; a != nil {
			return a, nil
		}
		return nil, fmt.Errorf("%w: no account has the LID %s", ErrNotFound, jid.User)
	}
	phone, err := parsePhone(jid.User)
	if err != nil {
		return nil, err
	}
	return s.accountLocked(phone)
}

// groupLocked returns the group with that JID. The caller holds s.mu.
func (s *Server) groupLocked(name string) (*group, error) {
	jid, err := types.ParseJID(name)
	if err != nil || jid.Server != types.GroupServer {
		return nil, fmt.Errorf("%w: a group is named by its JID, for example %d@g.us", ErrBadInput, firstGroup)
	}
	g := s.groups[jid.User]
	if g == nil {
		return nil, fmt.Errorf("%w: there is no group %s", ErrNotFound, jid)
	}
	return g, nil
}

// infoLocked is the node that describes a group. The caller holds Server.mu.
func (g *group) infoLocked() waBinary.Node {
	naming := g.correspondent(g.creator)
	created := strconv.FormatInt(g.created.Unix(), 10)
	node := waBinary.Node{Tag: "group", Attrs: waBinary.Attrs{
		"id": g.id, "subject": g.subject, "s_t": created, "s_o": naming.address(g.creator), "creation": created,
		"creator": naming.address(g.creator), "creator_pn": g.creator.jid(), "size": len(g.members), "addressing_mode": string(g.mode()),
	}}
	var children []waBinary.Node
	for _, a := range g.members {
		attrs := waBinary.Attrs{"jid": naming.address(a)}
		if g.byNumber {
			attrs["lid"] = a.lidJID()
		} else {
			attrs["phone_number"] = a.jid()
		}
		if _, ok := g.admins[a]; ok {
			attrs["type"] = "admin"
			if a == g.creator {
				attrs["type"] = "superadmin"
			}
		}
		children = append(children, waBinary.Node{Tag: "participant", Attrs: attrs})
	}
	if g.description != "" {
		children = append(children, waBinary.Node{
			Tag: "description", Attrs: waBinary.Attrs{"id": "1", "t": created, "participant": naming.address(g.creator)},
			Content: []waBinary.Node{{Tag: "body", Content: []byte(g.description)}},
		})
	}
	if g.announce {
		children = append(children, waBinary.Node{Tag: "announcement"})
	}
	if g.locked {
		children = append(children, waBinary.Node{Tag: "locked"})
	}
	if g.ephemeral > 0 {
		children = append(children, waBinary.Node{Tag: "ephemeral", Attrs: waBinary.Attrs{"expiration": g.ephemeral}})
	}
	node.Content = children
	return node
}

// joinedLocked is the notification that the device's account is now a member. The caller
// holds s.mu.
func (s *Server) joinedLocked(g *group, by *account) waBinary.Node {
	return s.groupNoticeLocked(g, by, waBinary.Node{Tag: "create", Attrs: waBinary.Attrs{"type": "new", "key": newID()}, Content: []waBinary.Node{g.infoLocked()}})
}

// groupNoticeLocked is a notification of a group about a change that a member has made. The
// caller holds s.mu.
func (s *Server) groupNoticeLocked(g *group, by *account, change waBinary.Node) waBinary.Node {
	node := notification("w:gp2", g.jid(), change)
	naming := g.correspondent(by)
	node.Attrs["participant"], node.Attrs["addressing_mode"], node.Attrs["notify"] = naming.address(by), string(g.mode()), by.name
	if !g.byNumber {
		node.Attrs["participant_pn"] = by.jid()
	}
	return node
}

// answerGroups answers requests about groups that exist.
func (c *conn) answerGroups(iq *waBinary.Node) (reply, bool) {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	member := func(g *group) bool { return slices.Contains(g.members, c.device.account) }
	if _, ok := iq.GetOptionalChildByTag("participating"); ok {
		groups := []*group{}
		for _, g := range c.srv.groups {
			if member(g) {
				groups = append(groups, g)
			}
		}
		slices.SortFunc(groups, func(a, b *group) int { return cmp.Or(len(a.id)-len(b.id), strings.Compare(a.id, b.id)) })
		nodes := []waBinary.Node{}
		for _, g := range groups {
			nodes = append(nodes, g.infoLocked())
		}
		return result(waBinary.Node{Tag: "groups", Content: nodes}), true
	}
	if _, ok := iq.GetOptionalChildByTag("query"); ok {
		switch g := c.srv.groups[jidAttribute(iq, "to").User]; {
		case g == nil:
			return notFound, true
		case !member(g):
			return notYours, true
		default:
			return result(g.infoLocked()), true
		}
	}
	return notFound, true
}
