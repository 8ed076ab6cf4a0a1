#!/usr/bin/env bash
# stop.sh: end the run after the step in hand, with a checkpoint; the pod stays, and costs. run.sh goes on from there.

NEEDS=(NAME PROJECT ZONE)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

on_workers act 'bash ~/grpo/tpu_scripts/worker.sh stop'
