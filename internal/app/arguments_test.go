package app

import (
	"bytes"
	"testing"

	. "github.com/onsi/gomega"
)

// A command line with a mistake is refused with an error that says what to type, before
// anything is connected to, and never with success.
func TestCommandLinesWithMistakes(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("POD_NAMESPACE", "ops")
	for _, row := range []struct {
		name string
		args []string
		want string
	}{
		{"an unknown command", []string{"deadletters"}, `unknown command "deadletters"`},
		{"an unknown command on dead letters", []string{"deadletter", "purge"}, "`whatsapp-operator deadletter --help` lists"},
		{"an unknown command on the store", []string{"store", "list"}, "`whatsapp-operator store --help` lists"},
		{"a flag of another command", []string{"deadletter", "list", "--laravel-url=https://x"}, "`whatsapp-operator deadletter list --help` lists the flags"},
		{"an argument too many", []string{"worker", "extra"}, `"whatsapp-operator worker" takes no arguments, but got "extra"`},
		{"a flag without its dashes", []string{"deadletter", "list", "kind=qr"}, "flags begin with --"},
		{"no session to purge", []string{"store", "purge", "--yes"}, "needs one argument, the id of a session"},
		{"two dead letters to show", []string{"deadletter", "show", "1-0", "2-0"}, "needs one argument, the id of a dead letter"},
		{"a kind that does not exist", []string{"deadletter", "list", "--kind=codes"}, `there is no kind "codes"`},
		{"dead letters to drop that are not named", []string{"deadletter", "drop"}, "no dead letter is named"},
		{"dead letters to replay that are not named", []string{"deadletter", "replay", "--kind=qr"}, "no dead letter is named"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			root := NewRootCommand()
			root.SetArgs(row.args)
			out := &bytes.Buffer{}
			root.SetOut(out)
			err := root.ExecuteContext(t.Context())
			g.Expect(err).To(MatchError(ContainSubstring(row.want)))
			g.Expect(err.Error()).NotTo(ContainSubstring("--store"), "dead letters are not in the database")
			g.Expect(out.String()).To(BeEmpty())
		})
	}
}
