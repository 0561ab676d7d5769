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

// egressOf returns the name of the egress through a proxy. Secrets with the same
// proxy address have the same egress, because WhatsApp sees that address. The name
// is a hash of the address, so that nothing of the URL is kept or shown. It is empty
// for nil, the worker's own address.
func egressOf(proxy *url.URL) string {
	if proxy == nil {
		return ""
	}
	port := proxy.Port()
	if port == "" { // the same defaults as net/http
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[proxy.Scheme]
	}
	host := strings.TrimSuffix(strings.ToLower(proxy.Hostname()), ".")
	sum := sha256.Sum256([]byte(net.JoinHostPort(host, port)))
	return hex.EncodeToString(sum[:16])
}

// egress returns the name of the egress of the session's next attempt. If the proxy
// cannot be read, the egress is named after the Secret, so that sessions of other
// Secrets do not wait for it.
func (s *supervisor) egress(ctx context.Context, obj *v1alpha1.WhatsAppSession) string {
	proxy, err := s.Proxies.Proxy(ctx, obj)
	if err != nil && obj.Spec.Proxy != nil {
		return obj.Namespace + "/" + obj.Spec.Proxy.SecretRef.Name
	}
	return egressOf(proxy)
}
