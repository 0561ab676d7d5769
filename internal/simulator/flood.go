package simulator

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// FloodRequest makes contacts write to devices at a steady rate.
type FloodRequest struct {
	// Devices are JIDs or phone numbers; without them, the first Sessions connected devices by
	// their JID, and all connected devices if that is 0.
	Devices  []string `json:"devices,omitempty"`
	Sessions int      `json:"sessions,omitempty"`
	// Rate is the number of messages in a second, to all devices together.
	Rate float64 `json:"rate"`
	// Seconds is how long the flood lasts.
	Seconds float64 `json:"seconds"`
	// Contacts is how many contacts write to each device, in turn (default 1); each writes to
	// one device only.
	Contacts int `json:"contacts,omitempty"`
	// Size is the length of each text (default 32).
	Size int `json:"size,omitempty"`
}

// Flood is the state of a flood.
type Flood struct {
	ID      int       `json:"id"`
	Devices int       `json:"devices"`
	Rate    float64   `json:"rate"`
	Started time.Time `json:"started"`
	// Ended is when the last message was sent; zero while the flood runs.
	Ended time.Time `json:"ended,omitzero"`
	Sent  int64     `json:"sent"`
	// Failed counts the messages that could not be sent, and Problem says why the last could not.
	Failed  int64  `json:"failed"`
	Problem string `json:"problem,omitempty"`
	// Late is by how much the latest message was sent after its time, in nanoseconds. If it
	// grows, the simulator is too slow for the rate.
	Late time.Duration `json:"late"`
}

// flood is a flood with its end. Its state is guarded by Server.mu; ended is closed after its last
// message.
type flood struct {
	state Flood
	stop  context.CancelFunc
	ended chan struct{}
}

const (
	defaultFloodSize = 32
	maxFloods        = 1000
)

// StartFlood starts a flood and returns its id.
func (s *Server) StartFlood(r FloodRequest) (int, error) {
	if r.Rate <= 0 || r.Seconds <= 0 || r.Sessions < 0 || r.Contacts < 0 || r.Size < 0 || r.Size > maxBody {
		return 0, fmt.Errorf("%w: a flood needs a rate and seconds above 0, and no negative numbers", ErrBadInput)
	}
	r.Contacts = max(r.Contacts, 1)
	if r.Size == 0 {
		r.Size = defaultFloodSize
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var devices []*device
	for _, name := range r.Devices {
		d, err := s.deviceLocked(name)
		if err != nil {
			return 0, err
		}
		devices = append(devices, d)
	}
	if len(r.Devices) == 0 {
		for _, a := range s.byPhone {
			for _, d := range a.devices {
				if d.conn != nil {
					devices = append(devices, d)
				}
			}
		}
		slices.SortFunc(devices, func(a, b *device) int { return strings.Compare(a.jid().String(), b.jid().String()) })
		if r.Sessions > 0 {
			devices = devices[:min(r.Sessions, len(devices))]
		}
	}
	if len(devices) == 0 {
		return 0, fmt.Errorf("%w: no device is connected", ErrNotNow)
	}
	if len(s.floods) == maxFloods || !s.startLocked() {
		return 0, fmt.Errorf("%w: there were too many floods, or the server ends", ErrNotNow)
	}
	ctx, stop := context.WithCancel(context.Background())
	f := &flood{stop: stop, ended: make(chan struct{}), state: Flood{ID: len(s.floods) + 1, Devices: len(devices), Rate: r.Rate, Started: s.clock.Now()}}
	s.floods = append(s.floods, f)
	go func() {
		defer s.wg.Done()
		defer close(f.ended)
		defer stop()
		s.runFlood(ctx, f, r, devices)
	}()
	return f.state.ID, nil
}

// runFlood writes to all devices. Message i of the flood is for device i modulo their number,
// and its time is i divided by the rate after the start. Each device has a goroutine, so that
// its messages keep their order.
func (s *Server) runFlood(ctx context.Context, f *flood, r FloodRequest, devices []*device) {
	total := int(r.Rate * r.Seconds)
	var group sync.WaitGroup
	for k, d := range devices {
		if k >= total {
			break
		}
		group.Go(func() {
			name := d.jid().String()
			for i, n := k, 0; i < total; i, n = i+len(devices), n+1 {
				at := f.state.Started.Add(time.Duration(float64(i) / r.Rate * float64(time.Second)))
				if !s.waitUntil(ctx, at) {
					return
				}
				contact := fmt.Sprintf("1556%08d", k*r.Contacts+n%r.Contacts)
				text := "Message " + strconv.Itoa(n+1) + " of a flood "
				text += strings.Repeat(".", max(0, r.Size-len(text)))
				_, err := s.Write(ctx, SendRequest{Device: name, From: contact, Text: text[:min(len(text), max(r.Size, 1))]})
				s.mu.Lock()
				if err != nil {
					f.state.Failed++
					f.state.Problem = err.Error()
				} else {
					f.state.Sent++
				}
				f.state.Late = max(f.state.Late, s.clock.Since(at))
				s.mu.Unlock()
			}
		})
	}
	group.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	f.state.Ended = s.clock.Now()
}

// waitUntil waits until that time. It returns false if the context or the server ends before.
func (s *Server) waitUntil(ctx context.Context, at time.Time) bool {
	if ctx.Err() != nil {
		return false
	}
	d := at.Sub(s.clock.Now())
	if d <= 0 {
		return true
	}
	timer := s.clock.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C():
		return true
	case <-ctx.Done():
		return false
	case <-s.done:
		return false
	}
}

// Floods lists the floods since the start, the oldest first.
func (s *Server) Floods() []Flood {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []Flood{}
	for _, f := range s.floods {
		out = append(out, f.state)
	}
	return out
}

// StopFloods ends the floods that run, and returns when they have sent their last messages.
func (s *Server) StopFloods() {
	s.mu.Lock()
	floods := slices.Clone(s.floods)
	s.mu.Unlock()
	for _, f := range floods {
		f.stop()
	}
	for _, f := range floods {
		<-f.ended
	}
}
