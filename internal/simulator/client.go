package simulator

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// controlTimeout is longer than a scan, which waits for the client's signature.
const controlTimeout = time.Minute

// Control drives a simulator that runs in another process, over its control
// API. Its methods do the same as the methods of [Server] with the same name, with the
// same kinds of errors.
type Control struct {
	// URL is the base of the API, see [Server.ControlURL].
	URL string
	// HTTP is http.DefaultClient if it is nil.
	HTTP *http.Client
}

// Info says how to reach the server.
func (c Control) Info(ctx context.Context) (Info, error) {
	return call[Info](ctx, c, http.MethodGet, "/info", nil)
}

// Stats returns the server's counters.
func (c Control) Stats(ctx context.Context) (Stats, error) {
	return call[Stats](ctx, c, http.MethodGet, "/stats", nil)
}

// Devices lists the linked devices.
func (c Control) Devices(ctx context.Context) ([]Device, error) {
	return call[[]Device](ctx, c, http.MethodGet, "/devices", nil)
}

// Doubled lists the doubled connections.
func (c Control) Doubled(ctx context.Context) ([]Doubled, error) {
	return call[[]Doubled](ctx, c, http.MethodGet, "/doubled", nil)
}

// Unknown counts what clients sent and the simulator does not know, by name.
func (c Control) Unknown(ctx context.Context) (map[string]int64, error) {
	return call[map[string]int64](ctx, c, http.MethodGet, "/unknown", nil)
}

// Scan scans a QR code as a phone with that number, or with a new one if it is
// empty, and returns the JID of the device.
func (c Control) Scan(ctx context.Context, qr, phone string) (string, error) {
	out, err := call[scanAnswer](ctx, c, http.MethodPost, "/scan", scanRequest{QR: qr, Phone: phone})
	return out.JID, err
}

// EnterCode types a pairing code on the phone with that number, and returns the
// JID of the device.
func (c Control) EnterCode(ctx context.Context, phone, code string) (string, error) {
	out, err := call[scanAnswer](ctx, c, http.MethodPost, "/enter-code", enterCodeRequest{Phone: phone, Code: code})
	return out.JID, err
}

// AnswerPasskey returns the answer of a browser on WhatsApp's page to a request for the
// passkey of the account with that phone number.
func (c Control) AnswerPasskey(ctx context.Context, phone string, request []byte) ([]byte, error) {
	out, err := call[passkeyAnswer](ctx, c, http.MethodPost, "/passkey", passkeyRequest{Phone: phone, Request: string(request)})
	return []byte(out.Answer), err
}

// SetAlias makes alias another way to write an account's number.
func (c Control) SetAlias(ctx context.Context, phone, alias string) error {
	_, err := call[aliasBody](ctx, c, http.MethodPost, "/alias", aliasBody{Phone: phone, Alias: alias})
	return err
}

// Send sends a text from a contact to a device, and returns the message's id.
func (c Control) Send(ctx context.Context, device, from, text string) (string, error) {
	return c.Write(ctx, SendRequest{Device: device, From: from, Text: text})
}

// Write sends a message of a contact or of the own account, and returns its id.
func (c Control) Write(ctx context.Context, r SendRequest) (string, error) {
	out, err := call[sendAnswer](ctx, c, http.MethodPost, "/send", r)
	return out.ID, err
}

// Receipt sends a device a receipt of contacts, and returns the id of its stanza.
func (c Control) Receipt(ctx context.Context, r ReceiptRequest) (string, error) {
	out, err := call[sendAnswer](ctx, c, http.MethodPost, "/receipt", r)
	return out.ID, err
}

// Call makes a contact call a device's account, and returns the id of the call.
func (c Control) Call(ctx context.Context, r CallRequest) (string, error) {
	out, err := call[sendAnswer](ctx, c, http.MethodPost, "/call", r)
	return out.ID, err
}

// CreateGroup creates a group, and returns its JID.
func (c Control) CreateGroup(ctx context.Context, r GroupRequest) (string, error) {
	out, err := call[groupAnswer](ctx, c, http.MethodPost, "/group", r)
	return out.Group, err
}

// ChangeGroup makes a change in a group.
func (c Control) ChangeGroup(ctx context.Context, r GroupChange) error {
	_, err := call[groupAnswer](ctx, c, http.MethodPost, "/group-change", r)
	return err
}

// SendHistory makes the phone of a device send it its history, see [Server.SendHistory].
func (c Control) SendHistory(ctx context.Context, device string, contacts ...string) (string, error) {
	out, err := call[sendAnswer](ctx, c, http.MethodPost, "/history", historyRequest{Device: device, Contacts: contacts})
	return out.ID, err
}

// ExpireMedia makes the media host forget all files, and returns how many there were.
func (c Control) ExpireMedia(ctx context.Context) (int, error) {
	out, err := call[expireAnswer](ctx, c, http.MethodPost, "/expire-media", struct{}{})
	return out.Files, err
}

// Ledger lists what the server has queued for devices, and what happened to it.
func (c Control) Ledger(ctx context.Context, q LedgerQuery) ([]LedgerEntry, error) {
	query := url.Values{
		"device": {q.Device}, "after": {strconv.FormatInt(q.After, 10)}, "limit": {strconv.Itoa(q.Limit)}, "waiting": {strconv.FormatBool(q.Waiting)},
	}
	return call[[]LedgerEntry](ctx, c, http.MethodGet, "/ledger?"+query.Encode(), nil)
}

// StartFlood starts a flood, and returns its id.
func (c Control) StartFlood(ctx context.Context, r FloodRequest) (int, error) {
	out, err := call[floodAnswer](ctx, c, http.MethodPost, "/flood", r)
	return out.ID, err
}

// Floods lists the floods since the start.
func (c Control) Floods(ctx context.Context) ([]Flood, error) {
	return call[[]Flood](ctx, c, http.MethodGet, "/flood", nil)
}

// StopFloods ends the floods that run, and returns when they have sent their last messages.
func (c Control) StopFloods(ctx context.Context) error {
	_, err := call[[]Flood](ctx, c, http.MethodDelete, "/flood", nil)
	return err
}

// Received lists the messages of a device, or of all devices if device is empty.
func (c Control) Received(ctx context.Context, device string) ([]Message, error) {
	return call[[]Message](ctx, c, http.MethodGet, "/received?"+url.Values{"device": {device}}.Encode(), nil)
}

// WebVersion is the version that the page names.
func (c Control) WebVersion(ctx context.Context) (uint32, error) {
	out, err := call[versionBody](ctx, c, http.MethodGet, "/version", nil)
	return out.WebVersion, err
}

// SetWebVersion sets the version that the page names; 0 restores the library's own.
func (c Control) SetWebVersion(ctx context.Context, version uint32) error {
	_, err := call[versionBody](ctx, c, http.MethodPost, "/version", versionBody{WebVersion: version})
	return err
}

// Inject starts a fault, and returns how many connections it affected immediately.
func (c Control) Inject(ctx context.Context, f Fault) (int, error) {
	out, err := call[faultAnswer](ctx, c, http.MethodPost, "/fault", f)
	return out.Connections, err
}

// Faults lists the active faults.
func (c Control) Faults(ctx context.Context) ([]Fault, error) {
	return call[[]Fault](ctx, c, http.MethodGet, "/fault", nil)
}

// Clear ends faults, and returns how many.
func (c Control) Clear(ctx context.Context, kind FaultKind, device string) (int, error) {
	query := url.Values{"kind": {string(kind)}, "device": {device}}
	out, err := call[clearAnswer](ctx, c, http.MethodDelete, "/fault?"+query.Encode(), nil)
	return out.Cleared, err
}

// maxAnswer limits an answer of the control API.
const maxAnswer = 64 << 20

func call[T any](ctx context.Context, c Control, method, path string, body any) (T, error) {
	var out T
	var reader io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return out, fmt.Errorf("encode the request: %w", err)
		}
		reader = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(c.URL, "/")+path, reader)
	if err != nil {
		return out, fmt.Errorf("make the request: %w", err)
	}
	request.Header.Set("Content-Type", "application/json")
	client := c.HTTP
	if client == nil {
		client = &http.Client{Timeout: controlTimeout}
	}
	response, err := client.Do(request)
	if err != nil {
		return out, fmt.Errorf("call the simulator: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return out, fmt.Errorf("read the simulator's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return out, answerError(response.StatusCode, data)
	}
	if err := json.Unmarshal(data, &out); err != nil {
		return out, fmt.Errorf("read the simulator's answer: %w", err)
	}
	return out, nil
}

// answerError turns an error answer into an error of the same kind.
func answerError(status int, data []byte) error {
	var in errorAnswer
	if json.Unmarshal(data, &in) != nil || in.Error == "" {
		return fmt.Errorf("the simulator answers with status %d", status)
	}
	kind := map[int]error{http.StatusBadRequest: ErrBadInput, http.StatusNotFound: ErrNotFound, http.StatusConflict: ErrNotNow}[status]
	if kind == nil {
		return fmt.Errorf("the simulator cannot do this: %s", in.Error)
	}
	return fmt.Errorf("%w: %s", kind, strings.TrimPrefix(in.Error, kind.Error()+": "))
}
