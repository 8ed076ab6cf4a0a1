#!/usr/bin/env bash
# create.sh: rent a pod: one VM, a slice of many, or several slices. Billing starts when it is granted.
#
#   create.sh --name pod --project my-project --zone us-west4-a --type v5e:4x4 --bucket my-bucket --capacity spot
#   create.sh                 with all of that in ./pod.env
#   create.sh --no-wait       only ask; the request waits in Google's queue
#
# Whatever the capacity (except now), this is a queued resource: Google's way to ask once and wait one's turn. When it
# is there: copy.sh, setup.sh, run.sh; or let watch.sh do all of it, and again after every preemption.

SWITCHES=(no-wait)
NEEDS=(NAME PROJECT ZONE TYPE BUCKET)
NO_WAIT=''
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

type=$(accelerator)
image=$(runtime "$type")
if [[ $CAPACITY == now ]]; then
  act gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" --accelerator-type="$type" --version="$image" --quiet
else
  tier=() slices=(--node-id="$NAME")
  [[ $CAPACITY == queued ]] || tier=("--$CAPACITY")
  [[ $SLICES == 1 ]] || slices=(--node-count="$SLICES" --node-prefix="$NAME")
  act gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --accelerator-type="$type" \
    --runtime-version="$image" "${slices[@]}" ${tier[@]+"${tier[@]}"} --quiet
fi
[[ -z $NO_WAIT && -z $DRY_RUN ]] || exit 0

for ((looked = 0, before = 0; looked < LOOKS; looked++)); do
  state=$(pod_state) || state="waiting (no answer from gcloud)"
  case $state in
    ready) say "$NAME is ready, and costs from now on: copy.sh, setup.sh, run.sh; delete.sh when done" && exit ;;
    none | gone*)
      fail "$NAME was not granted: ${state#gone }" \
        "why: gcloud compute tpus queued-resources describe $NAME --project=$PROJECT --zone=$ZONE" \
        "then take it out of the queue (delete.sh) and try another zone, type or capacity" ;;
  esac
  [[ $state == "$before" ]] || say "$(date +%H:%M) $NAME: ${state#waiting } (looking every $EVERY s)"
  before=$state
  sleep "$EVERY"
done
fail "$NAME is still not there after $LOOKS looks" \
  "the request stays in the queue, and costs once it is granted: delete.sh takes it out, watch.sh goes on waiting"
