{{/* What the schema can't say because it takes two values: each failure names both and the way out. */}}
{{- define "evop.validate" -}}
{{- $values := .Values }}

{{- if and (include "evop.isReplicated" .) (not (include "evop.dataIsShared" .)) }}
{{- fail (printf "persistence.accessModes is [%s], but more than one replica needs ReadWriteMany: add it, set persistence.existingClaim, or set persistence.enabled to false" (join ", " $values.persistence.accessModes)) }}
{{- end }}

{{- if and $values.persistence.existingClaim (not $values.persistence.enabled) }}
{{- fail "persistence.existingClaim is set, but persistence.enabled is false: /data would be an emptyDir" }}
{{- end }}

{{- with $values.autoscaling }}
{{- if .enabled }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas (%d) is above autoscaling.maxReplicas (%d)" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- if not (or .targetCPUUtilizationPercentage .metrics) }}
{{- fail "autoscaling.enabled needs a metric: set autoscaling.targetCPUUtilizationPercentage or autoscaling.metrics" }}
{{- end }}
{{- if and .targetCPUUtilizationPercentage (not (dig "requests" "cpu" "" $values.resources)) (not (dig "limits" "cpu" "" $values.resources)) }}
{{- fail "autoscaling.targetCPUUtilizationPercentage is a share of resources.requests.cpu, which is not set" }}
{{- end }}
{{- end }}
{{- end }}

{{- with $values.model }}
{{- if and .revision (or (not .source) (hasPrefix "/" .source)) }}
{{- fail "model.revision is for a hub id: set model.source to org/name, or leave model.revision empty" }}
{{- end }}
{{- if hasPrefix "/mnt/models" .source }}
{{- $mounted := .existingClaim }}
{{- range $values.extraVolumeMounts }}
{{- if hasPrefix "/mnt/models" .mountPath }}{{ $mounted = .mountPath }}{{ end }}
{{- end }}
{{- if not $mounted }}
{{- fail (printf "model.source is %s, but nothing is mounted at /mnt/models: set model.existingClaim or extraVolumeMounts" .source) }}
{{- end }}
{{- end }}
{{- if and .offline .source (not (hasPrefix "/" .source)) (not $values.persistence.enabled) }}
{{- fail "model.offline with a hub id needs its files in the data volume: set persistence.enabled to true, or model.source to a path" }}
{{- end }}
{{- end }}

{{- with $values.auth }}
{{- if and .existingSecret (or .apiKeys .adminKey) }}
{{- fail "auth.existingSecret replaces auth.apiKeys and auth.adminKey: set it or them, not both" }}
{{- end }}
{{- end }}

{{- $drain := add $values.preStopSleepSeconds $values.server.shutdownTimeout }}
{{- if lt (int (include "evop.terminationGracePeriodSeconds" .)) (int $drain) }}
{{- fail (printf "terminationGracePeriodSeconds (%d) is below preStopSleepSeconds + server.shutdownTimeout (%d): requests would be cut off" (int $values.terminationGracePeriodSeconds) (int $drain)) }}
{{- end }}

{{- if and $values.service.nodePort (eq $values.service.type "ClusterIP") }}
{{- fail "service.nodePort needs service.type NodePort or LoadBalancer" }}
{{- end }}
{{- end }}
