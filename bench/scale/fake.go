package main

import (
	"context"
	"fmt"
	"hash/fnv"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// accounts are simulated devices, without a network and without keys: they are linked and
// connected as soon as they are dialled.
type accounts struct{}

// Take implements worker.Accounts.
func (accounts) Take(_ context.Context, uid types.UID, _ int64) (worker.Account, error) {
	h := fnv.New64a()
	_, _ = h.Write([]byte(uid)) // never fails
	return account{phone: fmt.Sprintf("34%012d", h.Sum64()%1e12)}, nil
}

type account struct{ phone string }

func (account) Starts() int64                            { return 1 }
func (account) JID() string                              { return "" }
func (account) PhoneNumber() string                      { return "" }
func (account) Unsettled() int32                         { return 0 }
func (account) Settle(context.Context) error             { return nil }
func (account) Trial() int32                             { return 0 }
func (account) RecordTrial(context.Context, int32) error { return nil }
func (account) Forget(context.Context) error             { return nil }

// Push implements worker.Account.
func (account) Push(context.Context, delivery.Item) (string, error) { return "", nil }

// Dial implements worker.Account.
func (a account) Dial(_ context.Context, o worker.DialOptions) (worker.Connection, error) {
	c := &connection{}
	c.events.Go(func() {
		o.Events(session.Event{
			Type: session.EventConnected, JID: a.phone + ":1@s.whatsapp.net", PhoneNumber: "+" + a.phone, PushName: "Bench",
		})
	})
	return c, nil
}

type connection struct{ events sync.WaitGroup }

func (*connection) Paired() bool                 { return true }
func (*connection) Logout(context.Context) error { return nil }

// AnswerPasskey implements worker.Connection.
func (*connection) AnswerPasskey(context.Context, string) error { return nil }

// ConfirmPasskey implements worker.Connection.
func (*connection) ConfirmPasskey(context.Context) error { return nil }

// SameAccount implements worker.Connection.
func (*connection) SameAccount(context.Context, string) (bool, error) { return true, nil }

// Close implements worker.Connection: after it there are no more events.
func (c *connection) Close() { c.events.Wait() }
