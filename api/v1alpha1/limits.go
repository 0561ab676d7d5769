package v1alpha1

// MaxEpoch is the highest epoch: the highest number that JSON, JavaScript and the
// scripts in Redis all keep exactly. Epochs are Unix seconds, so one that is higher,
// or near it, was written by a clock or a hand that was wrong; no arithmetic goes
// above it.
const MaxEpoch int64 = 1<<53 - 1
