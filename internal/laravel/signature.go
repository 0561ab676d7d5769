package laravel

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The headers of the Standard Webhooks specification.
const (
	HeaderID        = "webhook-id"
	HeaderTimestamp = "webhook-timestamp"
	HeaderSignature = "webhook-signature"
)

const (
	// secretPrefix marks a secret whose rest is base64.
	secretPrefix = "whsec_"
	// minSecret is the least length that the specification requires: 192 bits.
	minSecret = 24
	// signatureVersion is HMAC-SHA256.
	signatureVersion = "v1,"
	// DefaultTolerance is how much the time of a request may differ from Verify's: the
	// specification's libraries use five minutes.
	DefaultTolerance = 5 * time.Minute
)

// Errors of Verify and ParseSecret.
var (
	// ErrSecret says that a signing secret cannot be used.
	ErrSecret = errors.New("a signing secret must be whsec_ and base64, or plain text, of at least 24 bytes")
	// ErrSignature says that no signature was made with one of the secrets.
	ErrSignature = errors.New("no signature of the request matches")
	// ErrTimestamp says that the request's time is too old, in the future, or missing.
	ErrTimestamp = errors.New("the request's timestamp is missing or out of tolerance")
)

// Secret is a signing key.
type Secret []byte

// ParseSecret reads a secret as people write it: whsec_ and base64, or plain
// text. The error does not repeat it.
func ParseSecret(text string) (Secret, error) {
	key := []byte(text)
	if encoded, found := strings.CutPrefix(text, secretPrefix); found {
		decoded, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return nil, ErrSecret
		}
		key = decoded
	}
	if len(key) < minSecret {
		return nil, ErrSecret
	}
	return key, nil
}

// sign is the HMAC of a request: its id, its time in Unix seconds and its body.
func (s Secret) sign(id, timestamp string, body []byte) []byte {
	mac := hmac.New(sha256.New, s)
	mac.Write([]byte(id + "." + timestamp + "."))
	mac.Write(body)
	return mac.Sum(nil)
}

// Sign sets the three headers of a request that is sent at now. Each secret makes one
// signature: during a rotation the receiver knows at least one of the secrets.
func Sign(header http.Header, secrets []Secret, id string, now time.Time, body []byte) {
	timestamp := strconv.FormatInt(now.Unix(), 10)
	signatures := make([]string, len(secrets))
	for i, s := range secrets {
		signatures[i] = signatureVersion + base64.StdEncoding.EncodeToString(s.sign(id, timestamp, body))
	}
	header.Set(HeaderID, id)
	header.Set(HeaderTimestamp, timestamp)
	header.Set(HeaderSignature, strings.Join(signatures, " "))
}

// Verify checks a request as a receiver does: it accepts one that was signed with one of
// the secrets, at a time within tolerance of now. The error is ErrTimestamp or ErrSignature.
func Verify(header http.Header, secrets []Secret, now time.Time, tolerance time.Duration, body []byte) error {
	timestamp := header.Get(HeaderTimestamp)
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil {
		return fmt.Errorf("verifying a request: %w", ErrTimestamp)
	}
	if age := now.Sub(time.Unix(seconds, 0)); age > tolerance || age < -tolerance {
		return fmt.Errorf("verifying a request: %w", ErrTimestamp)
	}
	for _, given := range strings.Fields(header.Get(HeaderSignature)) {
		encoded, found := strings.CutPrefix(given, signatureVersion)
		if !found {
			continue // a signature of another version
		}
		mac, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			continue
		}
		for _, s := range secrets {
			if hmac.Equal(mac, s.sign(header.Get(HeaderID), timestamp, body)) {
				return nil
			}
		}
	}
	return fmt.Errorf("verifying a request: %w", ErrSignature)
}
