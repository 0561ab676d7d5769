package laravel_test

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"k8s.io/utils/clock"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

// contract is docs/openapi.yaml. Its schemas are JSON Schema 2020-12, as OpenAPI 3.1 says.
type contract struct {
	g        *WithT
	document map[string]any
	compiler *jsonschema.Compiler
}

func readContract(t *testing.T) *contract {
	t.Helper()
	c := &contract{g: NewWithT(t), compiler: jsonschema.NewCompiler()}
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "openapi.yaml"))
	c.g.Expect(err).NotTo(HaveOccurred())
	asJSON, err := yaml.YAMLToJSON(text)
	c.g.Expect(err).NotTo(HaveOccurred())
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(asJSON))
	c.g.Expect(err).NotTo(HaveOccurred())
	c.document = document.(map[string]any)
	c.g.Expect(c.document["openapi"]).To(HavePrefix("3.1."))
	c.compiler.DefaultDraft(jsonschema.Draft2020)
	c.compiler.AssertFormat()
	c.g.Expect(c.compiler.AddResource("openapi.json", document)).To(Succeed())
	return c
}

// at is the value at a path in the document.
func (c *contract) at(path ...string) any {
	var value any = c.document
	for _, key := range path {
		object, ok := value.(map[string]any)
		c.g.Expect(ok).To(BeTrue(), "%v", path)
		c.g.Expect(object).To(HaveKey(key), "%v", path)
		value = c.resolved(object[key])
	}
	return value
}

// resolved follows a $ref.
func (c *contract) resolved(value any) any {
	if object, ok := value.(map[string]any); ok {
		if ref, ok := object["$ref"].(string); ok {
			return c.at(strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		}
	}
	return value
}

// validate checks a JSON text against the schema at a path in the document.
func (c *contract) validate(text []byte, path ...string) error {
	for i := range path {
		path[i] = strings.NewReplacer("~", "~0", "/", "~1").Replace(path[i])
	}
	schema, err := c.compiler.Compile("openapi.json#/" + strings.Join(path, "/"))
	c.g.Expect(err).NotTo(HaveOccurred())
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	c.g.Expect(err).NotTo(HaveOccurred())
	return schema.Validate(value)
}

func (c *contract) encode(value any) []byte {
	text, err := json.Marshal(value)
	c.g.Expect(err).NotTo(HaveOccurred())
	return text
}

// bodyOf is the path of the schema of a request's body.
func bodyOf(path string) []string {
	return []string{"paths", path, "post", "requestBody", "content", "application/json", "schema"}
}

// filled is a value of a type in which every field is set.
func filled(typ reflect.Type, limit int) reflect.Value {
	v := reflect.New(typ).Elem()
	switch {
	case typ == reflect.TypeFor[delivery.Time]():
		v.Set(reflect.ValueOf(delivery.Time{Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}))
	case typ == reflect.TypeFor[delivery.Metadata]():
		v.SetString(string(delivery.NewMetadata(map[string]string{"tenant": "7"})))
	case typ == reflect.TypeFor[json.RawMessage]():
		v.Set(reflect.ValueOf(json.RawMessage(`{"challenge":"x"}`)))
	case typ.Kind() == reflect.Struct:
		for i := range typ.NumField() {
			field := typ.Field(i)
			if field.Tag.Get("json") != "-" {
				n, _ := strconv.Atoi(field.Tag.Get("limit"))
				v.Field(i).Set(filled(field.Type, n))
			}
		}
	case typ.Kind() == reflect.Pointer:
		v.Set(reflect.New(typ.Elem()))
		v.Elem().Set(filled(typ.Elem(), limit))
	case typ.Kind() == reflect.Slice && typ.Elem().Kind() == reflect.Uint8:
		v.SetBytes([]byte("protobuf"))
	case typ.Kind() == reflect.Slice:
		v.Set(reflect.MakeSlice(typ, 1, 1))
		v.Index(0).Set(filled(typ.Elem(), limit))
	case typ.Kind() == reflect.String:
		v.SetString("x")
	case typ.Kind() == reflect.Bool:
		v.SetBool(true)
	case v.CanInt():
		v.SetInt(1)
	case v.CanUint():
		v.SetUint(1)
	case v.CanFloat():
		v.SetFloat(1.5)
	}
	return v
}

// aMessage is a message of a type with every field that any message has.
func aMessage(kind delivery.MessageType) delivery.MessageItem {
	m := filled(reflect.TypeFor[delivery.MessageItem](), 0).Interface().(delivery.MessageItem)
	m.Type, m.Key, m.TargetKey = kind, delivery.MessageKey("x", "1@lid", "1@lid", "1"), delivery.MessageKey("x", "1@lid", "1@lid", "2")
	m.Quoted.Type, m.Quoted.Key = delivery.TypeText, m.TargetKey
	m.GroupChange.Picture, m.Call.Outcome = delivery.PictureChanged, delivery.CallMissed
	m.Receipt.Status, m.Receipt.Messages[0].Key = delivery.ReceiptRead, m.TargetKey
	return m
}

// TestWhatTheClientSendsKeepsTheContract posts batches of each kind with the client, and checks
// what arrives.
func TestWhatTheClientSendsKeepsTheContract(t *testing.T) {
	c := readContract(t)
	g := c.g
	type request struct {
		path   string
		header http.Header
		body   []byte
	}
	var last request
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		last = request{r.URL.Path, r.Header, body}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer server.Close()
	secrets := t.TempDir()
	token, secret := filepath.Join(secrets, "token"), filepath.Join(secrets, "secret")
	g.Expect(os.WriteFile(token, []byte("token"), 0o600)).To(Succeed())
	g.Expect(os.WriteFile(secret, []byte("whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="), 0o600)).To(Succeed())
	client, err := laravel.New(laravel.Config{BaseURL: server.URL, TokenFile: token, SigningSecretFiles: []string{secret}}, clock.RealClock{}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	defer client.Close()

	item := func(item delivery.Item, err error) delivery.Item {
		t.Helper()
		g.Expect(err).NotTo(HaveOccurred())
		return item
	}
	full := func(change func(*delivery.QRItem)) delivery.Item {
		code := delivery.QRItem{
			Numbers: delivery.Numbers{Epoch: 1, Seq: 1}, SessionID: "x", Attempt: 1, GeneratedAt: delivery.Time{Time: time.Now()}, ExpiresAt: delivery.Time{Time: time.Now()},
			Metadata: delivery.NewMetadata(map[string]string{"tenant": "7"}),
		}
		change(&code)
		return item(code.Item())
	}
	status := filled(reflect.TypeFor[delivery.StatusItem](), 0).Interface().(delivery.StatusItem)
	status.Status, status.Priority = delivery.Active, delivery.High
	messages := []delivery.Item{item(delivery.MessageItem{
		SessionID: "x", Key: delivery.MessageKey("x", "1@lid", "1@lid", "1"), Type: delivery.TypeRevoke, Chat: delivery.Chat{Group: "1@g.us"},
	}.Item())}
	for _, kind := range delivery.MessageTypes {
		messages = append(messages, item(aMessage(kind).Item()))
	}
	batches := map[string]delivery.Batch{
		laravel.DefaultQRPath: {Kind: delivery.KindQR, Items: []delivery.Item{
			full(func(q *delivery.QRItem) { q.QR = "https://wa.me" }),
			full(func(q *delivery.QRItem) { q.PairingCode = "ABCD-1234" }),
			full(func(q *delivery.QRItem) {
				q.Passkey = &delivery.Passkey{RequestOptions: json.RawMessage(`{"challenge":"x"}`), ConfirmationCode: "ABCD-1234"}
			}),
		}},
		laravel.DefaultStatusPath: {Kind: delivery.KindStatus, Items: []delivery.Item{
			item(status.Item()),
			item(delivery.StatusItem{SessionID: "x", Status: delivery.Pending, Phase: "Pending", Priority: delivery.Normal}.Item()),
		}},
		laravel.DefaultMessagePath: {Kind: delivery.KindMessage, Items: messages},
	}
	for path, batch := range batches {
		batch.ID = "msg_1"
		answer := client.Send(t.Context(), batch)
		g.Expect(answer.Result).To(Equal(delivery.Delivered), answer.Detail)
		g.Expect(last.path).To(Equal(path))
		g.Expect(c.validate(last.body, bodyOf(path)...)).To(Succeed())
		for _, parameter := range c.at("paths", path, "post", "parameters").([]any) {
			p := c.resolved(parameter).(map[string]any)
			name := p["name"].(string)
			g.Expect(c.validate(c.encode(last.header.Get(name)), "components", "parameters", parameterName(name), "schema")).To(Succeed(), name)
		}
		g.Expect(last.header.Get("Authorization")).To(Equal("Bearer token"))
	}

	// A document that accepts everything would prove nothing.
	for _, wrong := range []string{`{}`, `{"batch_id":"1","sent_at":"2026-03-01T12:00:00.000Z","items":[{}]}`} {
		for path := range batches {
			g.Expect(c.validate([]byte(wrong), bodyOf(path)...)).NotTo(Succeed(), "%s %s", path, wrong)
		}
	}
}

// parameterName is the name of a header in the document's components.
func parameterName(header string) string {
	return map[string]string{"webhook-id": "webhookID", "webhook-timestamp": "webhookTimestamp", "webhook-signature": "webhookSignature"}[header]
}

// TestTheContractDescribesEveryField compares the schemas with the types: each field has a
// description, an example and the limit that the operator keeps to, and none is left over.
func TestTheContractDescribesEveryField(t *testing.T) {
	c := readContract(t)
	g := c.g
	var compare func(typ reflect.Type, schema map[string]any, path string)
	compare = func(typ reflect.Type, schema map[string]any, path string) {
		properties, ok := schema["properties"].(map[string]any)
		g.Expect(ok).To(BeTrue(), path)
		var names, required []string
		for _, field := range reflect.VisibleFields(typ) {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			if field.Anonymous || name == "-" {
				continue
			}
			names = append(names, name)
			if !strings.Contains(options, "omitempty") {
				required = append(required, name)
			}
			at := path + "." + name
			g.Expect(properties).To(HaveKey(name), at)
			own := properties[name].(map[string]any)
			property := c.resolved(own).(map[string]any)
			g.Expect(own["description"] != nil || property["description"] != nil).To(BeTrue(), "%s has no description", at)
			fieldType := field.Type
			if fieldType.Kind() == reflect.Pointer {
				fieldType = fieldType.Elem()
			}
			element := fieldType
			if fieldType.Kind() == reflect.Slice && fieldType.Elem().Kind() != reflect.Uint8 {
				g.Expect(property["type"]).To(Equal("array"), at)
				element = fieldType.Elem()
				if limit := field.Tag.Get("limit"); limit != "" {
					g.Expect(property["maxItems"]).To(Equal(json.Number(limit)), at)
				}
			}
			if element.Kind() == reflect.Struct && element != reflect.TypeFor[delivery.Time]() {
				inner := property
				if fieldType.Kind() == reflect.Slice {
					inner = c.resolved(property["items"]).(map[string]any)
				}
				compare(element, inner, at)
				continue
			}
			g.Expect(property["examples"]).NotTo(BeEmpty(), "%s has no example", at)
			if limit := field.Tag.Get("limit"); limit != "" && fieldType.Kind() == reflect.String && property["pattern"] == nil {
				g.Expect(property["maxLength"]).To(Equal(json.Number(limit)), at)
			}
		}
		g.Expect(slices.Sorted(maps.Keys(properties))).To(Equal(slices.Sorted(slices.Values(names))), path)
		listed := []string{}
		if list, ok := schema["required"].([]any); ok {
			for _, name := range list {
				listed = append(listed, name.(string))
			}
		}
		g.Expect(listed).To(ConsistOf(required), path)
	}
	for name, typ := range map[string]reflect.Type{
		"Code": reflect.TypeFor[delivery.QRItem](), "Status": reflect.TypeFor[delivery.StatusItem](), "Message": reflect.TypeFor[delivery.MessageItem](),
	} {
		compare(typ, c.at("components", "schemas", name).(map[string]any), name)
	}
	types := c.at("components", "schemas", "MessageType", "enum")
	g.Expect(c.encode(types)).To(MatchJSON(c.encode(delivery.MessageTypes)))
}

// TestTheExamplesKeepTheContract: every example is valid, and those of messages are as the
// operator itself writes them.
func TestTheExamplesKeepTheContract(t *testing.T) {
	c := readContract(t)
	g := c.g
	examples := 0
	var walk func(value any, path []string)
	walk = func(value any, path []string) {
		object, ok := value.(map[string]any)
		if !ok {
			return
		}
		if schema, ok := object["schema"]; ok {
			list, _ := object["examples"].(map[string]any)
			for name, example := range list {
				examples++
				at := append(slices.Clone(path), "schema")
				g.Expect(c.validate(c.encode(example.(map[string]any)["value"]), at...)).To(Succeed(), "%v %s", path, name)
			}
			_ = schema
		}
		if list, ok := object["examples"].([]any); ok {
			for _, example := range list {
				examples++
				g.Expect(c.validate(c.encode(example), slices.Clone(path)...)).To(Succeed(), "%v", path)
			}
		}
		for key, inner := range object {
			if key != "examples" {
				walk(inner, append(slices.Clone(path), key))
			}
		}
	}
	walk(c.document, nil)
	g.Expect(examples).To(BeNumerically(">", 100))

	for path, read := range map[string]func([]byte) (delivery.Item, error){
		laravel.DefaultQRPath:      reread[delivery.QRItem],
		laravel.DefaultStatusPath:  reread[delivery.StatusItem],
		laravel.DefaultMessagePath: reread[delivery.MessageItem],
	} {
		list := c.at("paths", path, "post", "requestBody", "content", "application/json", "examples").(map[string]any)
		for name, example := range list {
			for _, one := range example.(map[string]any)["value"].(map[string]any)["items"].([]any) {
				item, err := read(c.encode(one))
				g.Expect(err).NotTo(HaveOccurred(), name)
				g.Expect(item.Payload).To(MatchJSON(c.encode(one)), name)
			}
		}
	}
}

// reread reads an item as its receiver could, and encodes it again.
func reread[T interface{ Item() (delivery.Item, error) }](text []byte) (delivery.Item, error) {
	var item T
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&item); err != nil {
		return delivery.Item{}, err
	}
	return item.Item()
}

// TestTheAnswersOfTheContract: what the document says of answers is what the client understands.
func TestTheAnswersOfTheContract(t *testing.T) {
	c := readContract(t)
	g := c.g
	results := map[string]delivery.Result{
		"200": delivery.Delivered, "204": delivery.Delivered, "409": delivery.Refused, "413": delivery.TooLarge,
		"422": delivery.Refused, "429": delivery.Retry, "503": delivery.Retry,
	}
	for _, path := range []string{laravel.DefaultQRPath, laravel.DefaultStatusPath, laravel.DefaultMessagePath} {
		responses := c.at("paths", path, "post", "responses").(map[string]any)
		g.Expect(slices.Sorted(maps.Keys(responses))).To(Equal(slices.Sorted(maps.Keys(results))))
		for code, response := range responses {
			number, err := strconv.Atoi(code)
			g.Expect(err).NotTo(HaveOccurred())
			bodies := map[string][]byte{"": nil}
			if content, ok := c.resolved(response).(map[string]any)["content"].(map[string]any); ok {
				delete(bodies, "")
				for name, example := range content["application/json"].(map[string]any)["examples"].(map[string]any) {
					bodies[name] = c.encode(example.(map[string]any)["value"])
				}
			} else if code == "413" {
				bodies[""] = []byte(`{}`)
			}
			for name, body := range bodies {
				answer := laravel.Classify(number, http.Header{}, body, nil, time.Now())
				g.Expect(answer.Result).To(Equal(results[code]), "%s %s %s", path, code, name)
				if name == "message" {
					g.Expect(answer.Rejected).To(Equal([]delivery.Rejection{{SessionID: "shop-7", Key: "4f0c7f3a9d0e4b5b8a1c2d3e4f506172", Reason: "no such contact"}}))
				}
			}
		}
	}
}
