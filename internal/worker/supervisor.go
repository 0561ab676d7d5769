package worker

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

const (
	// requestTimeout bounds one request to the API server, the store or Redis.
	requestTimeout = 10 * time.Second
	// logoutAttempt bounds one attempt at a logout.
	logoutAttempt = 30 * time.Second
	// retryFirst and retryMost bound the pause after a failed write to the API server or to Redis.
	retryFirst = 500 * time.Millisecond
	retryMost  = 15 * time.Second
)

// dependencies are what every supervisor of a worker uses.
type dependencies struct {
	Sessions  Sessions
	Accounts  Accounts
	Proxies   Proxies
	Announcer Announcer
	Limiter   Limiter
	Events    Events
	Clock     clock.Clock
	// Dials counts the connections that were begun.
	Dials      *atomic.Int64
	Quarantine Quarantine
	// Fleet is what the session shares with the others of this worker.
	Fleet *fleet
}

// supervisor owns one session: its goroutine alone touches the model; blocking
// work runs beside it, one piece of each sort at a time, and comes back through
// the inbox.
type supervisor struct {
	dependencies
	base  logr.Logger // see log
	key   types.NamespacedName
	uid   types.UID
	inbox chan func()
	// finished is closed when the goroutine has ended and nothing of it runs any more.
	finished chan struct{}
	// snapshot is what the agent refreshes the cache with.
	snapshot atomic.Pointer[Announcement]
	// phase is what the agent counts.
	phase atomic.Pointer[v1alpha1.Phase]
	// quarantined and live are for its metrics.
	quarantined atomic.Bool
	live        atomic.Pointer[sign]
	// lastEnd is why the last connection ended; empty: there was none, or it is replaced.
	lastEnd string

	m        *model
	work     sync.WaitGroup
	account  Account
	conn     Connection
	hangUp   context.CancelFunc // ends conn's context
	cancelOp context.CancelFunc
	// tokenEgress is the way out that the login token in hand (m.token) is for.
	tokenEgress string
	// dial counts the connections, so that an old one's events are told from the present one's.
	dial  int
	early []whatsapp.Event

	writing       bool
	writeAfter    time.Time
	writeFails    int
	pending       *Announcement
	announcing    bool
	announceAfter time.Time
	announceFails int
}

func newSupervisor(d dependencies, log logr.Logger, obj *v1alpha1.WhatsAppSession, worker, process string) *supervisor {
	s := &supervisor{
		dependencies: d,
		base:         log,
		key:          types.NamespacedName{Namespace: obj.Namespace, Name: obj.Name},
		uid:          obj.UID,
		inbox:        make(chan func(), 16),
		finished:     make(chan struct{}),
		m:            newModel(worker, process, rand.Float64),
	}
	s.m.quarantine, s.m.around = d.Quarantine.orDefault(), d.Fleet
	return s
}

// log names the session. The logger is made when something is said: each keeps
// kilobytes, and a session that is well says nothing for days.
func (s *supervisor) log() logr.Logger {
	id := ""
	if s.m.obj != nil {
		id = s.m.obj.Status.SessionID
	}
	return s.base.WithValues("session", s.key.Name, "namespace", s.key.Namespace, "sessionID", id)
}

// post hands f to the supervisor's goroutine, unless that has ended.
func (s *supervisor) post(f func()) {
	select {
	case s.inbox <- f:
	case <-s.finished:
	}
}

// run supervises until nothing of the session is left here, or ctx ends; then
// the socket is closed and, ctx having ended, the hold is left to a restart in place.
func (s *supervisor) run(ctx context.Context) {
	opsCtx, cancelOps := context.WithCancel(ctx)
	timer := s.Clock.NewTimer(time.Hour)
	defer func() {
		timer.Stop()
		cancelOps()
		s.drainWork()
		s.Fleet.left(s.uid)
		closeSocket := s.closeSocket()
		s.work.Go(func() { closeSocket(ctx) })
		s.drainWork() // again: Close waits for events that are on their way to the inbox
		close(s.finished)
	}()
	for {
		now := s.Clock.Now()
		if s.m.obj != nil {
			s.m.tick(now)
			if s.m.restarted {
				s.m.restarted = false
				s.Fleet.again()
			}
			s.advance(opsCtx, now)
			s.notify()
			s.announce(opsCtx, now)
			s.write(opsCtx, now)
			phase := s.m.want.Phase
			s.phase.Store(&phase)
			s.quarantined.Store(s.m.stalled())
			// What is still to be told was given its moment before the release; whoever has
			// the session now tells the present state.
			if s.m.done() && !s.writing {
				return
			}
		}
		timer.Stop()
		if wake := s.wakeAt(now); !wake.IsZero() {
			timer.Reset(wake.Sub(now))
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

// drainWork waits for the work under way while it empties the inbox.
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

// wakeAt is the next time after now at which there is something to do; zero:
// none. What was due by now has been done, or waits for something else.
func (s *supervisor) wakeAt(now time.Time) (earliest time.Time) {
	if s.m.obj == nil {
		return earliest
	}
	for _, t := range append(s.m.wakeAt(), s.writeAfter, s.announceAfter) {
		if t.After(now) && (earliest.IsZero() || t.Before(earliest)) {
			earliest = t
		}
	}
	return earliest
}

// observe takes note of an object if it is newer than the one known.
func (s *supervisor) observe(obj *v1alpha1.WhatsAppSession) {
	if obj.UID != s.uid {
		s.m.vanish() // deleted and made anew: another session, with a supervisor of its own
		return
	}
	if s.m.obj != nil {
		switch order, err := resourceversion.CompareResourceVersion(obj.ResourceVersion, s.m.obj.ResourceVersion); {
		case err == nil && order == 0:
			s.m.obj = obj // the same: one copy less is kept where this is the cache's
			return
		case err == nil && order < 0:
			return
		}
	}
	s.m.observe(obj, s.Clock.Now())
}

// advance carries out the rules.
func (s *supervisor) advance(ctx context.Context, now time.Time) {
	if s.cancelOp != nil && s.m.cancels(now) {
		s.cancelOp()
	}
	for range 4 { // a rule that only changes the model may make way for another
		name, op := s.m.decide(now)
		if op != opNone {
			if s.base.V(1).Enabled() {
				s.log().V(1).Info("Next step", "rule", name, "operation", string(op), "epoch", s.m.obj.Status.Epoch)
			}
			s.begin(ctx, op)
			return
		}
	}
}

// begin starts an operation beside the goroutine; its outcome comes through the inbox.
func (s *supervisor) begin(life context.Context, op operation) {
	ctx, cancel := context.WithCancel(life)
	s.cancelOp = cancel
	s.m.running = op
	var perform func(context.Context) func(now time.Time)
	switch op {
	case opToken:
		perform = s.getToken()
	case opTake:
		perform = s.take()
	case opDial:
		perform = s.connect(life)
	case opClose:
		perform = s.closeSocket()
	case opLogout:
		perform = s.logout()
	case opForget:
		perform = s.forget()
	}
	s.work.Go(func() {
		defer cancel()
		outcome := perform(ctx)
		s.post(func() {
			s.m.running, s.cancelOp = opNone, nil
			outcome(s.Clock.Now())
		})
	})
}

func (s *supervisor) getToken() func(context.Context) func(time.Time) {
	obj, login := s.m.obj, s.login(s.m.obj.Status.JID == "")
	return func(ctx context.Context) func(time.Time) {
		login.Egress = s.egress(ctx, obj)
		err := s.Limiter.Wait(ctx, login)
		return func(time.Time) { s.m.token, s.tokenEgress = err == nil, login.Egress }
	}
}

// login is the session's next attempt, as the limiter is to see it, but for its
// way out (egress), which needs the API server. A session that has failed since
// its last stable minute counts as unproven, too: to have been connected once
// does not make the hundredth attempt of a loop a good one.
func (s *supervisor) login(pairing bool) Login {
	return Login{
		Namespace: s.key.Namespace, Pairing: pairing,
		Unproven: !pairing && (s.m.want.LastConnectedTime == nil || s.m.want.Failures > 0),
	}
}

func (s *supervisor) take() func(context.Context) func(time.Time) {
	obj := s.m.obj
	return func(ctx context.Context) func(time.Time) {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		account, err := s.Accounts.Take(ctx, obj.UID, obj.Status.Epoch)
		return func(now time.Time) {
			switch {
			case errors.Is(err, ErrNoRecord) && s.m.logoutWanted():
				s.m.forgotten = true
			case errors.Is(err, ErrNoRecord):
				s.fail("", "", &Refusal{
					Reason:  v1alpha1.ReasonRecordMissing,
					Message: "the database has no record of this session; if it was restored from an older copy, delete the session and apply it again",
				}, now)
			case err != nil:
				s.fail(v1alpha1.ReasonStoreUnavailable, "the database did not give the device's keys", err, now)
			case obj.Status.Epoch != s.m.obj.Status.Epoch || !s.m.held():
				// moved meanwhile: the next taking is under the new epoch
			default:
				s.account = account
				s.m.onTaken(account, now)
				s.log().Info("Took the device", "epoch", s.m.epoch, "starts", s.m.starts, "paired", s.m.want.JID != "")
			}
		}
	}
}

// fail sorts an error of the store, the proxy or the connection.
func (s *supervisor) fail(reason, sentence string, err error, now time.Time) {
	var behind *EpochBehindError
	var refusal *Refusal
	switch {
	case errors.Is(err, context.Canceled) && !s.m.stays(now):
		return
	case errors.As(err, &behind):
		s.log().Info("The store knows a higher epoch", "epoch", s.m.obj.Status.Epoch, "storedEpoch", behind.Stored)
		s.m.behind(behind.Stored, now)
	case errors.As(err, &refusal):
		s.log().Info("The session needs a person", "reason", refusal.Reason, "message", refusal.Message)
		s.m.refused(refusal, now)
	default:
		s.log().Error(err, "An attempt failed", "reason", reason, "epoch", s.m.obj.Status.Epoch, "attempts", s.m.attempts)
		// The text of other errors names hosts and users that are none of the tenant's business.
		var refused *whatsapp.ConnectError
		if errors.As(err, &refused) {
			metrics.ConnectionEnded(refused.Reason)
			sentence += ": " + status.Clean(refused.Message, 256)
		}
		s.m.failed(reason, sentence, now)
	}
}

func (s *supervisor) connect(life context.Context) func(context.Context) func(time.Time) {
	obj, account, hasToken, tokenEgress := s.m.obj, s.account, s.m.token, s.tokenEgress
	spec := s.m.dialSpec()
	pairing := s.m.want.JID == ""
	login := s.login(pairing)
	s.m.token = false
	s.dial++
	s.Dials.Add(1)
	s.m.dialing = spec
	if s.Fleet.holdsBack() {
		s.m.heldBack(s.Clock.Now())
	}
	s.early = nil
	number := s.dial
	life, hangUp := context.WithCancel(life)
	s.hangUp = hangUp
	return func(ctx context.Context) func(time.Time) {
		// Until the socket stands, what cancels the operation ends it too.
		release := context.AfterFunc(ctx, hangUp)
		defer release()
		conn, err := func() (Connection, error) {
			login.Egress = s.egress(ctx, obj)
			hasToken = hasToken && tokenEgress == login.Egress // the proxy may have changed since
			if err := s.turn(ctx, login, hasToken); err != nil {
				return nil, err
			}
			proxy, err := s.Proxies.Proxy(ctx, obj)
			if err != nil {
				return nil, err
			}
			return account.Dial(life, DialOptions{DeviceName: spec.deviceName, PairPhone: spec.pairPhone, Proxy: proxy, Events: func(e whatsapp.Event) {
				s.post(func() { s.onEvent(number, e) })
			}})
		}()
		cancelled := ctx.Err() != nil
		return func(now time.Time) {
			if err != nil {
				hangUp()
				s.Fleet.gone(s.uid)
				if cancelled { // it was not wanted any more, which is no failure
					return
				}
				s.fail(v1alpha1.ReasonConnectFailed, "the connection to WhatsApp could not be opened", err, now)
				return
			}
			s.conn = conn
			if live, ok := conn.(sign); ok {
				s.live.Store(&live)
			}
			if cancelled { // too late to stop it
				s.m.drop()
				s.early = nil
				return
			}
			s.m.onDialed(conn.Paired(), spec, now)
			for _, e := range s.early {
				s.onEvent(number, e)
			}
			s.early = nil
		}
	}
}

// turn returns when the session may connect: a login token is its own, and the
// breaker for an outdated client does not hold it back.
func (s *supervisor) turn(ctx context.Context, login Login, hasToken bool) error {
	for {
		waited, err := s.Fleet.wait(ctx, s.uid)
		if err != nil {
			return err
		}
		if hasToken && !waited { // an old token is not for the moment at which all are released
			return nil
		}
		queue, leave := s.Fleet.whileAdmitted(ctx, s.uid)
		err = s.Limiter.Wait(queue, login)
		leave()
		switch admitted, _ := s.Fleet.admits(s.uid); {
		case ctx.Err() != nil:
			return ctx.Err()
		case !admitted: // the breaker has opened meanwhile, which costs those who still queued no token
			hasToken = false
		case err == nil:
			return nil
		case queue.Err() == nil:
			return err
		}
	}
}

func (s *supervisor) onEvent(number int, e whatsapp.Event) {
	switch {
	case number != s.dial:
	case s.m.running == opDial:
		s.early = append(s.early, e) // the socket's own event may overtake the answer of Dial
	default:
		s.log().Info("WhatsApp says", "event", string(e.Type), "reason", e.Reason, "epoch", s.m.epoch)
		s.measure(e)
		s.Fleet.heard(s.uid, e)
		s.m.event(e, s.Clock.Now())
	}
}

// measure counts what happened on a connection.
func (s *supervisor) measure(e whatsapp.Event) {
	switch {
	case e.Over():
		s.lastEnd = e.Reason
		metrics.ConnectionEnded(e.Reason)
	case e.Type == whatsapp.EventConnected && s.lastEnd != "":
		metrics.Reconnected(s.lastEnd)
		s.lastEnd = ""
	}
}

func (s *supervisor) closeSocket() func(context.Context) func(time.Time) {
	conn, hangUp := s.conn, s.hangUp
	s.dial++ // what the old connection still says is of no interest
	s.live.Store(nil)
	s.Fleet.gone(s.uid)
	return func(context.Context) func(time.Time) {
		if conn != nil {
			conn.Close() // before its context ends: whatsmeow's reader would wait for ever
		}
		if hangUp != nil {
			hangUp()
		}
		return func(time.Time) { s.conn, s.hangUp, s.m.socket = nil, nil, socketNone }
	}
}

func (s *supervisor) logout() func(context.Context) func(time.Time) {
	conn := s.conn
	return func(ctx context.Context) func(time.Time) {
		ctx, cancel := context.WithTimeout(ctx, logoutAttempt)
		defer cancel()
		err := conn.Logout(ctx)
		return func(now time.Time) {
			if s.m.socket == socketOver {
				return // the connection's own event came first
			}
			if err != nil {
				s.log().Error(err, "The logout failed", "epoch", s.m.epoch)
				s.m.backOff(now)
				s.m.message = "the logout failed and is repeated"
				return
			}
			s.log().Info("Logged out", "epoch", s.m.epoch)
			s.m.onLoggedOut(now)
		}
	}
}

func (s *supervisor) forget() func(context.Context) func(time.Time) {
	account := s.account
	return func(ctx context.Context) func(time.Time) {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		err := account.Forget(ctx)
		return func(now time.Time) {
			if err != nil {
				s.fail(v1alpha1.ReasonStoreUnavailable, "the keys of the deleted session could not be deleted", err, now)
				return
			}
			s.m.forgotten = true
		}
	}
}

// write brings the status to the API server.
func (s *supervisor) write(ctx context.Context, now time.Time) {
	if s.writing || now.Before(s.writeAfter) {
		return
	}
	desired, needed := s.m.rendered(now)
	if !needed {
		s.writeAfter = time.Time{}
		return
	}
	s.writing = true
	base := s.m.obj
	s.work.Go(func() {
		written, err := s.patch(ctx, base, desired)
		s.post(func() {
			s.writing = false
			switch {
			case written != nil && written.ResourceVersion != base.ResourceVersion:
				s.writeFails, s.writeAfter = 0, time.Time{}
			default: // also a write that changed nothing: the API server keeps something else than was written
				s.log().Error(err, "The status could not be written")
				s.writeAfter = s.Clock.Now().Add(pause(s.writeFails))
				s.writeFails++
			}
			switch {
			case written != nil:
				s.observe(written)
			case apierrors.IsNotFound(err):
				s.m.vanish()
			}
		})
	})
}

// patch writes a status. After an error the answer may have been lost, or the
// base was old: what the API server has now is read in any case.
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

// announce brings to Redis what changed, the newest only, one call at a time.
func (s *supervisor) announce(ctx context.Context, now time.Time) {
	if a, changed := s.m.announcement(now); changed {
		s.wait(&a, s.pending)
	}
	s.m.telling = s.pending != nil || s.announcing
	if s.pending == nil || s.announcing || now.Before(s.announceAfter) {
		return
	}
	a := s.pending
	s.pending, s.announcing = nil, true
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		err := s.Announcer.Announce(ctx, *a)
		s.post(func() {
			s.announcing = false
			if err == nil {
				s.m.telling = s.pending != nil
				s.snapshot.Store(a)
				s.announceFails, s.announceAfter = 0, time.Time{}
				return
			}
			s.log().Error(err, "Redis did not take the session's state; it is tried again", "epoch", a.Status.Epoch)
			if s.pending == nil {
				s.pending = a
			} else {
				s.wait(s.pending, a)
			}
			s.announceAfter = s.Clock.Now().Add(pause(s.announceFails))
			s.announceFails++
		})
	})
}

// wait has an announcement wait in place of an older one, which Laravel may not
// have been told of.
func (s *supervisor) wait(a, older *Announcement) {
	if older != nil {
		a.NewStatus = a.NewStatus || older.NewStatus
		a.NewQR = a.QR != nil && (a.NewQR || older.NewQR)
	}
	s.pending = a
}

// notify records the Events that the model asks for.
func (s *supervisor) notify() {
	for _, n := range s.m.notes {
		if n.reason == v1alpha1.ReasonQuarantined {
			metrics.Quarantined()
		}
		if n.kind == corev1.EventTypeWarning {
			s.log().Info("A person is told", "reason", n.reason, "message", n.message)
		}
		s.Events.Event(s.m.obj, n.kind, n.reason, status.Clean(n.message, 512))
	}
	s.m.notes = nil
}

// pause is the wait after the n-th failure in a row: doubled each time, half of it by chance.
func pause(n int) time.Duration {
	interval := min(retryFirst<<min(n, 6), retryMost)
	return interval/2 + rand.N(interval/2)
}
