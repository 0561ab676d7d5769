package v1alpha1

// Conditions of a WhatsAppSession.
const (
	// ConditionReady is True when the session is connected and nothing is in the way.
	ConditionReady = "Ready"
	// ConditionPlaced is True when a worker has been chosen.
	ConditionPlaced = "Placed"
	// ConditionPaired is True when a phone has linked the device.
	ConditionPaired = "Paired"
	// ConditionConnected is True while the session is logged in at WhatsApp.
	ConditionConnected = "Connected"
	// ConditionReconciling is True while the session is on its way (kstatus).
	ConditionReconciling = "Reconciling"
	// ConditionStalled is True when the session goes no further without a person (kstatus).
	ConditionStalled = "Stalled"
)

// Reasons of conditions and of Events. Each comment says what a person can do.
const (
	// ReasonConnected: nothing to do.
	ReasonConnected = "Connected"
	// ReasonConnecting: the worker is logging in; wait.
	ReasonConnecting = "Connecting"
	// ReasonReconnecting: the connection was lost and is tried again; wait.
	ReasonReconnecting = "Reconnecting"
	// ReasonConnectFailed: the last attempt failed and is repeated; the message says why.
	ReasonConnectFailed = "ConnectFailed"
	// ReasonQuarantined: attempts fail in the same way again and again and are hours apart now; find the cause in the message, then change restartedAt.
	ReasonQuarantined = "Quarantined"

	// ReasonEndsItsWorker: the workers that connected the session died of it, so it is tried only after hours, apart from the others; read the end of the dead worker's log and report it, then change restartedAt to try at once.
	ReasonEndsItsWorker = "EndsItsWorker"

	// ReasonWaitingForPlacement: the manager has not placed the session yet; wait.
	ReasonWaitingForPlacement = "WaitingForPlacement"
	// ReasonPlaced: a worker has been chosen.
	ReasonPlaced = "Placed"
	// ReasonMoving: the session is on its way to another worker; wait.
	ReasonMoving = "Moving"
	// ReasonMoveRefused: the worker that the annotation move-to names cannot take the session; the message says why. Name another worker or remove the annotation.
	ReasonMoveRefused = "MoveRefused"
	// ReasonNoCapacity: every worker of the pool that can take sessions is full; add workers.
	ReasonNoCapacity = "NoCapacity"
	// ReasonNoWorkers: the pool has no worker that can take sessions; start one, or correct the namespace's pool label. The message says which pools have workers.
	ReasonNoWorkers = "NoWorkers"
	// ReasonWorkerFailing: the worker of this Lease cannot reach its database or WhatsApp; look at its network and its log.
	ReasonWorkerFailing = "WorkerFailing"
	// ReasonWorkerLost: its worker died; the session is placed again.
	ReasonWorkerLost = "WorkerLost"
	// ReasonEpochBehind: the store knows a higher epoch; the manager places the session above it by itself.
	ReasonEpochBehind = "EpochBehind"
	// ReasonEpochAtMaximum: no higher epoch exists, so Laravel may take the manager's later states for old ones; correct the clocks and use another spec.sessionID.
	ReasonEpochAtMaximum = "EpochAtMaximum"
	// ReasonTooManySessions: the namespace's max-sessions is reached; delete sessions or raise the annotation.
	ReasonTooManySessions = "TooManySessions"

	// ReasonWaitingForScan: scan status.qr with the phone (Linked devices → Link a device).
	ReasonWaitingForScan = "WaitingForScan"
	// ReasonWaitingForCode: type status.pairingCode on the phone (Linked devices → Link a device → Link with phone number instead).
	ReasonWaitingForCode = "WaitingForCode"
	// ReasonPairingCodeRefused: WhatsApp gives the number no code to type; correct spec.pairing.phoneNumber, wait, or set spec.pairing.method to QRCode.
	ReasonPairingCodeRefused = "PairingCodeRefused"
	// ReasonPaired: a phone has linked the device.
	ReasonPaired = "Paired"
	// ReasonPairingFailed: the phone's answer was refused; scan the next code.
	ReasonPairingFailed = "PairingFailed"
	// ReasonPairingExpired: no phone was linked in time; change restartedAt to begin again.
	ReasonPairingExpired = "PairingExpired"
	// ReasonWrongPhone: another phone than spec.pairing.phoneNumber was linked and has been logged out; scan with the right one.
	ReasonWrongPhone = "WrongPhone"
	// ReasonNotPaired: no phone has linked the device yet.
	ReasonNotPaired = "NotPaired"

	// ReasonLoggedOut: the phone or WhatsApp unlinked the device; change restartedAt and scan again.
	ReasonLoggedOut = "LoggedOut"
	// ReasonReplaced: another program uses the same device keys; stop it. Tried once more after 5 minutes.
	ReasonReplaced = "Replaced"
	// ReasonBanned: WhatsApp bans the account until status.retryAfter; it is not tried before.
	ReasonBanned = "Banned"
	// ReasonOutdated: WhatsApp refuses this version of the client; upgrade the operator's image.
	ReasonOutdated = "Outdated"
	// ReasonSuspended: spec.suspend is true; set it to false to connect.
	ReasonSuspended = "Suspended"

	// ReasonSessionIDTaken: another session holds this id; choose another spec.sessionID.
	ReasonSessionIDTaken = "SessionIDTaken"
	// ReasonOtherInstallation: the session belongs to another installation (status.installation), which does not manage it here. Start that one; or run "store adopt" where this one takes its place; or delete the session and remove the device on the phone by hand.
	ReasonOtherInstallation = "OtherInstallation"
	// ReasonProxySecretMissing: create the Secret that spec.proxy.secretRef names.
	ReasonProxySecretMissing = "ProxySecretMissing"
	// ReasonProxySecretForbidden: the worker may not read the Secret; create the RoleBinding that the message prints.
	ReasonProxySecretForbidden = "ProxySecretForbidden"
	// ReasonProxySecretInvalid: the Secret has another type, no key url, or no usable URL in it; correct it.
	ReasonProxySecretInvalid = "ProxySecretInvalid"
	// ReasonStoreUnavailable: the database does not answer; it is tried again.
	ReasonStoreUnavailable = "StoreUnavailable"
	// ReasonRecordMissing: the database has no record of the session, as after a restore from an older copy. The manager claims its id again; scan again if the keys were lost with the record.
	ReasonRecordMissing = "RecordMissing"

	// ReasonDeleting: the device is being unlinked.
	ReasonDeleting = "Deleting"
	// ReasonDeletionWaits: the database or Redis does not answer, and the deletion goes on when it does; see to it.
	ReasonDeletionWaits = "DeletionWaits"
	// ReasonDeleted: the device is unlinked, or its keys are kept as spec.deletionPolicy says; nothing to do.
	ReasonDeleted = "Deleted"
	// ReasonLogoutUnconfirmed: unlink the device that the Event names on the phone by hand.
	ReasonLogoutUnconfirmed = "LogoutUnconfirmed"
	// ReasonRestarted: restartedAt changed and was acted upon.
	ReasonRestarted = "Restarted"
	// ReasonSucceeded: Reconciling or Stalled is False because all is well.
	ReasonSucceeded = "Succeeded"
	// ReasonProgressing: Stalled is False because the session is on its way.
	ReasonProgressing = "Progressing"
)
