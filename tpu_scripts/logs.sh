#!/usr/bin/env bash
# logs.sh: follow what the run says.
#
#   logs.sh            the first worker of the first slice, live (Ctrl-C stops looking, not the run)
#   logs.sh --all      the last lines of every worker, where an error may be that the first one does not see
#
# What runs of this pod said before, preempted ones too where there was time: fetch.sh pods/NAME/logs

SWITCHES=(all)
NEEDS=(NAME PROJECT ZONE)
ALL=''
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

if [[ -n $ALL ]]; then
  on_workers act 'bash ~/grpo/tpu_scripts/worker.sh logs'
else
  first=$(nodes | head -n 1)
  act gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" --worker=0 --quiet --ssh-flag=-oServerAliveInterval=30 \
    --command='sudo journalctl --unit=grpo --output=cat --lines=200 --follow'
fi
