package whatsapp

import (
	"time"

	"go.mau.fi/whatsmeow"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// silentPeriods is how many keep-alive periods in a row may pass in silence.
const silentPeriods = 3

// silence is how long a live connection can be silent: the library sends a keep-alive
// once in every period.
func silence() time.Duration { return silentPeriods * whatsmeow.KeepAliveIntervalMax }

// proveLife ends the connection when no byte has come from WhatsApp for that long.
// Otherwise it checks again when that time may have passed. It does not depend on an
// event of the library: the loop that would send one can hang in a write to a dead link.
func (c *Connection) proveLife() {
	silent := c.factory.clock.Now().Sub(c.LastSeen())
	if left := silence() - silent; left > 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.over && !c.closed {
			// A separate goroutine: the fake clock of tests calls back while it holds its lock.
			c.life = c.factory.clock.AfterFunc(left, func() { go c.proveLife() })
		}
		return
	}
	c.report(over(EventDisconnected, session.EndKeepAliveTimeout, "nothing has come from WhatsApp for %s", silent.Round(time.Second)))
}

// forgetLife ends the checks. The caller holds c.mu.
func (c *Connection) forgetLife() {
	if c.life != nil {
		c.life.Stop()
	}
}
