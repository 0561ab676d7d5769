package v1alpha1

// Conditions of a WhatsAppSession.
const (
	// ConditionReady is True when the session is connected and needs nothing.
	ConditionReady = "Ready"
	// ConditionPlaced is True when the session has a worker.
	ConditionPlaced = "Placed"
	// ConditionPaired is True when a phone has linked the device.
	ConditionPaired = "Paired"
	// ConditionConnected is True while the session is logged in at WhatsApp.
	ConditionConnected = "Connected"
	// ConditionReconciling is True while the session changes towards its spec by itself (kstatus).
	ConditionReconciling = "Reconciling"
	// ConditionStalled is True when the session makes no progress until a person acts (kstatus).
	ConditionStalled = "Stalled"
)

// Reasons of conditions and of Events. Each comment says what a person can do.
const (
	// ReasonConnected: nothing to do.
	ReasonConnected = "Connected"
	// ReasonConnecting: the worker is logging in; wait.
	ReasonConnecting = "Connecting"
	// ReasonReconnecting: the connection was lost, and the worker tries to connect again; wait.
	ReasonReconnecting = "Reconnecting"
	// ReasonConnectFailed: the last attempt failed, and the worker tries again; the message says why.
	ReasonConnectFailed = "ConnectFailed"
	// ReasonQuarantined: attempts failed again and again in the same way, so the next one is only after hours; find the cause in the message, then change restartedAt.
	ReasonQuarantined = "Quarantined"

	// ReasonEndsItsWorker: the workers that connected the session died of it, so it is tried only after hours, apart from the others; read the end of the dead worker's log and report it, then change restartedAt to try at once.
	ReasonEndsItsWorker = "EndsItsWorker"

	// ReasonWaitingForPlacement: the manager has not placed the session yet; wait.
	ReasonWaitingForPlacement = "WaitingForPlacement"
	// ReasonPlaced: the session has a worker; nothing to do.
	ReasonPlaced = "Placed"
	// ReasonMoving: the session moves to another worker; wait.
	ReasonMoving = "Moving"
	// ReasonMoveRefused: the worker that the annotation move-to names cannot take the session; the message says why. Name another worker or remove the annotation.
	ReasonMoveRefused = "MoveRefused"
	// ReasonNoCapacity: every worker of the pool that can take sessions is full; add workers.
	ReasonNoCapacity = "NoCapacity"
	// ReasonNoWorkers: the pool has no worker that can take sessions; start one, or correct the namespace's pool label. The message says which pools have workers.
	ReasonNoWorkers = "NoWorkers"
	// ReasonWorkerFailing: the worker of this Lease cannot reach its database or WhatsApp; check its network and its log.
	ReasonWorkerFailing = "WorkerFailing"
	// ReasonWorkerSilent: the worker that holds the session has stopped to renew its Lease, and cannot be declared dead; check its pod and node, and Redis. If the node is lost for good, delete its Node or taint it with node.kubernetes.io/out-of-service.
	ReasonWorkerSilent = "WorkerSilent"
	// ReasonWorkerLost: the session's worker died, and another one connects the session; wait.
	ReasonWorkerLost = "WorkerLost"
	// ReasonEpochBehind: the store has a higher epoch; the manager raises the epoch by itself; wait.
	ReasonEpochBehind = "EpochBehind"
	// ReasonEpochAtMaximum: no higher epoch is possible, so Laravel may ignore later states as stale; correct the clocks and use another spec.sessionID.
	ReasonEpochAtMaximum = "EpochAtMaximum"
	// ReasonTooManySessions: the namespace's max-sessions is reached; delete sessions or raise the annotation.
	ReasonTooManySessions = "TooManySessions"

	// ReasonWaitingForScan: scan status.qr with the phone (Linked devices → Link a device).
	ReasonWaitingForScan = "WaitingForScan"
	// ReasonWaitingForCode: type status.pairingCode on the phone (Linked devices → Link a device → Link with phone number instead).
	ReasonWaitingForCode = "WaitingForCode"
	// ReasonPairingCodeRefused: WhatsApp gives no code for this number; correct spec.pairing.phoneNumber, wait, or set spec.pairing.method to QRCode.
	ReasonPairingCodeRefused = "PairingCodeRefused"
	// ReasonPasskeyRequired: WhatsApp asks for the account's passkey; answer status.passkey.requestOptions in a browser (docs/pair.md) and give the answer as the annotation passkey-response, then, where status.passkey.confirmationCode appears, that code as passkey-confirm.
	ReasonPasskeyRequired = "PasskeyRequired"
	// ReasonPasskeyRefused: the annotation passkey-response or passkey-confirm was not used; the message says why. Give another one before status.passkey.expiresAt.
	ReasonPasskeyRefused = "PasskeyRefused"
	// ReasonPasskeyExpired: the passkey was not answered in time, or its request was lost with the connection, a move or the worker's process; scan the next code.
	ReasonPasskeyExpired = "PasskeyExpired"
	// ReasonPasskeyFailed: WhatsApp's request cannot be used, or it did not accept the confirmation; the message says why. Scan the next code.
	ReasonPasskeyFailed = "PasskeyFailed"
	// ReasonPaired: a phone has linked the device; nothing to do.
	ReasonPaired = "Paired"
	// ReasonPairingFailed: the phone's answer was refused, WhatsApp did not link the device, or it changed its codes too often; the message says why. Scan the next code.
	ReasonPairingFailed = "PairingFailed"
	// ReasonCodeReplaced: WhatsApp does not accept the former QR code any more; scan the new one, also with a phone that has scanned the former one.
	ReasonCodeReplaced = "CodeReplaced"
	// ReasonPairingExpired: no phone was linked in time; change restartedAt to start again.
	ReasonPairingExpired = "PairingExpired"
	// ReasonWrongPhone: another phone than spec.pairing.phoneNumber was linked and has been logged out; change restartedAt and scan with the right phone.
	ReasonWrongPhone = "WrongPhone"
	// ReasonNotPaired: no phone has linked the device yet.
	ReasonNotPaired = "NotPaired"

	// ReasonLoggedOut: the phone or WhatsApp unlinked the device; change restartedAt and scan again.
	ReasonLoggedOut = "LoggedOut"
	// ReasonReplaced: another program uses the same device keys; stop it. The worker connects once more after 5 minutes.
	ReasonReplaced = "Replaced"
	// ReasonBanned: WhatsApp bans the account until status.retryAfter; the worker does not connect before.
	ReasonBanned = "Banned"
	// ReasonOutdated: WhatsApp refuses this version of the client; upgrade the operator's image.
	ReasonOutdated = "Outdated"
	// ReasonSuspended: spec.suspend is true; set it to false to connect.
	ReasonSuspended = "Suspended"

	// ReasonSessionIDTaken: another session holds this id (upper and lower case make no difference); choose another spec.sessionID.
	ReasonSessionIDTaken = "SessionIDTaken"
	// ReasonOtherInstallation: the session belongs to another installation (status.installation), which does not manage it here. Start that installation; or run "store adopt" if this one takes its place; or delete the session and remove the device on the phone by hand.
	ReasonOtherInstallation = "OtherInstallation"
	// ReasonProxySecretMissing: create the Secret that spec.proxy.secretRef names.
	ReasonProxySecretMissing = "ProxySecretMissing"
	// ReasonProxySecretForbidden: the worker may not read the Secret; create the RoleBinding that the message prints.
	ReasonProxySecretForbidden = "ProxySecretForbidden"
	// ReasonProxySecretInvalid: the Secret has another type, no key url, or an unusable URL; correct it.
	ReasonProxySecretInvalid = "ProxySecretInvalid"
	// ReasonStoreUnavailable: the database does not answer; bring it back.
	ReasonStoreUnavailable = "StoreUnavailable"
	// ReasonInboxUnavailable: a message could not be stored in the database, so the connection was ended and WhatsApp keeps the messages; bring the database back, and the session connects again.
	ReasonInboxUnavailable = "InboxUnavailable"
	// ReasonBacklog: too many messages wait for Laravel, so the session was disconnected and WhatsApp keeps the later ones; let Laravel accept messages (docs/troubleshoot.md), and the session connects again.
	ReasonBacklog = "Backlog"
	// ReasonRecordMissing: the database has no record of the session, as after a restore from an older backup. The manager claims its id again; scan again if the keys were lost with the record.
	ReasonRecordMissing = "RecordMissing"

	// ReasonDeleting: the device is being unlinked; wait.
	ReasonDeleting = "Deleting"
	// ReasonDeletionWaits: the database or Redis does not answer, and the deletion continues when it does; bring it back.
	ReasonDeletionWaits = "DeletionWaits"
	// ReasonDeleted: the device is unlinked, or its keys are kept as spec.deletionPolicy says; nothing to do.
	ReasonDeleted = "Deleted"
	// ReasonLogoutUnconfirmed: unlink the device that the Event names on the phone by hand.
	ReasonLogoutUnconfirmed = "LogoutUnconfirmed"
	// ReasonRestarted: restartedAt changed, and the session started again; nothing to do.
	ReasonRestarted = "Restarted"
	// ReasonSucceeded: Reconciling or Stalled is False because the session is as its spec says.
	ReasonSucceeded = "Succeeded"
	// ReasonProgressing: Stalled is False because the session makes progress by itself.
	ReasonProgressing = "Progressing"
)
