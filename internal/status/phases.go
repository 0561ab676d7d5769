package status

import "github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"

// phaseKind says what happens next in a phase.
type phaseKind struct {
	// rests: no attempt is made until a person acts or a point in time has come.
	rests bool
	// keeps: the phase does not change while the session moves to another worker.
	keeps bool
	// stalled: the phase ends only when a person acts, or for Banned and Replaced when a
	// point in time has come.
	stalled bool
}

// phases has the phases that do not end by themselves. For all others every field is
// false.
var phases = map[v1alpha1.Phase]phaseKind{
	v1alpha1.PhasePairingExpired: {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseLoggedOut:      {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseBanned:         {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseReplaced:       {rests: true, keeps: true, stalled: true},
	// The next holder makes an attempt, because it may run a newer image.
	v1alpha1.PhaseOutdated: {keeps: true, stalled: true},
	// The next holder makes an attempt, because the cause may be gone.
	v1alpha1.PhaseFailed: {stalled: true},
}

// Resting reports whether no holder makes an attempt in this phase until a person
// acts or a point in time has come.
func Resting(p v1alpha1.Phase) bool { return phases[p].rests }

// Kept reports whether the phase does not change while the session moves to another
// worker.
func Kept(p v1alpha1.Phase) bool { return phases[p].keeps }

// stalled reports whether the phase does not end by itself.
func stalled(p v1alpha1.Phase) bool { return phases[p].stalled }
