package app

import (
	"bytes"
	"os"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

// TestRedisACL: the page shows what the command prints, and what is asked for is printed.
func TestRedisACL(t *testing.T) {
	run := func(args ...string) (string, error) {
		out := &bytes.Buffer{}
		cmd := newRedisACLCommand()
		cmd.SetArgs(append([]string{}, args...)) // with nil the arguments of the test's own process are read
		cmd.SetOut(out)
		cmd.SetErr(&bytes.Buffer{})
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
	g := NewWithT(t)
	page, err := os.ReadFile("../../docs/redis.md")
	g.Expect(err).NotTo(HaveOccurred())
	printed, err := run()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(strings.Count(printed, "\n")).To(Equal(3))
	g.Expect(string(page)).To(ContainSubstring("```\n"+printed+"```"), "write the command's output to the page")

	worker, err := run("worker", "--redis-key-prefix=wa:", "--redis-mode=cluster", "--waitaof")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(worker).To(And(HavePrefix("ACL SETUSER whatsapp-operator-worker reset "), ContainSubstring(" ~wa:operator:* "),
		ContainSubstring(" +cluster|slots"), ContainSubstring(" +waitaof"), Not(ContainSubstring("+select"))))
	laravel, err := run("laravel", "--redis-db=3", "--redis-mode=sentinel")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(laravel).To(Equal("ACL SETUSER whatsapp-operator-laravel reset resetchannels on >PASSWORD ~session:* +ping +get +mget +exists +ttl +pttl +select\n"))
	for _, wrong := range [][]string{{"--redis-mode=ring"}, {"--redis-key-prefix=a{b}"}, {"nobody"}} {
		_, err := run(wrong...)
		g.Expect(err).To(HaveOccurred(), "%v", wrong)
	}
}
