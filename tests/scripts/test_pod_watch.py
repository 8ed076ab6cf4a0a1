"""watch.sh: the whole life of a run on machines that are taken away, and when it stops by itself."""

from __future__ import annotations

import re

import fake_cloud
import pytest
from fake_cloud import Cloud, printed

RUN = ["configs/a.yaml", "name=two words"]
LIFE = ["create", "setup", "start"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")


def test_through_a_preemption_to_the_end(cloud):
    cloud.request("", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", "", "PROVISIONING", "ACTIVE")
    # Seen again only by delete.sh, which makes sure that nothing is left.
    cloud.node("READY", "READY", "", "READY")
    cloud.run_states("absent", "absent", "running", "absent", "absent", "running", "finished")
    done = cloud.run("watch.sh", "--yes", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*LIFE, "delete", *LIFE]
    first, second = (words[-1] for words in cloud.calls() if "worker.sh start" in words[-1])
    assert first == second, "the same command resumes"
    assert first.endswith("start pod configs/a.yaml 'name=two words' 'directory=/mnt/grpo/runs/{name}'")
    assert "(1 of at most 10 in a row); going on in 60 s" in done.stderr and "costs: delete.sh" in done.stderr


def test_one_slice_of_several_is_taken_away(cloud):
    cloud.reply("*tpu-vm describe pod-0 *", "READY", times=1)
    cloud.reply("*tpu-vm describe pod-1 *", "PREEMPTED", times=1)
    cloud.reply("*tpu-vm describe pod-? *", times=2, status=1, error=fake_cloud.NO_NODE)
    cloud.node("READY")
    cloud.request("ACTIVE", "", "ACTIVE")
    cloud.run_states("absent", "absent", "absent", "absent", "finished")
    done = cloud.run("watch.sh", "--yes", "--slices=2", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete", "create", "setup", "setup", "start", "start"], "each slice"
    assert "pod is gone: pod-1 PREEMPTED" in done.stderr


def test_a_preemption_during_set_up(cloud):
    cloud.request("ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE")
    cloud.node("READY", "", "READY")
    cloud.run_states("absent", "absent", "absent", "absent", "finished")
    cloud.reply("*worker.sh setup*", times=1, status=255, error=fake_cloud.SSH_TIMEOUT)
    done = cloud.run("watch.sh", "--yes", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["setup", "delete", *LIFE]
    assert "went away during set-up: gone SUSPENDED" in done.stderr


def test_a_failing_run_is_restarted_and_then_given_up(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("failed 1\\nrunning")
    done = cloud.run("watch.sh", "--yes", "--restarts=6", *RUN)
    assert done.returncode == 1
    assert cloud.verbs() == ["logs", "stop", "start"] * 6 + ["logs"], "bounded, and the pod is left as it is"
    assert "number 7 in a row, giving up" in done.stderr and "costs: status.sh" in done.stderr
    pauses = [int(words[1]) for words in cloud.calls(looks=True) if words[0] == "sleep"]
    assert [p for p in pauses if p > 60] == [120, 240, 480, 960, 960], "longer and longer, up to a bound"


def test_a_long_good_time_forgives_what_went_wrong_before(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    for looks in (15, 8):
        cloud.reply("*worker.sh state*", "failed 1", times=1)
        cloud.reply("*worker.sh state*", "running", times=looks)
    cloud.run_states("failed 1", "finished")
    done = cloud.run("watch.sh", "--yes", "--restarts=1", *RUN)
    assert done.returncode == 1 and "number 2 in a row" in done.stderr, "and a short one does not"
    assert cloud.verbs() == ["logs", "stop", "start"] * 2 + ["logs"]


def test_stopped_by_somebody_it_stays_stopped(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("running", "failed 143")
    done = cloud.run("watch.sh", "--yes", *RUN)
    assert done.returncode == 143 and "somebody stopped the run" in done.stderr and cloud.calls() == []


def test_a_preemption_begins_like_a_stop(cloud):
    cloud.request("ACTIVE", "ACTIVE", "SUSPENDED", "", "ACTIVE")
    cloud.node("READY", "READY", "", "READY")
    cloud.run_states("running", "failed 143", "absent", "absent", "finished")
    assert cloud.run("watch.sh", "--yes", *RUN).returncode == 0
    assert cloud.verbs() == ["delete", *LIFE]


def test_a_run_on_some_workers_only(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("running\\nabsent", "running\\nabsent", "running", "finished")
    assert cloud.run("watch.sh", "--yes", *RUN).returncode == 0
    assert cloud.verbs() == ["logs", "stop", "start"], "seen twice: one look may fall between two starts"


def test_workers_that_do_not_answer_are_not_deleted(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("")
    done = cloud.run("watch.sh", "--yes", "--restarts=3", *RUN)
    assert done.returncode == 1 and "the workers did not answer" in done.stderr and cloud.calls() == []
    assert "the VMs were not reached" in done.stderr


def test_a_cloud_that_does_not_answer(cloud):
    cloud.reply("*describe*", status=1, error="ERROR: network is unreachable")
    done = cloud.run("watch.sh", "--yes", "--restarts=2", *RUN)
    assert done.returncode == 1 and "gcloud did not answer" in done.stderr and cloud.calls() == []


def test_no_capacity_for_ever(cloud):
    cloud.request("", "WAITING_FOR_RESOURCES")
    done = cloud.run("watch.sh", "--yes", "--looks=12", *RUN)
    assert done.returncode == 1 and "still WAITING_FOR_RESOURCES" in done.stderr and "stays in the queue" in done.stderr
    assert cloud.verbs() == ["create"]
    assert len(re.findall(r"pod: WAITING_FOR_RESOURCES", done.stderr)) == 2, "said now and then, not at every look"


def test_no_quota_for_ever(cloud):
    cloud.request("")
    cloud.reply("*create*", status=1, error=fake_cloud.QUOTA)
    done = cloud.run("watch.sh", "--yes", "--restarts=2", *RUN)
    assert done.returncode == 1 and "quota" in done.stderr and cloud.verbs() == ["create"] * 3


def test_what_somebody_deleted_is_not_made_again(cloud):
    cloud.request("ACTIVE", "")
    cloud.node("READY")
    cloud.run_states("running")
    done = cloud.run("watch.sh", "--yes", *RUN)
    assert done.returncode == 1 and "somebody deleted pod" in done.stderr and cloud.calls() == []


def test_it_asks_before_it_may_delete(cloud):
    refused = cloud.run("watch.sh", *RUN)
    assert refused.returncode == 1 and cloud.calls(looks=True) == []
    assert "pod (v5e:4x4, spot) in project my-project, zone us-west4-a" in refused.stderr
    cloud.request("ACTIVE")
    cloud.node("READY")
    cloud.run_states("finished")
    assert cloud.run("watch.sh", *RUN, answer="y\n").returncode == 0 and cloud.calls() == []


def test_back_to_no_cost(cloud):
    cloud.request("ACTIVE")
    cloud.node("READY", "")
    cloud.run_states("finished")
    done = cloud.run("watch.sh", "--yes", "--then-delete", *RUN)
    assert done.returncode == 0 and cloud.verbs() == ["delete"] and "costs nothing any more" in done.stderr


def test_without_a_queue(cloud):
    """capacity=now has no request: the node itself is looked at, deleted and made."""
    cloud.node("", "READY", "PREEMPTED", "", "", "READY")
    cloud.run_states("absent", "absent", "absent", "absent", "finished")
    done = cloud.run("watch.sh", "--yes", "--capacity=now", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*LIFE, "delete", *LIFE]
    assert not any("queued-resources" in words for words in cloud.calls(looks=True))


def test_a_dry_run_of_a_watch(cloud):
    dry = cloud.run("watch.sh", "--dry-run", "--then-delete", *RUN)
    assert [fake_cloud.verb(words) for words in printed(dry)] == [*LIFE, "logs", "stop", "start", "delete"]
    assert cloud.calls(looks=True) == []


def test_a_mistake_in_the_words_shows_at_once(cloud):
    assert "which configuration?" in cloud.run("watch.sh", "--yes").stderr
    assert "there is no option --mesh" in cloud.run("watch.sh", "--yes", "a.yaml", "--mesh=4").stderr
    assert "restarts is a whole number" in cloud.run("watch.sh", "--yes", "--restarts=many", "a.yaml").stderr
    assert cloud.calls(looks=True) == []
