"""A cloud for tests: programs on PATH that write down how they were called and answer as a test told them to."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
POD = """\
NAME=pod
PROJECT=my-project   # comments and quotes are read
ZONE='us-west4-a'
TYPE=v5e:4x4
BUCKET="gs://my-bucket/"
CAPACITY=spot
"""
QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
)
TAKEN = "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource 'pod' already exists"
LOGGED_OUT = "ERROR: (gcloud.storage.cp) You do not currently have an active account selected."
SSH_TIMEOUT = (
    "ssh: connect to host 10.0.0.2 port 22: Connection timed out\nERROR: [/usr/bin/ssh] exited with return code [255]."
)
CAPACITY = 'ERROR: There is no more capacity in the zone "us-west4-a"; you can try in another zone'
NO_REQUEST = "ERROR: NOT_FOUND: Resource 'projects/my-project/locations/us-west4-a/queuedResources/pod' was not found"
NO_NODE = "ERROR: NOT_FOUND: Resource 'projects/my-project/locations/us-west4-a/nodes/pod' was not found"
PROGRAMS = ("gcloud", "kubectl", "srun", "scontrol", "sleep")

# A reply is a file: a pattern, how often it is still given (below 0: always), exit status, output, then the errors.
# Workers are directories: with some there, ssh runs its command in each, and gs:// is a directory, too.
PROGRAM = r"""#!/usr/bin/env bash
cd "$FAKE_CLOUD" || exit 99
record=${0##*/}
for word in "$@"; do printf -v record '%s %q' "$record" "$word"; done
printf '%s\n' "$record" >>calls
exec 9>lock && flock 9 # several workers may ask at once
for reply in replies/*; do
  [[ -f $reply ]] || continue
  { read -r pattern; read -r left; read -r status; IFS= read -r out; IFS= read -r err; } <"$reply"
  [[ "${0##*/} $*" == $pattern && $left != 0 ]] || continue
  printf '%s\n' "$pattern" $((left - 1)) "$status" "$out" "$err" >"$reply"
  [[ -z $err ]] || printf '%b\n' "$err" >&2
  [[ -z $out ]] || printf '%b\n' "$out"
  exit "$status"
done
exec 9>&-
[[ "${0##*/} $*" == "kubectl apply"* ]] && exec cat >manifest
case "$*" in
  *"tpu-vm ssh"*--command=*)
    for word in "$@"; do [[ $word != --command=* ]] || command=${word#*=}; done
    for worker in workers/*; do
      [[ ! -d $worker ]] || HOME=$PWD/$worker GRPO_STATUS=$PWD/$worker/status bash -c "$command" || exit
    done ;;
  "storage cp "*) mkdir -p "bucket/$(dirname "${4#gs://*/}")"; [[ $3 == --* ]] || cp "$3" "bucket/${4#gs://*/}" ;;
  "storage cat "*) exec cat "bucket/${3#gs://*/}" ;;
esac
exit 0
"""


class Cloud:
    """PATH with fakes of gcloud, kubectl and what else is asked for, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.replies = directory, 0
        (directory / "bin").mkdir(parents=True)
        (directory / "replies").mkdir()
        (directory / "here").mkdir()
        (directory / "here" / "pod.env").write_text(POD)
        for program in PROGRAMS:
            self.program(program, PROGRAM)

    def program(self, name: str, text: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def reply(self, pattern: str, out: str = "", *, times: int = -1, status: int = 0, error: str = "") -> None:
        """What calls that match the pattern get, from the first reply that is not used up."""
        self.replies += 1
        text = "\n".join([pattern, str(times), str(status), out, error.replace("\n", r"\n"), ""])
        (self.directory / "replies" / f"{self.replies:03}").write_text(text)

    def request(self, *states: str) -> None:
        """The states of the queued resource, look by look; the last one stays. Empty: there is none."""
        self._sequence("gcloud compute tpus queued-resources describe*", states, NO_REQUEST)

    def node(self, *states: str) -> None:
        """The states of every slice, look by look."""
        self._sequence("gcloud compute tpus tpu-vm describe*", states, NO_NODE)

    def run_states(self, *states: str) -> None:
        """What the workers say of the run, look by look; "" is an ssh that times out."""
        self._sequence("gcloud*tpu-vm ssh*worker.sh state*", states, SSH_TIMEOUT)

    def _sequence(self, pattern: str, states: Sequence[str], missing: str) -> None:
        for i, state in enumerate(states):
            times = -1 if i == len(states) - 1 else 1
            self.reply(pattern, state, times=times, status=0 if state else 1, error="" if state else missing)

    def run(self, script: str, *words: str, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return self.bash([str(SCRIPTS / script), *words], answer=answer, **environment)

    def bash(self, words: Sequence[str], *, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.directory / 'bin'}:/usr/bin:/bin"
        variables = {"PATH": path, "FAKE_CLOUD": str(self.directory), "HOME": str(self.directory)}
        return subprocess.run(
            ["bash", *words],
            cwd=self.directory / "here",
            env=variables | {"TMPDIR": str(self.directory), "LANG": "C.UTF-8"} | environment,
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *, looks: bool = False, forget: bool = False) -> list[list[str]]:
        """Every call so far as words; without `looks`, those that change something."""
        path = self.directory / "calls"
        found = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
        if forget:
            path.unlink(missing_ok=True)
        return found if looks else [words for words in found if not is_look(words)]

    def verbs(self) -> list[str]:
        """The calls that change something, a word or two each: "create", "delete", "setup", "start", ..."""
        return [verb(words) for words in self.calls()]


def is_look(words: Sequence[str]) -> bool:
    return words[0] == "sleep" or "describe" in words or any("worker.sh state" in word for word in words)


def verb(words: Sequence[str]) -> str:
    commands = [word for word in words if word.startswith("--command=")]
    if commands:
        return commands[0].split("worker.sh ")[-1].split()[0]
    return next(word for word in words if word in ("create", "delete", "cp", "rsync", "apply", "describe"))


def printed(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The commands that a dry run printed."""
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]
