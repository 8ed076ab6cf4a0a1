#!/usr/bin/env bash
# Shared by the scripts beside it: the settings of a pod, --dry-run, errors that say what to do, and its workers.
set -euo pipefail

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SETTINGS=(NAME PROJECT ZONE TYPE BUCKET SLICES CAPACITY RUNTIME EXTRAS EVERY LOOKS)
NAME='' PROJECT='' ZONE='' TYPE='' BUCKET='' SLICES='' CAPACITY='' RUNTIME='' EXTRAS='' EVERY='' LOOKS=''
DRY_RUN='' YES='' POD_FILE=''
ARGS=()
MOUNT=/mnt/grpo # where every worker sees the bucket

settings_help() {
  cat <<'END'
settings: --name VALUE, or NAME=VALUE in a file (--pod FILE; without it ./pod.env, if there is one)
  name        of the pod; its slices are called name-0, name-1, ... when there are several
  project, zone
  type        as in `grpo-jax plan` (v5e:4x4, v6e:4x4, v5p:4x4x4), or an accelerator type (v5litepod-16, v4-32)
  bucket      for code, results, checkpoints and logs; hierarchical namespace (docs/pods.md)
  slices      of that type, joined by the data-center network (1)
  capacity    queued: on demand, when its turn comes; spot: cheaper, may be taken away; reserved;
              now: on demand, at once or not at all, one slice only (queued)
  runtime     image of the VMs (that of the type)
  extras      of the package to install (tpu,math,datasets)
  every       seconds between looks at the pod (60)
  looks       how often to look at a request that waits before giving up (1440, which is a day)
and
  --dry-run   print the commands, in order, ready to paste, and run none
  --yes       do not ask before something is deleted
END
}

say() { printf '%s\n' "$*" >&2; }

fail() { # the error, then what to do about it, a line each
  say "${0##*/}: $1"
  shift
  [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
  exit 1
}

usage() { # the comment at the top of the script that was called
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  echo
  settings_help
}

begin() { # read the arguments and the settings; what is left over goes to ARGS
  local key
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage && exit ;;
      --dry-run) DRY_RUN=yes ;;
      --yes) YES=yes ;;
      --pod=*) POD_FILE=${1#*=} ;;
      --pod) POD_FILE=${2:?--pod needs a file} && shift ;;
      --*)
        key=${1%%=*} && key=${key#--}
        if is_in "$key" ${SWITCHES[@]+"${SWITCHES[@]}"}; then
          assign "$key" yes
        elif [[ $1 == *=* ]]; then
          assign "$key" "${1#*=}"
        else
          [[ $# -gt 1 ]] || fail "--$key needs a value"
          assign "$key" "$2" && shift
        fi
        ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
  [[ -n ${WORDS:-} || ${#ARGS[@]} == 0 ]] ||
    fail "'${ARGS[0]}' says nothing to ${0##*/}" "only settings do, such as --name; --help has them all"
  read_pod_file
  check_settings
}

is_in() { # whether the first word is among the others
  local word=$1 other
  shift
  for other in "$@"; do [[ $word != "$other" ]] || return 0; done
  return 1
}

assign() { # a setting, or an option or switch of the script, by its name on the command line
  local key
  key=$(printf '%s' "$1" | tr 'a-z-' 'A-Z_')
  is_in "$key" "${SETTINGS[@]}" || is_in "$1" ${SWITCHES[@]+"${SWITCHES[@]}"} ${OPTIONS[@]+"${OPTIONS[@]}"} ||
    fail "there is no option --$1" "${0##*/} --help has them all"
  printf -v "$key" '%s' "$2"
}

read_pod_file() { # fills the settings that the command line left empty
  local line key value
  [[ -n $POD_FILE || ! -f pod.env ]] || POD_FILE=pod.env
  [[ -n $POD_FILE ]] || return 0
  [[ -r $POD_FILE ]] || fail "there is no file $POD_FILE"
  while IFS= read -r line || [[ -n $line ]]; do
    [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
    [[ $line =~ ^[[:space:]]*([A-Z]+)=(.*)$ ]] || fail "$POD_FILE: '$line' is not NAME=VALUE"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
    [[ ! $value =~ ^(\"(.*)\"|\'(.*)\')$ ]] || value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    is_in "$key" "${SETTINGS[@]}" || fail "$POD_FILE: there is no setting $key" "there are: ${SETTINGS[*]}"
    [[ -n ${!key} ]] || printf -v "$key" '%s' "$value"
  done <"$POD_FILE"
}

check_settings() {
  : "${SLICES:=1}" "${CAPACITY:=queued}" "${EXTRAS:=tpu,math,datasets}" "${EVERY:=60}" "${LOOKS:=1440}"
  local key
  for key in ${NEEDS[@]+"${NEEDS[@]}"}; do
    [[ -n ${!key} ]] || fail "no $(lower "$key") given" "--$(lower "$key") VALUE, or a line $key=VALUE in pod.env"
  done
  [[ -z $NAME || $NAME =~ ^[a-z]([-a-z0-9]{0,39}[a-z0-9])?$ ]] ||
    fail "'$NAME' cannot be the name of a pod" "up to 41 lower-case letters, digits and hyphens, a letter first"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "slices is a whole number from 1 on, got '$SLICES'"
  [[ $EVERY =~ ^[0-9]+$ && $LOOKS =~ ^[0-9]+$ ]] || fail "every and looks are whole numbers, got '$EVERY' and '$LOOKS'"
  is_in "$CAPACITY" queued spot reserved now || fail "capacity is queued, spot, reserved or now; got '$CAPACITY'"
  [[ $CAPACITY != now || $SLICES == 1 ]] || fail "capacity=now is for one slice; $SLICES need a request in the queue"
  BUCKET=${BUCKET#gs://} && BUCKET=${BUCKET%/}
  [[ $BUCKET =~ ^[-a-z0-9._]*$ ]] || fail "'$BUCKET' is not the name of a bucket (a whole one, not a folder of it)"
  [[ $EXTRAS =~ ^[a-z,]+$ ]] || fail "extras are names with commas between them, such as tpu,wandb; got '$EXTRAS'"
  WHERE=(--project="$PROJECT" --zone="$ZONE")
}

lower() { printf '%s' "$1" | tr 'A-Z_' 'a-z-'; }

quoted() { # the words as a shell reads them back
  local word line='' end="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$end}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

act() { # run a command, or print it under --dry-run; what fails is followed by what to do about it
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
    return
  fi
  local errors status=0
  command -v "$1" >/dev/null || fail "$1 is not installed" "$(where_from "$1")"
  errors=$(mktemp)
  say "+ $(quoted "$@")"
  { "$@" 2>&1 >&3 | tee "$errors" >&2; } 3>&1 || status=$?
  [[ $status == 0 ]] || advise "$(cat "$errors")"
  rm -f "$errors"
  return "$status"
}

look() { # what a command prints, NONE where the pod is not there; changes nothing
  local errors text status=0
  command -v "$1" >/dev/null || fail "$1 is not installed" "$(where_from "$1")"
  errors=$(mktemp)
  text=$("$@" 2>"$errors") || status=$?
  if [[ $status != 0 ]] && grep -qE 'NOT_FOUND.*/(queuedResources|nodes)/' "$errors"; then
    text=NONE status=0
  elif [[ $status != 0 ]]; then
    cat "$errors" >&2
    advise "$(cat "$errors")"
  fi
  rm -f "$errors"
  [[ -z $text ]] || printf '%s\n' "$text"
  return "$status"
}

where_from() {
  case $1 in
    gcloud) echo "https://cloud.google.com/sdk/docs/install, then: gcloud auth login" ;;
    kubectl) echo "gcloud components install kubectl, then: gcloud container clusters get-credentials CLUSTER" ;;
    *) echo "install $1 and try again" ;;
  esac
}

advise() { # what to do about an error of gcloud, from its text
  case $1 in
    *"no more capacity"* | *nsufficient*capacity* | *stockout*)
      hint "the zone has none left right now: --capacity queued or spot waits for its turn; or another zone" ;;
    *[Qq]uota*xceed* | *xceed*[Qq]uota* | *RESOURCE_EXHAUSTED*)
      hint "the project's quota for this type of TPU in this zone (spot has one of its own) is too small: ask for more at" \
        "https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API), or take a smaller type" ;;
    *ALREADY_EXISTS* | *"already exists"*)
      hint "the name is taken: status.sh shows by what; use it, delete it with delete.sh, or choose another name" ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      hint "gcloud services enable tpu.googleapis.com --project=$PROJECT" ;;
    *"active account"* | *"auth login"* | *UNAUTHENTICATED* | *Reauthentication*)
      hint "gcloud auth login" ;;
    *PERMISSION_DENIED* | *"does not have permission"* | *" 403"[:\ ]*)
      hint "your account needs roles/tpu.admin in $PROJECT and roles/storage.objectUser on gs://$BUCKET;" \
        "is the project's name right?" ;;
    *"SSH agent"* | *ssh-add*)
      hint "several workers at once need the key in the agent: eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine" ;;
    *"timed out"* | *"Connection refused"* | *"Connection closed"* | *"return code"*255*)
      hint "the VMs were not reached: just made (a minute later they are), port 22 closed in the firewall, or gone (status.sh)" ;;
    *"no matches for kind"*JobSet*)
      hint "the JobSet controller is not installed in this cluster: docs/pods.md says how" ;;
    *NOT_FOUND*)
      hint "there is no such thing: is it made with --capacity now, or is the name, zone or project another?" ;;
    *INVALID_ARGUMENT* | *"is not supported"*)
      hint "which types there are in the zone: gcloud compute tpus accelerator-types list --zone=$ZONE --project=$PROJECT" ;;
  esac
}

hint() { printf '  -> %s\n' "$@" >&2; }

confirm() { # say what is about to happen and ask; --yes and --dry-run go on without
  printf '%s\n' "$@" >&2
  [[ -z $YES$DRY_RUN ]] || return 0
  local answer=''
  printf 'Go on? [y/N] ' >&2
  read -r answer || say ''
  is_in "$answer" y Y yes || fail "not confirmed: nothing was done" "--yes answers in advance"
}

accelerator() { # the type as gcloud wants it: v5e:4x4 is v5litepod-16
  local kind=${TYPE%%:*} shape=${TYPE#*:} chips
  [[ $TYPE == *:* ]] || { echo "$TYPE" && return; }
  [[ $shape =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "type $TYPE is not of the form v5e:4x4"
  chips=$((${shape//x/*}))
  case $kind in
    v5e) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
    v4 | v5p) echo "$kind-$((2 * chips))" ;; # Google counts cores there, two to a chip
    *) fail "$kind is not rented as VMs" "v4, v5e, v5p and v6e are; newer ones through GKE: gke.sh" ;;
  esac
}

runtime() { # the image of the VMs: the one that was set, or that of an accelerator type
  [[ -z $RUNTIME ]] || { echo "$RUNTIME" && return; }
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "type $TYPE is not known here" "v5e:4x4, v5litepod-16, v5p-64, v6e-16, v4-32, ...; or say its --runtime, too" ;;
  esac
}

nodes() { # the slices, as gcloud calls them
  local i
  [[ $SLICES != 1 ]] || { echo "$NAME" && return; }
  for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
}

pod_state() { # ready, none, "waiting WHY" or "gone WHY", from the request and every slice of it
  local request=ACTIVE node state worst=ready
  [[ $CAPACITY == now ]] || request=$(look gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    '--format=value(state.state)') || return 1
  case $request in
    ACTIVE) ;;
    NONE) echo none && return ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) echo "gone $request" && return ;;
    *) echo "waiting $request" && return ;;
  esac
  for node in $(nodes); do
    state=$(look gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value(state)') || return 1
    case $state in
      READY) ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) worst="waiting $node $state" ;;
      NONE) [[ $CAPACITY == now ]] && echo none || echo "gone $node" && return ;;
      *) echo "gone $node $state" && return ;;
    esac
  done
  echo "$worst"
}

on_workers() { # HOW COMMAND: on every worker of every slice at once, through act or look; fails if it fails on one
  local node pid failed=0 pids=()
  for node in $(nodes); do
    "$1" gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker=all --quiet \
      --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30 --command="$2" &
    pids+=("$!")
    [[ -z $DRY_RUN ]] || wait "$!" # in order
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

run_state() { # running, finished, absent, partial, unreachable or "failed STATUS", over all workers
  local states
  states=$(on_workers look 'bash ~/grpo/tpu_scripts/worker.sh state 2>/dev/null || echo absent') ||
    { echo unreachable && return; }
  states=$(grep -E '^(running|finished|absent|failed .*)$' <<<"$states" | sort -u) || { echo unreachable && return; }
  case $states in
    *failed*) grep -m 1 failed <<<"$states" ;;
    $'finished\nrunning') echo running ;;
    *$'\n'*) echo partial ;;
    *) echo "$states" ;;
  esac
}

training() { # the words after `grpo-jax train`: CONFIG, its overrides, and a directory that outlives the VMs
  local word given=''
  [[ ${#ARGS[@]} -gt 0 ]] || fail "which configuration?" "${0##*/} CONFIG [key.path=value ...]"
  for word in "${ARGS[@]}"; do [[ $word != directory=* ]] || given=yes; done
  [[ -n $given ]] || ARGS+=("directory=$MOUNT/runs/{name}")
  quoted "${ARGS[@]}"
}

verb() { # another script, for the same pod
  local script=$1 key
  shift
  bash "$SCRIPTS/$script.sh" ${DRY_RUN:+--dry-run} --pod <(
    for key in "${SETTINGS[@]}"; do printf '%s="%s"\n' "$key" "${!key}"; done
  ) "$@"
}
