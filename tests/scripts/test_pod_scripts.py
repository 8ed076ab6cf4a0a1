"""The scripts of `tpu_scripts` against a fake cloud: what they call, what they print instead, what they refuse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cloud
import pytest
from fake_cloud import ROOT, SCRIPTS, Cloud, printed

NAMES = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
VERBS = [name for name in NAMES if name not in ("common.sh", "worker.sh", "pack.sh", "slurm.sbatch", "gke.sh")]
WHERE = ["--project=my-project", "--zone=us-west4-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
NODE = ["gcloud", "compute", "tpus", "tpu-vm"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")


def test_every_script_is_clean():
    """Shellcheck has nothing to say, and bash can read them."""
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck is not installed: pip install -e '.[test]'"
    files = [SCRIPTS / name for name in NAMES]
    found = subprocess.run([checker, "-x", "--extended-analysis=false", *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    for name in NAMES:
        text = (SCRIPTS / name).read_text()
        assert "\nset -euo pipefail\n" in text or '\nsource "$(dirname "$0")/common.sh"\n' in text
        assert subprocess.run(["bash", "-n", SCRIPTS / name]).returncode == 0


@pytest.mark.parametrize("name", [*VERBS, "gke.sh"])
def test_help(cloud, name):
    told = cloud.run(name, "--help")
    assert told.returncode == 0 and told.stdout.startswith(name) and "--dry-run" in told.stdout
    assert all(len(line) <= 120 for line in told.stdout.splitlines())
    own = re.findall(r"^(?:SWITCHES|OPTIONS)=\((.*)\)", (SCRIPTS / name).read_text(), re.MULTILINE)
    assert all(f"--{option}" in told.stdout for option in " ".join(own).split()), "an option that --help forgets"
    assert cloud.calls(looks=True) == []


CREATE = ["pod", *WHERE, "--accelerator-type=v5litepod-16"]
LITE = "--runtime-version=v2-alpha-tpuv5-lite"


@pytest.mark.parametrize(
    "words, command",
    [
        ([], [*QUEUED, "create", *CREATE, LITE, "--node-id=pod", "--spot", "--quiet"]),
        (["--capacity=queued"], [*QUEUED, "create", *CREATE, LITE, "--node-id=pod", "--quiet"]),
        (["--capacity=reserved"], [*QUEUED, "create", *CREATE, LITE, "--node-id=pod", "--reserved", "--quiet"]),
        (
            ["--slices", "4"],
            [*QUEUED, "create", *CREATE, LITE, "--node-count=4", "--node-prefix=pod", "--spot", "--quiet"],
        ),
        (["--capacity=now"], [*NODE, "create", *CREATE, "--version=v2-alpha-tpuv5-lite", "--quiet"]),
    ],
    ids=["spot", "queued", "reserved", "slices", "now"],
)
def test_create(cloud, words, command):
    cloud.request("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.node("READY")
    done = cloud.run("create.sh", *words)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [command]
    assert "costs from now on" in done.stderr


ALIVE = "--ssh-flag=-oServerAliveInterval=30"
ALL = ["--worker=all", "--quiet", "--ssh-flag=-oConnectTimeout=20", ALIVE]
FOLLOW = "--command=sudo journalctl --unit=grpo --output=cat --lines=200 --follow"
ON_WORKERS = "--command=bash ~/grpo/tpu_scripts/worker.sh"


@pytest.mark.parametrize(
    "words, command",
    [
        (["stop.sh"], [*NODE, "ssh", "pod", *WHERE, *ALL, f"{ON_WORKERS} stop"]),
        (["logs.sh", "--all"], [*NODE, "ssh", "pod", *WHERE, *ALL, f"{ON_WORKERS} logs"]),
        (["logs.sh", "--slices=2"], [*NODE, "ssh", "pod-0", *WHERE, "--worker=0", "--quiet", ALIVE, FOLLOW]),
        (
            ["run.sh", "a b.yaml", "directory=/x"],
            [*NODE, "ssh", "pod", *WHERE, *ALL, f"{ON_WORKERS} start pod 'a b.yaml' directory=/x"],
        ),
        (["delete.sh", "--yes", "--capacity=now"], [*NODE, "delete", "pod", *WHERE, "--quiet"]),
        (
            ["fetch.sh", "runs/a", "to here"],
            [
                *["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/runs/a", "to here"],
                *["--exclude=(^|.*/)checkpoints/.*", "--project=my-project"],
            ],
        ),
        (
            ["fetch.sh", "/mnt/grpo/runs/a", "--checkpoints"],
            ["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/runs/a", "runs/a", "--project=my-project"],
        ),
    ],
    ids=["stop", "all logs", "logs", "run", "delete", "fetch", "fetch all"],
)
def test_the_exact_command(cloud, words, command):
    cloud.node("")
    done = cloud.run(*words)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [command]


@pytest.mark.parametrize(
    "kind, accelerator, image",
    [
        ("v5e:2x4", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"),
        ("v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5"),  # counted in cores, two to a chip
        ("v4:2x2x4", "v4-32", "tpu-ubuntu2204-base"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_types(cloud, kind, accelerator, image):
    (command,) = printed(cloud.run("create.sh", "--dry-run", "--type", kind))
    assert f"--accelerator-type={accelerator}" in command and f"--runtime-version={image}" in command


DRY = {
    "create": ["create.sh"],
    "create slices": ["create.sh", "--slices=2", "--no-wait"],
    "create now": ["create.sh", "--capacity=now"],
    "setup": ["setup.sh", "--slices=2"],
    "run": ["run.sh", "--slices=2", "my configs/a.yaml", "name=it's mine", 'data.template="{q} $x"'],
    "stop": ["stop.sh"],
    "logs": ["logs.sh"],
    "all logs": ["logs.sh", "--all", "--slices=3"],
    "fetch": ["fetch.sh", "runs/mine", "to here"],
    "fetch all": ["fetch.sh", "/mnt/grpo/runs/mine", "--checkpoints"],
    "delete": ["delete.sh", "--yes"],
    "delete now": ["delete.sh", "--yes", "--capacity=now"],
}


@pytest.mark.parametrize("words", DRY.values(), ids=DRY)
def test_a_dry_run_prints_what_the_run_calls(cloud, words):
    cloud.run_states("absent")
    gone = words[0] == "delete.sh"
    cloud.request("" if gone else "ACTIVE")
    cloud.node("" if gone else "READY")
    dry = cloud.run(words[0], "--dry-run", *words[1:])
    expected = [line for line in printed(dry) if line[0] == "gcloud"]
    assert expected and cloud.calls(looks=True) == [], "a dry run calls nothing"
    real = cloud.run(*words)
    assert real.returncode == 0, real.stderr
    assert sorted(cloud.calls(forget=True)) == sorted(expected)  # slices at once, in any order
    pasted = cloud.bash(["-c", dry.stdout])
    assert pasted.returncode == 0 and cloud.calls() == expected, pasted.stderr


def test_delete_names_what_goes_and_asks(cloud):
    for answer in ("", "n\n", "\n", "nay\n"):
        refused = cloud.run("delete.sh", "--slices=2", answer=answer)
        assert refused.returncode == 1 and cloud.calls(looks=True) == []
        assert "pod-0 pod-1" in refused.stderr and "my-project" in refused.stderr and "us-west4-a" in refused.stderr
    cloud.node("")
    agreed = cloud.run("delete.sh", "--slices=2", answer="y\n")
    assert agreed.returncode == 0, agreed.stderr
    assert cloud.calls() == [[*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]]
    assert "costs nothing any more" in agreed.stderr


def test_delete_says_what_is_still_there(cloud):
    cloud.node("READY")
    left = cloud.run("delete.sh", "--yes")
    assert left.returncode == 1 and "pod is still there, and costs" in left.stderr


def test_only_delete_and_watch_delete(cloud):
    """No command of another script deletes anything in the cloud, and watch.sh has to be allowed to call delete.sh."""
    for name in NAMES:
        code = [line.split(" #")[0] for line in (SCRIPTS / name).read_text().splitlines() if not line.startswith("#")]
        deletes = [line for line in code if re.search(r"^\s*act .*\b(delete|rm)\b", line)]
        assert bool(deletes) == (name == "delete.sh"), (name, deletes)
        assert any("verb delete" in line for line in code) == (name == "watch.sh")


FAILURES = [
    ("create.sh", "*create*", fake_cloud.QUOTA, "quotas"),
    ("create.sh", "*create*", fake_cloud.TAKEN, "the name is taken"),
    ("create.sh", "*create*", fake_cloud.CAPACITY, "has none left right now"),
    ("create.sh", "*create*", "API tpu.googleapis.com has not been used in project my-project", "services enable"),
    ("create.sh", "*create*", "INVALID_ARGUMENT: accelerator type", "accelerator-types list --zone=us-west4-a"),
    ("setup.sh", "*describe*", fake_cloud.LOGGED_OUT, "gcloud auth login"),
    (
        "run.sh",
        "*ssh*",
        "HTTPError 403: no storage.objects.create access",
        "roles/storage.objectUser on gs://my-bucket",
    ),
    ("stop.sh", "*ssh*", fake_cloud.SSH_TIMEOUT, "the VMs were not reached"),
    ("stop.sh", "*ssh*", 'SSH Key is not present in the SSH agent. Please run "ssh-add k"', "ssh-add ~/.ssh/google"),
    ("delete.sh", "*delete*", fake_cloud.NO_REQUEST, "--capacity now"),
]


@pytest.mark.parametrize("script, pattern, error, hint", FAILURES, ids=[hint for *_, hint in FAILURES])
def test_a_failure_says_what_to_do(cloud, script, pattern, error, hint):
    cloud.reply(pattern, status=1, error=error)
    if script == "setup.sh":
        cloud.reply("*worker.sh setup*", status=1)
    failed = cloud.run(script, "--yes", *(["a.yaml"] if script == "run.sh" else []))
    assert failed.returncode == 1
    assert error.splitlines()[0] in failed.stderr and hint in failed.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--name", "My Pod"], "'My Pod' cannot be the name of a pod"),
        (["--slices=0"], "slices is a whole number from 1 on, got '0'"),
        (["--slices=2", "--capacity=now"], "capacity=now is for one slice"),
        (["--capacity=cheap"], "capacity is queued, spot, reserved or now"),
        (["--type=v9:4x4"], "v9 is not rented as VMs"),
        (["--type=v5e:4by4"], "not of the form v5e:4x4"),
        (["--type=a100-8"], "type a100-8 is not known here"),
        (["--bucket=gs://b/folder"], "'b/folder' is not the name of a bucket"),
        (["--extras=tpu; wandb"], "extras are names with commas between them"),
        (["--sepllnig=x"], "there is no option --sepllnig"),
        (["--zone"], "--zone needs a value"),
        (["my-pod"], "'my-pod' says nothing to create.sh"),
        (["--pod=elsewhere.env"], "there is no file elsewhere.env"),
    ],
)
def test_what_is_given_wrong_is_said_before_anything_happens(cloud, words, message):
    refused = cloud.run("create.sh", *words)
    assert refused.returncode == 1 and message in refused.stderr, refused.stderr
    assert cloud.calls(looks=True) == []


def test_the_file_of_settings(cloud):
    here = cloud.directory / "here"
    (here / "other.env").write_text("NAME=other\nPROJCET=x\n")
    assert "there is no setting PROJCET" in cloud.run("create.sh", "--pod", "other.env").stderr
    (here / "other.env").write_text("NAME=other\nZONE=z\nTYPE=v4-8\nBUCKET=b")
    assert "no project given" in cloud.run("create.sh", "--pod", "other.env").stderr
    (command,) = printed(cloud.run("create.sh", "--dry-run", "--pod=other.env", "--project=p", "--zone", "elsewhere"))
    assert command[4:] == [
        *["create", "other", "--project=p", "--zone=elsewhere", "--accelerator-type=v4-8"],
        *["--runtime-version=tpu-ubuntu2204-base", "--node-id=other", "--quiet"],
    ]


def test_without_gcloud(cloud):
    (cloud.directory / "bin" / "gcloud").unlink()
    lost = cloud.run("stop.sh", PATH=f"{cloud.directory / 'bin'}:{tools(cloud)}")
    assert lost.returncode == 1 and "gcloud is not installed" in lost.stderr and "https://" in lost.stderr


def tools(cloud: Cloud) -> Path:
    """The ordinary programs alone: this machine may have a gcloud of its own."""
    directory = cloud.directory / "tools"
    directory.mkdir()
    for name in ("bash", "sed", "tr", "dirname", "cat", "tee", "mktemp", "rm", "grep", "sort"):
        (directory / name).symlink_to(shutil.which(name))
    return directory


def test_a_request_that_is_never_granted(cloud):
    cloud.request("WAITING_FOR_RESOURCES")
    waited = cloud.run("create.sh", "--looks=5")
    assert waited.returncode == 1 and "after 5 looks" in waited.stderr and "stays in the queue" in waited.stderr
    assert cloud.verbs() == ["create"]
    assert sum("describe" in words for words in cloud.calls(looks=True)) == 5


def test_a_request_that_fails(cloud):
    cloud.request("WAITING_FOR_RESOURCES", "FAILED")
    failed = cloud.run("create.sh")
    assert failed.returncode == 1 and "was not granted: FAILED" in failed.stderr


def test_setup_tries_again_and_notices_a_preemption(cloud):
    cloud.run_states("absent")
    cloud.reply("*worker.sh setup*", times=2, status=255, error=fake_cloud.SSH_TIMEOUT)
    cloud.request("ACTIVE")
    cloud.node("READY", "READY", "PREEMPTED")
    assert cloud.run("setup.sh").returncode == 0
    assert cloud.verbs() == ["setup"] * 3
    cloud.reply("*worker.sh setup*", status=255, error=fake_cloud.SSH_TIMEOUT)
    lost = cloud.run("setup.sh")
    assert lost.returncode == 1 and "the pod went away during set-up: gone pod PREEMPTED" in lost.stderr


def test_setup_leaves_a_run_alone(cloud):
    cloud.run_states("running")
    refused = cloud.run("setup.sh")
    assert refused.returncode == 1 and "a run is going on" in refused.stderr and cloud.calls() == []


def test_run_fails_when_one_slice_does(cloud):
    cloud.reply("*ssh pod-1 *", status=1, error="host: no bucket at /mnt/grpo: setup.sh first")
    failed = cloud.run("run.sh", "--slices=2", "a.yaml")
    assert failed.returncode == 1 and "did not start on every worker" in failed.stderr
    assert sorted(words[5] for words in cloud.calls()) == ["pod-0", "pod-1"]


def test_status(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("running\\nfinished", "running\\nabsent", "failed 1\\nrunning", "")
    told = [cloud.run("status.sh").stdout for _ in range(4)]
    assert [text.splitlines() for text in told] == [
        ["pod: ready", f"run: {state}"] for state in ("running", "partial", "failed 1", "unreachable")
    ]


def test_the_page(cloud):
    """It names the scripts that there are, its settings are read, and its commands run."""
    page = (ROOT / "docs" / "pods.md").read_text()
    named = set(re.findall(r"[\w-]+\.(?:sh|sbatch|yaml)\b", page))
    there = {path.name for folder in ("tpu_scripts", "configs") for path in (ROOT / folder).iterdir()}
    assert not (unknown := named - there), unknown
    assert not (missing := set(VERBS) - named), missing
    settings = re.search(r"```\n(NAME=.*?)```", page, re.DOTALL)[1]
    (cloud.directory / "here" / "pod.env").write_text(settings)
    example = SCRIPTS / "pod.env.example"
    assert printed(cloud.run("create.sh", "--dry-run")) == printed(
        cloud.run("create.sh", "--dry-run", "--pod", str(example))
    )
    commands = re.findall(r"^tpu_scripts/(\S+)(.*)$", page + (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) > 6
    (cloud.directory / "here" / "Qwen2.5-1.5B-Instruct").mkdir()
    for script, words in commands:
        dry = cloud.bash(["-c", f"bash {SCRIPTS / script} --dry-run {words}"])
        assert dry.returncode == 0 and dry.stdout, (script, dry.stderr)
    assert cloud.calls(looks=True) == []
