package simulator

import (
	"fmt"
	"net/http"

	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"
)

// page serves a replacement of WhatsApp's page. Clients read only the number of the
// newest web version from it (GetLatestVersion of whatsmeow).
func (s *Server) page(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = fmt.Fprintf(w, "<!DOCTYPE html><title>Simulated WhatsApp</title>\n<script>{\"client_revision\":%d,\"simulated\":true}</script>\n", s.WebVersion()) // fails only if the client has closed the connection
}

// WebVersion is the version that the page names: the last of its three numbers.
func (s *Server) WebVersion() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.webVersion
}

// SetWebVersion sets the version that the page names; 0 restores the library's own.
func (s *Server) SetWebVersion(version uint32) {
	if version == 0 {
		version = store.GetWAVersion()[2]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.webVersion = version
}

// outdated reports whether a fault refuses clients of this version.
func (s *Server) outdated(payload *waWa6.ClientPayload, d *device) bool {
	f, ok := s.active(FaultMinVersion, d)
	return ok && payload.GetUserAgent().GetAppVersion().GetTertiary() < f.Version
}
