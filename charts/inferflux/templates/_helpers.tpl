{{- define "inferflux.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 of the 63 characters that Kubernetes allows: what it makes of a StatefulSet's name has to fit as well. */}}
{{- define "inferflux.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "inferflux.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "inferflux.selectorLabels" -}}
app.kubernetes.io/name: {{ include "inferflux.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "inferflux.labels" -}}
{{ include "inferflux.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "inferflux.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "inferflux.secretName" -}}
{{- .Values.secrets.existingSecret | default (include "inferflux.fullname" .) -}}
{{- end -}}

{{/* "true" when the keys stand in the configuration: INFERFLUX_API_KEYS would take the place of all of them. */}}
{{- define "inferflux.keysInConfig" -}}
{{- if (get .Values.config "auth" | default dict).api_keys -}}
{{- if .Values.secrets.apiKeys -}}
{{- fail "API keys: give them in config.auth.api_keys or in secrets.apiKeys, not in both" -}}
{{- end -}}
true
{{- end -}}
{{- end -}}

{{- define "inferflux.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "inferflux.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "inferflux.kind" -}}
{{- ternary "StatefulSet" "Deployment" .Values.persistence.enabled -}}
{{- end -}}

{{/* One process, or one rank per GPU. */}}
{{- define "inferflux.command" -}}
{{- $serve := list "serve" "--config" "/etc/inferflux/server.yaml" -}}
{{- if gt (int .Values.gpu.count) 1 -}}
{{- concat (list "torchrun" "--standalone" "--nproc-per-node" (toString (int .Values.gpu.count)) "-m" "inferflux") $serve | toJson -}}
{{- else -}}
{{- concat (list "inferflux") $serve | toJson -}}
{{- end -}}
{{- end -}}

{{- define "inferflux.scheme" -}}
{{- ternary "HTTPS" "HTTP" (eq true (get .Values.config.server "tls" | default dict).enabled) -}}
{{- end -}}

{{/* Seconds from SIGTERM's announcement to SIGKILL. */}}
{{- define "inferflux.gracePeriod" -}}
{{- add (int .Values.preStopSeconds) (ceil .Values.config.server.drain_timeout_s | int) 10 -}}
{{- end -}}
