#!/usr/bin/env bash
# status.sh: how the pod and its run stand, in two lines.

NEEDS=(NAME PROJECT ZONE)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

if [[ -n $DRY_RUN ]]; then
  [[ $CAPACITY == now ]] || quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}"
  for node in $(nodes); do quoted gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}"; done
  on_workers act 'bash ~/grpo/tpu_scripts/worker.sh state'
  exit
fi
state=$(pod_state)
echo "pod: $state"
[[ $state != ready ]] || echo "run: $(run_state)"
