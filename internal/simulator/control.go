package simulator

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
)

// Info says how to reach the server; a client's options contain these values.
type Info struct {
	// Endpoint is ws://host:port or wss://host:port.
	Endpoint string `json:"endpoint"`
	// NoiseRoot is the root of the noise certificates, 64 hexadecimal digits.
	NoiseRoot string `json:"noise_root"`
	// CA is the authority of the TLS certificate in PEM; empty without TLS.
	CA string `json:"ca,omitempty"`
	// Media is the host and port of the media host.
	Media string `json:"media"`
}

// Info says how to reach the server.
func (s *Server) Info() Info {
	root := s.NoiseRoot()
	return Info{Endpoint: s.Endpoint(), NoiseRoot: hex.EncodeToString(root[:]), CA: string(s.ca), Media: s.MediaHost()}
}

// Bodies of the control API without an exported type.
type (
	scanRequest struct {
		QR    string `json:"qr"`
		Phone string `json:"phone,omitempty"`
	}
	enterCodeRequest struct {
		Phone string `json:"phone"`
		Code  string `json:"code"`
	}
	scanAnswer struct {
		JID string `json:"jid"`
	}
	passkeyRequest struct {
		Phone string `json:"phone"`
		// Request is the JSON of the options, as a string.
		Request string `json:"request"`
	}
	passkeyAnswer struct {
		Answer string `json:"answer"`
	}
	confirmationAnswer struct {
		Code string `json:"code"`
	}
	notifyRequest struct {
		Device string `json:"device"`
		From   string `json:"from,omitempty"`
		Stanza string `json:"stanza"`
	}
	lidAnswer struct {
		LID string `json:"lid"`
	}
	sendAnswer struct {
		ID string `json:"id"`
	}
	groupAnswer struct {
		Group string `json:"group"`
	}
	floodAnswer struct {
		ID int `json:"id"`
	}
	expireAnswer struct {
		Files int `json:"files"`
	}
	historyRequest struct {
		Device   string   `json:"device"`
		Contacts []string `json:"contacts,omitempty"`
	}
	aliasBody struct {
		Phone string `json:"phone"`
		Alias string `json:"alias"`
	}
	versionBody struct {
		WebVersion uint32 `json:"web_version"`
	}
	faultAnswer struct {
		Connections int `json:"connections"`
	}
	clearAnswer struct {
		Cleared int `json:"cleared"`
	}
	errorAnswer struct {
		Error string `json:"error"`
	}
)

// maxBody limits the body of a request to the control API.
const maxBody = 1 << 20

// controlHandler serves the control API; the package's documentation lists it.
func (s *Server) controlHandler() http.Handler {
	mux := http.NewServeMux()
	get := func(path string, answer func(*http.Request) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			body, err := answer(r)
			respond(w, body, err)
		})
	}
	get("/info", func(*http.Request) (any, error) { return s.Info(), nil })
	get("/stats", func(*http.Request) (any, error) { return s.Stats(), nil })
	get("/devices", func(*http.Request) (any, error) { return s.Devices(), nil })
	get("/doubled", func(*http.Request) (any, error) { return s.Doubled(), nil })
	get("/unknown", func(*http.Request) (any, error) { return s.Stats().Unknown, nil })
	get("/fault", func(*http.Request) (any, error) { return s.Faults(), nil })
	get("/received", func(r *http.Request) (any, error) { return s.Received(r.URL.Query().Get("device")) })
	mux.HandleFunc("POST /scan", post(func(r *http.Request, in scanRequest) (any, error) {
		jid, err := s.Scan(r.Context(), in.QR, in.Phone)
		return scanAnswer{JID: jid}, err
	}))
	mux.HandleFunc("POST /enter-code", post(func(r *http.Request, in enterCodeRequest) (any, error) {
		jid, err := s.EnterCode(r.Context(), in.Phone, in.Code)
		return scanAnswer{JID: jid}, err
	}))
	mux.HandleFunc("POST /passkey", post(func(_ *http.Request, in passkeyRequest) (any, error) {
		answer, err := s.AnswerPasskey(in.Phone, []byte(in.Request))
		return passkeyAnswer{Answer: string(answer)}, err
	}))
	get("/confirmation-code", func(r *http.Request) (any, error) {
		code, err := s.ConfirmationCode(r.URL.Query().Get("phone"))
		return confirmationAnswer{Code: code}, err
	})
	mux.HandleFunc("POST /send", post(func(r *http.Request, in SendRequest) (any, error) {
		id, err := s.Write(r.Context(), in)
		return sendAnswer{ID: id}, err
	}))
	mux.HandleFunc("POST /receipt", post(func(r *http.Request, in ReceiptRequest) (any, error) {
		id, err := s.Receipt(r.Context(), in)
		return sendAnswer{ID: id}, err
	}))
	mux.HandleFunc("POST /call", post(func(r *http.Request, in CallRequest) (any, error) {
		id, err := s.Call(r.Context(), in)
		return sendAnswer{ID: id}, err
	}))
	mux.HandleFunc("POST /group", post(func(_ *http.Request, in GroupRequest) (any, error) {
		jid, err := s.CreateGroup(in)
		return groupAnswer{Group: jid}, err
	}))
	mux.HandleFunc("POST /group-change", post(func(r *http.Request, in GroupChange) (any, error) {
		return groupAnswer{Group: in.Group}, s.ChangeGroup(r.Context(), in)
	}))
	mux.HandleFunc("POST /history", post(func(r *http.Request, in historyRequest) (any, error) {
		id, err := s.SendHistory(r.Context(), in.Device, in.Contacts...)
		return sendAnswer{ID: id}, err
	}))
	mux.HandleFunc("POST /expire-media", post(func(*http.Request, struct{}) (any, error) {
		return expireAnswer{Files: s.ExpireMedia()}, nil
	}))
	get("/ledger", func(r *http.Request) (any, error) {
		q, err := ledgerQuery(r.URL.Query())
		if err != nil {
			return nil, err
		}
		return s.Ledger(q)
	})
	mux.HandleFunc("POST /flood", post(func(_ *http.Request, in FloodRequest) (any, error) {
		id, err := s.StartFlood(in)
		return floodAnswer{ID: id}, err
	}))
	get("/flood", func(*http.Request) (any, error) { return s.Floods(), nil })
	mux.HandleFunc("DELETE /flood", func(w http.ResponseWriter, _ *http.Request) {
		s.StopFloods()
		respond(w, s.Floods(), nil)
	})
	mux.HandleFunc("POST /notify", post(func(r *http.Request, in notifyRequest) (any, error) {
		id, err := s.Notify(r.Context(), in.Device, in.From, in.Stanza)
		return sendAnswer{ID: id}, err
	}))
	get("/lid", func(r *http.Request) (any, error) {
		lid, err := s.LID(r.URL.Query().Get("phone"))
		return lidAnswer{LID: lid}, err
	})
	mux.HandleFunc("POST /alias", post(func(_ *http.Request, in aliasBody) (any, error) {
		return in, s.SetAlias(in.Phone, in.Alias)
	}))
	get("/version", func(*http.Request) (any, error) { return versionBody{WebVersion: s.WebVersion()}, nil })
	mux.HandleFunc("POST /version", post(func(_ *http.Request, in versionBody) (any, error) {
		s.SetWebVersion(in.WebVersion)
		return versionBody{WebVersion: s.WebVersion()}, nil
	}))
	mux.HandleFunc("POST /fault", post(func(_ *http.Request, in Fault) (any, error) {
		n, err := s.Inject(in)
		return faultAnswer{Connections: n}, err
	}))
	mux.HandleFunc("DELETE /fault", func(w http.ResponseWriter, r *http.Request) {
		n, err := s.Clear(FaultKind(r.URL.Query().Get("kind")), r.URL.Query().Get("device"))
		respond(w, clearAnswer{Cleared: n}, err)
	})
	return mux
}

// ledgerQuery reads the parameters of GET /ledger.
func ledgerQuery(values url.Values) (LedgerQuery, error) {
	q := LedgerQuery{Device: values.Get("device"), Waiting: values.Get("waiting") == "true"}
	var err error
	if after := values.Get("after"); after != "" {
		if q.After, err = strconv.ParseInt(after, 10, 64); err != nil {
			return q, fmt.Errorf("%w: after is the number of an entry", ErrBadInput)
		}
	}
	if limit := values.Get("limit"); limit != "" {
		if q.Limit, err = strconv.Atoi(limit); err != nil {
			return q, fmt.Errorf("%w: limit is a number of entries", ErrBadInput)
		}
	}
	return q, nil
}

// post decodes a body strictly: an unknown field is an error.
func post[T any](answer func(*http.Request, T) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in T
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&in); err != nil {
			respond(w, nil, fmt.Errorf("%w: the body is not what this path takes: %w", ErrBadInput, err))
			return
		}
		body, err := answer(r, in)
		respond(w, body, err)
	}
}

func respond(w http.ResponseWriter, body any, err error) {
	status := http.StatusOK
	if err != nil {
		body = errorAnswer{Error: err.Error()}
		switch {
		case errors.Is(err, ErrBadInput):
			status = http.StatusBadRequest
		case errors.Is(err, ErrNotFound):
			status = http.StatusNotFound
		case errors.Is(err, ErrNotNow):
			status = http.StatusConflict
		default:
			status = http.StatusInternalServerError
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only if the caller has closed the connection
}
