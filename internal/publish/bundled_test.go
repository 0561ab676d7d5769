package publish

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// chartFiles has the files of the bundled stores.
const chartFiles = "../../charts/whatsapp-operator/files"

// bundledRedis runs the chart's start script up to the server, which it starts here with the
// same options and users.
func bundledRedis(t *testing.T, passwords string) *testenv.RedisProcess {
	t.Helper()
	g, dir := NewWithT(t), t.TempDir()
	script, err := os.ReadFile(filepath.Join(chartFiles, "valkey-start.sh"))
	g.Expect(err).NotTo(HaveOccurred())
	files, err := filepath.Abs(chartFiles)
	g.Expect(err).NotTo(HaveOccurred())
	text := strings.NewReplacer("/tmp/", dir+"/", "/passwords/", passwords+"/", "/config/", files+"/",
		`exec "$server"`, `printf '%s\n'`).Replace(string(script))
	g.Expect(text).To(ContainSubstring("printf"), "the script starts the server in another way")
	output, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", text).Output()
	g.Expect(err).NotTo(HaveOccurred())
	options := strings.Split(strings.TrimSuffix(string(output), "\n"), "\n")
	g.Expect(options[:2]).To(Equal([]string{"--dir", "/data"}))
	return testenv.RedisServer(t, options[2:]...)
}

// TestTheBundledRedisKeepsItsDataOverARestart: what has been delivered is not delivered again.
// The server reads its append-only file as the user default; where that user has no permission,
// it reads single commands, and skips what scripts have written.
func TestTheBundledRedisKeepsItsDataOverARestart(t *testing.T) {
	g, passwords := NewWithT(t), t.TempDir()
	for _, name := range []string{"manager", "worker", "laravel"} {
		g.Expect(os.WriteFile(filepath.Join(passwords, name), []byte("secret-of-"+name), 0o600)).To(Succeed())
	}
	server := bundledRedis(t, passwords)
	config := redis.Config{Addresses: []string{server.Addr()}, Username: "whatsapp-operator-manager", PasswordFile: filepath.Join(passwords, "manager")}
	client, err := redis.New(config)
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { _ = client.Close() })
	queue := batch.NewQueue(client, config.Keys(), clock.RealClock{}, batch.Options{})
	item := func(sessionID string) delivery.Item {
		i, err := publication(sessionID, 1).Status.Item()
		g.Expect(err).NotTo(HaveOccurred())
		return i
	}
	enqueue := func(sessionID string) batch.EnqueueCode {
		var results []batch.EnqueueResult
		g.Eventually(func() (err error) { // the first attempts meet closed connections
			results, err = queue.Enqueue(t.Context(), delivery.KindStatus, item(sessionID))
			return err
		}).WithTimeout(time.Minute).Should(Succeed())
		return results[0].Code
	}
	g.Expect(enqueue("delivered")).To(Equal(batch.Queued))
	first, err := queue.Claim(t.Context(), delivery.KindStatus, 10, time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(queue.Ack(t.Context(), first)).To(Succeed())
	g.Expect(enqueue("sent")).To(Equal(batch.Queued))
	sent, err := queue.Claim(t.Context(), delivery.KindStatus, 10, time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(queue.Release(t.Context(), sent, time.Time{})).To(Succeed())

	for _, stop := range []func(){server.Stop, server.Kill} {
		stop()
		server.Restart()
		g.Expect(enqueue("delivered")).To(Equal(batch.Repeated), "Laravel has it")
	}
	again, err := queue.Claim(t.Context(), delivery.KindStatus, 10, time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(again).NotTo(BeNil())
	g.Expect(again.ID).To(Equal(sent.ID), "what may have arrived is repeated under the same id")
	g.Expect(again.Items).To(Equal(sent.Items))
}
