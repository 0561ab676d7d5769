package controllers

// The rights of the manager. It neither creates nor deletes sessions, and it does not read
// Secrets. It reads Namespaces for their pool, their limit of sessions, and the id of this
// cluster (kube-system). It uses the Leases of its workers, deletes those of workers that
// have long been dead, and has one for its leader election, whose Events still use the older
// API group. It reads the Leases of other releases in this cluster to find out whether they
// still manage their sessions. It reads Pods for the kubelet's report on their end, and writes
// their deletion cost, and Nodes to find out whether the node of a silent worker is lost. At
// the start it compares the installed CustomResourceDefinition with its own. It asks the API
// server who may read its metrics.
//
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=whatsapp-operator.io,resources=whatsappsessions/status,verbs=patch
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get
// +kubebuilder:rbac:groups=apiextensions.k8s.io,resources=customresourcedefinitions,resourceNames=whatsappsessions.whatsapp-operator.io,verbs=get
// +kubebuilder:rbac:groups=authentication.k8s.io,resources=tokenreviews,verbs=create
// +kubebuilder:rbac:groups=authorization.k8s.io,resources=subjectaccessreviews,verbs=create
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups="",resources=events,verbs=create;patch,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get;list;watch;create;update;delete,namespace=whatsapp-operator-system
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;patch,namespace=whatsapp-operator-system
