#!/usr/bin/env bash
# copy.sh: send code and files to the bucket, from where every worker takes them.
#
#   copy.sh                                     this working tree, with its configs; then setup.sh to put it in place
#   copy.sh prompts.jsonl Qwen2.5-1.5B-Instruct     and these: the workers see them in /mnt/grpo/files/
#
# The code goes as it lies here, uncommitted edits included, without what git ignores. A restart after a preemption uses
# what was copied, not what was edited since.

WORDS=yes
NEEDS=(NAME PROJECT BUCKET)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

for path in ${ARGS[@]+"${ARGS[@]}"}; do [[ -e $path ]] || fail "there is no $path"; done
archive=${TMPDIR:-/tmp}/grpo-$NAME.tgz
act "$SCRIPTS/pack.sh" "$archive"
act gcloud storage cp "$archive" "gs://$BUCKET/pods/$NAME/code.tgz" --project="$PROJECT"
for path in ${ARGS[@]+"${ARGS[@]}"}; do
  act gcloud storage cp --recursive "$path" "gs://$BUCKET/files/" --project="$PROJECT"
done
