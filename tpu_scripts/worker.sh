#!/usr/bin/env bash
# worker.sh: what the other scripts have done on every VM of a pod; nothing to call by hand.
#
#   setup POD BUCKET EXTRAS              the package, and the bucket at /mnt/grpo
#   start POD CONFIG [key=value ...]     the run, as the systemd unit `grpo`
#   stop, state, logs                    of that unit
#   install EXTRAS, train WORDS          the parts of those that a container needs, too (gke.yaml)
#   finish POD                           called by systemd when the run has ended, however it did

set -euo pipefail
CODE=$(cd "$(dirname "$0")/.." && pwd)
VENV=$HOME/grpo-venv
MOUNT=${GRPO_MOUNT:-/mnt/grpo}
STATUS=${GRPO_STATUS:-/run/grpo-status} # how the last run ended; a reboot forgets it, and then there was none

fail() {
  printf '%s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

setup() {
  local pod=$1 bucket=$2 extras=$3
  mount_bucket "$bucket"
  check_bucket "$pod" "$bucket"
  install "$extras"
  "$VENV/bin/grpo-jax" --help >/dev/null || fail "grpo-jax does not start"
  echo "$(hostname): ready"
}

install() { # the package, with nothing newer than the code: the same everywhere, and after every restart
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 "$VENV"
  uv pip install --quiet --python "$VENV" --exclude-newer "$(cat "$CODE/.packed-at")" --editable "${CODE}[$1]"
}

mount_bucket() { # no caches: what one worker writes, the others see at once
  command -v gcsfuse >/dev/null || install_gcsfuse
  if ! mountpoint --quiet "$MOUNT"; then
    sudo mkdir -p "$MOUNT"
    sudo systemctl reset-failed grpo-bucket 2>/dev/null || true
    sudo systemd-run --quiet --unit=grpo-bucket --property=After=network-online.target --property=Restart=on-failure \
      --property="ExecStopPost=-/usr/bin/umount --lazy $MOUNT" \
      gcsfuse --foreground -o allow_other --uid="$(id -u)" --gid="$(id -g)" --implicit-dirs \
      --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$MOUNT"
    for _ in {1..30}; do ! mountpoint --quiet "$MOUNT" || break; sleep 1; done
  fi
  [[ $(findmnt --noheadings --output SOURCE "$MOUNT") == "$1" ]] ||
    fail "gs://$1 is not at $MOUNT: $(sudo journalctl --unit=grpo-bucket --output=cat --lines=5 | tail -n 5)"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse # a new VM is still upgrading itself
}

check_bucket() { # a checkpoint becomes visible by renaming its directory: only some buckets can
  local probe
  probe=$MOUNT/pods/$1/probe-$(hostname)
  { mkdir -p "$probe/before" && touch "$probe/before/file"; } ||
    fail "gs://$2 cannot be written: the VMs' service account needs roles/storage.objectUser on it"
  mv "$probe/before" "$probe/after" ||
    fail "gs://$2 cannot rename directories: make a bucket with --enable-hierarchical-namespace (docs/pods.md)"
  rm -r "$probe"
}

start() {
  local pod=$1
  shift
  [[ $(state) != running ]] || fail "a run is going on already"
  mountpoint --quiet "$MOUNT" || fail "no bucket at $MOUNT: setup.sh first"
  sudo rm -f "$STATUS"
  sudo systemctl reset-failed grpo 2>/dev/null || true
  # Stopped before the bucket is; $$ because systemd reads $ in its command lines.
  sudo systemd-run --quiet --unit=grpo --uid="$(id -u)" --gid="$(id -g)" --setenv=HOME="$HOME" \
    --property=After=grpo-bucket.service --property=KillMode=mixed --property=TimeoutStopSec=600 \
    --property="EnvironmentFile=-$MOUNT/pods/$pod/environment" \
    --property="ExecStopPost=+/bin/bash $CODE/tpu_scripts/worker.sh finish $pod" \
    /bin/bash "$CODE/tpu_scripts/worker.sh" train "${@//\$/\$\$}"
  echo "$(hostname): started"
}

train() {
  export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$MOUNT/compiled}
  cd "$CODE"
  exec "$VENV/bin/grpo-jax" train "$@"
}

finish() { # systemd gives EXIT_STATUS and INVOCATION_ID
  echo "${EXIT_STATUS:-unknown}" >"$STATUS"
  mkdir -p "$MOUNT/pods/$1/logs"
  journalctl --output=short-iso "_SYSTEMD_INVOCATION_ID=$INVOCATION_ID" \
    >"$MOUNT/pods/$1/logs/$(date -u +%Y%m%dT%H%M%SZ)-$(hostname).log"
}

state() { # running, finished, "failed STATUS", or absent: nothing was started since the VM did
  case $(systemctl show grpo --property=ActiveState --value) in
    inactive | failed) ;;
    *) echo running && return ;;
  esac
  [[ -f $STATUS ]] || { echo absent && return; }
  case $(cat "$STATUS") in
    0) echo finished ;;
    *) echo "failed $(cat "$STATUS")" ;;
  esac
}

stop() {
  [[ $(state) != running ]] || sudo systemctl stop grpo
  echo "$(hostname): $(state)"
}

logs() {
  sudo journalctl --unit=grpo --output=cat --lines=40 | sed "s/^/$(hostname): /"
}

case ${1:-} in
  setup | install | start | train | finish | state | stop | logs) "$@" ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
