package store

import (
	"context"
	"reflect"
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

// badText is text that a stranger may choose as a name and that PostgreSQL refuses.
const badText = "a\x00b\xff"

// badValue fills a value with badText wherever it holds text; bytes are missing.
func badValue(t reflect.Type) reflect.Value {
	v := reflect.New(t).Elem()
	switch {
	case t == reflect.TypeFor[types.JID]():
		v.Set(reflect.ValueOf(types.JID{User: "1" + badText, Server: types.DefaultUserServer}))
	case t.Kind() == reflect.String:
		v.SetString(badText)
	case t.Kind() == reflect.Struct && t.PkgPath() == reflect.TypeFor[store.ContactEntry]().PkgPath():
		for i := range t.NumField() {
			v.Field(i).Set(badValue(t.Field(i).Type))
		}
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		v.Set(reflect.Append(v, badValue(t.Elem())))
	}
	return v
}

// TestBadContentsLoseNoDevice calls every method of the stores whose arguments may come
// from encrypted contents, which nobody could check before.
func TestBadContentsLoseNoDevice(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		_, d, f := paired(t, s, "a", jidOf("491510000001"))
		for of, kept := range map[reflect.Type]any{
			reflect.TypeFor[store.AppStateSyncKeyStore](): d.AppStateKeys,
			reflect.TypeFor[store.ContactStore]():         d.Contacts,
			reflect.TypeFor[store.ChatSettingsStore]():    d.ChatSettings,
			reflect.TypeFor[store.MsgSecretStore]():       d.MsgSecrets,
			reflect.TypeFor[store.PrivacyTokenStore]():    d.PrivacyTokens,
			reflect.TypeFor[store.NCTSaltStore]():         d.NCTSalt,
			reflect.TypeFor[store.LIDStore]():             d.LIDs,
		} {
			for i := range of.NumMethod() {
				method := reflect.ValueOf(kept).MethodByName(of.Method(i).Name)
				args := []reflect.Value{reflect.ValueOf(t.Context())}
				for j := 1; j < method.Type().NumIn(); j++ {
					args = append(args, badValue(method.Type().In(j)))
				}
				if method.Type().IsVariadic() {
					method.CallSlice(args)
				} else {
					method.Call(args)
				}
				g.Expect(f.all()).To(BeEmpty(), of.Method(i).Name)
			}
		}
		ctx, other := t.Context(), types.JID{User: "1" + badText, Server: types.DefaultUserServer}
		contact, err := d.Contacts.GetContact(ctx, other)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(contact).To(Equal(types.ContactInfo{Found: true, FirstName: "a\uFFFDb\uFFFD", FullName: "a\uFFFDb\uFFFD",
			PushName: "a\uFFFDb\uFFFD", BusinessName: "a\uFFFDb\uFFFD", RedactedPhone: "a\uFFFDb\uFFFD"}))
		for _, name := range []*string{&d.PushName, &d.BusinessName, &d.Platform, &d.CompanionMetaNonce} {
			*name = badText
		}
		g.Expect(d.Save(context.WithoutCancel(ctx))).To(Succeed())
		g.Expect(f.all()).To(BeEmpty())
	})
}
