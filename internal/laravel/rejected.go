package laravel

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// errRejected says that the list of rejected items cannot be read.
var errRejected = errors.New("the list of rejected items cannot be read")

// parseRejected reads the rejected items of an answer. The contract is a list of
// {"session_id", "reason"}, and of messages {"session_id", "key", "reason"}. PHP writes an
// object if the array was filtered ({"3": {"session_id": …}}) or has the sessions as its keys
// ({"shop-7": "reason"}), and a number if a session id has only digits. Their meaning is clear,
// so they are accepted.
// unnamed counts the entries that name neither a session nor a message.
func parseRejected(raw json.RawMessage) (list []delivery.Rejection, unnamed int, err error) {
	var entries []json.RawMessage
	var keys []string
	object, isObject := parseObject(raw)
	switch {
	case isObject:
		for _, key := range slices.Sorted(maps.Keys(object)) {
			keys, entries = append(keys, key), append(entries, object[key])
		}
		_, bySession := field(object, "session_id")
		_, byKey := field(object, "key")
		_, why := field(object, "reason")
		if bySession || byKey && why { // one entry without a list around it
			keys, entries = []string{""}, []json.RawMessage{raw}
		}
	case json.Unmarshal(raw, &entries) == nil: // a list, or null
		keys = make([]string, len(entries))
	case slices.Contains([]string{"false", "0", `""`}, string(bytes.TrimSpace(raw))):
		return nil, 0, nil
	default:
		return nil, 0, errRejected
	}
	for i, entry := range entries {
		r, ok := parseRejection(entry, keys[i])
		if !ok {
			unnamed++
			continue
		}
		known := func(other delivery.Rejection) bool { return other.SessionID == r.SessionID && other.Key == r.Key }
		if !slices.ContainsFunc(list, known) {
			list = append(list, r)
		}
	}
	return list, unnamed, nil
}

// parseRejection reads one entry. key is its key in an object; empty: it is in a list.
// A key of digits is ignored, because it may be a position in a list.
func parseRejection(raw json.RawMessage, key string) (r delivery.Rejection, ok bool) {
	if strings.Trim(key, "0123456789") != "" {
		r.SessionID = key
	}
	if object, isObject := parseObject(raw); isObject {
		if id, named := field(object, "session_id"); named {
			r.SessionID = scalar(id)
		}
		if key, named := field(object, "key"); named {
			r.Key = strings.TrimSpace(scalar(key))
		}
		reason, _ := field(object, "reason")
		if r.Reason = scalar(reason); r.Reason == "" && len(reason) > 0 && string(reason) != "null" {
			r.Reason = string(reason) // the lists of Laravel's validator
		}
	} else if text := scalar(raw); key == "" {
		r.SessionID = text
	} else {
		r.Reason = text
	}
	r.SessionID = strings.TrimSpace(r.SessionID)
	r.Reason = clean(r.Reason, maxDetail)
	return r, r.SessionID != "" || r.Key != ""
}

// scalar is the text of a JSON string or number; empty for anything else.
func scalar(raw json.RawMessage) string {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text
	}
	var number json.Number
	if json.Unmarshal(raw, &number) == nil {
		return number.String()
	}
	return ""
}

// field is a value of an object by its key; upper and lower case do not matter.
func field(object map[string]json.RawMessage, name string) (value json.RawMessage, present bool) {
	if value, present = object[name]; present {
		return value, true
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		if strings.EqualFold(key, name) {
			return object[key], true
		}
	}
	return nil, false
}

func parseObject(raw []byte) (object map[string]json.RawMessage, ok bool) {
	ok = json.Unmarshal(raw, &object) == nil && object != nil
	return object, ok
}

func isObject(body []byte) bool {
	_, ok := parseObject(trimmed(body))
	return ok
}

func isEmptyList(body []byte) bool {
	var list []json.RawMessage
	return json.Unmarshal(body, &list) == nil && list != nil && len(list) == 0
}

// trimmed is a body without white space around it, and without a byte order mark: a PHP
// file that was saved with one puts it in front of every answer.
func trimmed(body []byte) []byte {
	return bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(body), []byte("\xef\xbb\xbf")))
}

// inBatch names the rejected items of an answer as the batch does: session ids that differ
// only by case are the same, and a message is named by its key. unknown are the names that are
// not in the batch. If an entry may mean any of several items, the batch counts as refused: the
// rejected ones are found when each is sent alone. A key may be twice in a batch, of a message
// that could not be decrypted at first and of the message itself.
func inBatch(batch delivery.Batch, answer delivery.Answer) (_ delivery.Answer, unknown []string) {
	var list []delivery.Rejection
	for _, r := range answer.Rejected {
		found := itemsOf(batch, r)
		switch {
		case len(found) == 0:
			unknown = append(unknown, clean(cmp.Or(r.Key, r.SessionID), maxHost))
			continue
		case len(found) > 1:
			name := "session " + clean(r.SessionID, maxHost) + " and no key"
			if r.Key != "" || found[0].Key == found[1].Key && found[0].Key != "" {
				name = "key " + clean(found[0].Key, maxHost)
			}
			return delivery.Answer{
				Result: delivery.Refused, StatusCode: answer.StatusCode,
				Detail: fmt.Sprintf("an entry of \"rejected\" names %s, which may mean any of %d items of the batch", name, len(found)),
			}, nil
		}
		r.SessionID, r.Key = found[0].SessionID, found[0].Key
		if !slices.ContainsFunc(list, func(other delivery.Rejection) bool { return other.Names(found[0]) }) {
			list = append(list, r)
		}
	}
	answer.Rejected = list
	return answer, unknown
}

// itemsOf are the items that a rejection may name.
func itemsOf(batch delivery.Batch, r delivery.Rejection) []delivery.Item {
	for _, is := range []func(delivery.Item) bool{
		func(item delivery.Item) bool { return item.Key != "" && item.Key == r.Key },
		func(item delivery.Item) bool {
			// A list of keys only, or an object with keys as its keys.
			byKey := r.Key == "" && item.Key != "" && item.Key == r.SessionID
			return byKey || (r.Key == "" || item.Key == "") && item.SessionID == r.SessionID
		},
		func(item delivery.Item) bool {
			return (r.Key == "" || item.Key == "") && strings.EqualFold(item.SessionID, r.SessionID)
		},
	} {
		var found []delivery.Item
		for _, item := range batch.Items {
			if is(item) {
				found = append(found, item)
			}
		}
		if len(found) > 0 {
			return found
		}
	}
	return nil
}
