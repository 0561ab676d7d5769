package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// WhatsApp forgets what is acknowledged, so everything that Laravel gets is handed over before
// its acknowledgement is written. The first item that is refused ends the connection while it is
// handled: what follows it is neither acknowledged nor decrypted, and WhatsApp delivers all of it
// again, in order, at the next login. See docs/decisions/0002-inbox.md.

// handOverTimeout is how long a hand-over may take. After it the item is refused.
const handOverTimeout = 10 * time.Second

// ErrBacklog is returned by [Options.Accept] when the item was accepted, but the connection must
// end after it, because too much waits for Laravel. What follows stays, encrypted, at WhatsApp.
var ErrBacklog = errors.New("too many messages of the session wait for Laravel")

var errHandOverTimeout = fmt.Errorf("the hand-over of a message took longer than %s", handOverTimeout)

// accept hands over what an event says. It returns false if that was refused: then the connection
// has ended. Only the goroutine that handles nodes calls it.
func (c *Connection) accept(evt any) bool {
	if c.ctx.Err() != nil {
		return false
	}
	if c.options.Accept == nil {
		return true
	}
	c.queue.hold(true)
	defer c.queue.hold(false)
	items, err := c.items(evt)
	for i := 0; i < len(items) && err == nil; i++ {
		err = c.handOver(items[i])
	}
	if err != nil {
		c.refuse(err)
		return false
	}
	c.handedOver++
	return c.ctx.Err() == nil
}

// items are what an event says. If its translation panics, it is handed over as it is. An error is
// one of the store.
func (c *Connection) items(evt any) (items []delivery.MessageItem, err error) {
	err = c.withoutPanic(evt, func() (err error) {
		if e, ok := evt.(*unreadable); ok {
			items, err = c.translator.unreadable(c.ctx, &e.info, e.raw)
			return err
		}
		items, err = c.translate(c.ctx, evt)
		return err
	})
	if !errors.Is(err, errPanic) {
		return items, err
	}
	e := asUnreadable(evt)
	err = c.withoutPanic(e, func() (err error) {
		items, err = c.translator.unreadable(c.ctx, &e.info, e.raw)
		return err
	})
	if errors.Is(err, errPanic) {
		return []delivery.MessageItem{c.identity(&e.info)}, nil
	}
	return items, err
}

// errPanic: the translation of an event has panicked.
var errPanic = errors.New("a panic")

func (c *Connection) withoutPanic(evt any, f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			c.options.Log().Error(fmt.Errorf("%v", r), "Recovered from a panic while translating an event of whatsmeow", "event", fmt.Sprintf("%T", evt), "stack", string(debug.Stack()))
			err = errPanic
		}
	}()
	return f()
}

// identity is an item that only identifies a message.
func (c *Connection) identity(info *types.MessageInfo) delivery.MessageItem {
	return Bare(delivery.MessageItem{
		SessionID: c.options.SessionID, ID: info.ID, Timestamp: delivery.Time{Time: info.Timestamp},
		Key: delivery.MessageKey(c.options.SessionID, info.Chat.ToNonAD().String(), info.Sender.ToNonAD().String(), info.ID),
	})
}

// asUnreadable is an event as a message that cannot be read.
func asUnreadable(evt any) *unreadable {
	e := &unreadable{}
	switch evt := evt.(type) {
	case *unreadable:
		return evt
	case *events.Message:
		e.info = evt.Info
		e.raw, _ = proto.Marshal(evt.RawMessage) // without it, the item still says that there is a message
	case *events.UndecryptableMessage:
		e.info = evt.Info
	case *events.Receipt:
		e.info = types.MessageInfo{MessageSource: evt.MessageSource, Timestamp: evt.Timestamp, ID: strings.Join(evt.MessageIDs[:min(len(evt.MessageIDs), 1)], "")}
	case *events.GroupInfo:
		e.info = types.MessageInfo{MessageSource: types.MessageSource{Chat: evt.JID, Sender: evt.JID, IsGroup: true}, Timestamp: evt.Timestamp, ID: evt.Notify + evt.ParticipantVersionID}
	case *events.JoinedGroup:
		e.info = types.MessageInfo{MessageSource: types.MessageSource{Chat: evt.JID, Sender: evt.JID, IsGroup: true}, ID: evt.CreateKey}
	case *events.CallTerminate:
		e.info = types.MessageInfo{MessageSource: types.MessageSource{Chat: evt.From, Sender: evt.From}, Timestamp: evt.Timestamp, ID: evt.CallID}
	case *events.CallReject:
		e.info = types.MessageInfo{MessageSource: types.MessageSource{Chat: evt.From, Sender: evt.From}, Timestamp: evt.Timestamp, ID: evt.CallID}
	}
	return e
}

// handOver hands an item over. If that panics, only what identifies the item is handed over.
func (c *Connection) handOver(item delivery.MessageItem) error {
	panicked, err := c.handOverOnce(item)
	if panicked {
		_, err = c.handOverOnce(Bare(item))
	}
	return err
}

func (c *Connection) handOverOnce(item delivery.MessageItem) (panicked bool, err error) {
	ctx, cancel := context.WithCancelCause(c.ctx)
	defer cancel(nil)
	timer := c.factory.clock.AfterFunc(handOverTimeout, func() { cancel(errHandOverTimeout) })
	defer timer.Stop()
	defer func() {
		if r := recover(); r != nil {
			panicked, err = true, fmt.Errorf("a panic: %v", r)
			c.options.Log().Error(err, "Recovered from a panic while handing over a message", "type", string(item.Type), "stack", string(debug.Stack()))
		}
	}()
	err = c.options.Accept(ctx, item)
	switch {
	case errors.Is(err, ErrBacklog):
		c.full = true
		return false, nil
	case err != nil && errors.Is(context.Cause(ctx), errHandOverTimeout):
		err = fmt.Errorf("%w: %w", errHandOverTimeout, err)
	}
	return false, err
}

// Bare is what identifies a message, without its contents, as a message that is not supported.
func Bare(item delivery.MessageItem) delivery.MessageItem {
	return delivery.MessageItem{
		Numbers: item.Numbers, Metadata: item.Metadata, SessionID: item.SessionID, Key: item.Key, ID: item.ID, Type: delivery.TypeUnsupported, Chat: item.Chat, Sender: item.Sender,
		FromMe: item.FromMe, Timestamp: item.Timestamp, Class: item.Class, Unsupported: &delivery.Unsupported{},
	}
}

// refuse ends the connection before anything more can be acknowledged: it ends its context and
// closes its socket.
func (c *Connection) refuse(cause error) {
	if c.ctx.Err() != nil { // it was the end of the connection that ended the hand-over
		return
	}
	c.cancel(fmt.Errorf("%w: %w", errRefused, cause))
	c.closeSocket()
	c.options.Log().Error(cause, "Refused a message and ended the connection: WhatsApp delivers it again, with all that follow it")
	c.report(refusal())
}

// errRefused is the cause of the end of a connection that has refused something.
var errRefused = errors.New("a message was refused")

// refusal is the event of such an end.
func refusal() Event {
	e := over(EventDisconnected, session.EndInboxUnavailable, "a message could not be stored: the connection was ended, and WhatsApp keeps the messages until the database takes them")
	e.Ours = true
	return e
}

// endIfFull ends the connection after Accept has returned ErrBacklog.
func (c *Connection) endIfFull() {
	if !c.full || c.ctx.Err() != nil {
		return
	}
	e := over(EventDisconnected, session.EndBacklog, "too many messages wait for Laravel: the later ones wait at WhatsApp")
	e.Ours = true
	c.report(e)
}

// handOverUnread hands over a node that whatsmeow could not handle, and acknowledges it.
func (c *Connection) handOverUnread(node *waBinary.Node) {
	defer c.recovered("what could not be handled", true)
	info := c.nodeInfo(node)
	if !c.accept(&unreadable{info: *info}) {
		return
	}
	if node.Tag == "message" || node.Tag == "status" || node.Tag == "appdata" {
		c.internals().SendAck(c.ctx, node, nackUnhandled)
		return
	}
	c.acknowledge(node)
}

// nodeInfo is what can be read of the attributes of a node.
func (c *Connection) nodeInfo(node *waBinary.Node) (info *types.MessageInfo) {
	attributes := node.AttrGetter()
	id, from, participant := attributes.OptionalString("id"), attributes.OptionalJIDOrEmpty("from"), attributes.OptionalJIDOrEmpty("participant")
	plain := &types.MessageInfo{
		ID:            id,
		MessageSource: types.MessageSource{Chat: from.ToNonAD(), Sender: from, IsGroup: from.Server == types.GroupServer},
		Timestamp:     attributes.OptionalUnixTime("t"),
		Category:      attributes.OptionalString("category"),
	}
	if !participant.IsEmpty() || from.Server == types.GroupServer || from.Server == types.BroadcastServer {
		plain.Sender = participant // empty: a group is not the sender of what is written in it
	}
	defer func() {
		if recover() != nil {
			info = plain
		}
	}()
	if node.Tag == "message" {
		if parsed, err := c.internals().ParseMessageInfo(node); err == nil {
			return parsed
		}
	}
	return plain
}

// isGroupChange reports whether a node is a notification of what has changed in a group.
func isGroupChange(node *waBinary.Node) bool { return node.Attrs["type"] == "w:gp2" }

// isChange reports whether a notification is handed over: pictures of groups are notifications of
// their own.
func isChange(node *waBinary.Node) bool {
	from, _ := node.Attrs["from"].(types.JID)
	return isGroupChange(node) || node.Attrs["type"] == "picture" && from.Server == types.GroupServer
}

// handleGroupChange is whatsmeow's handleNotification for changes of groups (notification.go),
// which acknowledges what it cannot parse before anybody hears of it.
func (c *Connection) handleGroupChange(node *waBinary.Node) {
	change, addresses, phones, err := c.internals().ParseGroupNotification(node)
	correctApproval(change, node)
	if err != nil {
		c.options.Log().Info("Failed to read a change of a group", "reason", briefError{err}.Error())
		c.handOverUnread(node)
		return
	}
	// A store that fails ends the connection.
	err = errors.Join(c.options.Device.LIDs.PutManyLIDMappings(c.ctx, addresses), c.options.Device.Contacts.PutManyRedactedPhones(c.ctx, phones))
	if err != nil && c.ctx.Err() == nil {
		c.options.Log().Info("Failed to store the addresses in a change of a group", "reason", briefError{err}.Error())
	}
	if c.handle(change) {
		c.acknowledge(node)
	}
}

// correctApproval says whether administrators must let new members in: whatsmeow (group.go,
// parseGroupChange) says yes also when this was ended.
func correctApproval(change any, node *waBinary.Node) {
	info, ok := change.(*events.GroupInfo)
	if !ok || info.MembershipApprovalMode == nil {
		return
	}
	for _, child := range node.GetChildrenByTag("membership_approval_mode") {
		join := child.GetChildByTag("group_join")
		info.MembershipApprovalMode.IsJoinApprovalRequired = join.Attrs["state"] != "off"
	}
}

// handleCall is whatsmeow's handleCallEvent (call.go), which acknowledges a call while it panics.
// Only how a call ends is handed over.
func (c *Connection) handleCall(node *waBinary.Node) {
	if event := callEvent(node); event == nil || c.accept(event) {
		c.acknowledge(node)
	}
}

// callEvent is the event of the end of a call; nil: it has not ended.
func callEvent(node *waBinary.Node) any {
	children := node.GetChildren()
	if len(children) != 1 {
		return nil
	}
	child := &children[0]
	from, call := node.AttrGetter(), child.AttrGetter()
	meta := types.BasicCallMeta{
		From: from.OptionalJIDOrEmpty("from"), Timestamp: from.OptionalUnixTime("t"),
		CallCreator: call.OptionalJIDOrEmpty("call-creator"), CallID: call.OptionalString("call-id"), GroupJID: call.OptionalJIDOrEmpty("group-jid"),
	}
	other := "caller_lid"
	if meta.CallCreator.Server == types.HiddenUserServer {
		other = "caller_pn"
	}
	meta.CallCreatorAlt = call.OptionalJIDOrEmpty(other)
	switch child.Tag {
	case "terminate":
		return &events.CallTerminate{BasicCallMeta: meta, Reason: call.OptionalString("reason"), Data: child}
	case "reject":
		return &events.CallReject{BasicCallMeta: meta, Data: child}
	default:
		return nil
	}
}
