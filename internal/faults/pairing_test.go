//go:build faults

package faults

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// way is how a session is linked to a phone.
type way string

const (
	byQR             way = "qr"
	byReplacedQR     way = "replaced-qr" // WhatsApp retires the first code when it is scanned
	byCode           way = "code"
	byQRAndPasskey   way = "qr-passkey"
	byCodeAndPasskey way = "code-passkey"
)

const (
	// stageLasts is how long a stage lasts that ends by itself. A worker waits 15 s for the
	// 515.
	stageLasts = 12 * time.Second
	// personTimeout bounds one step of a person.
	personTimeout = 20 * time.Second
	// retryInterval is the pause after a step that failed, and repeatInterval that after
	// one that has changed nothing.
	retryInterval  = 3 * time.Second
	repeatInterval = 15 * time.Second
)

var ways = []way{byQR, byReplacedQR, byCode, byQRAndPasskey, byCodeAndPasskey}

func (w way) typed() bool   { return w == byCode || w == byCodeAndPasskey }
func (w way) passkey() bool { return w == byQRAndPasskey || w == byCodeAndPasskey }

// stage is how far a pairing comes before the fault.
type stage string

const (
	codeShown       stage = "code-shown" // of byReplacedQR: the second code
	passkeyAsked    stage = "passkey-asked"
	passkeyAnswered stage = "passkey-answered" // the phone has not continued yet
	linked          stage = "linked"           // WhatsApp has not sent the 515 yet
	loggingIn       stage = "logging-in"       // WhatsApp refuses the first login
)

// stages lists the stages of each way.
func (w way) stages() []stage {
	if w.passkey() {
		return []stage{passkeyAsked, passkeyAnswered, linked, loggingIn}
	}
	return []stage{codeShown, linked, loggingIn}
}

// newcomer is a session that is paired during a fault, and the person who pairs it.
type newcomer struct {
	*session
	way   way
	until stage
	// fromLaravel: the person sees what Laravel has, and not the status.
	fromLaravel bool

	// Guarded by people.mu.
	used     string // the code or request that the person used last, at usedAt
	usedAt   time.Time
	scans    int       // how often the person has scanned or typed a code
	busy     bool      // a step is under way
	notAgain time.Time // a failed step is not repeated before
	unwanted types.UID // an object that the person deletes and applies again
}

// people pair newcomers: each scans, types or answers what the session shows, again and
// again until it is linked.
type people struct {
	w *environment

	mu        sync.Mutex
	newcomers []*newcomer
	count     int  // of all newcomers so far
	recreated int  // how many newcomers were deleted and applied again
	waiting   bool // nobody does what comes after the newcomer's stage
	linking   bool // newcomers whose stages end by themselves do everything

	steps sync.WaitGroup
}

func newPeople(w *environment) *people {
	p := &people{w: w}
	w.atEnd(p.steps.Wait)
	w.every(poll, p.act)
	return p
}

// add starts to pair a session in that way.
func (p *people) add(way way, until stage) *newcomer {
	p.mu.Lock()
	p.count++
	n := &newcomer{
		session: &session{name: strings.TrimSuffix(fmt.Sprintf("p-%03d-%s-%s", p.count, way, until), "-"), phone: fmt.Sprintf("3470%07d", p.count)},
		way:     way, until: until,
	}
	n.fromLaravel = p.count%2 == 0 && !n.late() // Laravel gets a code only each 30 s
	p.mu.Unlock()
	p.w.inject(n.faults()...)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.newcomers = append(p.newcomers, n)
	return n
}

// faults are the simulator's faults that belong to the newcomer's way.
func (n *newcomer) faults() []simulator.Fault {
	switch {
	case n.way == byReplacedQR:
		return []simulator.Fault{{Kind: simulator.FaultRetireCode, Device: n.phone}}
	case n.way.passkey():
		return []simulator.Fault{{Kind: simulator.FaultPasskey, Device: n.phone}}
	default:
		return nil
	}
}

// delays are the simulator's faults that make the newcomer's stage last.
func (n *newcomer) delays() []simulator.Fault {
	last := metav1.Duration{Duration: stageLasts}
	switch n.until {
	case passkeyAnswered:
		return []simulator.Fault{{Kind: simulator.FaultSlowPasskey, Device: n.phone, Delay: last}}
	case linked:
		return []simulator.Fault{{Kind: simulator.FaultSlowEnd, Device: n.phone, Delay: last}}
	case loggingIn:
		return []simulator.Fault{{Kind: simulator.FaultRefuse, Device: n.phone, For: last}}
	default:
		return nil
	}
}

func (w *environment) inject(faults ...simulator.Fault) {
	for _, f := range faults {
		if _, err := w.simulator.Inject(f); err != nil {
			w.reportViolation("the simulator: %v", err)
		}
	}
}

// all returns the newcomers.
func (p *people) all() []*newcomer {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.newcomers)
}

// recreations is how many newcomers were deleted and applied again.
func (p *people) recreations() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recreated
}

// rearm injects the faults again that belong to a way, after all faults were cleared.
func (p *people) rearm() {
	for _, n := range p.all() {
		p.w.inject(n.faults()...)
	}
}

// release lets everybody do all steps.
func (p *people) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = false
}

// recreate deletes the object of a newcomer, and applies it again when it is gone.
func (p *people) recreate(n *newcomer) {
	for _, obj := range p.w.history.all() {
		if obj.Name == n.name {
			p.mu.Lock()
			n.unwanted = obj.UID
			p.recreated++
			p.mu.Unlock()
		}
	}
}

// act starts the next step of each newcomer.
func (p *people) act(ctx context.Context) {
	objects := map[string]*v1alpha1.WhatsAppSession{}
	for _, obj := range p.w.history.all() {
		objects[obj.Name] = obj
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.newcomers {
		if n.busy || time.Now().Before(n.notAgain) {
			continue
		}
		step := p.next(n, objects[n.name])
		if step == nil {
			continue
		}
		n.busy = true
		p.steps.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, personTimeout)
			defer cancel()
			err := step(ctx)
			if err != nil && ctx.Err() == nil {
				p.w.record("%s: %v", n.name, err)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			n.busy = false
			if err != nil { // the code may be accepted later
				n.used, n.notAgain = "", time.Now().Add(retryInterval)
			}
		})
	}
}

// next returns the next step of a newcomer; nil: there is nothing to do. The caller holds p.mu.
func (p *people) next(n *newcomer, obj *v1alpha1.WhatsAppSession) func(context.Context) error {
	switch {
	case obj == nil:
		return func(ctx context.Context) error { return p.apply(ctx, n) }
	case obj.UID == n.unwanted && obj.DeletionTimestamp.IsZero():
		return func(ctx context.Context) error {
			return client.IgnoreNotFound(p.w.client.Delete(ctx, obj, client.Preconditions{UID: &obj.UID}))
		}
	case !obj.DeletionTimestamp.IsZero(), obj.Status.Phase == v1alpha1.PhaseConnected:
		return nil
	}
	code, request := p.sees(n, obj)
	if code+request == n.used && time.Since(n.usedAt) < repeatInterval {
		return nil
	}
	switch {
	case request != "" && p.may(n, false):
		n.used, n.usedAt = request, time.Now()
		return func(ctx context.Context) error {
			answer, err := p.w.simulator.AnswerPasskey(n.phone, []byte(request))
			if err != nil {
				return err
			}
			return p.annotate(ctx, n, v1alpha1.PasskeyResponseAnnotation, string(answer))
		}
	case code != "" && p.may(n, true):
		n.used, n.usedAt = code, time.Now()
		n.scans++
		return func(ctx context.Context) (err error) {
			if n.way.typed() {
				_, err = p.w.simulator.EnterCode(ctx, n.phone, code)
			} else {
				_, err = p.w.simulator.Scan(ctx, code, n.phone)
			}
			return err
		}
	}
	return nil
}

// sees returns what a person sees: a code, or the request for the passkey.
func (p *people) sees(n *newcomer, obj *v1alpha1.WhatsAppSession) (code, request string) {
	if n.fromLaravel {
		item := p.w.laravel.Code(n.name)
		switch {
		case !item.ExpiresAt.After(time.Now()):
			return "", ""
		case item.Passkey != nil:
			return "", string(item.Passkey.RequestOptions)
		default:
			return item.QR + item.PairingCode, ""
		}
	}
	switch s := obj.Status; {
	case s.Passkey != nil:
		return "", s.Passkey.RequestOptions
	case s.QR != nil:
		return s.QR.Code, ""
	default:
		return s.PairingCode, ""
	}
}

// may reports whether a newcomer's stage comes after the scan of a code, or after the
// answer of the passkey. The caller holds p.mu.
func (p *people) may(n *newcomer, scan bool) bool {
	switch {
	case !p.waiting, n.late() && p.linking:
		return true
	case !scan:
		return false
	default:
		return n.way.passkey() || n.way == byReplacedQR && n.scans == 0
	}
}

// late reports whether the newcomer's stage ends by itself, so that it begins last.
func (n *newcomer) late() bool {
	return n.until == passkeyAnswered || n.until == linked || n.until == loggingIn
}

func (p *people) apply(ctx context.Context, n *newcomer) error {
	obj := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: p.w.namespace, Name: n.name}}
	if n.way.typed() {
		obj.Spec.Pairing.Method, obj.Spec.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, "+"+n.phone
	}
	if err := p.w.client.Create(ctx, obj); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}

func (p *people) annotate(ctx context.Context, n *newcomer, annotation, value string) error {
	obj := &v1alpha1.WhatsAppSession{}
	if err := p.w.client.Get(ctx, client.ObjectKey{Namespace: p.w.namespace, Name: n.name}, obj); err != nil {
		return err
	}
	base := obj.DeepCopy()
	metav1.SetMetaDataAnnotation(&obj.ObjectMeta, annotation, value)
	return p.w.client.Patch(ctx, obj, client.MergeFrom(base))
}

// pairDuring returns a fault that begins while sessions are being paired in every way, each
// at another stage. do starts the fault and calls w.people.release.
func pairDuring(do func(w *environment)) func(w *environment) {
	return func(w *environment) {
		p := w.people
		p.mu.Lock()
		p.waiting, p.linking = true, false
		p.mu.Unlock()
		for range 2 {
			for _, way := range ways {
				for _, stage := range way.stages() {
					p.add(way, stage)
				}
			}
		}
		w.eventually("every pairing to be at its first stage", p.notReached)
		for _, n := range p.all() {
			w.inject(n.delays()...)
		}
		p.mu.Lock()
		p.linking = true
		p.mu.Unlock()
		w.eventually("every pairing to be at its last stage", p.notReached)
		w.record("every pairing is at its last stage")
		do(w)
		p.release()
	}
}

// notReached says which newcomers are not at their stages yet.
func (p *people) notReached(context.Context) error {
	objects := map[string]*v1alpha1.WhatsAppSession{}
	for _, obj := range p.w.history.all() {
		objects[obj.Name] = obj
	}
	devices := p.w.devicesByPhone()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.newcomers {
		obj, reached := objects[n.name], false
		if obj == nil {
			return fmt.Errorf("%s does not exist", n.name)
		}
		s := obj.Status
		until := n.until
		if n.late() && !p.linking {
			until = n.way.stages()[0]
		}
		switch until {
		case codeShown:
			reached = s.QR != nil && (n.way != byReplacedQR || n.scans > 0) || s.PairingCode != ""
		case passkeyAsked:
			reached = s.Passkey != nil
		case passkeyAnswered:
			reached = s.Passkey != nil && s.Passkey.ObservedResponse != "" || s.JID != ""
		case linked:
			reached = len(devices[n.phone]) > 0
		case loggingIn:
			reached = len(devices[n.phone]) > 0 && s.JID != ""
		}
		if !reached {
			return fmt.Errorf("%s is %s, %s", n.name, s.Phase, describeConditions(obj))
		}
	}
	return nil
}

// devicesByPhone returns the linked devices of each phone.
func (w *environment) devicesByPhone() map[string][]simulator.Device {
	devices := map[string][]simulator.Device{}
	for _, d := range w.simulator.Devices() {
		phone, _, _ := strings.Cut(d.JID, ":")
		devices[phone] = append(devices[phone], d)
	}
	return devices
}

// unpaired says why a newcomer is not paired as it must be; empty: it is. Then its device
// is known.
func (w *environment) unpairedBecause(n *newcomer, obj *v1alpha1.WhatsAppSession, devices []simulator.Device) string {
	p := w.people
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case obj == nil:
		return "it does not exist"
	case obj.UID == n.unwanted:
		return "it was not deleted: " + describeConditions(obj)
	case len(devices) != 1:
		return fmt.Sprintf("it is %s, and %d devices are linked to its phone: %s", obj.Status.Phase, len(devices), describeConditions(obj))
	case obj.Status.OffersCodes():
		return fmt.Sprintf("it is %s and still shows a code or a request", obj.Status.Phase)
	case obj.PasskeyResponse() != "" || obj.PasskeyConfirmation() != "":
		return "an annotation about its passkey was not removed"
	}
	n.jid = devices[0].JID
	return ""
}

func describeConditions(obj *v1alpha1.WhatsAppSession) string {
	for _, c := range obj.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c.Reason + ": " + c.Message
		}
	}
	return "no condition"
}

// staleCodes says which newcomers have a code or a request in Redis, or are newer at Laravel
// as a code than as connected.
func (w *environment) staleCodes(ctx context.Context) error {
	store := goredis.NewClient(&goredis.Options{Addr: w.redis.Addr()})
	defer func() { _ = store.Close() }()
	var problems []error
	for _, n := range w.people.all() {
		inCache, err := store.Exists(ctx, redis.Keys{}.QR(n.name)).Result()
		if err != nil {
			return err
		}
		inQueue, err := store.HExists(ctx, redis.Keys{}.Queue(delivery.KindQR, "items"), n.name).Result()
		if err != nil {
			return err
		}
		if inCache > 0 || inQueue {
			problems = append(problems, fmt.Errorf("%s has a code in Redis (cache: %t, queue: %t)", n.name, inCache > 0, inQueue))
		}
		if code, status := w.laravel.Code(n.name), w.laravel.Status(n.name); code.Newer(status.Numbers) {
			problems = append(problems, fmt.Errorf("Laravel has a code of %s (%s) that is newer than its status %s (%s)", n.name, code.Numbers, status.Status, status.Numbers))
		}
	}
	return errors.Join(problems...)
}

// endPairings deletes the newcomers, which must unlink their devices and leave nothing in
// Redis.
func (w *environment) endPairings() {
	p := w.people
	p.mu.Lock()
	newcomers := p.newcomers
	p.newcomers, p.waiting, p.recreated = nil, false, 0
	p.mu.Unlock()
	if len(newcomers) == 0 {
		return
	}
	p.steps.Wait()
	var names []string
	for _, n := range newcomers {
		names = append(names, n.name)
	}
	w.deleteAndWait(names)
	if _, err := w.simulator.Clear("", ""); err != nil {
		w.reportViolation("the simulator: %v", err)
	}
	w.eventually("the deleted sessions to leave nothing", func(ctx context.Context) error {
		if n := w.simulator.Stats().Devices; n != len(w.sessions) {
			return fmt.Errorf("%d devices are linked for %d sessions", n, len(w.sessions))
		}
		store := goredis.NewClient(&goredis.Options{Addr: w.redis.Addr()})
		defer func() { _ = store.Close() }()
		for _, name := range names {
			keys := redis.Keys{}
			n, err := store.Exists(ctx, keys.QR(name), keys.Status(name), keys.Connection(name)).Result()
			if err != nil {
				return err
			}
			if n > 0 {
				return fmt.Errorf("%d keys of %s are in Redis", n, name)
			}
		}
		return nil
	})
}
