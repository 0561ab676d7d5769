// Package helper_test runs the passkey helper in a real Chromium, on a page of loopback
// that the browser takes for web.whatsapp.com, with a virtual authenticator that has the
// passkey of a simulated account.
package helper_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

const (
	panel = "#whatsapp-operator-passkey-helper"
	// browserTimeout is generous: a browser on a busy machine starts slowly.
	browserTimeout = 2 * time.Minute
)

// newPage starts a browser whose tab shows the page of that host, and which has the passkeys.
func newPage(t *testing.T, host string, keys ...*passkey.Passkey) context.Context {
	t.Helper()
	g := NewWithT(t)
	chromium := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			chromium = path
			break
		}
	}
	if chromium == "" {
		t.Fatal("no Chromium: `make test-deps` installs one on Debian")
	}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		// As on WhatsApp's page: no inline scripts or styles, and text is never taken for HTML.
		w.Header().Set("Content-Security-Policy", "default-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'")
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte("<!DOCTYPE html><title>page</title><body>WhatsApp Web</body>"))
	}))
	t.Cleanup(server.Close)
	spki := sha256.Sum256(server.Certificate().RawSubjectPublicKeyInfo)
	extension, err := filepath.Abs(".")
	g.Expect(err).NotTo(HaveOccurred())
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	g.Expect(err).NotTo(HaveOccurred())

	ctx, cancel := context.WithTimeout(t.Context(), browserTimeout)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx,
		chromedp.ExecPath(chromium), chromedp.UserDataDir(t.TempDir()), chromedp.NoFirstRun, chromedp.NoDefaultBrowserCheck, chromedp.NoSandbox,
		chromedp.Flag("headless", "new"), chromedp.Flag("disable-gpu", true), chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true),
		chromedp.Flag("load-extension", extension), chromedp.Flag("disable-extensions-except", extension),
		chromedp.Flag("host-resolver-rules", "MAP "+host+":443 127.0.0.1:"+port+", MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
		chromedp.Flag("ignore-certificate-errors-spki-list", base64.StdEncoding.EncodeToString(spki[:])),
	)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	g.Expect(chromedp.Do(ctx, chromedp.Navigate("https://"+host+"/"))).To(Succeed())
	_, err = chromedp.Call(ctx, webauthn.Enable, webauthn.EnableParams{})
	g.Expect(err).NotTo(HaveOccurred())
	for _, key := range keys {
		addPasskey(ctx, t, key, passkey.RelyingParty)
	}
	return ctx
}

// addPasskey gives the browser a passkey for that site.
func addPasskey(ctx context.Context, t *testing.T, key *passkey.Passkey, site string) {
	t.Helper()
	g := NewWithT(t)
	private, err := x509.MarshalPKCS8PrivateKey(key.Key)
	g.Expect(err).NotTo(HaveOccurred())
	authenticator, err := chromedp.Call(ctx, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
		Protocol: "ctap2", Transport: "internal",
		HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true,
	}})
	g.Expect(err).NotTo(HaveOccurred())
	_, err = chromedp.Call(ctx, webauthn.AddCredential, webauthn.AddCredentialParams{
		AuthenticatorID: authenticator.AuthenticatorID,
		Credential: &webauthn.Credential{
			CredentialID: key.ID, IsResidentCredential: true, RpID: site,
			PrivateKey: private, UserHandle: key.UserHandle, SignCount: 1,
		},
	})
	g.Expect(err).NotTo(HaveOccurred())
}

func paste(ctx context.Context, t *testing.T) {
	t.Helper()
	code, err := os.ReadFile("passkey.js")
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	_, err = chromedp.Run(ctx, chromedp.Evaluate[any](string(code)))
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
}

// click does what a click on the extension's button does: it calls the listener with the tab.
func click(ctx context.Context, t *testing.T) {
	t.Helper()
	g := NewWithT(t)
	var worker *target.Info
	g.Eventually(func(g Gomega) {
		targets, err := chromedp.Targets(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		for _, info := range targets {
			if info.Type == "service_worker" && strings.HasSuffix(info.URL, "/background.js") {
				worker = info
			}
		}
		g.Expect(worker).NotTo(BeNil())
	}).WithTimeout(browserTimeout).Should(Succeed())
	extension, cancel := chromedp.NewContext(ctx, chromedp.WithTargetID(worker.TargetID))
	defer cancel()
	_, err := chromedp.Run(extension, chromedp.Evaluate[bool](
		`chrome.tabs.query({url: "https://web.whatsapp.com/*"}).then((tabs) => openHelper(tabs[0])).then(() => true)`, chromedp.EvalAwaitPromise))
	g.Expect(err).NotTo(HaveOccurred())
}

// ask gives the request to the helper and returns its answer and what it says.
func ask(ctx context.Context, t *testing.T, request string) (answer, status string) {
	t.Helper()
	g := NewWithT(t)
	g.Expect(chromedp.Do(ctx,
		chromedp.WaitVisible(panel+"-request"),
		chromedp.SetValue(panel+"-request", request),
		chromedp.Click(panel+"-ask"),
	)).To(Succeed())
	g.Eventually(func() (string, error) {
		var err error
		status, err = chromedp.Run(ctx, chromedp.TextContent(panel+"-status"))
		return status, err
	}).WithTimeout(browserTimeout).ShouldNot(Or(BeEmpty(), HavePrefix("Waiting")))
	answer, err := chromedp.Run(ctx, chromedp.Value(panel+"-answer"))
	g.Expect(err).NotTo(HaveOccurred())
	return answer, status
}

func TestTheAnswerSatisfiesWhatsApp(t *testing.T) {
	for name, open := range map[string]func(context.Context, *testing.T){"pasted into the console": paste, "as an extension": click} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			key, err := passkey.New()
			g.Expect(err).NotTo(HaveOccurred())
			challenge := make([]byte, 32)
			_, _ = rand.Read(challenge)
			request, err := key.Request(challenge, 10*time.Minute)
			g.Expect(err).NotTo(HaveOccurred())

			ctx := newPage(t, "web.whatsapp.com", key)
			open(ctx, t)
			answer, status := ask(ctx, t, string(request))
			g.Expect(status).To(ContainSubstring("whatsapp-operator.io/passkey-response"))
			g.Expect(key.Verify(challenge, []byte(answer))).To(Succeed())
		})
	}
}

// The operator also shows requests that name the page itself, or no site, which means the page.
func TestRequestsForThePageItself(t *testing.T) {
	g := NewWithT(t)
	key, err := passkey.New()
	g.Expect(err).NotTo(HaveOccurred())
	request, err := key.Request([]byte("0123456789abcdef"), 10*time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	ctx := newPage(t, session.WhatsAppPage)
	addPasskey(ctx, t, key, session.WhatsAppPage)
	for name, site := range map[string]string{"named": `"rpId":"web.whatsapp.com",`, "not named": "", "empty": `"rpId":"",`} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			options := strings.Replace(string(request), `"rpId":"whatsapp.com",`, site, 1)
			g.Expect(options).NotTo(Equal(string(request)))
			paste(ctx, t)
			answer, status := ask(ctx, t, options)
			g.Expect(status).To(ContainSubstring("whatsapp-operator.io/passkey-response"))
			g.Expect(session.CheckPasskeyResponse(options, answer)).To(Succeed())
		})
	}
}

func TestARequestThatCannotBeAnswered(t *testing.T) {
	g := NewWithT(t)
	key, err := passkey.New()
	g.Expect(err).NotTo(HaveOccurred())
	stranger, err := passkey.New()
	g.Expect(err).NotTo(HaveOccurred())
	request, err := key.Request([]byte("0123456789abcdef"), time.Second)
	g.Expect(err).NotTo(HaveOccurred())
	ctx := newPage(t, "web.whatsapp.com", stranger)
	for _, tt := range []struct{ name, request, want string }{
		{"nothing", " ", "Paste the request"},
		{"cut off", string(request[:len(request)-10]), "not complete JSON"},
		{"something else", `{"phase":"Pairing"}`, "no challenge"},
		{"another party's", strings.Replace(string(request), "whatsapp.com", "example.com", 1), "not for whatsapp.com"},
		{"another page's of WhatsApp", strings.Replace(string(request), "whatsapp.com", "business.whatsapp.com", 1), "not for whatsapp.com"},
		{"too long", `{"challenge":"` + strings.Repeat("a", 1<<20) + `"}`, "longer than 8192"},
		{"of an account whose passkey is not here", string(request), "gave no answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			paste(ctx, t)
			answer, status := ask(ctx, t, tt.request)
			g.Expect(status).To(ContainSubstring(tt.want))
			g.Expect(answer).To(BeEmpty())
		})
	}
}

func TestOnAnotherPageTheHelperSaysWhereToGo(t *testing.T) {
	g := NewWithT(t)
	ctx := newPage(t, "www.example.com")
	said := make(chan string, 1)
	g.Expect(chromedp.Listen(ctx, func(event any) {
		if dialog, ok := event.(*page.EventJavascriptDialogOpening); ok {
			said <- dialog.Message
		}
	})).To(Succeed())
	closed := make(chan error, 1)
	go func() {
		message := <-said
		_, err := chromedp.Call(ctx, page.HandleJavaScriptDialog, page.HandleJavaScriptDialogParams{Accept: true})
		said <- message
		closed <- err
	}()
	paste(ctx, t)
	g.Eventually(said).WithTimeout(browserTimeout).Should(Receive(ContainSubstring("Open https://web.whatsapp.com")))
	g.Eventually(closed).WithTimeout(browserTimeout).Should(Receive(BeNil()))
}
