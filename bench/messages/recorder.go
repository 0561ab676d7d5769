package main

import (
	"net/http"
	"sync"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// recorder decides what the stand-in for Laravel answers, and records what arrives.
type recorder struct {
	mu sync.Mutex
	// away: messages are refused with 503.
	away bool
	// poisoned is a session whose messages make each request fail with 500; empty: none.
	poisoned string
	// answers is how long a request of each kind takes.
	answers map[delivery.Kind]time.Duration
	// batches are the batch in which each message was accepted, by its key, and keys the first
	// key under which it came.
	batches map[string]string
	keys    map[messageID]string
	doubled int
	// first and last are when messages were accepted.
	first, last time.Time
	// arrivals are when each message arrived first, by WhatsApp's id, and order is the order of
	// each session's.
	arrivals map[string]time.Time
	order    map[string][]string
	// statuses are when the first status with these numbers arrived.
	statuses map[statusKey]time.Time
}

// messageID is what WhatsApp calls a message: the simulator gives no id twice.
type messageID struct{ sessionID, id string }

type statusKey struct {
	sessionID string
	delivery.Numbers
}

func newRecorder() *recorder {
	return &recorder{answers: map[delivery.Kind]time.Duration{}, batches: map[string]string{}, keys: map[messageID]string{},
		arrivals: map[string]time.Time{}, order: map[string][]string{}, statuses: map[statusKey]time.Time{}}
}

// setAway makes Laravel refuse messages, or accept them again.
func (r *recorder) setAway(away bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = away
}

// poison makes Laravel fail at the messages of a session; empty: at none.
func (r *recorder) poison(sessionID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.poisoned = sessionID
}

// setAnswer sets how long a request takes.
func (r *recorder) setAnswer(kind delivery.Kind, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers[kind] = d
}

func (r *recorder) answer(request laraveltest.Request) laraveltest.Answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	if request.Kind == delivery.KindMessage && r.away {
		return laraveltest.Refuse(http.StatusServiceUnavailable, "away")
	}
	if request.Kind == delivery.KindMessage && r.poisoned != "" && request.Contains(r.poisoned) {
		return laraveltest.Refuse(http.StatusInternalServerError, "a bug")
	}
	for _, item := range request.Items {
		switch request.Kind {
		case delivery.KindMessage:
			r.accept(request.BatchID, item)
			if _, before := r.arrivals[item.Message.ID]; !before {
				r.arrivals[item.Message.ID] = request.At
				r.order[item.SessionID] = append(r.order[item.SessionID], item.Message.ID)
			}
			if r.first.IsZero() {
				r.first = request.At
			}
			r.last = request.At
		case delivery.KindStatus:
			k := statusKey{item.SessionID, item.Numbers}
			if _, before := r.statuses[k]; !before {
				r.statuses[k] = request.At
			}
		}
	}
	return laraveltest.Answer{Accept: true, Write: answerAt(request.At.Add(r.answers[request.Kind]))}
}

// accept counts a message that came in another batch before, or under another key. It is called
// with mu held.
func (r *recorder) accept(batch string, item laraveltest.Item) {
	key, m := item.Message.Key, messageID{item.SessionID, item.Message.ID}
	before, accepted := r.batches[key]
	first, named := r.keys[m]
	if accepted && before != batch || !accepted && named && first != key {
		r.doubled++
	}
	r.batches[key] = batch
	if m.id != "" && !named {
		r.keys[m] = key
	}
}

// answerAt answers with success at a time, or when the request has ended.
func answerAt(at time.Time) http.HandlerFunc {
	return func(w http.ResponseWriter, request *http.Request) {
		timer := time.NewTimer(time.Until(at))
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-request.Context().Done():
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

// accepted is how many messages were accepted, and when the first and the last of them came.
func (r *recorder) accepted() (n int, first, last time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.batches), r.first, r.last
}

// arrival is when a message arrived; zero: not yet.
func (r *recorder) arrival(id string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.arrivals[id]
}

// outOfOrder is how many messages came after one of their session that was sent later. number
// is the position in which WhatsApp got each message, by its id.
func (r *recorder) outOfOrder(number map[string]int64) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, ids := range r.order {
		last := int64(0)
		for _, id := range ids {
			if at, known := number[id]; known && at < last {
				n++
			} else if known {
				last = at
			}
		}
	}
	return n
}

// doubledMessages is how many messages came in two batches, or under two keys.
func (r *recorder) doubledMessages() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.doubled
}

// arrivedAt is when a status arrived; zero: not yet.
func (r *recorder) arrivedAt(k statusKey) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.statuses[k]
}
