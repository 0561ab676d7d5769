package batch

import (
	_ "embed" // the scripts

	goredis "github.com/redis/go-redis/v9"
)

var (
	//go:embed scripts/lib.lua
	libLua string
	//go:embed scripts/enqueue.lua
	enqueueLua string
	//go:embed scripts/withdraw.lua
	withdrawLua string
	//go:embed scripts/pending.lua
	pendingLua string
	//go:embed scripts/claim.lua
	claimLua string
	//go:embed scripts/ack.lua
	ackLua string
	//go:embed scripts/release.lua
	releaseLua string
	//go:embed scripts/split.lua
	splitLua string
	//go:embed scripts/replay.lua
	replayLua string
	//go:embed scripts/discard.lua
	discardLua string
	//go:embed scripts/repair.lua
	repairLua string

	enqueueScript  = goredis.NewScript(libLua + enqueueLua)
	withdrawScript = goredis.NewScript(libLua + withdrawLua)
	pendingScript  = goredis.NewScript(libLua + pendingLua)
	claimScript    = goredis.NewScript(libLua + claimLua)
	ackScript      = goredis.NewScript(libLua + ackLua)
	releaseScript  = goredis.NewScript(libLua + releaseLua)
	splitScript    = goredis.NewScript(libLua + splitLua)
	replayScript   = goredis.NewScript(libLua + replayLua)
	discardScript  = goredis.NewScript(libLua + discardLua)
	repairScript   = goredis.NewScript(libLua + repairLua)
)

// Error codes of the scripts that need a claim; any other answer is a success.
const (
	claimLost       = -1
	deadLettersFull = -2
)
