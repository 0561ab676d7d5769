package simulator

import (
	"bytes"
	"net/http"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waMmsRetry"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
)

// downloadable is the part of a message with a media file.
func downloadable(m *waE2E.Message) whatsmeow.DownloadableMessage {
	for _, part := range []whatsmeow.DownloadableMessage{m.GetImageMessage(), m.GetVideoMessage(), m.GetAudioMessage(), m.GetDocumentMessage(), m.GetStickerMessage()} {
		if part.GetDirectPath() != "" {
			return part
		}
	}
	return nil
}

// A client downloads and decrypts the file of each kind of message, from a media host with and
// without TLS.
func TestMediaIn(t *testing.T) {
	for name, withTLS := range map[string]bool{"http": false, "https": true} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(o *Options) { o.TLS = withTLS })
			c := paired(t, s, "15551234567")
			for _, kind := range mediaKinds {
				t.Run(kind, func(t *testing.T) {
					g := wait(t)
					content := bytes.Repeat([]byte(kind), 1000)
					id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), Kind: kind, Text: "a caption", File: &File{Name: "file.bin", Data: content, Seconds: 3}})
					g.Expect(err).NotTo(HaveOccurred())
					m := lastMessage(t, c, id)
					part := downloadable(m.Message)
					data, err := c.Download(t.Context(), part)
					g.Expect(err).NotTo(HaveOccurred())
					g.Expect(data).To(Equal(content))
					g.Expect(m.Info.Type).To(Equal("media"))
					g.Expect(entries(s, id)).To(ConsistOf(HaveField("Kind", kind)))
					switch kind {
					case KindVoice:
						g.Expect(m.Message.GetAudioMessage().GetPTT()).To(BeTrue())
						g.Expect(m.Info.MediaType).To(Equal("ptt"))
					case KindDocument:
						g.Expect(m.IsDocumentWithCaption).To(BeTrue())
						g.Expect(m.Message.GetDocumentMessage().GetFileName()).To(Equal("file.bin"))
					}
				})
			}
		})
	}
}

// A client uploads a file, and can download it from the path that it got.
func TestMediaOut(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	content := bytes.Repeat([]byte("upload"), 10000)
	up, err := c.Upload(t.Context(), content, whatsmeow.MediaImage)
	g.Expect(err).NotTo(HaveOccurred())
	data, err := c.Download(t.Context(), &waE2E.ImageMessage{
		DirectPath: &up.DirectPath, MediaKey: up.MediaKey, FileSHA256: up.FileSHA256, FileEncSHA256: up.FileEncSHA256, FileLength: &up.FileLength,
	})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(data).To(Equal(content))

	for path, status := range map[string]int{
		"/mms/image/AAAA":                http.StatusUnauthorized,
		"/mms/image/AAAA?auth=simulated": http.StatusBadRequest,
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.MediaHost()+path, bytes.NewReader([]byte("x")))
		g.Expect(err).NotTo(HaveOccurred())
		transport := &http.Transport{}
		response, err := transport.RoundTrip(request)
		g.Expect(err).NotTo(HaveOccurred())
		_ = response.Body.Close()
		transport.CloseIdleConnections()
		g.Expect(response.StatusCode).To(Equal(status))
	}
}

// A file that the media host no longer has is uploaded again by the phone, if it has the file
// and is online.
func TestMediaRetry(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	content := bytes.Repeat([]byte("x"), 1000)
	id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), Kind: KindImage, File: &File{Data: content, Expired: true}})
	g.Expect(err).NotTo(HaveOccurred())
	m := lastMessage(t, c, id)
	image := m.Message.GetImageMessage()
	_, err = c.Download(t.Context(), image)
	g.Expect(err).To(MatchError(whatsmeow.ErrMediaDownloadFailedWith410))

	again := func(info *types.MessageInfo) *waMmsRetry.MediaRetryNotification {
		c.forget()
		g.Expect(c.SendMediaRetryReceipt(t.Context(), info, image.GetMediaKey())).To(Succeed())
		answer, err := whatsmeow.DecryptMediaRetryNotification(first[*events.MediaRetry](t, c), image.GetMediaKey())
		if err != nil {
			g.Expect(err).To(MatchError(whatsmeow.ErrMediaNotAvailableOnPhone))
		}
		return answer
	}
	answer := again(&m.Info)
	g.Expect(answer.GetResult()).To(Equal(waMmsRetry.MediaRetryNotification_SUCCESS))
	image.DirectPath = proto.String(answer.GetDirectPath())
	data, err := c.Download(t.Context(), image)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(data).To(Equal(content))

	// After some weeks it has expired again.
	files, err := Control{URL: s.ControlURL()}.ExpireMedia(t.Context())
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(files).To(Equal(1))
	_, err = c.Download(t.Context(), image)
	g.Expect(err).To(MatchError(whatsmeow.ErrMediaDownloadFailedWith410))

	unknown := m.Info
	unknown.ID = "3EB0"
	g.Expect(again(&unknown)).To(BeNil(), "the phone does not have it")
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())

	_, err = s.Inject(Fault{Kind: FaultPhoneOffline})
	g.Expect(err).NotTo(HaveOccurred())
	c.forget()
	g.Expect(c.SendMediaRetryReceipt(t.Context(), &m.Info, image.GetMediaKey())).To(Succeed())
	g.Consistently(func() []*events.MediaRetry { return of[*events.MediaRetry](c) }, "200ms").Should(BeEmpty())
}
