"""From the laptop to the command on every worker: the scripts end to end, with workers that are directories."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_cloud import SCRIPTS, Cloud, printed

SYSTEMCTL = """#!/usr/bin/env bash
case "$*" in "show grpo "*) cat "$FAKE_CLOUD/active" 2>/dev/null || echo inactive ;; esac
"""
# Runs what systemd would run, at once: the command, and after it ExecStopPost.
SYSTEMD_RUN = r"""#!/usr/bin/env bash
declare -a after words
while [[ $1 == --* ]]; do
  case $1 in
    --unit=grpo-bucket) touch "$HOME/mounted" ;;
    --setenv=*) export "${1#--setenv=}" ;;
    --property=ExecStopPost=+*) read -ra after <<<"${1#--property=ExecStopPost=+}" ;;
    --property=EnvironmentFile=-*)
      file=${1#--property=EnvironmentFile=-}
      [[ ! -f $file ]] || { set -a; . "$file"; set +a; } ;;
  esac
  shift
done
echo "$*" >>"$HOME/units"
[[ $1 != gcsfuse ]] || exit 0
for word in "$@"; do # systemd reads $$ as $, and takes $ for a variable
  word=${word//\$\$/$'\1'} && word=${word//\$/variable }
  words+=("${word//$'\1'/\$}")
done
"${words[@]}"
EXIT_STATUS=$? INVOCATION_ID=abc "${after[@]}"
"""
UV = r"""#!/usr/bin/env bash
echo "$*" >>"$HOME/uv"
[[ $1 == venv ]] || exit 0
mkdir -p "${@: -1}/bin"
cat >"${@: -1}/bin/grpo-jax" <<'END'
#!/usr/bin/env python3
import json, os, sys
if sys.argv[1:] == ["--help"]:
    sys.exit()
seen = {"words": sys.argv[1:], "here": os.getcwd(), "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}
seen |= {"token": os.environ.get("HF_TOKEN"), "ended": os.path.exists(os.environ["GRPO_STATUS"])}
open(os.environ["HOME"] + "/trained", "a").write(json.dumps(seen) + "\n")
sys.exit(int(os.environ.get("TRAIN_STATUS", 0)))
END
chmod +x "${@: -1}/bin/grpo-jax"
"""
ECHO = '#!/usr/bin/env bash\necho "$@"\n'


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    """A pod of two workers, their bucket, and a repository with the scripts and little else."""
    cloud = Cloud(tmp_path / "cloud")
    for name in ("0", "1"):
        (cloud.directory / "workers" / name).mkdir(parents=True)
    (cloud.directory / "bucket").mkdir()
    programs = {"systemctl": SYSTEMCTL, "systemd-run": SYSTEMD_RUN, "uv": UV, "journalctl": ECHO, "gcsfuse": ECHO}
    programs |= {
        "sudo": '#!/usr/bin/env bash\nexec "$@"\n',
        "mountpoint": "#!/usr/bin/env bash\n[[ -f $HOME/mounted ]]\n",
        "findmnt": "#!/usr/bin/env bash\n[[ -f $HOME/mounted ]] && echo my-bucket\n",
    }
    for name, text in programs.items():
        cloud.program(name, text)
    repository(tmp_path / "repo")
    return cloud


def repository(path: Path) -> None:
    shutil.copytree(SCRIPTS, path / "tpu_scripts")
    (path / ".gitignore").write_text("secret.env\n.venv/\n")
    (path / "secret.env").write_text("TOKEN=1\n")
    (path / "gone.py").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=path, check=True)
    (path / "gone.py").unlink()
    (path / "configs").mkdir()
    (path / "configs" / "my run.yaml").write_text("name: mine\n")


def scripts(cloud: Cloud) -> Path:
    return cloud.directory.parent / "repo" / "tpu_scripts"


def run(cloud: Cloud, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = scripts(cloud) / script
    return cloud.bash([str(script), *words], GRPO_MOUNT=str(cloud.directory / "bucket"), **environment)


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_dry_run_of_copying(cloud):
    (cloud.directory / "here" / "a file").touch()
    expected = printed(run(cloud, "copy.sh", "--dry-run", "a file"))
    assert cloud.calls(looks=True) == [] and not (cloud.directory / "grpo-pod.tgz").exists()
    check(run(cloud, "copy.sh", "a file"))
    assert [words[1:3] for words in cloud.calls()] == [["storage", "cp"]] * 2
    assert [[str(scripts(cloud) / "pack.sh"), str(cloud.directory / "grpo-pod.tgz")], *cloud.calls()] == expected
    assert "there is no b" in run(cloud, "copy.sh", "b").stderr


def trained(cloud: Cloud) -> list[list[dict]]:
    """What grpo-jax saw, per worker and run."""
    files = sorted(cloud.directory.glob("workers/*/trained"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]


def test_from_copy_to_results(cloud):
    bucket = cloud.directory / "bucket"
    (cloud.directory / "here" / "my prompts.jsonl").write_text("{}\n")
    check(run(cloud, "copy.sh", "my prompts.jsonl"))
    assert check(run(cloud, "setup.sh")).count(": ready") == 2
    code = cloud.directory / "workers" / "1" / "grpo"
    assert (code / "configs" / "my run.yaml").exists(), "new files go along"
    assert not (code / "secret.env").exists() and not (code / "gone.py").exists()
    installed = (cloud.directory / "workers" / "1" / "uv").read_text()
    stamp = (code / ".packed-at").read_text().strip()
    assert f"--exclude-newer {stamp} --editable {code}[tpu,math,datasets]" in installed
    assert run_state(cloud) == "absent"

    (bucket / "pods" / "pod" / "environment").write_text("HF_TOKEN=hf_1\n")
    words = ["configs/my run.yaml", "name=it's $HOME", 'data.template="{q}  \\n*"', "model.path=/a b/c"]
    check(run(cloud, "run.sh", *words))
    for (seen,) in trained(cloud):
        assert seen["words"] == ["train", *words, "directory=/mnt/grpo/runs/{name}"], (
            "word for word, through two shells"
        )
        assert seen["cache"] == str(bucket / "compiled") and seen["token"] == "hf_1"
    assert {Path(runs[0]["here"]) for runs in trained(cloud)} == {
        cloud.directory / "workers" / name / "grpo" for name in ("0", "1")
    }
    assert run_state(cloud) == "finished"
    (log, *_) = (bucket / "pods" / "pod" / "logs").iterdir()
    assert "_SYSTEMD_INVOCATION_ID=abc" in log.read_text()


def run_state(cloud: Cloud) -> str:
    cloud.request("ACTIVE")
    cloud.node("READY")
    return check(run(cloud, "status.sh")).splitlines()[1].removeprefix("run: ")


def test_how_a_run_ended(cloud):
    check(run(cloud, "copy.sh"))
    check(run(cloud, "setup.sh"))
    check(run(cloud, "run.sh", "a.yaml", "directory=/mnt/grpo/elsewhere", TRAIN_STATUS="143"))
    assert trained(cloud)[0][0]["words"] == ["train", "a.yaml", "directory=/mnt/grpo/elsewhere"]
    assert run_state(cloud) == "failed 143"
    check(run(cloud, "run.sh", "a.yaml"))
    assert run_state(cloud) == "finished" and [seen["ended"] for seen in trained(cloud)[1]] == [False, False]
    for path in cloud.directory.glob("workers/*/status"):  # as a reboot does
        path.unlink()
    assert run_state(cloud) == "absent"


def test_one_run_at_a_time(cloud):
    check(run(cloud, "copy.sh"))
    check(run(cloud, "setup.sh"))
    for state in ("active", "deactivating"):
        (cloud.directory / "active").write_text(state + "\n")
        assert run_state(cloud) == "running"
        refused = run(cloud, "run.sh", "a.yaml")
        assert refused.returncode == 1 and "a run is going on already" in refused.stderr and trained(cloud) == []
    assert "a run is going on" in run(cloud, "setup.sh").stderr


def test_a_bucket_that_will_not_do(cloud):
    check(run(cloud, "copy.sh"))
    cloud.program("mv", '#!/usr/bin/env bash\n[[ $* != *probe* ]] && exec /bin/mv "$@"\nexit 1\n')
    refused = run(cloud, "setup.sh", "--every=0")
    assert refused.returncode == 1 and "gs://my-bucket cannot rename directories" in refused.stderr
    assert "--enable-hierarchical-namespace" in refused.stderr
    (cloud.directory / "bin" / "findmnt").write_text("#!/usr/bin/env bash\necho other\n")
    assert "gs://my-bucket is not at" in run(cloud, "setup.sh").stderr


def test_without_a_bucket_nothing_starts(cloud):
    check(run(cloud, "copy.sh"))
    check(run(cloud, "setup.sh"))
    (cloud.directory / "workers" / "1" / "mounted").unlink()
    refused = run(cloud, "run.sh", "a.yaml")
    assert refused.returncode == 1 and "no bucket at" in refused.stderr


def test_without_a_repository(cloud):
    shutil.rmtree(cloud.directory.parent / "repo" / ".git")
    refused = run(cloud, "copy.sh")
    assert refused.returncode == 1 and "is no git working tree" in refused.stderr
    assert not list((cloud.directory / "bucket").iterdir())
