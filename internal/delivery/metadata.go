package delivery

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// Metadata is a session's spec.metadata as a JSON object, which each item carries to Laravel;
// empty: none. As a text it can be compared and needs no encoding for each item.
type Metadata string

// maxMetadata is the maximum number of characters of a key or value; the schema of spec.metadata
// allows no more, and 64 for a key.
const maxMetadata = 256

// NewMetadata encodes spec.metadata. Its texts can be stored everywhere, see cleanText.
func NewMetadata(pairs map[string]string) Metadata {
	if len(pairs) == 0 {
		return ""
	}
	clean := make(map[string]string, len(pairs))
	for key, value := range pairs {
		key, _ = cleanText(key, maxMetadata)
		clean[key], _ = cleanText(value, maxMetadata)
	}
	text, err := marshal(clean)
	if err != nil { // a map of texts can be encoded
		return ""
	}
	return Metadata(text)
}

// MarshalJSON implements json.Marshaler.
func (m Metadata) MarshalJSON() ([]byte, error) {
	if m == "" {
		return []byte("{}"), nil
	}
	return []byte(m), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (m *Metadata) UnmarshalJSON(text []byte) error {
	var pairs map[string]string
	if err := json.Unmarshal(bytes.TrimSpace(text), &pairs); err != nil {
		return fmt.Errorf("reading metadata: %w", err)
	}
	*m = NewMetadata(pairs)
	return nil
}
