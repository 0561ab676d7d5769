package redis

import (
	"cmp"
	"context"
	"errors"
	"net"
	"strings"

	goredis "github.com/redis/go-redis/v9"
)

// Refusal is a kind of answer with which Redis refuses a command that is right in
// itself. It is a label of a metric.
type Refusal string

const (
	// ReadOnly: the server is a replica.
	ReadOnly Refusal = "read_only"
	// Loading: the server has just started and reads its data.
	Loading Refusal = "loading"
	// ClusterDown: the cluster has no node for the key.
	ClusterDown Refusal = "cluster_down"
	// TryAgain: the cluster moves the key at this moment.
	TryAgain Refusal = "try_again"
	// Busy: a script runs for too long.
	Busy Refusal = "busy"
	// DiskFailing: the server cannot write to its disk.
	DiskFailing Refusal = "disk_failing"
	// Full: the server has reached maxmemory.
	Full Refusal = "full"
	// NotAuthenticated: the server needs a password.
	NotAuthenticated Refusal = "not_authenticated"
	// WrongPassword: the server does not accept user and password.
	WrongPassword Refusal = "wrong_password"
	// NoPermission: the ACL user may not use a command, a key or a channel.
	NoPermission Refusal = "no_permission"
	// MasterDown: the server is a replica that has lost its primary.
	MasterDown Refusal = "master_down"
	// NoReplicas: the primary has fewer replicas than it needs to take writes.
	NoReplicas Refusal = "no_replicas"
	// TooManyClients: the server takes no more connections.
	TooManyClients Refusal = "too_many_clients"
	// UnknownCommand: the server does not know the command, or it was renamed.
	UnknownCommand Refusal = "unknown_command"
	// WrongDatabase: the server has no database of the configured number.
	WrongDatabase Refusal = "wrong_database"
	// WrongMode: the server is a cluster or no cluster, and the configuration says otherwise.
	WrongMode Refusal = "wrong_mode"
	// Protected: the server takes connections from its own machine only.
	Protected Refusal = "protected"
)

// refusals say by which words of an answer a refusal is known, and what to do. The first
// match counts.
var refusals = []struct {
	refusal Refusal
	// codes are the first words of an answer. Redis before version 7 puts "-CODE" into
	// the middle of the answer where a script's command is refused.
	codes []string
	// texts are parts of an answer that has only the code ERR.
	texts    []string
	sentence string
}{
	{ReadOnly, []string{"READONLY"}, nil,
		"Redis is a replica and takes no writes: after a fail-over the client connects again by itself; if it lasts, the address names a replica"},
	{Loading, []string{"LOADING"}, nil, "Redis has started and is loading its data: wait"},
	{ClusterDown, []string{"CLUSTERDOWN"}, nil,
		"the Redis cluster is down or has slots without a node: bring its nodes back (CLUSTER INFO)"},
	{TryAgain, []string{"TRYAGAIN"}, nil, "the Redis cluster is moving these keys to another node: wait"},
	{Busy, []string{"BUSY"}, nil,
		"a script of another program keeps Redis busy: wait, or end it with SCRIPT KILL"},
	{DiskFailing, []string{"MISCONF"}, nil,
		"Redis cannot write its data to its disk and so takes no writes: see its log, and free or repair the disk"},
	{Full, []string{"OOM"}, nil, "Redis is full: raise maxmemory, or remove what else uses the memory"},
	{WrongPassword, []string{"WRONGPASS"}, []string{"invalid username-password pair", "invalid password"},
		"Redis does not accept the user and password: check --redis-username and --redis-password-file"},
	{NotAuthenticated, []string{"NOAUTH"}, nil, "Redis needs a password: set --redis-password-file"},
	{NoPermission, []string{"NOPERM"}, []string{"The user executing the script can't", "ACL failure in script"},
		"the Redis user has no permission: give it what `whatsapp-operator redis-acl` prints"},
	{MasterDown, []string{"MASTERDOWN"}, nil,
		"Redis is a replica that has lost its primary: connect to the primary, or wait for the fail-over"},
	{NoReplicas, []string{"NOREPLICAS"}, nil,
		"Redis has fewer replicas than min-replicas-to-write and so takes no writes: bring the replicas back"},
	{TooManyClients, nil, []string{"max number of clients reached"}, "Redis takes no more connections: raise maxclients"},
	{WrongDatabase, nil, []string{"DB index is out of range", "SELECT is not allowed in cluster mode", "invalid DB index"},
		"Redis has no database of this number: check --redis-db"},
	{WrongMode, nil, []string{"cluster support disabled"}, "Redis is no cluster: set --redis-mode=standalone or sentinel"},
	{WrongMode, []string{"MOVED"}, nil, "Redis is a cluster: set --redis-mode=cluster"},
	{Protected, []string{"DENIED"}, nil,
		"Redis is in protected mode and takes connections from its own machine only: give its user a password"},
	{UnknownCommand, nil, []string{"unknown command", "Unknown Redis command", "Unknown command"},
		"Redis does not know a command, or it was renamed or disabled: allow it, or use Redis 6.2 or newer"},
}

// RefusedError is a refusal as a sentence that says what to do. It wraps the answer.
type RefusedError struct {
	Refusal Refusal
	// Command is the name of the command that was refused.
	Command  string
	sentence string
	err      error
}

// Error joins the sentence and the answer. The answer to an unknown command repeats its
// arguments, which may be secret, and is left out.
func (e *RefusedError) Error() string {
	if e.Refusal == UnknownCommand {
		return strings.TrimSuffix(e.sentence+" ("+strings.ToUpper(e.Command)+")", " ()")
	}
	return e.sentence + " (" + e.err.Error() + ")"
}

// Unwrap is the answer of Redis.
func (e *RefusedError) Unwrap() error { return e.err }

// refusalOf classifies an answer of Redis; false: it is none, or no refusal.
func refusalOf(err error) (*RefusedError, bool) {
	var known *RefusedError
	if errors.As(err, &known) {
		return known, true
	}
	var answer goredis.Error
	if err == nil || !errors.As(err, &answer) || errors.Is(err, goredis.Nil) {
		return nil, false
	}
	text := answer.Error()
	for _, r := range refusals {
		for _, code := range r.codes {
			if code == "MOVED" && !strings.HasPrefix(text, code+" ") {
				continue
			}
			if strings.HasPrefix(text, code+" ") || strings.HasPrefix(text, "ERR Error running script") && strings.Contains(text, "-"+code+" ") {
				return &RefusedError{Refusal: r.refusal, sentence: r.sentence, err: err}, true
			}
		}
		for _, part := range r.texts {
			if strings.Contains(text, part) {
				return &RefusedError{Refusal: r.refusal, sentence: r.sentence, err: err}, true
			}
		}
	}
	return nil, false
}

// optional are the commands without which the program works as well. Many servers forbid
// them, so such a refusal is not counted.
var optional = map[string]bool{"config": true, "waitaof": true, "info": true}

// notOffered reports a command that this server does not offer to this user.
func (e *RefusedError) notOffered() bool {
	return e.Refusal == NoPermission || e.Refusal == UnknownCommand
}

// refusalHook turns every refusal into a RefusedError, so that each caller returns and
// logs the sentence, and counts it. What can be repeated, the client library has already
// repeated: it discards a connection that answers READONLY, and repeats READONLY, LOADING,
// CLUSTERDOWN, MASTERDOWN, NOREPLICAS, TRYAGAIN and "max number of clients" three times.
type refusalHook struct {
	mode  Mode
	count func(Refusal)
}

func (h refusalHook) explain(command string, err error) error {
	// HELLO is refused by servers that do not know it, and the client library then uses AUTH.
	var known *RefusedError
	if err == nil || command == "hello" || errors.As(err, &known) {
		return err
	}
	refused, ok := refusalOf(err)
	if !ok || h.mode == Cluster && goredis.HasErrorPrefix(err, "MOVED") { // a cluster's way to name the node
		return err
	}
	refused.Command = command
	if h.count != nil && (!optional[command] || !refused.notOffered()) {
		h.count(refused.Refusal)
	}
	return refused
}

// DialHook implements goredis.Hook.
func (h refusalHook) DialHook(next goredis.DialHook) goredis.DialHook {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return next(ctx, network, address)
	}
}

// ProcessHook implements goredis.Hook.
func (h refusalHook) ProcessHook(next goredis.ProcessHook) goredis.ProcessHook {
	return func(ctx context.Context, cmd goredis.Cmder) error { return h.explain(cmd.Name(), next(ctx, cmd)) }
}

// ProcessPipelineHook implements goredis.Hook.
func (h refusalHook) ProcessPipelineHook(next goredis.ProcessPipelineHook) goredis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []goredis.Cmder) error {
		err := next(ctx, cmds)
		if err == nil {
			return nil
		}
		var first error
		for _, cmd := range cmds {
			if was := cmd.Err(); was != nil {
				cmd.SetErr(h.explain(cmd.Name(), was))
				first = cmp.Or(first, cmd.Err())
			}
		}
		if first == nil {
			// The server has refused the connection (a password, a database). The client
			// library (9.23) then leaves the commands without an error.
			first = h.explain("", err)
			for _, cmd := range cmds {
				cmd.SetErr(first)
			}
		}
		return first
	}
}

// explainRefusals adds the hook to a client and, of a cluster, to the client of each node.
func explainRefusals(client goredis.UniversalClient, mode Mode, count func(Refusal)) {
	hook := refusalHook{mode: mode, count: count}
	client.AddHook(hook)
	if cluster, ok := client.(*goredis.ClusterClient); ok {
		cluster.OnNewNode(func(node *goredis.Client) { node.AddHook(hook) })
	}
}
