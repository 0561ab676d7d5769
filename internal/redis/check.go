package redis

import (
	"context"
	"strconv"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"
)

// checkInterval is how often Redis is checked (docs/architecture.md, "QR and status"): an administrator's change at
// run time must be noticed before it has cost much.
const checkInterval = time.Minute

// Report is the result of Check.
type Report struct {
	// Problems are sentences, each with what to change; empty: Redis is fit.
	Problems []string
	// Durability is what writes wait for; Monitor sets it.
	Durability Level
}

// VolatileError says that Redis may lose what is written to it.
type VolatileError struct{ Problems []string }

// Error joins the sentences.
func (e *VolatileError) Error() string {
	return "Redis may lose what is written to it: " + strings.Join(e.Problems, "; ") +
		" (or accept the loss with --allow-volatile-redis)"
}

// Err is a *VolatileError where there are problems that were not accepted.
func (r Report) Err(allowVolatile bool) error {
	if len(r.Problems) == 0 || allowVolatile {
		return nil
	}
	return &VolatileError{Problems: r.Problems}
}

// Check reads whether Redis, each master of a cluster, evicts nothing and persists. An
// error means that it could not be read.
func Check(ctx context.Context, client goredis.UniversalClient) (Report, error) {
	var report Report
	seen := map[string]bool{}
	err := eachMaster(ctx, client, func(ctx context.Context, node goredis.Cmdable) error {
		problems, err := problemsOf(ctx, node)
		for _, problem := range problems {
			if !seen[problem] {
				seen[problem] = true
				report.Problems = append(report.Problems, problem)
			}
		}
		return err
	})
	return report, err
}

func problemsOf(ctx context.Context, node goredis.Cmdable) ([]string, error) {
	fields, err := info(ctx, node, "memory", "persistence")
	if err != nil {
		return nil, err
	}
	policy, found, err := config(ctx, node, "maxmemory-policy")
	if err != nil {
		return nil, err
	}
	if !found {
		policy = fields["maxmemory_policy"]
	}
	var problems []string
	switch policy {
	case "noeviction":
	case "":
		problems = append(problems, "its maxmemory-policy cannot be read: allow CONFIG GET or INFO to this user and see that the policy is noeviction")
	default:
		problems = append(problems, "its maxmemory-policy is "+strconv.Quote(policy)+", which deletes keys when memory is short: set maxmemory-policy to noeviction")
	}
	save, savesKnown, err := config(ctx, node, "save")
	if err != nil {
		return nil, err
	}
	_, persistenceKnown := fields["aof_enabled"]
	aof, snapshots := fields["aof_enabled"] == "1", save != ""
	if !savesKnown {
		// Where CONFIG is forbidden, a snapshot that was made shows that they
		// are made (-1: none since the start).
		seconds, err := strconv.Atoi(fields["rdb_last_bgsave_time_sec"])
		snapshots = err == nil && seconds >= 0
	}
	switch {
	case aof || snapshots:
	case !persistenceKnown && !savesKnown:
		problems = append(problems, "it cannot be seen whether it persists: allow INFO to this user and see that appendonly is yes")
	default:
		problems = append(problems, "it does not persist, so a restart empties it: set appendonly to yes")
	}
	return problems, nil
}

// Monitor repeats Check, and detects the durability that the server offers, each minute.
type Monitor struct {
	// Client is the server to check.
	Client goredis.UniversalClient
	// Keys, Role and User say which permissions are checked; without a Role none are.
	Keys Keys
	Role Role
	User string
	// Durability is detected again each time; nil: not.
	Durability *Durability
	// Clock drives the checks.
	Clock clock.WithTicker
	// Report gets each result: an error when Redis could not be read, or does not offer
	// the durability (ErrNotOffered).
	Report func(Report, error)
}

// Once checks once. An *AccessError says that the user may not do what its role needs.
func (m *Monitor) Once(ctx context.Context) (Report, error) {
	if m.Role != "" {
		if err := CheckAccess(ctx, m.Client, m.Keys, m.Role, m.User); err != nil {
			return Report{}, err
		}
	}
	report, err := Check(ctx, m.Client)
	if m.Durability != nil && err == nil {
		report.Durability, err = m.Durability.Detect(ctx)
	}
	return report, err
}

// Start checks now and each minute until ctx ends. It is a runnable of the
// manager and of the worker, not only of the leader.
func (m *Monitor) Start(ctx context.Context) error {
	ticker := m.Clock.NewTicker(checkInterval)
	defer ticker.Stop()
	for {
		report, err := m.Once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.Report(report, err)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}
