{{/* Parts of pods. */}}

{{/* podMetadata (list $ "component" settings labels): labels and annotations of a pod. */}}
{{- define "whatsapp-operator.podMetadata" -}}
{{- $root := index . 0 }}{{- $settings := index . 2 -}}
annotations:
  {{- merge (deepCopy $settings.podAnnotations) (dict "kubectl.kubernetes.io/default-container" (index . 1)) | toYaml | nindent 2 }}
labels:
  {{- mergeOverwrite (deepCopy $settings.podLabels) (include "whatsapp-operator.labels" (list $root (index . 1) (index . 3)) | fromYaml) | toYaml | nindent 2 }}
{{- end }}

{{- define "whatsapp-operator.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "whatsapp-operator.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "whatsapp-operator.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* scheduling (list $ "component" settings extraSelector): where pods run. A lost node is
   given up after 30 s instead of Kubernetes' five minutes: another worker has its sessions by then. */}}
{{- define "whatsapp-operator.scheduling" -}}
{{- $root := index . 0 }}{{- $component := index . 1 }}{{- $settings := index . 2 }}{{- $extra := index . 3 -}}
{{- with $settings.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
tolerations:
  - key: node.kubernetes.io/unreachable
    operator: Exists
    effect: NoExecute
    tolerationSeconds: 30
  - key: node.kubernetes.io/not-ready
    operator: Exists
    effect: NoExecute
    tolerationSeconds: 30
  {{- with $settings.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if $settings.topologySpread.enabled }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: {{ $settings.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- mergeOverwrite (include "whatsapp-operator.selectorLabels" (list $root $component) | fromYaml) $extra | toYaml | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end }}

{{/* jobScheduling: the Jobs and the test run on the nodes that the managers may use. */}}
{{- define "whatsapp-operator.jobScheduling" -}}
{{- with .Values.manager.affinity.nodeAffinity }}
affinity:
  nodeAffinity:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- include "whatsapp-operator.nodes" .Values.manager }}
{{- end }}

{{/* nodes: which nodes pods of these settings may use. */}}
{{- define "whatsapp-operator.nodes" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "whatsapp-operator.probes" -}}
# From the first moment: while the API server, Redis or the database are away the process
# waits, which is no reason to restart it.
startupProbe:
  httpGet: {path: /healthz, port: health}
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 2
  timeoutSeconds: 5
{{- end }}

{{/* The variables of every process of ours. Variables, not arguments, because they are merged
   by name in an overlay; an argument has priority over its variable. */}}
{{- define "whatsapp-operator.podEnv" -}}
- name: POD_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: WHATSAPP_OPERATOR_RELEASE
  value: {{ .Release.Name | quote }}
{{- end }}

{{- define "whatsapp-operator.processEnv" -}}
- name: WHATSAPP_OPERATOR_POD_UID
  valueFrom:
    fieldRef: {fieldPath: metadata.uid}
- name: GOMAXPROCS
  valueFrom:
    resourceFieldRef: {resource: requests.cpu, divisor: "1"}
{{- end }}

{{/* storesEnv (list $ "manager"): how to reach Redis and the database. */}}
{{- define "whatsapp-operator.storesEnv" -}}
{{- $root := index . 0 }}{{- $role := index . 1 }}{{- $fullname := include "whatsapp-operator.fullname" $root -}}
{{- $redis := $root.Values.redis }}{{- $database := $root.Values.database }}{{- $user := index $redis $role -}}
{{- if include "whatsapp-operator.bundledRedis" $root }}
- name: WHATSAPP_OPERATOR_REDIS
  value: {{ printf "%s-valkey:6379" $fullname | quote }}
- name: WHATSAPP_OPERATOR_REDIS_USERNAME
  value: {{ printf "whatsapp-operator-%s" $role | quote }}
- name: WHATSAPP_OPERATOR_REDIS_PASSWORD_FILE
  value: /etc/whatsapp-operator/redis/password
{{- else }}
- name: WHATSAPP_OPERATOR_REDIS
  value: {{ join "," $redis.addresses | quote }}
- name: WHATSAPP_OPERATOR_REDIS_MODE
  value: {{ $redis.mode | quote }}
{{- with $redis.masterName }}
- name: WHATSAPP_OPERATOR_REDIS_MASTER_NAME
  value: {{ . | quote }}
{{- end }}
{{- with $user.username }}
- name: WHATSAPP_OPERATOR_REDIS_USERNAME
  value: {{ . | quote }}
{{- end }}
{{- if $user.passwordSecret.name }}
- name: WHATSAPP_OPERATOR_REDIS_PASSWORD_FILE
  value: /etc/whatsapp-operator/redis/password
{{- end }}
{{- with $redis.sentinel.username }}
- name: WHATSAPP_OPERATOR_REDIS_SENTINEL_USERNAME
  value: {{ . | quote }}
{{- end }}
{{- if $redis.sentinel.passwordSecret.name }}
- name: WHATSAPP_OPERATOR_REDIS_SENTINEL_PASSWORD_FILE
  value: /etc/whatsapp-operator/redis-sentinel/password
{{- end }}
{{- if $redis.tls.enabled }}
- name: WHATSAPP_OPERATOR_REDIS_TLS
  value: "true"
{{- if $redis.tls.caSecret.name }}
- name: WHATSAPP_OPERATOR_REDIS_CA_FILE
  value: /etc/whatsapp-operator/redis-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}
- name: WHATSAPP_OPERATOR_REDIS_DB
  value: {{ $redis.db | int64 | quote }}
{{- with $redis.keyPrefix }}
- name: WHATSAPP_OPERATOR_REDIS_KEY_PREFIX
  value: {{ . | quote }}
{{- end }}
- name: WHATSAPP_OPERATOR_REDIS_DURABILITY
  value: {{ $redis.durability | quote }}
{{- if $redis.allowVolatile }}
- name: WHATSAPP_OPERATOR_ALLOW_VOLATILE_REDIS
  value: "true"
{{- end }}
{{- with $redis.poolSize | int64 }}
- name: WHATSAPP_OPERATOR_REDIS_POOL_SIZE
  value: {{ . | quote }}
{{- end }}
{{- if include "whatsapp-operator.bundledDatabase" $root }}
- name: WHATSAPP_OPERATOR_STORE
  value: {{ printf "postgres://whatsapp@%s-postgresql:5432/whatsapp?sslmode=disable" $fullname | quote }}
- name: WHATSAPP_OPERATOR_STORE_PASSWORD_FILE
  value: /etc/whatsapp-operator/database/password
{{- else }}
{{- if $database.urlSecret.name }}
- name: WHATSAPP_OPERATOR_STORE_FILE
  value: /etc/whatsapp-operator/database-url/url
{{- else }}
- name: WHATSAPP_OPERATOR_STORE
  value: {{ $database.url | quote }}
{{- end }}
{{- if $database.credentialsSecret.name }}
{{- if $database.credentialsSecret.userKey }}
- name: WHATSAPP_OPERATOR_STORE_USER_FILE
  value: /etc/whatsapp-operator/database/username
{{- end }}
- name: WHATSAPP_OPERATOR_STORE_PASSWORD_FILE
  value: /etc/whatsapp-operator/database/password
{{- end }}
{{- end }}
{{- with $database.maxConnections | int64 }}
- name: WHATSAPP_OPERATOR_STORE_MAX_CONNECTIONS
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/* storesVolumes (list $ "manager"): the Secrets of storesEnv, as a list of name, secret and items. */}}
{{- define "whatsapp-operator.storesVolumes" -}}
{{- $root := index . 0 }}{{- $role := index . 1 }}{{- $fullname := include "whatsapp-operator.fullname" $root -}}
{{- $redis := $root.Values.redis }}{{- $database := $root.Values.database }}{{- $user := index $redis $role -}}
{{- $files := list -}}
{{- if include "whatsapp-operator.bundledRedis" $root }}
{{- $files = append $files (dict "name" "redis" "secret" (printf "%s-valkey" $fullname) "items" (dict $role "password")) }}
{{- else }}
{{- with $user.passwordSecret }}{{ if .name }}
{{- $files = append $files (dict "name" "redis" "secret" .name "items" (dict .key "password")) }}
{{- end }}{{ end }}
{{- with $redis.sentinel.passwordSecret }}{{ if .name }}
{{- $files = append $files (dict "name" "redis-sentinel" "secret" .name "items" (dict .key "password")) }}
{{- end }}{{ end }}
{{- if and $redis.tls.enabled $redis.tls.caSecret.name }}
{{- $files = append $files (dict "name" "redis-ca" "secret" $redis.tls.caSecret.name "items" (dict $redis.tls.caSecret.key "ca.crt")) }}
{{- end }}
{{- end }}
{{- if include "whatsapp-operator.bundledDatabase" $root }}
{{- $files = append $files (dict "name" "database" "secret" (printf "%s-postgresql" $fullname) "items" (dict "password" "password")) }}
{{- else }}
{{- with $database.urlSecret }}{{ if .name }}
{{- $files = append $files (dict "name" "database-url" "secret" .name "items" (dict .key "url")) }}
{{- end }}{{ end }}
{{- with $database.credentialsSecret }}{{ if .name }}
{{- $items := dict .passwordKey "password" }}
{{- if .userKey }}{{ $_ := set $items .userKey "username" }}{{ end }}
{{- $files = append $files (dict "name" "database" "secret" .name "items" $items) }}
{{- end }}{{ end }}
{{- with $database.caSecret }}{{ if .name }}
{{- $files = append $files (dict "name" "database-ca" "secret" .name "items" (dict .key "ca.crt")) }}
{{- end }}{{ end }}
{{- end }}
{{- dict "files" $files | toYaml }}
{{- end }}

{{/* laravelVolumes: the same for what the managers need for Laravel. */}}
{{- define "whatsapp-operator.laravelVolumes" -}}
{{- $fullname := include "whatsapp-operator.fullname" . -}}
{{- $files := list -}}
{{- if include "whatsapp-operator.demoLaravel" . }}
{{- $files = append $files (dict "name" "laravel-token" "secret" (printf "%s-laravel" $fullname) "items" (dict "token" "token")) }}
{{- $files = append $files (dict "name" "laravel-signing" "secret" (printf "%s-laravel" $fullname) "items" (dict "signing-secret" "signing-secret")) }}
{{- else if .Values.laravel.url }}
{{- with .Values.laravel.tokenSecret }}
{{- $files = append $files (dict "name" "laravel-token" "secret" .name "items" (dict .key "token")) }}
{{- end }}
{{- with .Values.laravel.signingSecret }}
{{- $items := dict }}{{- range .keys }}{{ $_ := set $items . . }}{{ end }}
{{- $files = append $files (dict "name" "laravel-signing" "secret" .name "items" $items) }}
{{- end }}
{{- with .Values.laravel.caSecret }}{{ if .name }}
{{- $files = append $files (dict "name" "laravel-ca" "secret" .name "items" (dict .key "ca.crt")) }}
{{- end }}{{ end }}
{{- end }}
{{- dict "files" $files | toYaml }}
{{- end }}

{{- define "whatsapp-operator.laravelEnv" -}}
{{- $l := .Values.laravel -}}
{{- if include "whatsapp-operator.hasLaravel" . }}
- name: WHATSAPP_OPERATOR_LARAVEL_URL
  value: {{ $l.url | default (printf "http://%s-laravel:8000" (include "whatsapp-operator.fullname" .)) | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_TOKEN_FILE
  value: /etc/whatsapp-operator/laravel-token/token
- name: WHATSAPP_OPERATOR_LARAVEL_SIGNING_SECRET_FILE
  {{- if $l.url }}
  {{- $paths := list }}{{- range $l.signingSecret.keys }}{{ $paths = append $paths (printf "/etc/whatsapp-operator/laravel-signing/%s" .) }}{{ end }}
  value: {{ join "," $paths | quote }}
  {{- else }}
  value: /etc/whatsapp-operator/laravel-signing/signing-secret
  {{- end }}
{{- if and $l.url $l.caSecret.name }}
- name: WHATSAPP_OPERATOR_LARAVEL_CA_FILE
  value: /etc/whatsapp-operator/laravel-ca/ca.crt
{{- end }}
{{- if or $l.insecureHTTP (not $l.url) }}
- name: WHATSAPP_OPERATOR_INSECURE_LARAVEL_HTTP
  value: "true"
{{- end }}
- name: WHATSAPP_OPERATOR_LARAVEL_QR_PATH
  value: {{ $l.qrPath | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_STATUS_PATH
  value: {{ $l.statusPath | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_MESSAGE_PATH
  value: {{ $l.messagePath | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_TIMEOUT
  value: {{ printf "%ds" ($l.timeoutSeconds | int64) | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_MAX_REQUESTS
  value: {{ $l.maxRequests | int64 | quote }}
- name: WHATSAPP_OPERATOR_LARAVEL_MAX_MESSAGE_REQUESTS
  value: {{ $l.maxMessageRequests | int64 | quote }}
{{- end }}
{{- end }}

{{/* volumes (dict "files" list): the Secrets, readable by the pod's group only. They are whole
   folders, so that the kubelet replaces them when the Secret changes. */}}
{{- define "whatsapp-operator.volumes" -}}
{{- range .files }}
- name: {{ .name }}
  secret:
    secretName: {{ .secret | quote }}
    defaultMode: 288 # 0440
    items:
      {{- range $key, $path := .items }}
      - {key: {{ $key | quote }}, path: {{ $path | quote }}}
      {{- end }}
{{- end }}
{{- end }}

{{- define "whatsapp-operator.volumeMounts" -}}
{{- range .files }}
- name: {{ .name }}
  mountPath: /etc/whatsapp-operator/{{ .name }}
  readOnly: true
{{- end }}
{{- end }}
