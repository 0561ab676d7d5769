package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// accounts joins the store and the connector: the store reads a device, and the
// connector connects it.
type accounts struct {
	store     *store.Store
	connector *whatsapp.Factory
	inbox     *workerInbox
	// allowed is nil while this process may hold connections.
	allowed func() error
	log     logr.Logger
}

// Take implements worker.Accounts.
func (a *accounts) Take(ctx context.Context, uid types.UID, epoch int64) (worker.Account, error) {
	ctx, cancel := context.WithTimeout(ctx, store.TakeTimeout)
	defer cancel()
	taking, err := a.store.Take(ctx, string(uid), epoch)
	if err != nil {
		return nil, toWorkerError(err)
	}
	return &account{accounts: a, taking: taking}, nil
}

type account struct {
	*accounts
	taking *store.Taking
}

func (a *account) Starts() int64       { return a.taking.Starts() }
func (a *account) Unsettled() int32    { return a.taking.Unsettled() }
func (a *account) Trial() int32        { return a.taking.Trial() }
func (a *account) JID() string         { return a.taking.Record.JID }
func (a *account) PhoneNumber() string { return a.taking.Record.PhoneNumber() }

// Settle records that the session has not ended this process.
func (a *account) Settle(ctx context.Context) error {
	return toWorkerError(a.taking.Settle(ctx))
}

// RecordTrial implements worker.Account.
func (a *account) RecordTrial(ctx context.Context, size int32) error {
	return toWorkerError(a.taking.RecordTrial(ctx, size))
}

// Forget implements worker.Account.
func (a *account) Forget(ctx context.Context) error {
	return toWorkerError(a.taking.Forget(ctx))
}

// Push implements worker.Account.
func (a *account) Push(ctx context.Context, item delivery.Item) (over string, err error) {
	pushed, err := a.inbox.Push(ctx, a.taking, item)
	if errors.Is(err, store.ErrInvalidMessage) {
		return "", fmt.Errorf("%w (%w)", worker.ErrInvalidMessage, err)
	}
	return string(pushed.Over), err
}

// Dial implements worker.Account. When the store fails, the connection's
// context ends before anything can be acknowledged; the connector then reports
// that the connection has ended.
func (a *account) Dial(ctx context.Context, o worker.DialOptions) (worker.Connection, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	reading, done := context.WithTimeout(ctx, store.TakeTimeout)
	device, err := a.taking.Open(reading, cancel)
	done()
	if err != nil {
		cancel(err)
		return nil, toWorkerError(err)
	}
	options := a.options(o, cancel)
	options.Device = device
	conn, err := a.connector.New(options)
	if err != nil {
		cancel(err)
		return nil, fmt.Errorf("preparing the connection: %w", err)
	}
	if err := conn.Connect(ctx); err != nil {
		conn.Close()
		cancel(err)
		return nil, err
	}
	return &connection{Connection: conn, cancel: cancel}, nil
}

// options are those of a connection whose context is ended by end, without its device.
func (a *account) options(o worker.DialOptions, end context.CancelCauseFunc) whatsapp.Options {
	return whatsapp.Options{
		DeviceName: o.DeviceName, PairPhone: o.PairPhone, Proxy: o.Proxy, Events: o.Events, Allowed: a.allowed,
		SessionID: a.taking.Record.SessionID, Accept: endIfFenced(o.Accept, end),
		Log: func() logr.Logger { return a.log.WithValues("sessionID", a.taking.Record.SessionID) },
	}
}

// endIfFenced makes a message that the store refuses because another process has taken the session
// end the connection with that cause, as every other write does. The connector would say that the
// database is away, and this process would wait for it.
func endIfFenced(accept func(context.Context, delivery.MessageItem) error, end context.CancelCauseFunc) func(context.Context, delivery.MessageItem) error {
	if accept == nil {
		return nil
	}
	return func(ctx context.Context, item delivery.MessageItem) error {
		err := accept(ctx, item)
		if errors.Is(err, store.ErrFenced) {
			end(store.ErrFenced)
		}
		return err
	}
}

type connection struct {
	*whatsapp.Connection
	cancel context.CancelCauseFunc
}

// Close implements worker.Connection.
func (c *connection) Close() {
	c.Connection.Close()
	c.cancel(context.Canceled)
}

// toWorkerError converts an error of the store into the worker's error for the same case.
func toWorkerError(err error) error {
	var behind *store.EpochBehindError
	switch {
	case errors.As(err, &behind):
		return fmt.Errorf("%w (%w)", &worker.EpochBehindError{Stored: behind.Stored}, err)
	case errors.Is(err, store.ErrTaken):
		return fmt.Errorf("%w (%w)", &worker.SetupError{
			Reason:  v1alpha1.ReasonSessionIDTaken,
			Message: "another session holds the session id, maybe under other upper and lower case: unlink the device on the phone, delete this session and apply it with another spec.sessionID",
		}, err)
	case errors.Is(err, store.ErrNoRecord):
		return fmt.Errorf("%w (%w)", worker.ErrNoRecord, err)
	case store.IsUnreachable(err):
		return fmt.Errorf("%w (%w)", worker.ErrStoreUnreachable, err)
	default:
		return err
	}
}
