package session

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// After a scan, or a code that was typed, WhatsApp may ask for the account's passkey, on
// the same connection: EventPasskeyRequest. A person asks the passkey in a browser and
// gives its answer as an annotation, which is sent (OpPasskeyAnswer). WhatsApp then
// confirms it by itself, or wants a person to compare a code with the one on the phone
// (EventPasskeyConfirmation, OpPasskeyConfirm). Then it links the device as without a
// passkey. The connection's keys are part of the exchange, so the pairing starts again with
// a scan when the connection ends or another process takes the session.

const (
	// passkeyTimeout is how long WhatsApp's request is waited for at most: the time-out
	// that WhatsApp's own client is given.
	passkeyTimeout = 10 * time.Minute
	// minPasskeyTimeout is how long WhatsApp's request is waited for at least: no person answers
	// faster, and WhatsApp decides itself whether an answer is too late.
	minPasskeyTimeout = time.Minute
	// MaxPasskeyRequests is how often WhatsApp may ask on one connection.
	MaxPasskeyRequests = 3
	// MaxPasskeyJSON bounds a request and an answer, in bytes: the maximum of
	// status.passkey.requestOptions.
	MaxPasskeyJSON = 8192

	// WhatsAppPage is the host of the page on which the passkey is asked.
	WhatsAppPage   = "web.whatsapp.com"
	whatsAppOrigin = "https://" + WhatsAppPage

	// minAuthenticatorData is how long the authenticator data of an answer is at least: the hash
	// of the site, the flags and the counter (Web Authentication Level 3, section 6.1).
	minAuthenticatorData = 32 + 1 + 4
)

// passkey is what this process knows of the request that waits. The zero value: none does.
type passkey struct {
	// until is when the request expires; zero: there is none.
	until time.Time
	// answer waits to be sent; sending: it is being sent; sent: WhatsApp has accepted one.
	answer        string
	sending, sent bool
	// code is what a person compares with the phone. confirm: the confirmation may be sent;
	// confirming: it is being sent; confirmed: WhatsApp has accepted it.
	code                           string
	confirm, confirming, confirmed bool
}

// onPasskeyRequest handles WhatsApp's request for the account's passkey.
func (m *Machine) onPasskeyRequest(e Event, now time.Time) {
	if m.socket != socketPairing || m.want.JID != "" {
		return
	}
	if len(e.PasskeyOptions) > MaxPasskeyJSON || !json.Valid([]byte(e.PasskeyOptions)) {
		m.passkeyFailed("WhatsApp's request for the passkey cannot be used", now)
		return
	}
	if !m.countOffer(now) {
		return
	}
	m.passkeyRequests++
	if m.passkeyRequests > MaxPasskeyRequests {
		m.passkeyFailed(fmt.Sprintf("WhatsApp asked for the passkey %d times on one connection", m.passkeyRequests), now)
		return
	}
	until := now.Add(passkeyTimeout)
	if !e.Until.IsZero() && e.Until.Before(until) {
		until = e.Until
	}
	if earliest := now.Add(minPasskeyTimeout); until.Before(earliest) {
		until = earliest
	}
	if before := m.passkey.until; !before.IsZero() && before.Before(until) { // asking again is no reason to wait longer
		until = before
	}
	m.passkey = passkey{} // a request that another replaces is not lost
	m.hideCode()          // the codes cannot be scanned any more: the client has a new secret
	m.passkey = passkey{until: until}
	m.watchdog, m.codeUntil = time.Time{}, until
	m.want.Passkey = &v1alpha1.PasskeyStatus{RequestOptions: e.PasskeyOptions, ExpiresAt: metav1.NewTime(until.Truncate(time.Second))}
	m.showPasskey(now)
	message := "WhatsApp asks for the account's passkey: answer status.passkey.requestOptions in a browser before " +
		until.UTC().Format(time.RFC3339) + " (docs/pair.md says how) and give the answer as the annotation " + v1alpha1.PasskeyResponseAnnotation
	m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonPasskeyRequired, message)
	m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, message, now)
}

// showPasskey makes the request what Redis and Laravel get in place of a code.
func (m *Machine) showPasskey(now time.Time) {
	m.code = &delivery.QRItem{
		SessionID: m.obj.Status.SessionID, Attempt: max(m.codeCount, 1), ReplacesInvalid: true,
		Passkey:     &delivery.Passkey{RequestOptions: json.RawMessage(m.want.Passkey.RequestOptions), ConfirmationCode: m.want.Passkey.ConfirmationCode},
		GeneratedAt: delivery.Time{Time: now}, ExpiresAt: delivery.Time{Time: m.passkey.until},
	}
}

// onPasskeyConfirmation handles WhatsApp's acceptance of the answer.
func (m *Machine) onPasskeyConfirmation(e Event, now time.Time) {
	if m.want.Passkey == nil || m.passkey.confirming || m.passkey.confirmed || !m.countOffer(now) {
		return
	}
	m.passkey.sent = true
	// Without a code WhatsApp has seen that the passkey is the phone's that scanned the code. The
	// newest confirmation counts: a person who confirmed an earlier code has not compared this one.
	m.passkey.code, m.passkey.confirm = e.Code, e.Code == ""
	m.want.Passkey.ConfirmationCode, m.want.Passkey.ObservedConfirmation = e.Code, ""
	if e.Code == "" {
		return
	}
	m.showPasskey(now)
	message := "compare status.passkey.confirmationCode with the code on the phone, and if they are equal give it as the annotation " + v1alpha1.PasskeyConfirmAnnotation
	m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonPasskeyRequired, message)
	m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, message, now)
}

// onPasskeyFailed handles a request that cannot be shown, or a continuation that cannot be used.
func (m *Machine) onPasskeyFailed(e Event, now time.Time) {
	switch {
	case m.want.JID != "":
	case e.Continuation && (m.want.Passkey == nil || m.passkey.confirming || m.passkey.confirmed):
		// WhatsApp has sent a continuation that nobody waits for: before a request, or once more
		// after its end. The codes on show, and the pairing that is about to end, go on.
	default:
		m.passkeyFailed(e.Message, now)
	}
}

// passkeyFailed ends a pairing whose passkey cannot be asked or was not accepted.
func (m *Machine) passkeyFailed(why string, now time.Time) {
	m.beginPairing(now) // it expires also where there is never a code
	m.passkey = passkey{}
	m.drop()
	why = status.Clean(why, maxFailure)
	m.pairingFailure = why
	message := why + ": the pairing starts again, scan the next code"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPasskeyFailed, message)
	m.onFailed(v1alpha1.ReasonPasskeyFailed, message, now)
}

// tickPasskey handles the time and the annotations while a passkey is asked for.
func (m *Machine) tickPasskey(now time.Time) {
	if !now.Before(m.passkey.until) {
		why := "the passkey was not answered in time"
		switch {
		case m.passkey.confirming || m.passkey.confirmed || m.passkey.sent && m.passkey.code == "":
			why = "WhatsApp accepted the passkey's answer but did not link the device in time"
		case m.passkey.code != "":
			why = "status.passkey.confirmationCode was not confirmed in time"
		}
		m.passkey = passkey{}
		m.drop()
		m.retryAt, m.pairingFailure = now, why
		message := why + ": the pairing starts again, scan the next code"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPasskeyExpired, message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyExpired, message, now)
		return
	}
	// A text that was removed and is given again is handled again.
	switch response := m.obj.PasskeyResponse(); {
	case response == "":
		m.want.Passkey.ObservedResponse = ""
	case m.want.Passkey.ObservedResponse != Digest(response):
		m.want.Passkey.ObservedResponse = Digest(response)
		m.takePasskeyResponse(response, now)
	}
	switch code := m.obj.PasskeyConfirmation(); {
	case code == "":
		m.want.Passkey.ObservedConfirmation = ""
	case m.want.Passkey.ObservedConfirmation != Digest(code):
		m.want.Passkey.ObservedConfirmation = Digest(code)
		m.takePasskeyConfirmation(code, now)
	}
}

func (m *Machine) takePasskeyResponse(response string, now time.Time) {
	err := CheckPasskeyResponse(m.want.Passkey.RequestOptions, response)
	if err == nil && (m.passkey.sent || m.passkey.sending || m.passkey.answer != "") {
		err = errors.New("an answer was given before; wait for what WhatsApp says")
	}
	if err != nil {
		m.refusePasskey(v1alpha1.PasskeyResponseAnnotation, err, now)
		return
	}
	m.passkey.answer = response
	m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, "the answer of the passkey is sent to WhatsApp", now)
}

func (m *Machine) takePasskeyConfirmation(code string, now time.Time) {
	switch {
	case m.passkey.confirming || m.passkey.confirmed || m.passkey.confirm:
		m.refusePasskey(v1alpha1.PasskeyConfirmAnnotation, errors.New("the confirmation was given before; wait for what WhatsApp says"), now)
	case m.passkey.code == "":
		m.refusePasskey(v1alpha1.PasskeyConfirmAnnotation, errors.New("WhatsApp has not asked for a confirmation; wait for status.passkey.confirmationCode"), now)
	case !sameCode(code, m.passkey.code):
		m.refusePasskey(v1alpha1.PasskeyConfirmAnnotation, errors.New("it is not the present status.passkey.confirmationCode; compare that one with the code on the phone"), now)
	default:
		m.passkey.confirm = true
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, "the confirmation is sent to WhatsApp", now)
	}
}

// sameCode reports whether a person has given that code, however it is written.
func sameCode(given, code string) bool {
	plain := strings.NewReplacer("-", "", " ", "")
	return strings.EqualFold(plain.Replace(strings.TrimSpace(given)), plain.Replace(code))
}

// refusePasskey says why an annotation was not used. The request stays.
func (m *Machine) refusePasskey(annotation string, why error, now time.Time) {
	message := status.Clean("the annotation "+annotation+" was not used: "+why.Error(), 512)
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPasskeyRefused, message)
	m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, message, now)
}

// sendPasskeyAnswer returns the answer that OpPasskeyAnswer sends.
func (m *Machine) sendPasskeyAnswer() (answer string) {
	answer, m.passkey.answer, m.passkey.sending = m.passkey.answer, "", true
	return answer
}

// onPasskeyAnswered handles the result of OpPasskeyAnswer. The request that was answered may
// be over, or another one may have replaced it: then nothing is being sent.
func (m *Machine) onPasskeyAnswered(why string, now time.Time) {
	if !m.passkey.sending {
		return
	}
	m.passkey.sending = false
	switch {
	case why == "":
		if m.passkey.sent = true; m.passkey.code == "" && !m.passkey.confirm {
			m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, "WhatsApp has the answer of the passkey; it links the device or asks for a confirmation", now)
		}
	case !m.passkey.sent:
		m.refusePasskey(v1alpha1.PasskeyResponseAnnotation,
			fmt.Errorf("WhatsApp did not accept it (%s); ask the passkey of the account that was linked again, and give the new answer", why), now)
	}
}

// onPasskeyConfirmed handles the result of OpPasskeyConfirm, likewise.
func (m *Machine) onPasskeyConfirmed(why string, now time.Time) {
	if !m.passkey.confirming {
		return
	}
	m.passkey.confirming, m.passkey.confirmed = false, why == ""
	if why != "" {
		m.passkeyFailed("WhatsApp did not accept the confirmation ("+why+")", now)
	}
}

// PasskeyLostMessage says what to do when a request was lost with its connection.
const PasskeyLostMessage = "the connection that asked for the account's passkey has ended, or the session has moved: the pairing starts again, scan the next code"

// losePasskey records, if one was lost, that a person who is answering the request must
// start again.
func (m *Machine) losePasskey(lost bool) {
	if lost && !m.logoutWanted() {
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPasskeyExpired, PasskeyLostMessage)
	}
}

// Digest is what a status keeps of an annotation that was dealt with: the first half of
// its SHA-256, in hexadecimal.
func Digest(annotation string) string {
	sum := sha256.Sum256([]byte(annotation))
	return hex.EncodeToString(sum[:16])
}

type passkeyRequest struct {
	Challenge        string              `json:"challenge"`
	RelyingParty     string              `json:"rpId"`
	AllowCredentials []passkeyCredential `json:"allowCredentials"`
}

type passkeyCredential struct {
	ID string `json:"id"`
}

type passkeyResponse struct {
	ID       string `json:"id"`
	RawID    string `json:"rawId"`
	Type     string `json:"type"`
	Response struct {
		ClientDataJSON    string `json:"clientDataJSON"`
		AuthenticatorData string `json:"authenticatorData"`
		Signature         string `json:"signature"`
		UserHandle        string `json:"userHandle"`
	} `json:"response"`
}

type clientData struct {
	Type      string `json:"type"`
	Challenge string `json:"challenge"`
	Origin    string `json:"origin"`
}

// CheckPasskeyResponse reports why a text cannot be the answer to the request with those
// options; nil: WhatsApp may be given it. The form is that of PublicKeyCredential.toJSON
// (Web Authentication Level 3, section 5.1); the signature is WhatsApp's to verify. The
// error contains nothing of the text.
func CheckPasskeyResponse(options, response string) error {
	const ask = "; ask the passkey again with the present status.passkey.requestOptions"
	if len(response) > MaxPasskeyJSON {
		return fmt.Errorf("it has more than %d characters", MaxPasskeyJSON)
	}
	var request passkeyRequest
	if err := json.Unmarshal([]byte(options), &request); err != nil {
		return errors.New("status.passkey.requestOptions cannot be read")
	}
	var r passkeyResponse
	if err := json.Unmarshal([]byte(response), &r); err != nil {
		return errors.New("it is not the JSON that a browser makes of the passkey's answer: copy the whole answer of the passkey helper")
	}
	for _, field := range []struct{ name, value string }{
		{"rawId", r.RawID}, {"response.clientDataJSON", r.Response.ClientDataJSON},
		{"response.authenticatorData", r.Response.AuthenticatorData}, {"response.signature", r.Response.Signature},
	} {
		if decoded, err := decodeURL(field.value); err != nil || len(decoded) == 0 {
			return fmt.Errorf("its field %s is missing or is not base64url without padding: copy the whole answer of the passkey helper", field.name)
		}
	}
	if _, err := decodeURL(r.Response.UserHandle); err != nil || !equalURL(r.ID, r.RawID) {
		return errors.New("its fields id and rawId differ, or its field response.userHandle is not base64url without padding: copy the whole answer of the passkey helper")
	}
	if r.Type != "public-key" {
		return errors.New("its type is not public-key: copy the whole answer of the passkey helper")
	}
	var client clientData
	text, _ := decodeURL(r.Response.ClientDataJSON)
	if err := json.Unmarshal(text, &client); err != nil || client.Type != "webauthn.get" {
		return errors.New("its response.clientDataJSON is not that of a passkey's answer: copy the whole answer of the passkey helper")
	}
	if !equalURL(client.Challenge, request.Challenge) {
		return errors.New("it answers another request" + ask)
	}
	if client.Origin != whatsAppOrigin {
		return errors.New("it was made on another page than " + whatsAppOrigin + ask)
	}
	site := sha256.Sum256([]byte(cmp.Or(request.RelyingParty, WhatsAppPage)))
	if data, _ := decodeURL(r.Response.AuthenticatorData); len(data) < minAuthenticatorData || !bytes.Equal(data[:len(site)], site[:]) {
		return errors.New("the passkey has answered for another site than WhatsApp" + ask)
	}
	if len(request.AllowCredentials) > 0 && !slices.ContainsFunc(request.AllowCredentials, func(c passkeyCredential) bool { return equalURL(c.ID, r.RawID) }) {
		return errors.New("the passkey of another account has answered: choose the one of the phone that was linked")
	}
	return nil
}

// decodeURL decodes base64url without padding, which is what browsers write and whatsmeow reads.
func decodeURL(s string) ([]byte, error) { return base64.RawURLEncoding.DecodeString(s) }

// equalURL reports whether two texts in base64url are of the same bytes.
func equalURL(a, b string) bool { return strings.TrimRight(a, "=") == strings.TrimRight(b, "=") }
