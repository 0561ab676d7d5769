package worker

// The rights of a worker. It reads no Secret by default: the owner of a
// namespace binds whatsapp-operator-proxy-reader for its proxies. From its own
// pod and ReplicaSet it learns its Deployment's revision.
//
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions,verbs=get;list;watch
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions/status,verbs=patch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups="",resources=namespaces,resourceNames=kube-system,verbs=get
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get;create;update;patch;delete,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups="",resources=pods,verbs=get,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups=apps,resources=replicasets,verbs=get,namespace=whatsapp-operator-system
