package worker

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

const (
	// requestTimeout bounds one request to the API server, the store or Redis.
	requestTimeout = 10 * time.Second
	// settleTimeout bounds the settlement of a taking, for which a release waits, and the
	// recording of a trial.
	settleTimeout = time.Second
	// passkeyTimeout bounds a step of a passkey's exchange: two questions to WhatsApp.
	passkeyTimeout = 60 * time.Second
	// verifyTimeout bounds one request to WhatsApp that asks which account a number belongs to.
	verifyTimeout = 30 * time.Second
	// logoutTimeout bounds one attempt at a logout.
	logoutTimeout = 30 * time.Second
	// retryFirst and retryMost bound the pause after a failed write to the API server or to Redis.
	retryFirst = 500 * time.Millisecond
	retryMost  = 15 * time.Second
)

// dependencies are what every supervisor of a worker uses.
type dependencies struct {
	Sessions  Sessions
	Accounts  Accounts
	Proxies   Proxies
	Publisher Publisher
	Limiter   Limiter
	Events    Events
	Clock     clock.Clock
	// Dials counts the dials of all supervisors.
	Dials      *atomic.Int64
	Quarantine session.Quarantine
	// Fleet is what the session shares with the others of this worker.
	Fleet *fleet
	// Health records the results of attempts to take keys and to connect.
	Health *Health
	// Inbox informs sessions that wait until their messages can be stored.
	Inbox *inboxWatch
	// DropMessages: there is no Laravel application, so no message is stored.
	DropMessages bool
}

// supervisor supervises one session. Only its goroutine uses the state machine.
// Blocking work runs in other goroutines, one of each kind at a time, and its result
// comes back through the inbox.
type supervisor struct {
	dependencies
	base  logr.Logger // see log
	key   types.NamespacedName
	uid   types.UID
	inbox chan func()
	// finished is closed when the goroutine and all its work have ended.
	finished chan struct{}
	// lastPublished is what was last published; the agent refreshes the cache with it.
	lastPublished atomic.Pointer[session.Publication]
	// phase, quarantined and live are for the agent's metrics.
	phase       atomic.Pointer[v1alpha1.Phase]
	quarantined atomic.Bool
	live        atomic.Pointer[lastSeen]
	// lastEnd is why the last connection ended; empty: no connection has ended since the
	// session was last connected.
	lastEnd string

	machine *session.Machine
	work    sync.WaitGroup
	account Account
	// messages accepts the messages of the present taking; nil: nothing is taken yet.
	messages   *messages
	conn       Connection
	cancelConn context.CancelFunc // ends conn's context
	cancelOp   context.CancelFunc
	// tokenEgress is the egress that the present login token is for.
	tokenEgress string
	// dialNumber counts the dials, so that events of an old connection can be ignored.
	dialNumber int
	// earlyEvents are events that came before the result of their dial.
	earlyEvents []session.Event

	writing         bool
	writeAfter      time.Time
	writeFailures   int
	pending         *session.Publication
	publishing      bool
	publishAfter    time.Time
	publishFailures int
}

func newSupervisor(d dependencies, log logr.Logger, obj *v1alpha1.WhatsAppSession, worker, process string, pace *session.Pace) *supervisor {
	s := &supervisor{
		dependencies: d,
		base:         log,
		key:          types.NamespacedName{Namespace: obj.Namespace, Name: obj.Name},
		uid:          obj.UID,
		inbox:        make(chan func(), 16),
		finished:     make(chan struct{}),
		machine: session.New(session.Config{
			Worker: worker, Process: process, Random: rand.Float64, Quarantine: d.Quarantine, Fleet: d.Fleet, Pace: pace,
		}),
	}
	return s
}

// step gives an input to the machine.
func (s *supervisor) step(in session.Input) { s.machine.Step(in, s.Clock.Now()) }

// log returns a logger with the session's keys. It is made for each line, because a
// logger takes kilobytes and a session that works logs nothing for days.
func (s *supervisor) log() logr.Logger {
	id := ""
	if obj := s.machine.Object(); obj != nil {
		id = obj.Status.SessionID
	}
	return s.base.WithValues("session", s.key.Name, "namespace", s.key.Namespace, "sessionID", id)
}

// post makes the supervisor's goroutine call f, unless that goroutine has ended.
func (s *supervisor) post(f func()) {
	select {
	case s.inbox <- f:
	case <-s.finished:
	}
}

// run supervises until this worker no longer has anything of the session, or until
// ctx ends. In both cases it closes the socket. After the end of ctx the session is
// still held, and a restart in place continues with it.
func (s *supervisor) run(ctx context.Context) {
	opsCtx, cancelOps := context.WithCancel(ctx)
	timer := s.Clock.NewTimer(time.Hour)
	defer func() {
		timer.Stop()
		cancelOps()
		s.drainWork()
		s.Fleet.forget(s.uid)
		s.Inbox.forget(s)
		closeSocket := s.closeSocket()
		s.work.Go(func() { closeSocket(ctx) })
		s.drainWork() // again, because Close waits until its last events are in the inbox
		close(s.finished)
	}()
	for {
		now := s.Clock.Now()
		if s.machine.Object() != nil {
			s.carryOut(opsCtx, s.machine.Next(now))
			s.publish(opsCtx, now)
			s.write(opsCtx, now)
			phase := s.machine.Phase()
			s.phase.Store(&phase)
			s.quarantined.Store(s.machine.Quarantined())
			s.observeMessages()
			// The machine has waited for a pending publication before the release. If it is still
			// pending, the next holder publishes the present state.
			if s.machine.Finished() && !s.writing {
				return
			}
		}
		timer.Stop()
		if wake := s.wakeAt(now); !wake.IsZero() {
			timer.Reset(wake.Sub(s.Clock.Now()))
		}
		select {
		case f := <-s.inbox:
			f()
		case <-timer.C():
		case <-ctx.Done():
			return
		}
	}
}

// drainWork empties the inbox until all work has ended.
func (s *supervisor) drainWork() {
	ended := make(chan struct{})
	go func() { s.work.Wait(); close(ended) }()
	for {
		select {
		case f := <-s.inbox:
			f()
		case <-ended:
			return
		}
	}
}

// wakeAt is the next time after now at which there is something to do; zero: there
// is nothing to do until something happens.
func (s *supervisor) wakeAt(now time.Time) time.Time {
	earliest := s.machine.WakeAt(now)
	for _, t := range []time.Time{s.writeAfter, s.publishAfter} {
		if t.After(now) && (earliest.IsZero() || t.Before(earliest)) {
			earliest = t
		}
	}
	return earliest
}

// observe gives an object to the machine if it is newer than the known one.
func (s *supervisor) observe(obj *v1alpha1.WhatsAppSession) {
	if obj.UID != s.uid {
		s.step(session.Vanished{}) // deleted and created again: a new session, which gets its own supervisor
		return
	}
	if known := s.machine.Object(); known != nil {
		switch order, err := resourceversion.CompareResourceVersion(obj.ResourceVersion, known.ResourceVersion); {
		case err == nil && order == 0:
			s.step(session.SameObject{Object: obj}) // saves memory: this may be the copy that the cache keeps anyway
			return
		case err == nil && order < 0:
			return
		}
	}
	s.step(session.Observed{Object: obj})
}

// carryOut does what the machine has decided. publish publishes later what is pending.
func (s *supervisor) carryOut(ctx context.Context, d session.Decision) {
	if d.Restarted {
		s.Fleet.endPause()
	}
	if d.Cancel && s.cancelOp != nil {
		s.cancelOp()
	}
	s.recordEvents(d.Events)
	if d.Publication != nil {
		d.Publication.Supersede(s.pending)
		s.pending = d.Publication
	}
	if d.Operation == session.OpNone {
		return
	}
	if s.base.V(1).Enabled() {
		s.log().V(1).Info("Starting the next step", "rule", d.Rule, "operation", string(d.Operation), "epoch", s.machine.Object().Status.Epoch)
	}
	s.begin(ctx, d)
}

// begin starts an operation in a goroutine; its result comes through the inbox.
func (s *supervisor) begin(opsCtx context.Context, d session.Decision) {
	ctx, cancel := context.WithCancel(opsCtx)
	s.cancelOp = cancel
	var perform func(context.Context) func() session.Input
	switch d.Operation {
	case session.OpToken:
		perform = s.getToken()
	case session.OpTake:
		perform = s.take()
	case session.OpDial:
		perform = s.connect(opsCtx, d)
	case session.OpClose:
		perform = s.closeSocket()
	case session.OpLogout:
		perform = s.logout()
	case session.OpForget:
		perform = s.forget()
	case session.OpPasskeyAnswer:
		perform = s.answerPasskey(d.PasskeyResponse)
	case session.OpPasskeyConfirm:
		perform = s.confirmPasskey()
	case session.OpSettle:
		perform = s.settle()
	case session.OpTrial:
		perform = s.recordTrial(d.Trial)
	case session.OpVerify:
		perform = s.verify(d.Phone)
	}
	s.work.Go(func() {
		defer cancel()
		result := perform(ctx)
		s.post(func() {
			s.cancelOp = nil
			s.step(result())
			s.replayEarlyEvents()
		})
	})
}

func (s *supervisor) getToken() func(context.Context) func() session.Input {
	obj, login := s.machine.Object(), s.login(s.machine.Object().Status.JID == "")
	return func(ctx context.Context) func() session.Input {
		login.Egress = s.egress(ctx, obj)
		err := s.Limiter.Wait(ctx, login)
		return func() session.Input {
			s.tokenEgress = login.Egress
			return session.TokenResult{Granted: err == nil}
		}
	}
}

// login describes the session's next attempt for the limiter. The egress is missing,
// because reading it needs the API server.
func (s *supervisor) login(pairing bool) Login {
	return Login{Namespace: s.key.Namespace, Pairing: pairing, Unstable: !pairing && s.machine.Unstable()}
}

func (s *supervisor) take() func(context.Context) func() session.Input {
	obj := s.machine.Object()
	return func(op context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(op, requestTimeout)
		defer cancel()
		account, err := s.Accounts.Take(ctx, obj.UID, obj.Status.Epoch)
		if op.Err() == nil { // a cancelled attempt has no result
			s.Health.recordTake(s.uid, err)
		}
		return func() session.Input {
			switch {
			case errors.Is(err, ErrNoRecord):
				return session.NoRecord{}
			case err != nil:
				return s.failure(v1alpha1.ReasonStoreUnavailable, "the database did not give the device's keys", err)
			}
			s.account = account
			s.messages = newMessages(account, obj.Status.Epoch, s.DropMessages)
			s.observeMessages()
			s.log().Info("Took the device", "epoch", obj.Status.Epoch, "starts", account.Starts(), "paired", account.JID() != "")
			return session.Taken{Epoch: obj.Status.Epoch, Device: session.Device{
				Starts: account.Starts(), JID: account.JID(), PhoneNumber: account.PhoneNumber(),
				Unsettled: account.Unsettled(), Trial: account.Trial(),
			}}
		}
	}
}

// failure turns an error of the store, the proxy or the connection into an input.
func (s *supervisor) failure(reason, sentence string, err error) session.Input {
	var behind *EpochBehindError
	var setup *SetupError
	switch {
	case errors.Is(err, context.Canceled) && !s.machine.Wanted(s.Clock.Now()):
		return session.Cancelled{}
	case errors.As(err, &behind):
		s.log().Info("Found a higher epoch in the store", "epoch", s.machine.Object().Status.Epoch, "storedEpoch", behind.Stored)
		return session.EpochBehind{Stored: behind.Stored}
	case errors.As(err, &setup):
		s.log().Info("Waiting until a person corrects the session's configuration", "reason", setup.Reason, "message", setup.Message)
		return session.SetupInvalid{Reason: setup.Reason, Message: setup.Message}
	default:
		s.log().Error(err, "Failed to perform an operation", "reason", reason, "epoch", s.machine.Object().Status.Epoch, "attempts", s.machine.Attempts())
		// Only this error's text is shown to the tenant. Others name hosts and users of the installation.
		var refused *whatsapp.ConnectError
		if errors.As(err, &refused) {
			metrics.ConnectionEnded(refused.Reason)
			sentence += ": " + status.Clean(refused.Message, 256)
		}
		return session.Failed{Reason: reason, Message: sentence}
	}
}

func (s *supervisor) connect(opsCtx context.Context, d session.Decision) func(context.Context) func() session.Input {
	obj, account, accept, hasToken, tokenEgress := s.machine.Object(), s.account, s.messages.accept, d.HasToken, s.tokenEgress
	login := s.login(!s.machine.Paired())
	s.dialNumber++
	s.Dials.Add(1)
	s.earlyEvents = nil
	number := s.dialNumber
	connCtx, cancelConn := context.WithCancel(opsCtx)
	s.cancelConn = cancelConn
	return func(ctx context.Context) func() session.Input {
		// Until the socket is open, cancelling the operation also ends the connection.
		release := context.AfterFunc(ctx, cancelConn)
		defer release()
		conn, err := func() (Connection, error) {
			login.Egress = s.egress(ctx, obj)
			hasToken = hasToken && tokenEgress == login.Egress // the proxy may have changed since the token was granted
			if err := s.waitForTurn(ctx, login, hasToken); err != nil {
				return nil, err
			}
			proxy, err := s.Proxies.Proxy(ctx, obj)
			if err != nil {
				return nil, err
			}
			conn, err := account.Dial(connCtx, DialOptions{DeviceName: d.Dial.DeviceName, PairPhone: d.Dial.PairPhone, Proxy: proxy, Accept: accept, Events: func(e session.Event) {
				s.post(func() { s.onEvent(number, e) })
			}})
			if ctx.Err() == nil {
				s.Health.recordDial(s.uid, login.Egress, err)
			}
			return conn, err
		}()
		cancelled := ctx.Err() != nil
		return func() session.Input {
			if err != nil {
				cancelConn()
				s.earlyEvents = nil
				s.Fleet.onAttemptEnded(s.uid)
				if cancelled { // the machine no longer wanted it, so it is no failure
					return session.Cancelled{}
				}
				return s.failure(v1alpha1.ReasonConnectFailed, "the connection to WhatsApp could not be opened", err)
			}
			s.conn = conn
			if live, ok := conn.(lastSeen); ok {
				s.live.Store(&live)
			}
			if cancelled { // too late: the socket is open, and the machine closes it
				s.earlyEvents = nil
			}
			return session.Dialed{Paired: conn.Paired(), Cancelled: cancelled}
		}
	}
}

// replayEarlyEvents handles the events that came before the result of their dial.
func (s *supervisor) replayEarlyEvents() {
	events := s.earlyEvents
	s.earlyEvents = nil
	for _, e := range events {
		s.onEvent(s.dialNumber, e)
	}
}

// waitForTurn returns when the session has a login token and the breaker for an
// outdated client admits it.
func (s *supervisor) waitForTurn(ctx context.Context, login Login, hasToken bool) error {
	for {
		waited, err := s.Fleet.wait(ctx, s.uid)
		if err != nil {
			return err
		}
		if hasToken && !waited { // after a wait, all sessions are admitted at once, so each needs a new token
			return nil
		}
		admittedCtx, cancel := s.Fleet.whileAdmitted(ctx, s.uid)
		err = s.Limiter.Wait(admittedCtx, login)
		cancel()
		switch admitted, _ := s.Fleet.admits(s.uid); {
		case ctx.Err() != nil:
			return ctx.Err()
		case !admitted: // the breaker has opened meanwhile; sessions that still waited used no token
			hasToken = false
		case err == nil:
			return nil
		case admittedCtx.Err() == nil:
			return err
		}
	}
}

func (s *supervisor) onEvent(number int, e session.Event) {
	switch {
	case number != s.dialNumber:
	case s.machine.Running() == session.OpDial:
		s.earlyEvents = append(s.earlyEvents, e) // an event may come before Dial returns
	default:
		s.log().Info("Received an event of the connection", "event", string(e.Type), "reason", e.Reason, "epoch", s.machine.Object().Status.Epoch)
		s.countEvent(e)
		s.Fleet.onEvent(s.uid, e)
		s.step(e)
	}
}

// observeMessages applies the newest spec to the messages, and waits for the inbox where the
// machine does.
func (s *supervisor) observeMessages() {
	obj := s.machine.Object()
	if s.messages == nil {
		return
	}
	s.messages.observe(obj)
	reason := s.machine.Awaits()
	if reason == "" { // also without an answer: a person may have started the session again
		s.Inbox.forget(s)
		return
	}
	a := awaited{reason: reason, sessionID: obj.Status.SessionID, namespace: obj.Namespace}
	if bound := s.messages.over.Load(); bound != nil && reason == session.EndBacklog {
		a.bound = *bound
	}
	s.Inbox.await(s, a)
}

// countEvent counts the ends of connections and the reconnections.
func (s *supervisor) countEvent(e session.Event) {
	switch {
	case e.Over():
		s.lastEnd = e.Reason
		metrics.ConnectionEnded(e.Reason)
	case e.Type == session.EventConnected && s.lastEnd != "":
		metrics.Reconnected(s.lastEnd)
		s.lastEnd = ""
	}
}

func (s *supervisor) closeSocket() func(context.Context) func() session.Input {
	conn, cancelConn := s.conn, s.cancelConn
	s.dialNumber++ // later events of the old connection are ignored
	s.live.Store(nil)
	s.Fleet.onAttemptEnded(s.uid)
	return func(context.Context) func() session.Input {
		if conn != nil {
			conn.Close() // before its context ends, or whatsmeow's reader waits forever
		}
		if cancelConn != nil {
			cancelConn()
		}
		return func() session.Input {
			s.conn, s.cancelConn = nil, nil
			return session.Closed{}
		}
	}
}

func (s *supervisor) logout() func(context.Context) func() session.Input {
	conn := s.conn
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, logoutTimeout)
		defer cancel()
		err := conn.Logout(ctx)
		return func() session.Input {
			if err != nil {
				s.log().Error(err, "Failed to log out", "epoch", s.machine.Object().Status.Epoch)
			} else {
				s.log().Info("Logged out", "epoch", s.machine.Object().Status.Epoch)
			}
			return session.LogoutResult{Failed: err != nil}
		}
	}
}

func (s *supervisor) settle() func(context.Context) func() session.Input {
	account := s.account
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, settleTimeout)
		defer cancel()
		err := account.Settle(ctx)
		return func() session.Input {
			if err != nil {
				s.log().Error(err, "Failed to settle the taking of the device", "epoch", s.machine.Object().Status.Epoch)
			}
			return session.Settled{Failed: err != nil}
		}
	}
}

func (s *supervisor) answerPasskey(response string) func(context.Context) func() session.Input {
	conn := s.conn
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, passkeyTimeout)
		defer cancel()
		err := conn.AnswerPasskey(ctx, response)
		return func() session.Input {
			return session.PasskeyAnswered{Why: s.passkeyResult(err, "Gave WhatsApp the answer of the passkey", "Failed to give WhatsApp the answer of the passkey")}
		}
	}
}

func (s *supervisor) confirmPasskey() func(context.Context) func() session.Input {
	conn := s.conn
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, passkeyTimeout)
		defer cancel()
		err := conn.ConfirmPasskey(ctx)
		return func() session.Input {
			return session.PasskeyConfirmed{Why: s.passkeyResult(err, "Confirmed the passkey", "Failed to confirm the passkey")}
		}
	}
}

// passkeyResult logs what came of a step of a passkey's exchange, and returns why it failed.
func (s *supervisor) passkeyResult(err error, done, failed string) string {
	epoch := s.machine.Object().Status.Epoch
	if err != nil {
		s.log().Error(err, failed, "epoch", epoch)
		return status.Clean(err.Error(), 200)
	}
	s.log().Info(done, "epoch", epoch)
	return ""
}

func (s *supervisor) recordTrial(trial int32) func(context.Context) func() session.Input {
	account := s.account
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, settleTimeout)
		defer cancel()
		err := account.RecordTrial(ctx, trial)
		return func() session.Input {
			epoch := s.machine.Object().Status.Epoch
			switch {
			case err != nil:
				s.log().Error(err, "Failed to record the trial of a session that may end its worker", "epoch", epoch, "trial", trial)
			case trial != 0:
				s.log().Info("Connecting a session that may end its worker", "epoch", epoch, "groupSize", session.GroupSize(trial))
			}
			return session.TrialRecorded{Failed: err != nil}
		}
	}
}

func (s *supervisor) verify(phone string) func(context.Context) func() session.Input {
	conn := s.conn
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
		defer cancel()
		same, err := conn.SameAccount(ctx, phone)
		return func() session.Input {
			if err != nil {
				s.log().Error(err, "Failed to ask WhatsApp which account spec.pairing.phoneNumber belongs to; trying again", "epoch", s.machine.Object().Status.Epoch)
				return session.VerifyFailed{}
			}
			return session.Verified{SameAccount: same}
		}
	}
}

func (s *supervisor) forget() func(context.Context) func() session.Input {
	account := s.account
	return func(ctx context.Context) func() session.Input {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		err := account.Forget(ctx)
		return func() session.Input {
			if err != nil {
				return s.failure(v1alpha1.ReasonStoreUnavailable, "the keys of the deleted session could not be deleted", err)
			}
			return session.Forgotten{}
		}
	}
}

// write writes the status to the API server if it has changed.
func (s *supervisor) write(ctx context.Context, now time.Time) {
	if s.writing || now.Before(s.writeAfter) {
		return
	}
	desired, needed := s.machine.Status(now)
	if !needed {
		s.writeAfter = time.Time{}
		return
	}
	s.writing = true
	base := s.machine.Object()
	s.work.Go(func() {
		written, err := s.patch(ctx, base, desired)
		s.post(func() {
			s.writing = false
			switch {
			case written != nil && written.ResourceVersion != base.ResourceVersion:
				s.writeFailures, s.writeAfter = 0, time.Time{}
			default: // also if the write changed nothing: the API server keeps something else than was written
				s.log().Error(err, "Failed to write the status")
				s.writeFailures++
				s.writeAfter = s.Clock.Now().Add(pause(s.writeFailures))
			}
			switch {
			case written != nil:
				s.observe(written)
			case apierrors.IsNotFound(err):
				s.step(session.Vanished{})
			}
		})
	})
}

// patch writes a status. After an error it reads the object, because the answer may
// have been lost or the base may have been stale.
func (s *supervisor) patch(ctx context.Context, base *v1alpha1.WhatsAppSession, desired v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error) {
	written, err := s.Sessions.PatchStatus(ctx, base, desired)
	if err == nil {
		return written, nil
	}
	fresh, getErr := s.Sessions.Get(ctx, s.key)
	switch {
	case getErr == nil:
		return fresh, err
	case apierrors.IsNotFound(getErr):
		return nil, getErr
	default:
		return nil, err
	}
}

// publish publishes the pending publication to Redis, one call at a time.
func (s *supervisor) publish(ctx context.Context, now time.Time) {
	if s.pending == nil || s.publishing || now.Before(s.publishAfter) {
		return
	}
	p := s.pending
	s.pending, s.publishing = nil, true
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		err := s.Publisher.Publish(ctx, *p)
		s.post(func() {
			s.publishing = false
			var stale *StaleError
			if errors.As(err, &stale) { // repeating it cannot help
				s.log().Info("Found something newer of the session in Redis; the manager must place it with a higher epoch", "epoch", p.Status.Epoch, "storedEpoch", stale.Epoch)
				s.step(session.Stale{Epoch: stale.Epoch})
				err = nil
			}
			if err == nil {
				s.lastPublished.Store(p)
				s.publishFailures, s.publishAfter = 0, time.Time{}
				if s.pending == nil {
					s.step(session.Published{})
				}
				return
			}
			s.log().Error(err, "Failed to publish the session's state; trying again", "epoch", p.Status.Epoch)
			if s.pending == nil {
				s.pending = p
			} else {
				s.pending.Supersede(p)
			}
			s.publishFailures++
			s.publishAfter = s.Clock.Now().Add(pause(s.publishFailures))
		})
	})
}

// recordEvents records the Events of a decision.
func (s *supervisor) recordEvents(events []session.RecordedEvent) {
	for _, e := range events {
		if e.Reason == v1alpha1.ReasonQuarantined {
			metrics.Quarantined()
		}
		if e.Warning() {
			s.log().Info("Recording a warning", "reason", e.Reason, "message", e.Message)
		}
		s.Events.Event(s.machine.Object(), e.Type, e.Reason, status.Clean(e.Message, 512))
	}
}

// pause is the wait after that many failures in a row; half of it is random.
func pause(failures int) time.Duration {
	return backoff.HalfJitter(backoff.Backoff{First: retryFirst, Most: retryMost}.After(failures), rand.Float64())
}
