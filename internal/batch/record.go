package batch

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// An item is stored as one string whose first parts have a fixed width, so
// that the scripts can cut it by position:
//
//	numbers (38)  class (1)  due (13)  expires (13)  payload
//
// and a batch's content as the concatenation of its items, each as
//
//	length of the session id (3)  session id  length of the item (8)  item
const (
	classUrgent, classNormal = "h", "n"

	millisWidth  = 13
	headerWidth  = delivery.NumbersWidth + 1 + 2*millisWidth
	sidLenWidth  = 3
	itemLenWidth = 8

	maxSessionID = 255
	maxPayload   = 64 << 10

	// maxEpoch is the highest epoch that a session can have: the largest number that is
	// exact in JSON, JavaScript and Lua. scripts/lib.lua contains it too.
	maxEpoch = 1<<53 - 1
)

var errMalformed = errors.New("malformed")

func class(p delivery.Priority) string {
	if p == delivery.High {
		return classUrgent
	}
	return classNormal
}

// millis formats a time for the scripts; zero is "never".
func millis(t time.Time) string {
	if t.IsZero() {
		return fmt.Sprintf("%0*d", millisWidth, 0)
	}
	return fmt.Sprintf("%0*d", millisWidth, t.UnixMilli())
}

func validate(kind delivery.Kind, item delivery.Item) error {
	switch {
	case len(item.SessionID) == 0 || len(item.SessionID) > maxSessionID:
		return fmt.Errorf("%w: a session id of %d bytes", ErrInvalidItem, len(item.SessionID))
	case item.Epoch < 0 || item.Epoch > maxEpoch || item.Seq < 0:
		return fmt.Errorf("%w: the numbers (%d, %d)", ErrInvalidItem, item.Epoch, item.Seq)
	case len(item.Payload) > maxPayload:
		return fmt.Errorf("%w: a payload of %d bytes", ErrInvalidItem, len(item.Payload))
	case !json.Valid(item.Payload):
		return fmt.Errorf("%w: the payload is not JSON", ErrInvalidItem)
	case kind == delivery.KindQR && item.ExpiresAt.IsZero():
		return fmt.Errorf("%w: a QR code that never expires", ErrInvalidItem)
	case !item.ExpiresAt.IsZero() && (item.ExpiresAt.UnixMilli() <= 0 || len(millis(item.ExpiresAt)) != millisWidth):
		return fmt.Errorf("%w: it expires in year %d", ErrInvalidItem, item.ExpiresAt.Year())
	}
	return nil
}

// claim is the answer of the script claim.lua.
type claim struct {
	now, until int64
	id         string
	attempt    int
	items      []delivery.Item
	// expired counts the expired items that the script dropped.
	expired int
	// more: the script stopped early, call it again.
	more bool
}

// parseClaim reads an answer. If it returns an error and an id, the content of the batch
// with that id cannot be read.
func parseClaim(answer []any) (claim, error) {
	if len(answer) != 7 {
		return claim{}, fmt.Errorf("%w: an answer of %d parts", errMalformed, len(answer))
	}
	var numbers [7]int64
	for i := range answer {
		if i == 2 || i == 4 {
			continue
		}
		n, ok := answer[i].(int64)
		if !ok {
			return claim{}, fmt.Errorf("%w: part %d is not a number", errMalformed, i)
		}
		numbers[i] = n
	}
	id, okID := answer[2].(string)
	content, okContent := answer[4].(string)
	if !okID || !okContent {
		return claim{}, fmt.Errorf("%w: id or content is not a string", errMalformed)
	}
	items, err := parseContent(content)
	return claim{
		now: numbers[0], until: numbers[1], id: id, attempt: int(numbers[3]), items: items,
		expired: int(numbers[5]), more: numbers[6] != 0,
	}, err
}

// parseResult reads the answer of the script enqueue.lua for one item: a code, or, if the
// item is stale, the session's newest numbers.
func parseResult(part any) (EnqueueResult, error) {
	switch part := part.(type) {
	case int64:
		return EnqueueResult{Code: EnqueueCode(part)}, nil
	case string:
		newest, err := parseNumbers(part)
		return EnqueueResult{Code: Stale, Newest: newest}, err
	default:
		return EnqueueResult{}, fmt.Errorf("%w: a result is neither a code nor numbers", errMalformed)
	}
}

// parseContent reads the content of a batch.
func parseContent(content string) ([]delivery.Item, error) {
	var items []delivery.Item
	for rest := content; rest != ""; {
		var sessionID, record string
		var err error
		if sessionID, rest, err = cutString(rest, sidLenWidth); err != nil {
			return nil, fmt.Errorf("session of item %d: %w", len(items), err)
		}
		if record, rest, err = cutString(rest, itemLenWidth); err != nil {
			return nil, fmt.Errorf("item %d: %w", len(items), err)
		}
		item, err := parseRecord(sessionID, record)
		if err != nil {
			return nil, fmt.Errorf("item %d: %w", len(items), err)
		}
		items = append(items, item)
	}
	return items, nil
}

// cutString reads a string that begins with its length, in width digits.
func cutString(s string, width int) (value, rest string, err error) {
	if len(s) < width {
		return "", "", fmt.Errorf("%w: it ends within a length", errMalformed)
	}
	n, err := parseDigits(s[:width])
	if err != nil {
		return "", "", err
	}
	if int64(len(s)-width) < n {
		return "", "", fmt.Errorf("%w: it is shorter than its length says", errMalformed)
	}
	return s[width : width+int(n)], s[width+int(n):], nil
}

// parseRecord reads one stored item.
func parseRecord(sessionID, record string) (delivery.Item, error) {
	if sessionID == "" || len(record) < headerWidth {
		return delivery.Item{}, fmt.Errorf("%w: %d bytes", errMalformed, len(record))
	}
	numbers, err := parseNumbers(record[:delivery.NumbersWidth])
	if err != nil {
		return delivery.Item{}, err
	}
	item := delivery.Item{SessionID: sessionID, Numbers: numbers, Payload: json.RawMessage(record[headerWidth:])}
	switch record[delivery.NumbersWidth : delivery.NumbersWidth+1] {
	case classUrgent:
		item.Priority = delivery.High
	case classNormal:
		item.Priority = delivery.Normal
	default:
		return delivery.Item{}, fmt.Errorf("%w: unknown class", errMalformed)
	}
	expires, err := parseDigits(record[headerWidth-millisWidth : headerWidth])
	if err != nil {
		return delivery.Item{}, err
	}
	if expires > 0 {
		item.ExpiresAt = time.UnixMilli(expires).UTC()
	}
	if !json.Valid(item.Payload) {
		return delivery.Item{}, fmt.Errorf("%w: the payload is not JSON", errMalformed)
	}
	return item, nil
}

// parseNumbers reads what Numbers.String writes.
func parseNumbers(s string) (delivery.Numbers, error) {
	if len(s) != delivery.NumbersWidth {
		return delivery.Numbers{}, fmt.Errorf("%w: numbers of %d bytes", errMalformed, len(s))
	}
	epoch, err := parseDigits(s[:len(s)/2])
	if err != nil {
		return delivery.Numbers{}, err
	}
	seq, err := parseDigits(s[len(s)/2:])
	if err != nil {
		return delivery.Numbers{}, err
	}
	return delivery.Numbers{Epoch: epoch, Seq: seq}, nil
}

// parseDigits is strconv.ParseInt without signs; its error does not contain the text.
func parseDigits(s string) (int64, error) {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, fmt.Errorf("%w: not a number", errMalformed)
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: number out of range", errMalformed)
	}
	return n, nil
}
