#!/usr/bin/env bash
# run.sh: start `grpo-jax train` on every worker, detached: a dropped connection or a closed laptop does not matter.
#
#   run.sh configs/gsm8k_qwen.yaml model.path=/mnt/grpo/files/Qwen2.5-1.5B-Instruct mesh.fsdp=16
#
# CONFIG is a path in the copied code, or one under /mnt/grpo. Results and checkpoints go to /mnt/grpo/runs/NAME OF THE
# RUN, that is the bucket, unless directory= says otherwise. The same command resumes from the newest checkpoint.
# It is the systemd unit `grpo`: stopped or preempted, it gets the time to save what it has.

WORDS=yes
NEEDS=(NAME PROJECT ZONE BUCKET)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

words=$(training)
on_workers act "bash ~/grpo/tpu_scripts/worker.sh start $NAME $words" ||
  fail "the run did not start on every worker" "what they said is above; stop.sh, then run.sh again; setup.sh if files are missing"
say "started: logs.sh follows it, status.sh says how it stands, stop.sh saves and stops it"
