#!/usr/bin/env bash
# delete.sh: give the pod back: billing for it ends. It says what goes and asks. The bucket stays, with every run in it.

NEEDS=(NAME PROJECT ZONE)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

confirm "This deletes, in project $PROJECT, zone $ZONE:" "  $(nodes | tr '\n' ' ')with the disks of the VMs$(
  [[ $CAPACITY == now ]] || printf ', and the request %s' "$NAME"
)" "It does not touch the bucket${BUCKET:+ gs://$BUCKET}."
if [[ $CAPACITY == now ]]; then
  act gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
else
  act gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
fi
[[ -z $DRY_RUN ]] || exit 0

for node in $(nodes); do
  [[ $(look gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value(state)') == NONE ]] ||
    fail "$node is still there, and costs" "gcloud compute tpus tpu-vm delete $node --project=$PROJECT --zone=$ZONE"
done
say "$NAME is gone and costs nothing any more. What is in the bucket costs a little: gcloud storage du gs://${BUCKET:-BUCKET} --summarize"
