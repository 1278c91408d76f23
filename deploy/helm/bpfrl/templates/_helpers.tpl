{{- define "bpfrl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What all names begin with: the release's name, and the chart's unless that is in it. */}}
{{- define "bpfrl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "bpfrl.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "bpfrl.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* By these a component's pods are found; they never change. Takes a dict of root and component. */}}
{{- define "bpfrl.selector" -}}
app.kubernetes.io/name: {{ include "bpfrl.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "bpfrl.labels" -}}
{{ include "bpfrl.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: bpfrl
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "bpfrl.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote }}
{{- end -}}

{{/* Of a container that needs nothing of the machine. */}}
{{- define "bpfrl.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Of a pod that needs nothing of the machine. The number is nobody's, and the image's own. */}}
{{- define "bpfrl.unprivileged" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "bpfrl.probes" -}}
livenessProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
# The first start compiles Python: give it time before it counts as dead.
startupProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 60
{{- end -}}

{{/* What makes certificates, and may write just their Secrets. Takes a dict of root, name and annotations. */}}
{{- define "bpfrl.certs.access" -}}
{{- $root := .root -}}
{{- $metadata := printf "name: %s\nnamespace: %s\nlabels:\n%s" .name $root.Release.Namespace
    (include "bpfrl.labels" (dict "root" $root "component" "certs") | indent 2) -}}
{{- with .annotations -}}
{{- $metadata = printf "%s\nannotations:\n%s" $metadata (toYaml . | indent 2) -}}
{{- end -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- $metadata | nindent 2 }}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- $metadata | nindent 2 }}
rules:
  - apiGroups: [""]
    resources: [secrets]
    resourceNames: [bpfrl-ca, bpfrl-node, bpfrl-master, bpfrl-operator]
    verbs: [get, update]
  # What is to be created has no name yet by which it could be allowed.
  - apiGroups: [""]
    resources: [secrets]
    verbs: [create]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- $metadata | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ .name }}
    namespace: {{ $root.Release.Namespace }}
{{- end -}}

{{/* A Job's pod that makes certificates. Takes a dict of root and name, its ServiceAccount's. */}}
{{- define "bpfrl.certs.pod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "bpfrl.labels" (dict "root" $root "component" "certs") | nindent 4 }}
spec:
  serviceAccountName: {{ .name }}
  automountServiceAccountToken: true
  enableServiceLinks: false
  restartPolicy: OnFailure
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  nodeSelector:
    kubernetes.io/os: linux
  securityContext:
    {{- include "bpfrl.unprivileged" $root | nindent 4 }}
  containers:
    - name: certs
      image: {{ include "bpfrl.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - certs
        - apply
        - --namespace={{ $root.Release.Namespace }}
        - --days={{ int $root.Values.certificates.hook.days }}
      securityContext:
        {{- include "bpfrl.confined" $root | nindent 8 }}
      resources:
        requests: {cpu: 10m, memory: 64Mi}
        limits: {memory: 256Mi}
      volumeMounts:
        - name: scratch
          mountPath: /tmp
  volumes:
    # Keys are not for a disk.
    - name: scratch
      emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end -}}
