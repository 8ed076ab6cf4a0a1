"""The same run on GKE and under SLURM."""

from __future__ import annotations

import re

import pytest
import yaml
from fake_cloud import Cloud

RUN = ["configs/a.yaml", 'data.template="{q}: \\n\ttab"', "name=it's $two"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")


@pytest.mark.parametrize(
    "kind, label, hosts, chips",
    [
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("tpu7x:2x2x2", "tpu7x", 2, 4),
    ],
)
def test_gke(cloud, kind, label, hosts, chips):
    done = cloud.run("gke.sh", "--type", kind, "--slices=3", "--capacity=queued", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [["kubectl", "apply", "--filename=-"]]
    jobset = yaml.safe_load((cloud.directory / "manifest").read_text())
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "pod"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (3, hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": kind.split(":")[1],
    }
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    assert container["args"] == [*RUN, "directory=/mnt/grpo/runs/{name}"], "word for word"
    assert container["command"][-2:] == [container["command"][-2], "train"] and 'train "$@"' in container["command"][2]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert "@" not in re.sub(r'"\$@"', "", yaml.safe_dump(jobset)), "nothing is left to fill in"


def test_gke_spot_and_dry_run(cloud):
    dry = cloud.run("gke.sh", "--dry-run", *RUN)
    assert dry.returncode == 0 and cloud.calls(looks=True) == []
    assert cloud.bash(["-c", dry.stdout]).returncode == 0
    pasted = yaml.safe_load((cloud.directory / "manifest").read_text())
    assert cloud.run("gke.sh", *RUN).returncode == 0
    assert yaml.safe_load((cloud.directory / "manifest").read_text()) == pasted
    pod = pasted["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_gke_refuses(cloud):
    assert "GKE wants the shape" in cloud.run("gke.sh", "--type=v5litepod-16", *RUN).stderr
    assert "type a100 is not known" in cloud.run("gke.sh", "--type=a100:2x2", *RUN).stderr
    assert "which configuration?" in cloud.run("gke.sh").stderr
    cloud.reply(
        "kubectl apply*", status=1, error='error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"'
    )
    failed = cloud.run("gke.sh", *RUN)
    assert failed.returncode == 1 and "the JobSet controller is not installed" in failed.stderr


def test_slurm(cloud):
    cloud.program("grpo-jax", "#!/bin/sh\n")
    words = ["slurm.sbatch", "configs/a.yaml", "name=two words"]
    dry = cloud.run("slurm.sbatch", "--dry-run", *words[1:])
    assert dry.returncode == 0 and cloud.calls(looks=True) == []
    assert cloud.run(*words).returncode == 0
    program = str(cloud.directory / "bin" / "grpo-jax")
    command = ["srun", "--kill-on-bad-exit=1", program, "train", *words[1:]]
    assert cloud.calls(forget=True) == [command]
    assert cloud.bash(["-c", dry.stdout]).returncode == 0 and cloud.calls() == [command]


def test_slurm_goes_on_later(cloud):
    cloud.program("grpo-jax", "#!/bin/sh\n")
    cloud.reply("srun*", times=2, status=143)
    cloud.reply("srun*", status=1)
    assert cloud.run("slurm.sbatch", "a.yaml", SLURM_JOB_ID="7").returncode == 143
    assert cloud.calls(forget=True)[1:] == [["scontrol", "requeue", "7"]]
    assert cloud.run("slurm.sbatch", "a.yaml", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="50").returncode == 143
    assert len(cloud.calls(forget=True)) == 1, "bounded"
    assert cloud.run("slurm.sbatch", "a.yaml", SLURM_JOB_ID="7").returncode == 1
    assert len(cloud.calls()) == 1, "a failure is not repeated"


def test_slurm_says_what_is_missing(cloud):
    assert "pip install -e '.[cuda]'" in cloud.run("slurm.sbatch", "a.yaml").stderr
    assert "sbatch tpu_scripts/slurm.sbatch" in cloud.run("slurm.sbatch").stdout
