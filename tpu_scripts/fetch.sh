#!/usr/bin/env bash
# fetch.sh PATH [DIRECTORY]: bring results home from the bucket; the pod need not exist any more.
#
#   fetch.sh runs/gsm8k-qwen                  metrics, report, samples, TensorBoard files -> ./runs/gsm8k-qwen
#   fetch.sh runs/gsm8k-qwen --checkpoints    and the checkpoints, which are large (for eval, sample, export)
#   fetch.sh pods/NAME/logs                   what the workers said

SWITCHES=(checkpoints)
WORDS=yes
NEEDS=(PROJECT BUCKET)
CHECKPOINTS=''
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

[[ ${#ARGS[@]} == 1 || ${#ARGS[@]} == 2 ]] ||
  fail "which path of the bucket?" "fetch.sh runs/NAME; there are: gcloud storage ls gs://$BUCKET/runs/"
path=${ARGS[0]#/mnt/grpo/} && path=${path%/}
to=${ARGS[1]:-$path}
without=('--exclude=(^|.*/)checkpoints/.*')
[[ -z $CHECKPOINTS ]] || without=()
act mkdir -p "$to"
act gcloud storage rsync --recursive "gs://$BUCKET/$path" "$to" ${without[@]+"${without[@]}"} --project="$PROJECT"
