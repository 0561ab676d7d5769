package demo

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mdp/qrterminal/v3"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// maxRows is the highest number of rows. With more sessions, those that are not Connected
// come first, and the table ends with the number of the others.
const maxRows = 12

// view is everything that is shown at one moment.
type view struct {
	sessions []v1alpha1.WhatsAppSession // by name
	total    int                        // the requested number of sessions
	events   int64                      // the number of new QR codes and states, without messages
	laravel  laravelState
	messages bool // each session gets a message
}

// table is the view as lines of text.
func table(v view) []string {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "SESSION\tPHASE\tPHONE\tWORKER\tREADY\tLARAVEL")
	rows, left := pick(v)
	for _, s := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, orNone(string(s.Status.Phase)), orNone(s.Status.PhoneNumber),
			orNone(s.Status.Worker), orNone(ready(s)), orNone(string(v.laravel.Status[s.SessionID()].Status)))
	}
	_ = w.Flush() // into memory
	lines := strings.Split(strings.TrimRight(text.String(), "\n"), "\n")
	if left > 0 {
		lines = append(lines, fmt.Sprintf("… and %d more", left))
	}
	return append(lines, "", progress(v))
}

// pick chooses the sessions that have a row: all, or those that are not Connected first.
func pick(v view) (rows []*v1alpha1.WhatsAppSession, left int) {
	var connected []*v1alpha1.WhatsAppSession
	for i := range v.sessions {
		s := &v.sessions[i]
		if len(v.sessions) > maxRows && s.Status.Phase == v1alpha1.PhaseConnected {
			connected = append(connected, s)
			continue
		}
		rows = append(rows, s)
	}
	rows = append(rows, connected...)
	left = max(0, len(rows)-maxRows)
	return rows[:len(rows)-left], left
}

// progress is the view in one line: phases, and the requests saved.
func progress(v view) string {
	phases := map[string]int{}
	for i := range v.sessions {
		phases[orNone(string(v.sessions[i].Status.Phase))]++
	}
	return fmt.Sprintf("%d of %d sessions: %s   |   %s", len(v.sessions), v.total, orNone(list(phases)), saved(v))
}

// saved says how many requests to Laravel were saved: without batches there is one for each
// event, and for each message.
func saved(v view) string {
	in, out := v.events+int64(v.laravel.Messages), int64(v.laravel.Requests)
	text := fmt.Sprintf("events in: %d → requests to Laravel: %d", in, out)
	if in > 0 && out < in {
		text += fmt.Sprintf(" (%d %% saved)", (in-out)*100/in)
	}
	return text
}

// summary is the last line of a demo that succeeded.
func summary(v view, took time.Duration) string {
	messages := ""
	if v.messages {
		messages = fmt.Sprintf(" and %d messages", v.laravel.Messages)
	}
	return fmt.Sprintf("Done in %s: %d sessions are Connected and Laravel has the last state of each%s. %s.",
		took.Round(100*time.Millisecond), v.total, messages, upperFirst(saved(v)))
}

// missing returns a sentence for each session that has not reached its final state; it is
// empty when all have.
func missing(v view) []string {
	var sentences []string
	if n := len(v.sessions); n < v.total {
		sentences = append(sentences, fmt.Sprintf("%d of %d sessions exist in the API server", n, v.total))
	}
	for i := range v.sessions {
		s := &v.sessions[i]
		if s.Status.Phase != v1alpha1.PhaseConnected {
			sentences = append(sentences, fmt.Sprintf("%s is %s%s", s.Name, orNone(string(s.Status.Phase)), because(s)))
			continue
		}
		switch has, ok := v.laravel.Status[s.SessionID()]; {
		case !ok:
			sentences = append(sentences, s.Name+" is Connected, but Laravel has no status of it")
		case has.Status != delivery.Active || has.Epoch != s.Status.Epoch:
			sentences = append(sentences, fmt.Sprintf("%s is Connected under epoch %d, but Laravel's last status is %s (%s) of epoch %d",
				s.Name, s.Status.Epoch, has.Status, has.Phase, has.Epoch))
		case v.messages && !v.laravel.HasMessage[s.SessionID()]:
			sentences = append(sentences, s.Name+" is Connected, but Laravel has no message of it")
		}
	}
	return sentences
}

// because returns the reason and the message of a session's Ready condition.
func because(s *v1alpha1.WhatsAppSession) string {
	c := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionReady)
	if c == nil {
		return ""
	}
	return fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
}

func ready(s *v1alpha1.WhatsAppSession) string {
	if c := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionReady); c != nil {
		return string(c.Status)
	}
	return ""
}

func readyReason(s *v1alpha1.WhatsAppSession) string {
	if c := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionReady); c != nil {
		return c.Reason
	}
	return ""
}

// codeLines draws a session's QR code.
func codeLines(s *v1alpha1.WhatsAppSession) []string {
	var text strings.Builder
	qrterminal.GenerateHalfBlock(s.Status.QR.Code, qrterminal.L, &text)
	lines := []string{fmt.Sprintf("QR code %d of %s, valid until %s:", s.Status.QR.Attempt, s.Name, s.Status.QR.ExpiresAt.Local().Format(time.TimeOnly))}
	return append(lines, strings.Split(strings.TrimRight(text.String(), "\n"), "\n")...)
}

func orNone(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
