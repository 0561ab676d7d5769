package redis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// Role is a part of the installation that has its own ACL user in Redis.
type Role string

const (
	// Manager is `manager`, and the commands that a person runs: deadletter, store adopt.
	Manager Role = "manager"
	// Worker is `worker`.
	Worker Role = "worker"
	// Laravel is the application, which reads the session cache.
	Laravel Role = "laravel"
)

// Roles are all of them.
var Roles = []Role{Manager, Worker, Laravel}

// keyGroup is a part of the keys: each has a pattern in an ACL rule.
type keyGroup int

const (
	sessionKeys keyGroup = iota
	deletionKeys
	queueKeys
	operatorKeys
)

// pattern is the glob of an ACL rule.
func (g keyGroup) pattern(k Keys) string {
	return k.prefix + map[keyGroup]string{
		sessionKeys: "session:*", deletionKeys: "gone:*", queueKeys: "batch:{queue}:*", operatorKeys: "operator:*",
	}[g]
}

// probes are keys of the group that nothing else uses: no session id begins with "_".
func (g keyGroup) probes(k Keys) []string {
	const unused = "_check"
	switch g {
	case sessionKeys:
		return []string{k.QR(unused), k.Status(unused), k.Connection(unused)}
	case deletionKeys:
		return []string{k.Sibling(k.QR(unused), "gone"), k.Sibling(k.Status(unused), "gone"), k.Sibling(k.Connection(unused), "gone")}
	case queueKeys:
		return []string{k.Queue(delivery.KindQR, unused), k.Queue(delivery.KindStatus, unused), k.Key("batch:{queue}:dead:" + unused)}
	default:
		return []string{k.Key("operator:" + unused)}
	}
}

// command is a command that a role uses, also inside a script: Redis checks the user's
// permissions there as well.
type command struct {
	// name is as Redis names it, a subcommand after a space.
	name  string
	roles []Role
	// on are the keys that it is used on.
	on []keyGroup
	// probe are arguments with which the command changes nothing. KEY stands for a key that
	// is not there, WAKE for the channel of the queue. Redis checks permissions before it
	// executes a command, so one that fails for its arguments was permitted.
	probe string
	// mode, where set, is the only one that needs the command.
	mode Mode
	// unknownWorks: a server that does not know the command will do, such as an embedded one.
	unknownWorks bool
	// useful: the program works without it.
	useful bool
}

var (
	everyRole   = Roles
	ownRoles    = []Role{Manager, Worker}
	managerOnly = []Role{Manager}
	workerOnly  = []Role{Worker}
	laravelOnly = []Role{Laravel}

	everyKey     = []keyGroup{sessionKeys, deletionKeys, queueKeys, operatorKeys}
	queuesAndOwn = []keyGroup{queueKeys, operatorKeys}
)

// commands is the one list of what each role needs. A test holds it against what a real
// Redis has executed for every operation.
var commands = []command{
	{name: "PING", roles: everyRole},
	{name: "GET", roles: ownRoles, on: everyKey, probe: "KEY"},
	{name: "GET", roles: laravelOnly, on: []keyGroup{sessionKeys}, probe: "KEY"},
	{name: "MGET", roles: laravelOnly, on: []keyGroup{sessionKeys}, probe: "KEY"},
	{name: "EXISTS", roles: laravelOnly, on: []keyGroup{sessionKeys}, probe: "KEY"},
	{name: "TTL", roles: laravelOnly, on: []keyGroup{sessionKeys}, probe: "KEY"},
	{name: "PTTL", roles: laravelOnly, on: []keyGroup{sessionKeys}, probe: "KEY"},
	{name: "SET", roles: ownRoles, on: everyKey, probe: "KEY x XX"},
	{name: "DEL", roles: managerOnly, on: everyKey, probe: "KEY"},
	{name: "DEL", roles: workerOnly, on: []keyGroup{sessionKeys, deletionKeys, queueKeys}, probe: "KEY"},
	{name: "TYPE", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY"},
	{name: "TIME", roles: ownRoles},
	{name: "INFO", roles: ownRoles, probe: "server", unknownWorks: true},
	{name: "WAIT", roles: ownRoles, probe: "0 0", unknownWorks: true},
	{name: "EVAL", roles: ownRoles, on: queuesAndOwn, probe: "return{} 1 KEY"},
	{name: "EVALSHA", roles: ownRoles, on: []keyGroup{sessionKeys, deletionKeys, queueKeys}, probe: "0000000000000000000000000000000000000000 1 KEY"},
	{name: "SCRIPT LOAD", roles: ownRoles, probe: "return{}"},
	{name: "PUBLISH", roles: ownRoles, probe: "WAKE check"},
	{name: "SUBSCRIBE", roles: managerOnly, probe: "WAKE"},

	{name: "HSET", roles: ownRoles, on: queuesAndOwn, probe: "KEY field value field"},
	{name: "HGET", roles: ownRoles, on: queuesAndOwn, probe: "KEY field"},
	{name: "HDEL", roles: ownRoles, on: queuesAndOwn, probe: "KEY field"},
	{name: "HLEN", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY"},
	{name: "HEXISTS", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY field"},
	{name: "HGETALL", roles: managerOnly, on: queuesAndOwn, probe: "KEY"},
	{name: "HGETALL", roles: workerOnly, on: []keyGroup{operatorKeys}, probe: "KEY"},
	{name: "HKEYS", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY"},
	{name: "ZADD", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY no-score member"},
	{name: "ZREM", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY member"},
	{name: "ZSCORE", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY member"},
	{name: "ZRANGEBYSCORE", roles: ownRoles, on: []keyGroup{queueKeys}, probe: "KEY 0 0"},
	{name: "ZCARD", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY"},
	{name: "ZCOUNT", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY 0 0"},
	{name: "ZRANGE", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY 0 0"},
	{name: "XADD", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY no-id field value"},
	{name: "XDEL", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY 0-0"},
	{name: "XLEN", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY"},
	{name: "XRANGE", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY - +"},
	{name: "XTRIM", roles: managerOnly, on: []keyGroup{queueKeys}, probe: "KEY MINID 0"},

	{name: "COMMAND", roles: ownRoles, mode: Cluster},
	{name: "CLUSTER SLOTS", roles: ownRoles, mode: Cluster},

	{name: "CONFIG GET", roles: ownRoles, probe: "save", useful: true},
	{name: "WAITAOF", roles: ownRoles, probe: "0 0 0", useful: true}, // from version 7.2 on,
}

// rule is how an ACL rule names the command.
func (c command) rule() string { return strings.ReplaceAll(strings.ToLower(c.name), " ", "|") }

// args are the words of a probe.
func (c command) args(k Keys, key string) []any {
	words := strings.Fields(c.name + " " + c.probe)
	args := make([]any, len(words))
	for i, word := range words {
		switch word {
		case "KEY":
			args[i] = key
		case "WAKE":
			args[i] = k.Wake()
		default:
			args[i] = word
		}
	}
	return args
}

// neededBy are the commands of a role in a mode.
func neededBy(role Role, mode Mode) []command {
	return slices.DeleteFunc(slices.Clone(commands), func(c command) bool {
		return !slices.Contains(c.roles, role) || c.mode != "" && c.mode != mode
	})
}

// AccessError says what a role needs of Redis and cannot use.
type AccessError struct {
	Role Role
	User string
	// Commands are forbidden to the user, or on some of the keys.
	Commands []string
	// Keys and Channels are the patterns that the user may not use.
	Keys, Channels []string
	// Unknown are the commands that the server does not know.
	Unknown []string
}

// Error names all of it.
func (e *AccessError) Error() string {
	var parts []string
	for _, part := range []struct {
		words string
		names []string
	}{{"the commands", e.Commands}, {"the keys", e.Keys}, {"the channels", e.Channels}} {
		if len(part.names) > 0 {
			parts = append(parts, part.words+" "+strings.Join(part.names, ", "))
		}
	}
	var sentences []string
	if len(parts) > 0 {
		sentences = append(sentences, fmt.Sprintf("the Redis user %q has no permission for what the %s needs: %s: apply what `whatsapp-operator redis-acl` prints",
			e.User, e.Role, strings.Join(parts, "; ")))
	}
	if len(e.Unknown) > 0 {
		sentences = append(sentences, fmt.Sprintf("Redis does not know what the %s needs: the commands %s: they were renamed or disabled, or the server is older than 6.2",
			e.Role, strings.Join(e.Unknown, ", ")))
	}
	return strings.Join(sentences, "; ")
}

func (e *AccessError) add(c command, pattern string, err error) {
	refused, ok := refusalOf(err)
	if !ok || c.useful {
		return
	}
	answer := refused.err.Error()
	add := func(to *[]string, name string) {
		if name != "" && !slices.Contains(*to, name) {
			*to = append(*to, name)
		}
	}
	// "… to access one of the keys used as arguments" and "… to access the 'x' key", from
	// version 7.2 on; and likewise of a channel. (An answer about a command says "… to run
	// the 'x' command", where x may be hkeys.)
	_, access, _ := strings.Cut(answer, " to access ")
	switch {
	case refused.Refusal == NoPermission && strings.Contains(answer, "'select'"): // while connecting
		add(&e.Commands, "SELECT")
	case refused.Refusal == UnknownCommand && !c.unknownWorks:
		add(&e.Unknown, c.name)
	case refused.Refusal != NoPermission:
	case access == "":
		add(&e.Commands, c.name)
	case strings.Contains(access, "channel"):
		add(&e.Channels, pattern)
	default:
		add(&e.Keys, pattern)
	}
}

// unchecked reports an error before the server has checked any permission.
func unchecked(err error) bool {
	var answer goredis.Error
	if err == nil || !errors.As(err, &answer) {
		return err != nil
	}
	refused, ok := refusalOf(err)
	return ok && slices.Contains([]Refusal{NotAuthenticated, WrongPassword, WrongDatabase, TooManyClients, Protected}, refused.Refusal)
}

// CheckAccess tries every command that a role needs, on every group of keys, with arguments
// that change nothing, on each master of a cluster. An *AccessError says what is missing;
// any other error says that the permissions could not be checked. (ACL DRYRUN and ACL
// GETUSER would show the same, but need a permission that no role has.)
func CheckAccess(ctx context.Context, client goredis.UniversalClient, keys Keys, role Role, user string) error {
	found := &AccessError{Role: role, User: user}
	if user == "" {
		found.User = "default"
	}
	mode := Standalone
	if _, ok := client.(*goredis.ClusterClient); ok {
		mode = Cluster
	}
	type probe struct {
		command command
		pattern string
		answer  *goredis.Cmd
	}
	err := eachMaster(ctx, client, func(ctx context.Context, node goredis.Cmdable) error {
		var probes []probe
		_, err := node.Pipelined(ctx, func(p goredis.Pipeliner) error {
			for _, c := range neededBy(role, mode) {
				switch {
				case c.name == "SUBSCRIBE": // not in a pipeline
				case len(c.on) == 0:
					pattern := ""
					if c.name == "PUBLISH" {
						pattern = keys.Wake()
					}
					probes = append(probes, probe{c, pattern, p.Do(ctx, c.args(keys, "")...)})
				default:
					for _, group := range c.on {
						for _, key := range group.probes(keys) {
							probes = append(probes, probe{c, group.pattern(keys), p.Do(ctx, c.args(keys, key)...)})
						}
					}
				}
			}
			return nil
		})
		if unchecked(err) {
			return err //nolint:wrapcheck // wrapped below
		}
		for _, p := range probes {
			found.add(p.command, p.pattern, p.answer.Err())
		}
		return nil
	})
	if err == nil && slices.ContainsFunc(neededBy(role, mode), func(c command) bool { return c.name == "SUBSCRIBE" }) {
		subscription := client.Subscribe(ctx, keys.Wake())
		_, subscribeErr := subscription.Receive(ctx)
		_ = subscription.Close()
		if unchecked(subscribeErr) {
			err = subscribeErr
		}
		found.add(command{name: "SUBSCRIBE"}, keys.Wake(), subscribeErr)
	}
	switch {
	case errors.Is(err, io.EOF):
		return fmt.Errorf("checking the permissions in Redis: the server closes the connection without an answer, as one with TLS does: check its port, or set --redis-tls if it has TLS: %w", err)
	case err != nil:
		return fmt.Errorf("checking the permissions in Redis: %w", err)
	case len(found.Commands)+len(found.Keys)+len(found.Channels)+len(found.Unknown) > 0:
		return found
	}
	return nil
}

// ACLUser is the ACL SETUSER command that makes the user of a role, with PASSWORD in place
// of the password. waitAOF: the server knows WAITAOF; another one would refuse the whole
// command.
func ACLUser(role Role, name string, config Config, waitAOF bool) string {
	keys := config.Keys()
	var patterns, channels, rules []string
	add := func(to *[]string, rule string) {
		if !slices.Contains(*to, rule) {
			*to = append(*to, rule)
		}
	}
	for _, c := range neededBy(role, config.mode()) {
		if c.name == "WAITAOF" && !waitAOF {
			continue
		}
		add(&rules, "+"+c.rule())
		for _, group := range c.on {
			add(&patterns, "~"+group.pattern(keys))
		}
		if strings.Contains(c.probe, "WAKE") {
			add(&channels, "&"+keys.Wake())
		}
	}
	if config.DB != 0 {
		add(&rules, "+select")
	}
	words := []string{"ACL", "SETUSER", name, "reset", "resetchannels", "on", ">PASSWORD"}
	return strings.Join(slices.Concat(words, patterns, channels, rules), " ")
}
