package simulator

import (
	"bytes"
	"compress/zlib"
	"context"
	"errors"
	"fmt"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waHistorySync"
	"go.mau.fi/whatsmeow/proto/waLidMigrationSyncPayload"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// Methods for tests of a client: they send nodes that this server never sends on its own.

// PlayPasskeyRequest asks each client that is not paired for a passkey, with these options,
// possibly malformed, and again if it was asked before. It returns ErrNotNow if there is none.
func (s *Server) PlayPasskeyRequest(options string) error {
	plaintext, err := waBinary.Marshal(waBinary.Node{
		Tag: "notification", Attrs: waBinary.Attrs{"from": types.ServerJID, "id": "1", "type": "passkey_prologue_request"},
		Content: []waBinary.Node{{Tag: "passkey_request_options", Content: []byte(options)}},
	})
	if err != nil {
		return fmt.Errorf("encoding the request of a passkey: %w", err)
	}
	return s.Play("", plaintext)
}

// Play sends a frame with that plaintext (a flag byte and an encoded node, possibly
// malformed) to a device's connection or, without a device, to each client that is not
// paired. It returns ErrNotNow if there is no connection.
func (s *Server) Play(device string, plaintext []byte) error {
	var conns []*conn
	s.mu.Lock()
	if device == "" {
		for _, p := range s.pairings {
			conns = append(conns, p.conn)
		}
	} else {
		d, err := s.deviceLocked(device)
		if err != nil {
			s.mu.Unlock()
			return err
		}
		if d.conn != nil {
			conns = append(conns, d.conn)
		}
	}
	s.mu.Unlock()
	if len(conns) == 0 {
		return fmt.Errorf("%w: there is no connection to play it to", ErrNotNow)
	}
	var errs []error
	for _, c := range conns {
		errs = append(errs, c.sendPlaintext(plaintext))
	}
	return errors.Join(errs...)
}

// AnswerWith makes f answer the requests (iq) of all clients, until AnswerWith is called
// again; nil restores the server's own answers. If f returns nil for a request, the server
// answers it. AnswerWith sets the request's id in the answer.
func (s *Server) AnswerWith(f func(request *waBinary.Node) (answer *waBinary.Node)) {
	if f == nil {
		s.script.Store(nil)
		return
	}
	s.script.Store(&f)
}

// scripted returns the answer of AnswerWith's function to a request, or nil.
func (s *Server) scripted(request *waBinary.Node) *waBinary.Node {
	f := s.script.Load()
	if f == nil {
		return nil
	}
	answer := (*f)(request)
	if answer != nil {
		if answer.Attrs == nil {
			answer.Attrs = waBinary.Attrs{}
		}
		answer.Attrs["id"] = request.Attrs["id"]
	}
	return answer
}

// SendMessage is [Server.Send] for any message. From may also be the device's own phone,
// whose messages change the device's settings.
func (s *Server) SendMessage(ctx context.Context, deviceName, from string, message *waE2E.Message) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	d, sender, err := s.correspondents(deviceName, from)
	if err != nil {
		return "", err
	}
	return s.send(&draft{from: sender}, []*device{d}, message)
}

// correspondents returns a device and the account that writes to it, which is named by its
// phone number or its JID.
func (s *Server) correspondents(device, from string) (*device, correspondent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sender, err := s.correspondentLocked(from)
	if err != nil {
		return nil, correspondent{}, err
	}
	d, err := s.deviceLocked(device)
	return d, sender, err
}

// phoneHistory is what the phone of a device sends it about contacts: their LIDs, their
// tokens, and the secret from which the device makes a cstoken.
func (s *Server) phoneHistory(d *device, contacts []string) (*waHistorySync.HistorySync, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &waHistorySync.HistorySync{SyncType: waHistorySync.HistorySync_INITIAL_BOOTSTRAP.Enum(), NctSalt: d.account.saltLocked()}
	for _, name := range contacts {
		phone, err := parsePhone(name)
		if err != nil {
			return nil, err
		}
		a, err := s.accountLocked(phone)
		if err != nil {
			return nil, err
		}
		out.PhoneNumberToLidMappings = append(out.PhoneNumberToLidMappings, &waHistorySync.PhoneNumberToLIDMapping{
			PnJID: proto.String(a.jid().String()), LidJID: proto.String(a.lidJID().String()),
		})
		conversation := &waHistorySync.Conversation{ID: proto.String(a.lidJID().String())}
		if known := a.contacts[d.account.lid]; known != nil && len(known.given) > 0 {
			conversation.TcToken = known.given[len(known.given)-1]
			conversation.TcTokenTimestamp = proto.Uint64(uint64(s.clock.Now().Unix()))
		}
		out.Conversations = append(out.Conversations, conversation)
	}
	return out, nil
}

// SendHistory makes the phone of a device send it the first part of its history, without
// messages: the LIDs of the contacts with those phone numbers, the tokens that they gave
// to the account, and the secret with which the device proves to others who it is.
func (s *Server) SendHistory(ctx context.Context, device string, contacts ...string) (string, error) {
	d, _, err := s.correspondents(device, "")
	if err != nil {
		return "", err
	}
	history, err := s.phoneHistory(d, contacts)
	if err != nil {
		return "", err
	}
	content, err := proto.Marshal(history)
	if err != nil {
		return "", fmt.Errorf("encode a history: %w", err)
	}
	var compressed bytes.Buffer
	z := zlib.NewWriter(&compressed)
	_, _ = z.Write(content) // a buffer never fails
	_ = z.Close()
	return s.SendMessage(ctx, device, d.account.phone, &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		Type: waE2E.ProtocolMessage_HISTORY_SYNC_NOTIFICATION.Enum(),
		HistorySyncNotification: &waE2E.HistorySyncNotification{
			SyncType:                          waE2E.HistorySyncType_INITIAL_BOOTSTRAP.Enum(),
			InitialHistBootstrapInlinePayload: compressed.Bytes(),
		},
	}})
}

// MigrateToLIDs makes the phone of a device report that its chats are now named by LIDs,
// with the LIDs of the contacts with those phone numbers.
func (s *Server) MigrateToLIDs(ctx context.Context, device string, contacts ...string) (string, error) {
	d, _, err := s.correspondents(device, "")
	if err != nil {
		return "", err
	}
	payload := &waLidMigrationSyncPayload.LIDMigrationMappingSyncPayload{ChatDbMigrationTimestamp: proto.Uint64(uint64(s.clock.Now().Unix()))}
	for _, name := range contacts {
		lid, err := s.LID(name)
		if err != nil {
			return "", err
		}
		phone, err := parsePhone(name)
		if err != nil {
			return "", err
		}
		mapping := &waLidMigrationSyncPayload.LIDMigrationMapping{Pn: new(uint64), AssignedLid: new(uint64)}
		if _, err := fmt.Sscan(phone, mapping.Pn); err != nil {
			return "", fmt.Errorf("read a phone number: %w", err)
		}
		if _, err := fmt.Sscan(strings.TrimSuffix(lid, "@"+types.HiddenUserServer), mapping.AssignedLid); err != nil {
			return "", fmt.Errorf("read a LID: %w", err)
		}
		payload.PnToLidMappings = append(payload.PnToLidMappings, mapping)
	}
	encoded, err := proto.Marshal(payload)
	if err != nil {
		return "", fmt.Errorf("encode the LIDs: %w", err)
	}
	return s.SendMessage(ctx, device, d.account.phone, &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		Type:                           waE2E.ProtocolMessage_LID_MIGRATION_MAPPING_SYNC.Enum(),
		LidMigrationMappingSyncMessage: &waE2E.LIDMigrationMappingSyncMessage{EncodedMappingPayload: encoded},
	}})
}
