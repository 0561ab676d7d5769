package simulator

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// Info says how to reach the server; a client's options contain these values.
type Info struct {
	// Endpoint is ws://host:port or wss://host:port.
	Endpoint string `json:"endpoint"`
	// NoiseRoot is the root of the noise certificates, 64 hexadecimal digits.
	NoiseRoot string `json:"noise_root"`
	// CA is the authority of the TLS certificate in PEM; empty without TLS.
	CA string `json:"ca,omitempty"`
}

// Info says how to reach the server.
func (s *Server) Info() Info {
	root := s.NoiseRoot()
	return Info{Endpoint: s.Endpoint(), NoiseRoot: hex.EncodeToString(root[:]), CA: string(s.ca)}
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
	sendRequest struct {
		Device string `json:"device"`
		From   string `json:"from,omitempty"`
		Text   string `json:"text"`
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
	mux.HandleFunc("POST /send", post(func(r *http.Request, in sendRequest) (any, error) {
		id, err := s.Send(r.Context(), in.Device, in.From, in.Text)
		return sendAnswer{ID: id}, err
	}))
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
