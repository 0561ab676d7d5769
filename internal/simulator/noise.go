package simulator

import (
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow/proto/waCert"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/socket"
	"go.mau.fi/whatsmeow/util/gcmutil"
	"google.golang.org/protobuf/proto"
)

// Serial numbers of the certificate chain. The client checks that the
// intermediate's issuer is 0 (whatsmeow, handshake.go) and that the leaf's is
// the intermediate.
const (
	rootSerial         = 0
	intermediateSerial = 1
	leafSerial         = 2
)

// authority is the server's identity in the Noise handshake: its static key, and
// the certificate chain for it, signed by a root that the client is configured with.
type authority struct {
	root   [32]byte
	static *ecdh.PrivateKey
	chain  []byte
}

// newAuthority makes the chain root → intermediate → leaf. Without rootKey (32
// bytes, a Curve25519 private key) it generates the root too.
func newAuthority(rootKey *[32]byte, now time.Time) (*authority, error) {
	root, err := ecc.GenerateKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make the noise root: %w", err)
	}
	if rootKey != nil {
		root = ecc.CreateKeyPair(rootKey[:])
	}
	intermediate, err := ecc.GenerateKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make the noise intermediate: %w", err)
	}
	static, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the noise key: %w", err)
	}
	certificate := func(serial, issuer uint32, key []byte, signer *ecc.ECKeyPair) (*waCert.CertChain_NoiseCertificate, error) {
		details, err := proto.Marshal(&waCert.CertChain_NoiseCertificate_Details{
			Serial:       proto.Uint32(serial),
			IssuerSerial: proto.Uint32(issuer),
			Key:          key,
			NotBefore:    proto.Uint64(uint64(now.Add(-24 * time.Hour).Unix())),
			NotAfter:     proto.Uint64(uint64(now.Add(certificateLife).Unix())),
		})
		if err != nil {
			return nil, err
		}
		signature := ecc.CalculateSignature(signer.PrivateKey(), details)
		return &waCert.CertChain_NoiseCertificate{Details: details, Signature: signature[:]}, nil
	}
	intermediateKey := intermediate.PublicKey().PublicKey()
	middle, err := certificate(intermediateSerial, rootSerial, intermediateKey[:], root)
	if err != nil {
		return nil, fmt.Errorf("make the intermediate certificate: %w", err)
	}
	leaf, err := certificate(leafSerial, intermediateSerial, static.PublicKey().Bytes(), intermediate)
	if err != nil {
		return nil, fmt.Errorf("make the leaf certificate: %w", err)
	}
	chain, err := proto.Marshal(&waCert.CertChain{Leaf: leaf, Intermediate: middle})
	if err != nil {
		return nil, fmt.Errorf("make the certificate chain: %w", err)
	}
	return &authority{root: root.PublicKey().PublicKey(), static: static, chain: chain}, nil
}

// responder is the state of the responder in Noise_XX_25519_AESGCM_SHA256
// (noiseprotocol.org, section 7.5). The library's NoiseHandshake implements only the
// initiator.
type responder struct {
	hash      [32]byte
	salt      []byte
	key       cipher.AEAD
	counter   uint32
	ephemeral *ecdh.PrivateKey
}

func newResponder() *responder {
	h := &responder{salt: []byte(socket.NoiseStartPattern)}
	copy(h.hash[:], socket.NoiseStartPattern) // not hashed, because it is 32 bytes long
	h.mixHash(socket.WAConnHeader)
	return h
}

func (h *responder) mixHash(data []byte) {
	d := sha256.New()
	d.Write(h.hash[:])
	d.Write(data)
	d.Sum(h.hash[:0])
}

func (h *responder) expand(secret []byte) (first, second []byte, err error) {
	prk, err := hkdf.Extract(sha256.New, secret, h.salt)
	if err != nil {
		return nil, nil, err
	}
	okm, err := hkdf.Expand(sha256.New, prk, "", 64)
	if err != nil {
		return nil, nil, err
	}
	return okm[:32], okm[32:], nil
}

func (h *responder) mixKey(private *ecdh.PrivateKey, public []byte) error {
	peer, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return err
	}
	secret, err := private.ECDH(peer)
	if err != nil {
		return err
	}
	var key []byte
	if h.salt, key, err = h.expand(secret); err != nil {
		return err
	}
	h.counter = 0
	h.key, err = gcmutil.Prepare(key)
	return err
}

func (h *responder) seal(plaintext []byte) []byte {
	ciphertext := h.key.Seal(nil, nonce(h.counter), plaintext, h.hash[:])
	h.counter++
	h.mixHash(ciphertext)
	return ciphertext
}

func (h *responder) open(ciphertext []byte) ([]byte, error) {
	plaintext, err := h.key.Open(nil, nonce(h.counter), ciphertext, h.hash[:])
	if err != nil {
		return nil, err
	}
	h.counter++
	h.mixHash(ciphertext)
	return plaintext, nil
}

// nonce is the initialisation vector of the n-th message of a direction.
func nonce(n uint32) []byte {
	iv := make([]byte, 12)
	binary.BigEndian.PutUint32(iv[8:], n)
	return iv
}

// errHandshake means that a client does not follow the handshake.
var errHandshake = errors.New("not a valid noise handshake")

// hello answers the client's first message.
func (h *responder) hello(a *authority, message []byte) ([]byte, error) {
	var in waWa6.HandshakeMessage
	if err := proto.Unmarshal(message, &in); err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	theirs := in.GetClientHello().GetEphemeral()
	var err error
	if h.ephemeral, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
		return nil, err
	}
	ours := h.ephemeral.PublicKey().Bytes()
	h.mixHash(theirs)
	h.mixHash(ours)
	if err := h.mixKey(h.ephemeral, theirs); err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	static := h.seal(a.static.PublicKey().Bytes())
	if err := h.mixKey(a.static, theirs); err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	return proto.Marshal(&waWa6.HandshakeMessage{ServerHello: &waWa6.HandshakeMessage_ServerHello{
		Ephemeral: ours,
		Static:    static,
		Payload:   h.seal(a.chain),
	}})
}

// finish reads the client's second message. It returns the client's static key, its
// payload, and the keys of the two directions.
func (h *responder) finish(message []byte) (static [32]byte, payload *waWa6.ClientPayload, read, write cipher.AEAD, err error) {
	fail := func(err error) ([32]byte, *waWa6.ClientPayload, cipher.AEAD, cipher.AEAD, error) {
		return [32]byte{}, nil, nil, nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	var in waWa6.HandshakeMessage
	if err := proto.Unmarshal(message, &in); err != nil {
		return fail(err)
	}
	key, err := h.open(in.GetClientFinish().GetStatic())
	if err != nil {
		return fail(err)
	}
	if err := h.mixKey(h.ephemeral, key); err != nil {
		return fail(err)
	}
	raw, err := h.open(in.GetClientFinish().GetPayload())
	if err != nil {
		return fail(err)
	}
	payload = &waWa6.ClientPayload{}
	if err := proto.Unmarshal(raw, payload); err != nil {
		return fail(err)
	}
	readKey, writeKey, err := h.expand(nil)
	if err != nil {
		return fail(err)
	}
	if read, err = gcmutil.Prepare(readKey); err != nil {
		return fail(err)
	}
	if write, err = gcmutil.Prepare(writeKey); err != nil {
		return fail(err)
	}
	copy(static[:], key)
	return static, payload, read, write, nil
}
