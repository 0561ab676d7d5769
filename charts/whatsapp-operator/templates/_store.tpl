{{/* store (dict "root" $ "name" "valkey" "port" 6379 "settings" .Values.valkey "scripts" list): a
   bundled store, one pod with a volume that outlives an uninstall. */}}
{{- define "whatsapp-operator.store" -}}
{{- $root := .root }}{{- $name := .name }}{{- $settings := .settings }}{{- $port := .port | int64 -}}
{{- $object := printf "%s-%s" (include "whatsapp-operator.fullname" $root) $name -}}
{{- $labels := include "whatsapp-operator.labels" (list $root $name) -}}
{{- $selector := include "whatsapp-operator.selectorLabels" (list $root $name) -}}
{{- $config := dict "passwd" (printf "%s:x:%d:%d::/data:/bin/sh\n" $name ($settings.user | int64) ($settings.user | int64)) -}}
{{- range .files }}{{ $_ := set $config . ($root.Files.Get (printf "files/%s" .)) }}{{ end -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $object }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
data:
  {{- toYaml $config | nindent 2 }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $object }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  selector:
    {{- $selector | nindent 4 }}
  ports:
    - {name: {{ $name }}, port: {{ $port }}, targetPort: {{ $name }}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $object }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  serviceName: {{ $object }}
  replicas: 1
  selector:
    matchLabels:
      {{- $selector | nindent 6 }}
  template:
    metadata:
      annotations:
        checksum/config: {{ toYaml $config | sha256sum }}
      # Without the chart's version: an upgrade must not restart the stores while workers hand over.
      labels:
        {{- mergeOverwrite (deepCopy $root.Values.commonLabels) ($selector | fromYaml) | toYaml | nindent 8 }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      {{- include "whatsapp-operator.imagePullSecrets" $root | nindent 6 }}
      {{- include "whatsapp-operator.nodes" $settings | nindent 6 }}
      securityContext:
        runAsNonRoot: true
        runAsUser: {{ $settings.user | int64 }}
        runAsGroup: {{ $settings.user | int64 }}
        fsGroup: {{ $settings.user | int64 }}
        # PostgreSQL refuses a data folder that the group may write.
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile:
          type: RuntimeDefault
      containers:
        - name: {{ $name }}
          image: {{ include "whatsapp-operator.image" (list $root $settings.image) }}
          imagePullPolicy: {{ $settings.image.pullPolicy }}
          command: [/bin/sh, /config/{{ $name }}-start.sh]
          {{- with .env }}
          env:
            {{- range $key, $value := . }}
            - name: {{ $key }}
              value: {{ $value | quote }}
            {{- end }}
          {{- end }}
          ports:
            - {name: {{ $name }}, containerPort: {{ $port }}}
          # To read a large file at the start takes time.
          startupProbe:
            exec: {command: [/bin/sh, /config/{{ $name }}-ready.sh]}
            periodSeconds: 1
            timeoutSeconds: 5
            failureThreshold: 600
          readinessProbe:
            exec: {command: [/bin/sh, /config/{{ $name }}-ready.sh]}
            periodSeconds: 5
            timeoutSeconds: 5
          resources:
            {{- toYaml $settings.resources | nindent 12 }}
          terminationMessagePolicy: FallbackToLogsOnError
          securityContext:
            {{- include "whatsapp-operator.containerSecurityContext" $root | nindent 12 }}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: tmp, mountPath: /tmp}
            - {name: config, mountPath: /config, readOnly: true}
            # The user exists in any image.
            - {name: config, mountPath: /etc/passwd, subPath: passwd, readOnly: true}
            - {name: passwords, mountPath: /passwords, readOnly: true}
      volumes:
        - name: tmp
          emptyDir: {}
        - name: config
          configMap: {name: {{ $object }}}
        - name: passwords
          secret:
            secretName: {{ $object }}
            defaultMode: 288 # 0440
  # Kept when the StatefulSet is deleted. No label here may ever change.
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Retain, whenScaled: Retain}
  volumeClaimTemplates:
    - metadata:
        name: data
        labels:
          {{- $selector | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $settings.persistence.storageClass }}
        storageClassName: {{ . | quote }}
        {{- end }}
        resources:
          requests: {storage: {{ $settings.persistence.size | quote }}}
{{- end }}
