#!/usr/bin/env bash
# watch.sh CONFIG [key.path=value ...]: see a run through: make the pod, set it up, train, and after a preemption or a
# failure do it again, from the newest checkpoint, until the run has finished.
#
#   copy.sh && watch.sh configs/gsm8k_qwen.yaml mesh.fsdp=16
#   watch.sh --yes --then-delete configs/gsm8k_qwen.yaml     and give the pod back at the end; asks nothing
#
# It may begin at any point (no pod yet, a pod at work) and be ended and begun again: all it knows, it asks the cloud.
# Run it where it stays up: tmux on a small VM, Cloud Shell, a laptop that does not sleep. Without it the run goes on,
# but nobody restarts it.
#
#   --restarts N     things that may go wrong in a row before it gives up (10); 15 looks at a run at work forgive all
#   --then-delete    give the pod back when the run has finished
#
# Exit status: 0 the run has finished; 1 given up, the pod left as it is; 143 somebody stopped the run.

SWITCHES=(then-delete)
WORDS=yes
OPTIONS=(restarts)
NEEDS=(NAME PROJECT ZONE TYPE BUCKET)
THEN_DELETE='' RESTARTS=''
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
begin "$@"

training >/dev/null # a mistake in the words shows now
: "${RESTARTS:=10}"
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "restarts is a whole number, got '$RESTARTS'"
confirm "While this watches, it rents, and whenever the VMs are taken away deletes and rents anew:" \
  "  $(nodes | tr '\n' ' ')($TYPE, $CAPACITY) in project $PROJECT, zone $ZONE" \
  "${THEN_DELETE:+It deletes them when the run has finished. }What is in gs://$BUCKET stays."

wrong=0 calm=0 waited=0 seen='' stopped=''

note() { say "$(date '+%m-%d %H:%M') $*"; }

trouble() { # count it, and wait the longer the more there was of it
  calm=0 wrong=$((wrong + 1))
  [[ $wrong -le $RESTARTS ]] || fail "$1; that was number $wrong in a row, giving up" \
    "the pod, if there is one, is as it was and costs: status.sh, logs.sh --all, delete.sh" \
    "nothing is lost: checkpoints and logs are in gs://$BUCKET; watch.sh goes on from the newest"
  local pause=$((EVERY << (wrong < 5 ? wrong - 1 : 4)))
  note "$1 ($wrong of at most $RESTARTS in a row); going on in $pause s"
  sleep "$pause"
}

renew() { # what is dead goes, and is asked for again
  trouble "$NAME is gone: ${1#gone }"
  verb delete --yes || return 0
  seen=''
}

launch() {
  { verb setup && verb run "${ARGS[@]}"; } || trouble "it did not start"
}

patience() {
  waited=$((waited + 1))
  [[ $waited -lt $LOOKS ]] || fail "$NAME is still ${1}" "the request stays in the queue, and costs once it is granted: delete.sh"
  [[ $((waited % 10)) != 1 ]] || note "$NAME: $1"
}

finished() {
  note "the run has finished: fetch.sh brings the results"
  [[ -z $THEN_DELETE ]] || verb delete --yes
  [[ -n $THEN_DELETE ]] || note "$NAME is still there, and costs: delete.sh"
  exit 0
}

mend() { # a worker failed, or only some run: stop the others, start all
  note "the last lines of every worker:"
  verb logs --all || true
  trouble "the run $1"
  { verb stop && verb run "${ARGS[@]}"; } || true # if not, the next look says why
}

look_at_run() {
  local run
  run=$(run_state)
  case $run in
    running)
      calm=$((calm + 1)) stopped=''
      [[ $calm -lt 15 ]] || wrong=0
      ;;
    finished) finished ;;
    absent) launch ;;
    unreachable) trouble "the workers did not answer" ;;
    "failed 143" | partial) # a preemption begins so, and so does an end: look twice
      [[ $stopped == "$run" && $run == failed* ]] && note "somebody stopped the run; run.sh or watch.sh goes on" && exit 143
      [[ $stopped != "$run" ]] || mend "is on some workers only"
      stopped=$run
      ;;
    *) mend "${run/failed/ended with status}" ;;
  esac
}

if [[ -n $DRY_RUN ]]; then
  echo "# at first, and after every preemption" && verb create --no-wait && verb setup && verb run "${ARGS[@]}"
  echo "# after a failure" && verb logs --all && verb stop && verb run "${ARGS[@]}"
  echo "# after a preemption, before it is asked for again${THEN_DELETE:+; and at the end}" && verb delete
  exit
fi

while :; do
  state=$(pod_state) || state=unknown
  case $state in
    ready) seen=yes waited=0 && look_at_run ;;
    waiting*) seen=yes && patience "${state#waiting }" ;;
    gone*) renew "$state" ;;
    unknown) trouble "gcloud did not answer" ;;
    none)
      [[ -z $seen ]] || fail "somebody deleted $NAME" "watch.sh again makes it anew"
      verb create --no-wait || trouble "$NAME could not be asked for"
      ;;
  esac
  sleep "$EVERY"
done
