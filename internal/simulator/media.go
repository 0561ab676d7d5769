package simulator

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/util/cbcutil"
	"go.mau.fi/whatsmeow/util/hkdfutil"
	"google.golang.org/protobuf/proto"
)

// The media host stores the encrypted files of messages. A client gets its address with the
// answer to w:m, uploads under /mms/, and downloads by the direct path in a message.

// File describes the media file of a message.
type File struct {
	Mime string `json:"mime,omitempty"`
	Name string `json:"name,omitempty"`
	// Data is the content; if it is empty, the content is Size random bytes (default 1,024).
	Data []byte `json:"data,omitempty"`
	Size int    `json:"size,omitempty"`
	// Seconds is the length of a voice message, an audio or a video.
	Seconds int `json:"seconds,omitempty"`
	// Expired means that the media host no longer has the file, but the phone has it.
	Expired bool `json:"expired,omitempty"`
}

const (
	defaultFileSize = 1024
	maxFileSize     = 64 << 20
	// maxMedia limits the bytes that the media host stores; the oldest files are deleted.
	maxMedia = 256 << 20
	// mediaAuth is the token that a client must show to upload.
	mediaAuth = "simulated"
)

// mediaKeyInfo names the keys of each kind of file (whatsmeow's download.go, MediaType).
var mediaKeyInfo = map[string]string{
	KindImage: "WhatsApp Image Keys", KindSticker: "WhatsApp Image Keys", KindVideo: "WhatsApp Video Keys",
	KindAudio: "WhatsApp Audio Keys", KindVoice: "WhatsApp Audio Keys", KindDocument: "WhatsApp Document Keys",
}

// mediaTypes are the usual types of the files.
var mediaTypes = map[string]string{
	KindImage: "image/jpeg", KindSticker: "image/webp", KindVideo: "video/mp4",
	KindAudio: "audio/mpeg", KindVoice: "audio/ogg; codecs=opus", KindDocument: "application/pdf",
}

// mediaFile is a file as its sender knows it: the media host has only the encrypted content.
type mediaFile struct {
	File
	key, hash, encryptedHash []byte
	length                   int
	path                     string
	encrypted                []byte
}

// mediaHost stores encrypted files by their path.
type mediaHost struct {
	mu    sync.Mutex
	files map[string][]byte // nil for a file that has expired
	paths []string          // the oldest first
	bytes int
}

// add encrypts a file for a message and stores it.
func (h *mediaHost) add(kind string, description *File) (*mediaFile, error) {
	f := &mediaFile{}
	if description != nil {
		f.File = *description
	}
	if f.Mime == "" {
		f.Mime = mediaTypes[kind]
	}
	content := f.Data
	if len(content) == 0 {
		if f.Size == 0 {
			f.Size = defaultFileSize
		}
		if f.Size < 0 || f.Size > maxFileSize {
			return nil, fmt.Errorf("%w: a file has at most %d bytes", ErrBadInput, maxFileSize)
		}
		content = make([]byte, f.Size)
		_, _ = rand.Read(content) // never fails
	}
	f.Data = nil // the encrypted content is enough
	f.key = make([]byte, 32)
	_, _ = rand.Read(f.key) // never fails
	keys := hkdfutil.SHA256(f.key, nil, []byte(mediaKeyInfo[kind]), 112)
	iv, cipherKey, macKey := keys[:16], keys[16:48], keys[48:80]
	ciphertext, err := cbcutil.Encrypt(cipherKey, iv, content)
	if err != nil {
		return nil, fmt.Errorf("encrypt a file: %w", err)
	}
	mac := hmac.New(sha256.New, macKey)
	mac.Write(iv)
	mac.Write(ciphertext)
	f.encrypted = slices.Concat(ciphertext, mac.Sum(nil)[:10])
	plainHash, encryptedHash := sha256.Sum256(content), sha256.Sum256(f.encrypted)
	f.hash, f.encryptedHash, f.length = plainHash[:], encryptedHash[:], len(content)
	if f.Expired {
		f.path = h.store(nil)
	} else {
		f.path = h.store(f.encrypted)
	}
	return f, nil
}

// store stores an encrypted file and returns its direct path.
func (h *mediaHost) store(encrypted []byte) string {
	var id [12]byte
	_, _ = rand.Read(id[:]) // never fails
	path := "/v/t62.7118-24/" + hex.EncodeToString(id[:])
	h.mu.Lock()
	defer h.mu.Unlock()
	h.files[path] = encrypted
	h.paths = append(h.paths, path)
	for h.bytes += len(encrypted); h.bytes > maxMedia && len(h.paths) > 1; h.paths = h.paths[1:] {
		h.bytes -= len(h.files[h.paths[0]])
		delete(h.files, h.paths[0])
	}
	return path + "?ccb=11-4&oh=simulated&oe=7FFFFFFF"
}

// message is the message with a file.
func (f *mediaFile) message(kind string, caption *string, info *waE2E.ContextInfo) *waE2E.Message {
	path, mime, length, name := &f.path, &f.Mime, proto.Uint64(uint64(f.length)), textOrNil(f.Name)
	seconds := proto.Uint32(uint32(f.Seconds))
	switch kind {
	case KindImage:
		return &waE2E.Message{ImageMessage: &waE2E.ImageMessage{
			DirectPath: path, Mimetype: mime, FileLength: length, MediaKey: f.key, FileSHA256: f.hash, FileEncSHA256: f.encryptedHash,
			Caption: caption, ContextInfo: info,
		}}
	case KindVideo:
		return &waE2E.Message{VideoMessage: &waE2E.VideoMessage{
			DirectPath: path, Mimetype: mime, FileLength: length, MediaKey: f.key, FileSHA256: f.hash, FileEncSHA256: f.encryptedHash,
			Caption: caption, ContextInfo: info, Seconds: seconds,
		}}
	case KindVoice, KindAudio:
		return &waE2E.Message{AudioMessage: &waE2E.AudioMessage{
			DirectPath: path, Mimetype: mime, FileLength: length, MediaKey: f.key, FileSHA256: f.hash, FileEncSHA256: f.encryptedHash,
			ContextInfo: info, Seconds: seconds, PTT: proto.Bool(kind == KindVoice),
		}}
	case KindSticker:
		return &waE2E.Message{StickerMessage: &waE2E.StickerMessage{
			DirectPath: path, Mimetype: mime, FileLength: length, MediaKey: f.key, FileSHA256: f.hash, FileEncSHA256: f.encryptedHash,
			ContextInfo: info,
		}}
	default:
		document := &waE2E.Message{DocumentMessage: &waE2E.DocumentMessage{
			DirectPath: path, Mimetype: mime, FileLength: length, MediaKey: f.key, FileSHA256: f.hash, FileEncSHA256: f.encryptedHash,
			FileName: name, Title: name, Caption: caption, ContextInfo: info,
		}}
		if caption != nil {
			document = &waE2E.Message{DocumentWithCaptionMessage: &waE2E.FutureProofMessage{Message: document}}
		}
		return document
	}
}

// handler serves the media host.
func (h *mediaHost) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v/", h.download)
	mux.HandleFunc("POST /mms/{type}/{token}", h.upload)
	mux.HandleFunc("DELETE /mms/{type}/{token}", func(http.ResponseWriter, *http.Request) {}) // a client deletes only the history of its phone
	return mux
}

// download answers 410 for a file that has expired and 404 for one that never existed or was
// deleted.
func (h *mediaHost) download(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	content, ok := h.files[r.URL.Path]
	h.mu.Unlock()
	switch {
	case !ok:
		http.NotFound(w, r)
	case content == nil:
		http.Error(w, "the file has expired", http.StatusGone)
	default:
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(content) // fails only if the client has closed the connection
	}
}

// upload stores a file whose name is the hash of its content.
func (h *mediaHost) upload(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("auth") != mediaAuth {
		http.Error(w, "the token of the answer to w:m is missing", http.StatusUnauthorized)
		return
	}
	content, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxFileSize))
	if err != nil {
		http.Error(w, "the file is too large or was not sent completely", http.StatusRequestEntityTooLarge)
		return
	}
	hash := sha256.Sum256(content)
	if base64.URLEncoding.EncodeToString(hash[:]) != r.PathValue("token") {
		http.Error(w, "the content does not have the hash in the path", http.StatusBadRequest)
		return
	}
	path := h.store(content)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"url": "https://" + r.Host + path, "direct_path": path}) // fails only if the client has closed the connection
}

// answerMediaConn names the media host of this server.
func (c *conn) answerMediaConn(iq *waBinary.Node) (reply, bool) {
	if _, ok := iq.GetOptionalChildByTag("media_conn"); !ok {
		return reply{}, false
	}
	return result(waBinary.Node{
		Tag:     "media_conn",
		Attrs:   waBinary.Attrs{"auth": mediaAuth, "ttl": "3600", "auth_ttl": "3600", "max_buckets": "12"},
		Content: []waBinary.Node{{Tag: "host", Attrs: waBinary.Attrs{"hostname": c.srv.MediaHost()}}},
	}), true
}

// ExpireMedia makes the media host forget all files, as after some weeks: downloads are
// answered with status 410. The phones still have the files.
func (s *Server) ExpireMedia() int {
	s.media.mu.Lock()
	defer s.media.mu.Unlock()
	n := 0
	for path, content := range s.media.files {
		if content != nil {
			s.media.files[path] = nil
			n++
		}
	}
	s.media.bytes = 0
	s.media.paths = slices.Clone(s.media.paths)
	return n
}
