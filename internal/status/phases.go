package status

import "github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"

// phaseKind is what a phase alone says of what happens next.
type phaseKind struct {
	// rests: no attempt is made until a person or a date says so.
	rests bool
	// keeps: the phase stays as it is while the session changes hands.
	keeps bool
	// stalled: a person, or for Banned and Replaced a date, must end it.
	stalled bool
}

// phases are those that do not go on by themselves; of the others nothing is true.
var phases = map[v1alpha1.Phase]phaseKind{
	v1alpha1.PhasePairingExpired: {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseLoggedOut:      {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseBanned:         {rests: true, keeps: true, stalled: true},
	v1alpha1.PhaseReplaced:       {rests: true, keeps: true, stalled: true},
	// The next holder tries: it may be of a newer image.
	v1alpha1.PhaseOutdated: {keeps: true, stalled: true},
	// The next holder looks for itself whether the cause is gone.
	v1alpha1.PhaseFailed: {stalled: true},
}

// Resting reports whether no attempt is made in this phase until a person or a
// date says so, whoever holds the session.
func Resting(p v1alpha1.Phase) bool { return phases[p].rests }

// Kept reports whether the phase stays as it is while the session changes hands.
func Kept(p v1alpha1.Phase) bool { return phases[p].keeps }

// stalled reports whether the phase does not end by itself.
func stalled(p v1alpha1.Phase) bool { return phases[p].stalled }
