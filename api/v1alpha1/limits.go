package v1alpha1

// MaxEpoch is the highest epoch: the highest integer that JSON, JavaScript and the scripts in
// Redis all represent exactly. Epochs are Unix seconds, so an epoch near it was written by a
// wrong clock or by a person. No computed epoch exceeds it.
const MaxEpoch int64 = 1<<53 - 1
