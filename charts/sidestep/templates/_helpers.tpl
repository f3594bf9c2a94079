{{- define "sidestep.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sidestep.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sidestep.labels" -}}
{{ include "sidestep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "sidestep.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Whether the HTTP server is on localhost alone; empty: no. */}}
{{- define "sidestep.loopback" -}}
{{- if has .Values.http.address (list "127.0.0.1" "::1") -}}true{{- end -}}
{{- end -}}

{{/* HOST:PORT, an IPv6 address in brackets. */}}
{{- define "sidestep.http" -}}
{{- $host := .Values.http.address -}}
{{- if contains ":" $host -}}{{- $host = printf "[%s]" $host -}}{{- end -}}
{{- printf "%s:%d" $host (int .Values.http.port) -}}
{{- end -}}

{{/* Where the kubelet, on the same node, finds that. */}}
{{- define "sidestep.probeHost" -}}
{{- ternary "::1" "127.0.0.1" (contains ":" .Values.http.address) -}}
{{- end -}}
