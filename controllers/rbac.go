package controllers

// The rights of the manager. It creates and deletes no session and reads no
// Secret. Namespaces are read for their pool, their limit, and the name of this
// cluster (kube-system); Leases are the workers' and its own for the election,
// whose Events still use the older group; those of another release in this
// cluster are read to find out whether it still manages its sessions. The Lease of a worker that has long
// been dead is deleted. Pods are read for the kubelet's
// word on their end, and get a deletion cost.
//
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions/status,verbs=patch
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get;list;watch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups="",resources=events,verbs=create;patch,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get;list;watch;create;update;delete,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;patch,namespace=whatsapp-operator-system
