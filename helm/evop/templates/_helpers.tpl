{{/* Names leave room for suffixes such as "-test" within the 63 characters of a label. */}}
{{- define "evop.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "evop.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- $name := include "evop.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What every resource carries. */}}
{{- define "evop.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "evop.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What selects the server's pods. The component keeps the test's pod out of the Services. */}}
{{- define "evop.selectorLabels" -}}
app.kubernetes.io/name: {{ include "evop.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "evop.image" -}}
{{- $image := .Values.image }}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .Chart.AppVersion $image.tag }}{{ end }}
{{- end }}

{{- define "evop.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "evop.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "evop.claimName" -}}
{{- default (include "evop.fullname" .) .Values.persistence.existingClaim }}
{{- end }}

{{/* "true" where there are keys to mount: given, generated or in an existing Secret. */}}
{{- define "evop.hasKeys" -}}
{{- if or .Values.auth.existingSecret .Values.auth.apiKeys .Values.admin.enabled }}true{{ end }}
{{- end }}

{{- define "evop.keysSecretName" -}}
{{- default (printf "%s-keys" (include "evop.fullname" .)) .Values.auth.existingSecret }}
{{- end }}

{{/* "true" where more than one pod is asked for, now or by the autoscaler. */}}
{{- define "evop.isReplicated" -}}
{{- if .Values.autoscaling.enabled }}
{{- if gt (int .Values.autoscaling.maxReplicas) 1 }}true{{ end }}
{{- else if gt (int .Values.replicaCount) 1 }}true{{ end }}
{{- end }}

{{/* "true" where an old and a new pod may have the data volume at the same time. Of an existing claim the chart can't know:
     it takes the word of a user who asks for replicas. */}}
{{- define "evop.dataIsShared" -}}
{{- $data := .Values.persistence }}
{{- if not $data.enabled }}true
{{- else if $data.existingClaim }}{{ include "evop.isReplicated" . }}
{{- else if has "ReadWriteMany" $data.accessModes }}true{{ end }}
{{- end }}

{{- define "evop.strategy" -}}
{{- if .Values.strategy }}
{{- toYaml .Values.strategy }}
{{- else if include "evop.dataIsShared" . -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: 1
  maxUnavailable: 0
{{- else -}}
type: Recreate
{{- end }}
{{- end }}

{{- define "evop.terminationGracePeriodSeconds" -}}
{{- $drain := add .Values.preStopSleepSeconds .Values.server.shutdownTimeout }}
{{- default (add $drain 15) .Values.terminationGracePeriodSeconds }}
{{- end }}
