package testenv

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Seed returns the seed of a random test, and writes it to the test's log. Setting
// SEED in the environment to a logged seed repeats the random numbers of that run.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("SEED"); text != "" {
		fixed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("SEED: %v", err)
		}
		seed = fixed
	}
	t.Logf("SEED=%d repeats the random numbers of this run", seed)
	return seed
}
