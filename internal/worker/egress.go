package worker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/url"
	"strings"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// egressOf names the egress through a proxy by the proxy's address, whichever
// Secret it comes from: WhatsApp sees all their sessions come from there. It is a hash, so that neither the address nor anything else of the
// URL is kept or shown. nil is the worker's own address, which has no name.
func egressOf(proxy *url.URL) string {
	if proxy == nil {
		return ""
	}
	port := proxy.Port()
	if port == "" { // as net/http fills it in
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[proxy.Scheme]
	}
	host := strings.TrimSuffix(strings.ToLower(proxy.Hostname()), ".")
	sum := sha256.Sum256([]byte(net.JoinHostPort(host, port)))
	return hex.EncodeToString(sum[:16])
}

// egress names the egress of the session's next attempt. Where its proxy cannot
// be read it is one of the Secret's own, so that no other session waits for it.
func (s *supervisor) egress(ctx context.Context, obj *v1alpha1.WhatsAppSession) string {
	proxy, err := s.Proxies.Proxy(ctx, obj)
	if err != nil && obj.Spec.Proxy != nil {
		return obj.Namespace + "/" + obj.Spec.Proxy.SecretRef.Name
	}
	return egressOf(proxy)
}
