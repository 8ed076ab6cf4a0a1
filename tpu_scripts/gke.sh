#!/usr/bin/env bash
# gke.sh CONFIG [key.path=value ...]: the same run on GKE, as a JobSet (gke.yaml), in the cluster that kubectl talks to.
#
#   copy.sh && gke.sh --name mine --bucket my-bucket --type v6e:4x4 --slices 2 configs/gsm8k_qwen.yaml mesh.fsdp=16
#   kubectl get jobset mine                                        how it stands
#   kubectl logs --follow job/mine-slice-0                         what it says
#   kubectl delete jobset mine                                     ends it; the node pool costs while it is there
#
# Kubernetes does here what watch.sh does for VMs. type is the shape (v6e:4x4); capacity spot asks for spot nodes.
#
#   --image IMAGE        with bash, tar and uv (ghcr.io/astral-sh/uv:python3.12-bookworm)
#   --account ACCOUNT    Kubernetes service account that may use the bucket (default)

OPTIONS=(image account)
WORDS=yes
NEEDS=(NAME TYPE BUCKET)
IMAGE='' ACCOUNT=''
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

words=$(training) && eval "ARGS=($words)"
: "${IMAGE:=ghcr.io/astral-sh/uv:python3.12-bookworm}" "${ACCOUNT:=default}"
[[ $TYPE =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || fail "GKE wants the shape: a type such as v5e:4x4, not '$TYPE'"
kind=${TYPE%%:*} topology=${TYPE#*:}
chips=$((${topology//x/*})) per_host=4
case $kind in
  v4) label=tpu-v4-podslice ;;
  v5e) label=tpu-v5-lite-podslice ;;
  v5p) label=tpu-v5p-slice ;;
  v6e) label=tpu-v6e-slice ;;
  tpu7x) label=tpu7x ;;
  *) fail "type $kind is not known here" "v4, v5e, v5p, v6e and tpu7x are" ;;
esac
[[ $chips -ge 4 && ! ($topology == 2x4 && $kind == v[56]e) ]] || per_host=$chips # one host holds them all

json() { # the words as a JSON list of strings, which is YAML, too
  local word list=''
  for word in "$@"; do
    word=${word//\\/\\\\} && word=${word//\"/\\\"} && word=${word//$'\n'/\\n} && word=${word//$'\t'/\\t}
    list+=", \"$word\""
  done
  printf '[%s]' "${list#, }"
}

manifest=$(cat "$SCRIPTS/gke.yaml")
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$NAME"
fill SLICES "$SLICES"
fill HOSTS "$((chips / per_host))"
fill CHIPS "$per_host"
fill ACCOUNT "$ACCOUNT"
fill ACCELERATOR "$label"
fill TOPOLOGY "$topology"
fill IMAGE "$IMAGE"
fill EXTRAS "$EXTRAS"
fill BUCKET "$BUCKET"
if [[ $CAPACITY == spot ]]; then fill SPOT 'cloud.google.com/gke-spot: "true"'; else fill SPOT ''; fi
fill ARGS "$(json "${ARGS[@]}")"

if [[ -n $DRY_RUN ]]; then
  printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$manifest"
  exit
fi
act kubectl apply --filename=- <<<"$manifest"
say "kubectl get jobset $NAME says how it stands; kubectl delete jobset $NAME ends it"
