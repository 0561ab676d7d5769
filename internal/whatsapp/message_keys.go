package whatsapp

import (
	"strings"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// withoutKeys encodes a message without what opens other messages or files: keys, secrets, and the
// addresses of files, wherever they are in it. It changes the message. What a newer version of the
// protobuf has added stays as it is.
func withoutKeys(m *waE2E.Message) []byte {
	// The function below returns no error, and a message that was decoded can be encoded.
	_ = protorange.Range(m.ProtoReflect(), func(at protopath.Values) error {
		if inner, ok := at.Index(-1).Value.Interface().(protoreflect.Message); ok {
			removeKeys(inner)
		}
		return nil
	})
	raw, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return raw
}

// removeKeys removes the keys of one message, without those of its parts.
func removeKeys(m protoreflect.Message) {
	descriptor := m.Descriptor()
	_, isMessage := m.Interface().(*waE2E.Message)
	isFile := descriptor.Fields().ByName("mediaKey") != nil || descriptor.Fields().ByName("directPath") != nil
	m.Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if isMessage && contents[field.Name()] == ignoredContent || isKey(field) || isFile && isURL(field) {
			m.Clear(field)
		}
		return true
	})
}

// isKey reports whether a field holds a key, a secret or the path of a file, by its name: the
// protobuf names them all alike.
func isKey(field protoreflect.FieldDescriptor) bool {
	name := strings.ToLower(string(field.Name()))
	switch field.Kind() {
	case protoreflect.BytesKind:
		for _, part := range []string{"key", "secret", "token", "webmessageinfobytes", "inlinepayload"} {
			if strings.Contains(name, part) {
				return true
			}
		}
	case protoreflect.StringKind:
		for _, end := range []string{"mediakey", "directpath", "token"} {
			if strings.HasSuffix(name, end) {
				return true
			}
		}
	}
	return false
}

// isURL reports whether a field of a file holds an address of it.
func isURL(field protoreflect.FieldDescriptor) bool {
	return field.Kind() == protoreflect.StringKind && strings.HasSuffix(string(field.Name()), "URL")
}
