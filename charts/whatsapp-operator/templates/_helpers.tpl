{{/* Names, labels and choices that several templates share. */}}

{{- define "whatsapp-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 38 | trimSuffix "-" }}
{{- end }}

{{/* The begin of all names: short enough for the longest suffix within the 63 characters of a label. */}}
{{- define "whatsapp-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 38 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 38 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 38 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* selectorLabels (list $ "component"): labels that never change, for selectors and volume claims. */}}
{{- define "whatsapp-operator.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "whatsapp-operator.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* labels (list $ "component"), without a component (list $ ""), or with further labels
   (list $ "component" dict), which have priority over commonLabels. */}}
{{- define "whatsapp-operator.labels" -}}
{{- $root := index . 0 -}}
{{- $own := dict
  "app.kubernetes.io/name" (include "whatsapp-operator.name" $root)
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/version" ($root.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" $root.Release.Service
  "app.kubernetes.io/part-of" "whatsapp-operator"
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
-}}
{{- with index . 1 }}{{- $_ := set $own "app.kubernetes.io/component" . }}{{- end }}
{{- if gt (len .) 2 }}{{- $own = merge $own (index . 2) }}{{- end }}
{{- mergeOverwrite (deepCopy $root.Values.commonLabels) $own | toYaml }}
{{- end }}

{{/* image (list $ .Values.image): the reference, by digest where one is given. */}}
{{- define "whatsapp-operator.image" -}}
{{- $root := index . 0 }}{{- $image := index . 1 -}}
{{- $tag := $image.tag | default $root.Chart.AppVersion -}}
{{- printf "%s:%s%s" $image.repository $tag (ternary "" (printf "@%s" $image.digest) (empty $image.digest)) | quote }}
{{- end }}

{{- define "whatsapp-operator.managerServiceAccount" -}}
{{- .Values.manager.serviceAccount.name | default (printf "%s-manager" (include "whatsapp-operator.fullname" .)) }}
{{- end }}

{{/* pools: every pool with its complete settings, as YAML. */}}
{{- define "whatsapp-operator.pools" -}}
{{- $fullname := include "whatsapp-operator.fullname" . -}}
{{- $pools := dict -}}
{{- range $name, $changes := .Values.pools }}
{{- $pool := mergeOverwrite (deepCopy $.Values.worker) (deepCopy ($changes | default dict)) -}}
{{- $object := ternary (printf "%s-worker" $fullname) (printf "%s-worker-%s" $fullname $name) (eq $name "default") -}}
{{- $_ := set $pool "objectName" $object -}}
{{- $_ := set $pool "serviceAccountName" ($pool.serviceAccount.name | default $object) -}}
{{- $_ := set $pools $name $pool -}}
{{- end }}
{{- $pools | toYaml }}
{{- end }}

{{/* Which stores are the chart's own; empty: external. */}}
{{- define "whatsapp-operator.bundledRedis" -}}
{{- if and .Values.valkey.enabled (not .Values.redis.addresses) }}true{{ end }}
{{- end }}
{{- define "whatsapp-operator.bundledDatabase" -}}
{{- if and .Values.postgresql.enabled (not .Values.database.url) (not .Values.database.urlSecret.name) }}true{{ end }}
{{- end }}
{{- define "whatsapp-operator.bundledStores" -}}
{{- $stores := list -}}
{{- if include "whatsapp-operator.bundledRedis" . }}{{ $stores = append $stores "redis" }}{{ end }}
{{- if include "whatsapp-operator.bundledDatabase" . }}{{ $stores = append $stores "database" }}{{ end }}
{{- join "," $stores }}
{{- end }}
{{/* Whether the stand-in for Laravel runs. */}}
{{- define "whatsapp-operator.demoLaravel" -}}
{{- if and .Values.simulator.enabled .Values.simulator.laravel.enabled (not .Values.laravel.url) }}true{{ end }}
{{- end }}

{{/* Whether there is an application that takes what is delivered. */}}
{{- define "whatsapp-operator.hasLaravel" -}}
{{- if or .Values.laravel.url (include "whatsapp-operator.demoLaravel" .) }}true{{ end }}
{{- end }}
{{/* The Secrets that the bootstrap Job makes complete, as its arguments. */}}
{{- define "whatsapp-operator.bootstrapArgs" -}}
{{- $fullname := include "whatsapp-operator.fullname" . -}}
{{- $args := list -}}
{{- if include "whatsapp-operator.bundledRedis" . }}
{{- $args = append $args (printf "--password=%s-valkey/manager,%s-valkey/worker,%s-valkey/laravel" $fullname $fullname $fullname) }}
{{- end }}
{{- if include "whatsapp-operator.bundledDatabase" . }}
{{- $args = append $args (printf "--password=%s-postgresql/password" $fullname) }}
{{- end }}
{{- if include "whatsapp-operator.demoLaravel" . }}
{{- $args = concat $args (list (printf "--password=%s-laravel/token" $fullname) (printf "--signing-secret=%s-laravel/signing-secret" $fullname)) }}
{{- end }}
{{- with $args }}{{ toYaml . }}{{ end }}
{{- end }}
{{- define "whatsapp-operator.bootstrapSecrets" -}}
{{- $fullname := include "whatsapp-operator.fullname" . -}}
{{- $names := list -}}
{{- if include "whatsapp-operator.bundledRedis" . }}{{ $names = append $names (printf "%s-valkey" $fullname) }}{{ end }}
{{- if include "whatsapp-operator.bundledDatabase" . }}{{ $names = append $names (printf "%s-postgresql" $fullname) }}{{ end }}
{{- if include "whatsapp-operator.demoLaravel" . }}{{ $names = append $names (printf "%s-laravel" $fullname) }}{{ end }}
{{- with $names }}{{ toYaml . }}{{ end }}
{{- end }}

{{/* kindKnown (list $ "group/version" renderMode): whether a kind of another project is rendered. */}}
{{- define "whatsapp-operator.kindKnown" -}}
{{- $root := index . 0 }}{{- $version := index . 1 }}{{- $mode := index . 2 -}}
{{- if or (eq $mode "alwaysRender") ($root.Capabilities.APIVersions.Has $version) }}true
{{- else if eq $mode "failIfMissing" }}
{{- fail (printf "the cluster does not know %s: install its operator, or set metrics.serviceMonitor.renderMode to skipIfMissing" $version) }}
{{- end }}
{{- end }}

{{/* withExtra (list ours key extra what): a list of ours, as YAML, and the items that the values
   add. Kubernetes takes no two with the same key. */}}
{{- define "whatsapp-operator.withExtra" -}}
{{- $ours := index . 0 | fromYamlArray }}{{- $key := index . 1 }}{{- $extra := index . 2 }}{{- $what := index . 3 -}}
{{- $seen := dict -}}
{{- range $ours }}{{ $_ := set $seen (get . $key | trimSuffix "/") true }}{{ end -}}
{{- range $extra }}
{{- $name := get . $key | trimSuffix "/" }}
{{- if hasKey $seen $name }}
{{- fail (printf "%s has an item with the %s %s, which another item or the chart itself has already: choose another %s" $what $key $name $key) }}
{{- end }}
{{- $_ := set $seen $name true }}
{{- end -}}
{{- concat $ours ($extra | default list) | toYaml }}
{{- end }}

{{/* env (list ours extra what): our variables, as YAML, and those of the values, which replace
   ours of the same name. */}}
{{- define "whatsapp-operator.env" -}}
{{- $given := dict -}}
{{- range index . 1 }}{{ $_ := set $given .name true }}{{ end -}}
{{- $ours := list -}}
{{- range index . 0 | fromYamlArray }}
{{- if not (hasKey $given .name) }}{{ $ours = append $ours . }}{{ end }}
{{- end -}}
{{- include "whatsapp-operator.withExtra" (list (toYaml $ours) "name" (index . 1) (index . 2)) }}
{{- end }}
