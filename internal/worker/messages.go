package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// ErrInvalidMessage says that the inbox can never store an item, whatever the state of the database.
var ErrInvalidMessage = errors.New("the inbox cannot store the message")

// messages accepts the messages of a session, from when its keys were taken until they are taken
// again. The supervisor makes it and changes the spec; everything else runs in the goroutine of
// the session's connection, and of one connection at a time.
type messages struct {
	push    func(ctx context.Context, item delivery.Item) (over string, err error)
	epoch   int64
	first   int64 // the seq before that of the first message
	counted atomic.Pointer[counted]
	// drop: there is no Laravel application that could ever get a message.
	drop bool
	// spec is what the session's spec says about messages.
	spec atomic.Pointer[messagesSpec]
	// over is the bound that the last message went over.
	over atomic.Pointer[string]
}

// counted is which numbers the messages of this taking have.
type counted struct {
	// n is the number of the last message that was stored.
	n int64
	// unsure is the message that was pushed with the next number and refused: the database may
	// have stored it nevertheless. Zero: there is none.
	unsure identity
}

// identity tells a message apart from others, and from its placeholder.
type identity struct {
	key         string
	placeholder bool
}

func newMessages(account Account, epoch int64, drop bool) *messages {
	return &messages{push: account.Push, epoch: epoch, first: delivery.FirstSeq(account.Starts()), drop: drop}
}

// messagesSpec is what the spec says about messages. generation is that of the object.
type messagesSpec struct {
	generation int64
	ignored    []v1alpha1.IgnoredMessages
	metadata   delivery.Metadata
}

// observe applies the session's spec, also while it is connected.
func (m *messages) observe(obj *v1alpha1.WhatsAppSession) {
	if known := m.spec.Load(); known == nil || known.generation != obj.Generation {
		m.spec.Store(&messagesSpec{obj.Generation, obj.Spec.Messages.Ignore, delivery.NewMetadata(obj.Spec.Metadata)})
	}
}

// accept stores a message, or drops it deliberately. An error refuses it, and the connection ends
// before WhatsApp gets an acknowledgement. It is the Accept of [DialOptions].
func (m *messages) accept(ctx context.Context, item delivery.MessageItem) error {
	spec := m.spec.Load()
	if slices.Contains(spec.ignored, v1alpha1.IgnoredMessages(item.Class)) {
		metrics.MessageIn(metrics.MessageIgnored)
		return nil
	}
	if m.drop {
		metrics.MessageIn(metrics.MessageDropped)
		return nil
	}
	id := identity{item.Key, item.Placeholder()}
	number := m.number(id)
	item.Numbers, item.Metadata = delivery.Numbers{Epoch: m.epoch, Seq: m.first + number}, spec.metadata
	over, err := m.store(ctx, item)
	if err != nil {
		m.counted.Store(&counted{n: number - 1, unsure: id})
		metrics.MessageIn(metrics.MessageRefused)
		return err
	}
	metrics.MessageIn(metrics.MessageStored)
	m.counted.Store(&counted{n: number})
	if over != "" {
		m.over.Store(&over)
		return whatsapp.ErrBacklog
	}
	return nil
}

// number is the number of the next message. One that was refused keeps its number when it comes
// again: a gap would look like a loss. Another one does not get that number, because two messages
// of a session with one number have no order.
func (m *messages) number(id identity) int64 {
	last := m.counted.Load()
	switch {
	case last == nil:
		return 1
	case last.unsure != (identity{}) && last.unsure != id:
		return last.n + 2
	default:
		return last.n + 1
	}
}

// store pushes an item. What the inbox can never store is replaced by what identifies it: one
// strange message must not stop a session.
func (m *messages) store(ctx context.Context, item delivery.MessageItem) (over string, err error) {
	encoded, err := item.Item()
	if err == nil {
		over, err = m.push(ctx, encoded)
		if !errors.Is(err, ErrInvalidMessage) {
			return over, err
		}
	}
	if encoded, err = whatsapp.Bare(item).Item(); err != nil {
		return "", fmt.Errorf("encoding a message: %w", err)
	}
	return m.push(ctx, encoded)
}
