package v1alpha1

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// Finalizer keeps a deleted session until its device is unlinked, or the logout has failed
	// for too long.
	Finalizer = "whatsapp-operator.io/session"

	// RestartedAtAnnotation restarts the session whenever its value changes: it begins a new
	// pairing after LoggedOut or PairingExpired, and connects at once if it waits. It counts at
	// most once a minute.
	RestartedAtAnnotation = "whatsapp-operator.io/restartedAt"

	// MoveToAnnotation names the worker to which the session should move. The session moves, at
	// most once a minute, when that worker is live, not draining, of the session's pool, and has
	// room; until then an Event says why it does not. While the annotation is set, the session
	// is not rebalanced.
	MoveToAnnotation = "whatsapp-operator.io/move-to"

	// PasskeyResponseAnnotation is the answer of the account's passkey to
	// status.passkey.requestOptions, as PublicKeyCredential.toJSON writes it. It is removed
	// when it was used or refused.
	PasskeyResponseAnnotation = "whatsapp-operator.io/passkey-response"

	// PasskeyConfirmAnnotation is status.passkey.confirmationCode, when it is the code that
	// the phone shows. It is removed when it was used or refused.
	PasskeyConfirmAnnotation = "whatsapp-operator.io/passkey-confirm"

	// PoolLabel on a Namespace chooses the pool of workers for its sessions.
	PoolLabel = "whatsapp-operator.io/pool"

	// DefaultPool serves the namespaces without PoolLabel.
	DefaultPool = "default"

	// MaxSessionsAnnotation on a Namespace limits how many of its sessions are placed.
	MaxSessionsAnnotation = "whatsapp-operator.io/max-sessions"

	// ProxySecretType is the only type of Secret that spec.proxy.secretRef may name.
	ProxySecretType corev1.SecretType = "whatsapp-operator.io/proxy"

	// ProxySecretKey is the key of the proxy's URL in its Secret.
	ProxySecretKey = "url"
)

// PairingMethod is how a session is linked to a phone.
// +kubebuilder:validation:Enum=QRCode;PhoneCode
type PairingMethod string

const (
	// PairingQRCode shows QR codes in status.qr until one is scanned.
	PairingQRCode PairingMethod = "QRCode"
	// PairingPhoneCode shows a code in status.pairingCode that is typed on the phone.
	PairingPhoneCode PairingMethod = "PhoneCode"
)

// DeletionPolicy says what happens to the linked device when the resource is deleted.
// +kubebuilder:validation:Enum=Logout;Retain
type DeletionPolicy string

const (
	// DeletionLogout unlinks the device from the phone and deletes its keys.
	DeletionLogout DeletionPolicy = "Logout"
	// DeletionRetain keeps the keys: a session applied again with the same id in the
	// same namespace connects without a new scan.
	DeletionRetain DeletionPolicy = "Retain"
)

// IgnoredMessages is a class of messages that is not forwarded to Laravel.
// +kubebuilder:validation:Enum=Status;Channels;Groups;Broadcasts
type IgnoredMessages string

const (
	// IgnoreStatus are status updates (stories).
	IgnoreStatus IgnoredMessages = "Status"
	// IgnoreChannels are messages of channels (newsletters).
	IgnoreChannels IgnoredMessages = "Channels"
	// IgnoreGroups are messages of groups.
	IgnoreGroups IgnoredMessages = "Groups"
	// IgnoreBroadcasts are messages of broadcast lists.
	IgnoreBroadcasts IgnoredMessages = "Broadcasts"
)

// WhatsAppSessionSpec is the desired state of a session.
//
// +kubebuilder:validation:XValidation:rule="has(self.sessionID) == has(oldSelf.sessionID) && (!has(self.sessionID) || self.sessionID == oldSelf.sessionID)",message="spec.sessionID cannot be changed: Laravel and Redis know the session by it; delete the session and create one with the other id"
// +kubebuilder:validation:XValidation:rule="!has(self.pairing) || !has(self.pairing.method) || self.pairing.method != 'PhoneCode' || has(self.pairing.phoneNumber)",message="spec.pairing.phoneNumber is required when spec.pairing.method is PhoneCode: set it to the phone's number, for example \"+34600111222\", in quotes"
type WhatsAppSessionSpec struct {
	// sessionID is the id of the session at Laravel and in Redis. It cannot be changed.
	// Default: metadata.name. Ids that differ only by upper and lower case are one id. An id of
	// digits only must be in quotes, because YAML reads it as a number.
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:Type=""
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="type(self) == string",message="spec.sessionID must be in quotes, because YAML reads it as a number: for example \"42\""
	// +kubebuilder:validation:XValidation:rule="type(self) != string || self.matches('^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$')",message="spec.sessionID must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a letter or digit"
	SessionID string `json:"sessionID,omitempty"`

	// pairing is how the session is linked to a phone.
	// +optional
	// +kubebuilder:default={}
	Pairing PairingSpec `json:"pairing,omitzero"`

	// suspend disconnects the session and keeps its keys.
	// +optional
	Suspend bool `json:"suspend,omitempty"`

	// proxy is the proxy through which the session connects to WhatsApp. Default: none, the
	// worker connects directly.
	// +optional
	Proxy *ProxySpec `json:"proxy,omitempty"`

	// messages says which messages are forwarded to Laravel.
	// +optional
	// +kubebuilder:default={}
	Messages MessagesSpec `json:"messages,omitzero"`

	// deletionPolicy says what happens to the linked device when this resource is deleted.
	// +optional
	// +kubebuilder:default=Logout
	DeletionPolicy DeletionPolicy `json:"deletionPolicy,omitempty"`

	// deviceName is what the phone shows under linked devices.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=50
	// +kubebuilder:validation:XValidation:rule="!self.matches('[\\\\x00-\\\\x1f\\\\x7f]')",message="spec.deviceName must not contain control characters"
	DeviceName string `json:"deviceName,omitempty"`

	// metadata is sent to Laravel with everything about this session, so that it knows, for
	// example, the tenant without a query: up to 16 pairs, keys of up to 64 and values of up to
	// 256 characters. A change applies from the next item on.
	// +optional
	// +kubebuilder:validation:MaxProperties=16
	// +kubebuilder:validation:XValidation:rule="self.all(k, size(k) >= 1 && size(k) <= 64)",message="a key of spec.metadata must have 1 to 64 characters"
	// +kubebuilder:validation:XValidation:rule="self.all(k, size(self[k]) <= 256)",message="a value of spec.metadata must have at most 256 characters"
	Metadata map[string]string `json:"metadata,omitempty"`
}

// PairingSpec is how a session is linked to a phone.
type PairingSpec struct {
	// method is QRCode (scan status.qr) or PhoneCode (type status.pairingCode on the phone).
	// +optional
	// +kubebuilder:default=QRCode
	Method PairingMethod `json:"method,omitempty"`

	// phoneNumber is the only phone that may be linked, in E.164 and in quotes
	// ("+34600111222"), because YAML reads it as a number without them. Another phone is logged
	// out at once. Required for PhoneCode.
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:Type=""
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="type(self) == string",message="spec.pairing.phoneNumber must be in quotes, because YAML reads it as a number and drops the '+': for example \"+34600111222\""
	// +kubebuilder:validation:XValidation:rule="type(self) != string || self.matches('^\\\\+[1-9][0-9]{6,14}$')",message="spec.pairing.phoneNumber must be in E.164 form: '+', the country code and the number, 7 to 15 digits and nothing else, in quotes, for example \"+34600111222\""
	PhoneNumber string `json:"phoneNumber,omitempty"`

	// timeout is how long codes are offered before the phase becomes PairingExpired, 1m to 1h.
	// +optional
	// +kubebuilder:default="10m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h)){1,8}$')",message="spec.pairing.timeout must be a duration like 90s, 10m or 1h"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h)){1,8}$') || (duration(self) >= duration('1m') && duration(self) <= duration('1h'))",message="spec.pairing.timeout must be between 1m and 1h, for example 10m"
	Timeout metav1.Duration `json:"timeout,omitzero"`
}

// ProxySpec names the proxy through which a session connects to WhatsApp.
type ProxySpec struct {
	// secretRef names a Secret of type whatsapp-operator.io/proxy in this namespace; its key
	// "url" is the URL of an HTTP or SOCKS5 proxy.
	// +required
	SecretRef SecretReference `json:"secretRef"`
}

// SecretReference names a Secret in the namespace of the session.
type SecretReference struct {
	// name of the Secret.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="spec.proxy.secretRef.name must be the name of a Secret: lower case letters, digits, '-' and '.'"
	Name string `json:"name"`
}

// MessagesSpec says which messages are forwarded to Laravel.
type MessagesSpec struct {
	// ignore lists the classes of messages that are not forwarded. Default: Status. With an
	// empty list every message is forwarded.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=4
	// +kubebuilder:default={Status}
	Ignore []IgnoredMessages `json:"ignore,omitzero"`
}

// Phase is the state of a session in one word.
// +kubebuilder:validation:Enum=Pending;Pairing;Connecting;Connected;Disconnected;Suspended;PairingExpired;LoggedOut;Banned;Outdated;Replaced;Failed;Terminating
type Phase string

const (
	// PhasePending waits for an id or a worker.
	PhasePending Phase = "Pending"
	// PhasePairing shows codes and waits for the phone.
	PhasePairing Phase = "Pairing"
	// PhaseConnecting has a device and is logging in.
	PhaseConnecting Phase = "Connecting"
	// PhaseConnected is logged in.
	PhaseConnected Phase = "Connected"
	// PhaseDisconnected lost its connection and will try again by itself.
	PhaseDisconnected Phase = "Disconnected"
	// PhaseSuspended is disconnected by spec.suspend.
	PhaseSuspended Phase = "Suspended"
	// PhasePairingExpired was not scanned in time; restartedAt begins a new pairing.
	PhasePairingExpired Phase = "PairingExpired"
	// PhaseLoggedOut lost its device; restartedAt begins a new pairing.
	PhaseLoggedOut Phase = "LoggedOut"
	// PhaseBanned must not connect before status.retryAfter.
	PhaseBanned Phase = "Banned"
	// PhaseOutdated was refused because the client is too old: the image must be upgraded.
	PhaseOutdated Phase = "Outdated"
	// PhaseReplaced was displaced by another login of the same device.
	PhaseReplaced Phase = "Replaced"
	// PhaseFailed needs a person: see the condition Stalled.
	PhaseFailed Phase = "Failed"
	// PhaseTerminating is being deleted.
	PhaseTerminating Phase = "Terminating"
)

// WhatsAppSessionStatus is the observed state of a session. While heldBy names a worker, that
// worker writes it; otherwise the manager does. Only the manager writes worker and epoch.
type WhatsAppSessionStatus struct {
	// phase is the state in one word.
	// +optional
	Phase Phase `json:"phase,omitempty"`

	// conditions are Ready, Placed, Paired, Connected, Reconciling and Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:XValidation:rule="self.all(c, size(c.message) <= 512)",message="the message of a condition must have at most 512 characters"
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// observedGeneration is the generation of the spec that this status is about; -1 until the
	// session is reconciled for the first time, so that kstatus reads a new session as in
	// progress.
	// +optional
	// +kubebuilder:validation:Minimum=-1
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// sessionID is the id that this session holds; empty while it holds none.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	SessionID string `json:"sessionID,omitempty"`

	// installation is the id of the installation that manages this session.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	Installation string `json:"installation,omitempty"`

	// worker is the pod that the session is placed on.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Worker string `json:"worker,omitempty"`

	// epoch is the fencing number of the placement. It never becomes lower.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=9007199254740991
	Epoch int64 `json:"epoch,omitempty"`

	// heldBy is the worker that owns the device.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	HeldBy string `json:"heldBy,omitempty"`

	// holderStart identifies the process of heldBy that owns the device.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	HolderStart string `json:"holderStart,omitempty"`

	// retryAfter is when the next attempt may be made (the end of a ban, or of a backoff of hours).
	// +optional
	RetryAfter *metav1.Time `json:"retryAfter,omitempty"`

	// retryReason is why no attempt is made before retryAfter or, if that is absent, before the
	// annotation restartedAt changes: LoggedOut, WrongPhone, PairingExpired, Banned,
	// PairingCodeRefused or EndsItsWorker. Unlike the phase it is kept during a move and a
	// suspension.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	RetryReason string `json:"retryReason,omitempty"`

	// failures counts the connections in a row that ended in the same way and lasted less than a
	// minute.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Failures int32 `json:"failures,omitempty"`

	// failureReason is how they ended, in one word.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	FailureReason string `json:"failureReason,omitempty"`

	// replacements counts the logins elsewhere that ended this session's connection, until it
	// stays connected for a minute. After the first one the session connects once more, after
	// the second one it does not.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Replacements int32 `json:"replacements,omitempty"`

	// pairingDeadline is until when codes are offered.
	// +optional
	PairingDeadline *metav1.Time `json:"pairingDeadline,omitempty"`

	// observedRestartedAt is the value of the annotation restartedAt that was acted on last.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	ObservedRestartedAt string `json:"observedRestartedAt,omitempty"`

	// restartedTime is when that value was acted on: restarts count at most once a minute.
	// +optional
	RestartedTime *metav1.Time `json:"restartedTime,omitempty"`

	// storedEpoch is the epoch that the store has if it refused this session's lower one; the
	// manager raises the epoch above it.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=9007199254740991
	StoredEpoch int64 `json:"storedEpoch,omitempty"`

	// qr is the newest QR code; absent when it has expired or was used.
	// +optional
	QR *QRStatus `json:"qr,omitempty"`

	// pairingCode is typed on the phone when spec.pairing.method is PhoneCode; absent when it
	// has expired or was used.
	// +optional
	// +kubebuilder:validation:MaxLength=16
	PairingCode string `json:"pairingCode,omitempty"`

	// passkey is what the account's passkey is asked, which some accounts need to be linked;
	// absent when nothing is asked.
	// +optional
	Passkey *PasskeyStatus `json:"passkey,omitempty"`

	// jid is the device's address at WhatsApp.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	JID string `json:"jid,omitempty"`

	// lid is the device's other address at WhatsApp, for example 123456789012345:3@lid. It hides
	// the phone number: its digits are no phone number. Contacts are addressed like this first.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	LID string `json:"lid,omitempty"`

	// phoneNumber of the linked phone, in E.164.
	// +optional
	// +kubebuilder:validation:MaxLength=32
	PhoneNumber string `json:"phoneNumber,omitempty"`

	// pushName is the name that the account shows to others.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	PushName string `json:"pushName,omitempty"`

	// lastConnectedTime is when the session last connected.
	// +optional
	LastConnectedTime *metav1.Time `json:"lastConnectedTime,omitempty"`

	// lastDisconnectedTime is when a connection last ended.
	// +optional
	LastDisconnectedTime *metav1.Time `json:"lastDisconnectedTime,omitempty"`

	// lastDisconnectReason is why that connection ended.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	LastDisconnectReason string `json:"lastDisconnectReason,omitempty"`

	// reconnects counts the connections after the first one.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Reconnects int64 `json:"reconnects,omitempty"`
}

// QRStatus is a QR code that waits to be scanned.
type QRStatus struct {
	// code is the content of the QR code.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Code string `json:"code"`

	// expiresAt is when WhatsApp stops accepting the code.
	// +required
	ExpiresAt metav1.Time `json:"expiresAt"`

	// attempt counts the codes of this pairing, from 1.
	// +optional
	// +kubebuilder:validation:Minimum=1
	Attempt int32 `json:"attempt,omitempty"`
}

// PasskeyStatus is what the passkey of an account is asked while a device is being linked.
type PasskeyStatus struct {
	// requestOptions is the request as JSON, which PublicKeyCredential.parseRequestOptionsFromJSON
	// takes in a browser, on a page of https://web.whatsapp.com. The answer goes into the annotation
	// passkey-response.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	RequestOptions string `json:"requestOptions"`

	// expiresAt is when the request is given up and the pairing starts again.
	// +required
	ExpiresAt metav1.Time `json:"expiresAt"`

	// confirmationCode must be the code that the phone shows; then it goes into the annotation
	// passkey-confirm. Absent where WhatsApp asks for no confirmation.
	// +optional
	// +kubebuilder:validation:MaxLength=16
	ConfirmationCode string `json:"confirmationCode,omitempty"`

	// observedResponse is the digest of the annotation passkey-response that was used or refused.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	ObservedResponse string `json:"observedResponse,omitempty"`

	// observedConfirmation is the digest of the annotation passkey-confirm that was used or refused.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	ObservedConfirmation string `json:"observedConfirmation,omitempty"`
}

// WhatsAppSession is one WhatsApp account, linked as a device, with exactly one connection.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=whatsappsessions,singular=whatsappsession,scope=Namespaced,shortName=wa,categories=whatsapp
// +kubebuilder:selectablefield:JSONPath=`.status.worker`
// +kubebuilder:selectablefield:JSONPath=`.status.heldBy`
// +kubebuilder:selectablefield:JSONPath=`.status.sessionID`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Phone",type=string,JSONPath=`.status.phoneNumber`
// +kubebuilder:printcolumn:name="Worker",type=string,JSONPath=`.status.worker`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Session-ID",type=string,priority=1,JSONPath=`.status.sessionID`
// +kubebuilder:printcolumn:name="JID",type=string,priority=1,JSONPath=`.status.jid`
// +kubebuilder:printcolumn:name="Reconnects",type=integer,priority=1,JSONPath=`.status.reconnects`
// +kubebuilder:validation:XValidation:rule="has(self.spec.sessionID) || self.metadata.name.matches('^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$')",message="metadata.name is the session's id when spec.sessionID is not set, so it must be at most 63 letters, digits, '.' or '-': shorten the name or set spec.sessionID"
type WhatsAppSession struct {
	metav1.TypeMeta `json:",inline"`

	// metadata is the standard metadata of Kubernetes.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is the desired state.
	// +optional
	// +kubebuilder:default={}
	Spec WhatsAppSessionSpec `json:"spec,omitzero"`

	// status is the observed state.
	// +optional
	// +kubebuilder:default={observedGeneration:-1}
	Status WhatsAppSessionStatus `json:"status,omitzero"`
}

// SessionID returns the id that the session has, or wants, at Laravel and in Redis.
func (s *WhatsAppSession) SessionID() string {
	if s.Spec.SessionID != "" {
		return s.Spec.SessionID
	}
	return s.Name
}

// RestartedAt returns the annotation's value, shortened to the longest value of
// status.observedRestartedAt.
func (s *WhatsAppSession) RestartedAt() string {
	value := s.Annotations[RestartedAtAnnotation]
	// A character that is cut in two would be stored as another one, and never compare equal.
	return strings.ToValidUTF8(value[:min(len(value), 64)], "")
}

// PasskeyResponse is the value of the annotation passkey-response; empty: there is none.
func (s *WhatsAppSession) PasskeyResponse() string { return s.Annotations[PasskeyResponseAnnotation] }

// PasskeyConfirmation is the value of the annotation passkey-confirm; empty: there is none.
func (s *WhatsAppSession) PasskeyConfirmation() string {
	return s.Annotations[PasskeyConfirmAnnotation]
}

// HideCodes removes what can be used to link a phone only while the connection lives that
// brought it: the QR code, the pairing code and the passkey's request.
func (s *WhatsAppSessionStatus) HideCodes() { s.QR, s.PairingCode, s.Passkey = nil, "", nil }

// OffersCodes reports whether the session waits for a person to link a phone.
func (s *WhatsAppSessionStatus) OffersCodes() bool {
	return s.QR != nil || s.PairingCode != "" || s.Passkey != nil
}

// WhatsAppSessionList is a list of sessions.
// +kubebuilder:object:root=true
type WhatsAppSessionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []WhatsAppSession `json:"items"`
}
