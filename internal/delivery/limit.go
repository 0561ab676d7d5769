package delivery

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// shortened are the fields that together can be too large, by their names in JSON and in the
// order in which they are shortened until a message fits: each is halved until it is empty,
// before the next one. All others together always fit (TestTheOtherFieldsOfAMessageFit).
var shortened = []string{
	"unsupported.protobuf",
	"group_change.members",
	"contacts",
	"mentions",
	"poll.options",
	"poll_vote.selected",
	"receipt.messages",
	"group_change.added",
	"group_change.removed",
	"group_change.promoted",
	"group_change.demoted",
}

// encode encodes m within MaxMessagePayload.
func (m MessageItem) encode() ([]byte, error) {
	m = m.limited()
	payload, err := marshal(m)
	for _, path := range shortened {
		for err == nil && len(payload) > MaxMessagePayload && halve(reflect.ValueOf(&m).Elem(), path) {
			m.Cut = addOnce(m.Cut, path)
			payload, err = marshal(m)
		}
	}
	return payload, err
}

// halve removes the second half of a list; it reports false if there is nothing to remove. m
// is a copy made by limited, so no one else has its parts.
func halve(m reflect.Value, path string) bool {
	for name := range strings.SplitSeq(path, ".") {
		if m.Kind() == reflect.Pointer {
			if m.IsNil() {
				return false
			}
			m = m.Elem()
		}
		m = m.FieldByIndex(fieldNamed(m.Type(), name).Index)
	}
	if m.Len() == 0 {
		return false
	}
	if m.Type().Elem().Kind() == reflect.Uint8 { // half of it has no meaning
		m.SetZero()
	} else {
		m.SetLen(m.Len() / 2)
	}
	return true
}

// fieldNamed is the field of a struct with a name in JSON.
func fieldNamed(t reflect.Type, name string) reflect.StructField {
	for _, field := range reflect.VisibleFields(t) {
		if jsonName(field) == name && !field.Anonymous {
			return field
		}
	}
	panic("no field " + name + " in " + t.Name()) // shortened is a constant: TestShortenedFieldsExist
}

// The times that a timestamp may have: others cannot be written as RFC 3339.
var (
	firstTime = time.Unix(0, 0)
	lastTime  = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
)

// limited returns a copy of m in which every text and every list keeps to the limit in its
// field's tag, and whose texts can be stored everywhere; Cut names what was longer.
func (m MessageItem) limited() MessageItem {
	if m.Timestamp.Before(firstTime) {
		m.Timestamp = Time{firstTime}
	}
	if m.Timestamp.After(lastTime) {
		m.Timestamp = Time{lastTime}
	}
	var cut limiter
	m = cut.limit(reflect.ValueOf(m), 0).Interface().(MessageItem)
	for _, path := range cut.paths {
		m.Cut = addOnce(m.Cut, path)
	}
	return m
}

// limiter copies a value within the limits, and remembers the paths of fields that were longer.
type limiter struct {
	at    []string // the names, in JSON, of the fields around the present value
	paths []string
}

// cut says that the present value was longer.
func (l *limiter) cut() { l.paths = append(l.paths, strings.Join(l.at, ".")) }

func (l *limiter) limit(v reflect.Value, limit int) reflect.Value {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[Time]() {
			return v
		}
		limited := reflect.New(v.Type()).Elem()
		for i, field := range tagsOf(v.Type()) {
			switch {
			case field.name == "-":
				limited.Field(i).Set(v.Field(i))
			case field.anonymous:
				limited.Field(i).Set(l.limit(v.Field(i), field.limit))
			default:
				l.at = append(l.at, field.name)
				limited.Field(i).Set(l.limit(v.Field(i), field.limit))
				l.at = l.at[:len(l.at)-1]
			}
		}
		return limited
	case reflect.Pointer:
		if v.IsNil() {
			return v
		}
		limited := reflect.New(v.Type().Elem())
		limited.Elem().Set(l.limit(v.Elem(), limit))
		return limited
	case reflect.Slice:
		return l.list(v, limit)
	case reflect.String:
		if v.Type() == reflect.TypeFor[Metadata]() { // it is JSON, and clean already
			return v
		}
		text, whole := cleanText(v.String(), limit)
		if !whole {
			l.cut()
		}
		return reflect.ValueOf(text).Convert(v.Type())
	case reflect.Float64:
		if f := v.Float(); math.IsNaN(f) || math.IsInf(f, 0) { // JSON has neither
			return reflect.ValueOf(0.0)
		}
	}
	return v
}

// list limits a list and its elements. A list of texts has one limit for both.
func (l *limiter) list(v reflect.Value, limit int) reflect.Value {
	switch {
	case v.IsNil():
		return v
	case v.Type().Elem().Kind() == reflect.Uint8:
		if v.Len() > limit {
			l.cut()
			return reflect.Zero(v.Type())
		}
		return v
	case v.Len() > limit:
		l.cut()
		v = v.Slice(0, limit)
	}
	limited := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
	for i := range v.Len() {
		limited.Index(i).Set(l.limit(v.Index(i), limit))
	}
	return limited
}

// tags are what the tags of a field say.
type tags struct {
	name      string
	limit     int
	anonymous bool
}

// knownTags are the tags of the types that were asked for: every message asks for the same, and
// to read them takes longer than the rest of limited.
var knownTags sync.Map // reflect.Type → []tags

// tagsOf are the tags of the fields of a struct.
func tagsOf(t reflect.Type) []tags {
	if known, ok := knownTags.Load(t); ok {
		return known.([]tags)
	}
	all := make([]tags, t.NumField())
	for i := range all {
		field := t.Field(i)
		all[i] = tags{jsonName(field), limitOf(field), field.Anonymous}
	}
	knownTags.Store(t, all)
	return all
}

// limitOf is the limit in the tag of a field, 0 without one.
func limitOf(field reflect.StructField) int {
	limit, _ := strconv.Atoi(field.Tag.Get("limit"))
	return limit
}

func jsonName(field reflect.StructField) string {
	name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
	return name
}

func addOnce(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

var lineBreaks = strings.NewReplacer("\r\n", "\n", "\r", "\n")

// LineFeeds makes each line break of a text a line feed: a carriage return moves a terminal's
// cursor to the beginning of its line.
func LineFeeds(text string) string { return lineBreaks.Replace(text) }

// cleanText makes a text valid UTF-8 without control characters, which PostgreSQL refuses or
// terminals obey, except tabs and line breaks; each line break becomes a line feed. It has at most
// limit characters; whole is false if it had more.
func cleanText(text string, limit int) (clean string, whole bool) {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return -1
		}
		return r
	}, LineFeeds(strings.ToValidUTF8(text, string(utf8.RuneError))))
	n := 0
	for i := range text {
		if n == limit {
			return text[:i], false
		}
		n++
	}
	return text, true
}

// marshal encodes without the escapes for HTML (<, >, &), which would make a text six times as long.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
