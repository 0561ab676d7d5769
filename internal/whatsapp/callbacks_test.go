package whatsapp

import (
	"reflect"
	"testing"

	"go.mau.fi/whatsmeow"
	wastore "go.mau.fi/whatsmeow/store"
)

// TestEveryCallbackIsSet: whatsmeow calls some callbacks without a check for nil. A new
// version may have new ones.
func TestEveryCallbackIsSet(t *testing.T) {
	client := whatsmeow.NewClient(&wastore.Device{}, nil)
	setCallbacks(client)
	client.GetClientPayload = (&Connection{}).payload // set in New
	fields := reflect.ValueOf(client).Elem()
	for i := range fields.NumField() {
		field := fields.Type().Field(i)
		if field.IsExported() && field.Type.Kind() == reflect.Func && fields.Field(i).IsNil() {
			t.Errorf("Client.%s is not set", field.Name)
		}
	}
}
