#!/usr/bin/env bash
# setup.sh: make every worker ready: the code that copy.sh sent, Python and the package, the bucket at /mnt/grpo.
#
#   setup.sh                      a few minutes the first time, seconds after that
#   setup.sh --extras tpu,wandb   with other extras of the package
#
# Safe to repeat. A VM that was just made may refuse the first connections, so this tries three times.

NEEDS=(NAME PROJECT ZONE BUCKET)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

unpack="set -e; rm -rf ~/grpo.new; mkdir ~/grpo.new; gcloud storage cat gs://$BUCKET/pods/$NAME/code.tgz | tar -xzf - -C ~/grpo.new; \
rm -rf ~/grpo; mv ~/grpo.new ~/grpo; bash ~/grpo/tpu_scripts/worker.sh setup $NAME $BUCKET $EXTRAS"
if [[ -z $DRY_RUN && $(run_state 2>/dev/null) == running ]]; then
  fail "a run is going on, and its code must not change under it" "stop.sh first; it goes on with run.sh"
fi
for attempt in 1 2 3; do
  if on_workers act "$unpack"; then exit 0; fi
  state=$(pod_state) || state=unknown
  [[ $state != gone* && $state != none ]] ||
    fail "the pod went away during set-up: $state" "delete.sh and create.sh make a new one; watch.sh does it by itself"
  [[ $attempt == 3 ]] || say "set-up failed (attempt $attempt of 3); again in $EVERY s"
  sleep "$EVERY"
done
fail "set-up failed on a worker three times" "what it said is above; was copy.sh run before?"
