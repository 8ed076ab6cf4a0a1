"""The picture holds the run's numbers, the page is self-contained, escaped and complete."""

import base64
import math
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from grpo_jax.training.curves import _smooth
from grpo_jax.training.metrics import Metrics, Series
from grpo_jax.training.report import figure, plot, report

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[0m\x00"


def write_run(directory, steps=60, every=10, text="42"):
    generator = np.random.default_rng(0)
    with Metrics(directory, tensorboard=False) as metrics:
        for step in range(steps):
            seconds = 5.0 if step == 0 else 0.1
            values = {
                "reward": 0.3 + 0.5 * step / steps + 0.01 * generator.normal(),
                "reward_std": 0.4,
                "kl": 0.001 * step,
                "entropy": 1.0 - step / steps / 2,
                "length_mean": 6.0,
                "length_max": 12.0,
                "truncated": 0.1,
                "seconds": seconds,
                "seconds/sample": 0.6 * seconds,
                "seconds/update": 0.3 * seconds,
                "seconds/other": 0.1 * seconds,
            }
            metrics.log(step, values)
            if step % every == 0:
                metrics.log(step, {"pass@1": 0.3 + 0.01 * step, "pass@8": 0.9}, kind="eval")
                group = {
                    "prompt": f"prompt of step {step}: {text}",
                    "completions": [text, f"{text}!"],
                    "rewards": {"exact": [1.0, 0.0], "format": [math.nan, 0.5]},
                    "advantages": [1.0, -1.0],
                    "lengths": [2, 3],
                }
                metrics.samples(step, [group])
    return directory


def panels(drawn):
    return {axes.get_title(loc="left"): axes for axes in drawn.axes if axes.get_title(loc="left")}


def test_smoothing_is_a_normalised_gaussian_that_skips_gaps():
    generator = np.random.default_rng(1)
    values = generator.normal(size=200)
    values[[0, 50, 51, 199]] = np.nan
    expected, width = np.empty(200), 200 / 40
    for i in range(200):
        weights = [
            (math.exp(-0.5 * ((i - j) / width) ** 2), values[j])
            for j in range(200)
            if abs(i - j) <= 3 * width and not math.isnan(values[j])
        ]
        expected[i] = sum(w * v for w, v in weights) / sum(w for w, _ in weights)
    np.testing.assert_allclose(_smooth(values), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(_smooth(np.full(100, 3.0)), 3.0)  # the ends are not pulled to zero
    np.testing.assert_array_equal(_smooth(np.array([1.0, 5.0])), [1.0, 5.0])
    assert np.isnan(_smooth(np.full(100, np.nan))).all()


def test_the_picture_shows_what_was_logged(tmp_path):
    drawn = figure(write_run(tmp_path / "my run"))
    found = panels(drawn)
    assert list(found) == [
        "Reward",
        "Held-out accuracy",
        "KL to the reference",
        "Entropy of the policy",
        "Completion length",
        "Where the time goes",
    ]
    raw = found["KL to the reference"].lines[0]
    np.testing.assert_allclose(raw.get_ydata(), 0.001 * np.arange(60))
    accuracy = found["Held-out accuracy"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    texts = [text.get_text() for text in accuracy.texts]
    assert {"pass@1 0.80", "pass@8 0.90", "0.30"} <= set(texts)
    # Compilation in the first step counts in the shares, and does not flatten the picture.
    time_axes = found["Where the time goes"]
    legend = [text.get_text() for text in time_axes.get_legend().get_texts()]
    assert legend == ["sample 60%", "update 30%", "other 10%"]
    assert [text.get_text() for text in drawn.texts] == ["my run", "pass@1 0.30 → 0.80  ·  60 steps in 0:11"]


def test_one_slow_step_does_not_flatten_the_time(tmp_path):
    seconds = np.full(600, 0.1)
    seconds[0] = 60.0
    drawn = figure({"seconds": Series(np.arange(600), seconds), "seconds/sample": Series(np.arange(600), seconds)})
    assert panels(drawn)["Where the time goes"].get_ylim()[1] < 0.2


def test_time_that_is_in_no_section_is_shown():
    steps = np.arange(10)
    run = {"seconds": Series(steps, np.full(10, 4.0)), "seconds/sample": Series(steps, np.full(10, 1.0))}
    run["seconds/tiny"] = Series(steps, np.full(10, 0.01))
    legend = panels(figure(run))["Where the time goes"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["sample 25%", "other 75%"]


@pytest.mark.parametrize("names", [["reward"], ["reward", "kl"], ["seconds"], ["eval/pass@16"], ["length_mean"]])
@pytest.mark.parametrize("length", [1, 2, 50])
@pytest.mark.parametrize("fill", [0.0, 1.5])
def test_missing_series_make_fewer_panels(names, length, fill):
    run = {name: Series(np.arange(length), np.full(length, fill)) for name in names}
    run["entropy"] = Series(np.arange(length), np.full(length, np.nan))  # nothing known of it
    if fill == 0 and names == ["seconds"]:
        with pytest.raises(ValueError, match=r"nothing to draw.*\['entropy', 'seconds'\]"):
            figure(run)
        return
    drawn = figure(run)
    assert len(panels(drawn)) == len(names)
    drawn.canvas.draw()


def test_many_channels_and_sections():
    steps = np.arange(30)
    run = {"reward": Series(steps, np.ones(30)), "seconds": Series(steps, np.ones(30))}
    run |= {f"reward/{c}": Series(steps, np.full(30, i)) for i, c in enumerate("abcdefg")}
    run |= {f"seconds/{c}": Series(steps, np.full(30, 0.1)) for c in "abcdefgh"}
    run |= {f"eval/pass@{k}": Series(steps[:2], np.full(2, k / 20)) for k in range(1, 12)}
    found = panels(figure(run))
    labels = [text.get_text() for text in found["Reward"].get_legend().get_texts()]
    assert labels == ["mean", *"abcdefg"] and found["Reward"].get_ylim()[1] > 6
    assert len(found["Where the time goes"].get_legend().get_texts()) <= 7


def test_plot_writes_a_png_and_leaves_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    path = plot(write_run(tmp_path / "run", steps=12), tmp_path / "new" / "picture.png", title="")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert figure({"reward": Series([0, 1], [0.5, 1.0])})._repr_png_().startswith(b"\x89PNG")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_escaped(tmp_path):
    directory = write_run(tmp_path / "<u>$\\bad$ run", text=HOSTILE)
    (directory / "config.yaml").write_text(f"model: '{HOSTILE}'\n")
    picture, path = report(directory)
    assert (picture, path) == (directory / "report.png", directory / "report.html")
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("img") == 1 and "link" not in tags
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 1
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in content)
    text = "".join(page.text)
    visible = HOSTILE.replace("\x1b", "\\x1b").replace("\x00", "\\x00")
    assert text.count(visible) == 6 * 3 + 1  # a prompt and two completions, six times, and the configuration
    assert "model: '</td><script>" in text
    assert "<u>$\\bad$ run" in text and "u" not in tags


def test_the_page_shows_groups_by_step(tmp_path):
    _, path = report(write_run(tmp_path / "run"))
    page = Page(path.read_text(encoding="utf-8"))
    sections = [a["data-step"] for tag, a in page.tags if tag == "section"]
    assert sections == ["0", "10", "20", "30", "40", "50"]
    text = "".join(page.text)
    assert "+1.00" in text and "-1.00" in text and "exact" in text and "format" in text
    # rewards are 1 (one channel does not apply) and 0.5: the ends of the scale, green and red
    colors = [a["style"] for _, a in page.tags if a.get("class") == "completion"]
    assert colors[:2] == ["--c:hsl(138 62% 52%)", "--c:hsl(8 62% 52%)"]
    summary = text[text.index("Start and end") :]
    assert "pass@1, held out0.3000.8000.3000.800" in summary.replace("\n", "")
    assert "Configuration" not in text


def test_a_long_run_keeps_its_first_and_last_groups(tmp_path):
    write_run(tmp_path / "run", steps=250, every=1)
    _, path = report(tmp_path / "run")
    page = Page(path.read_text(encoding="utf-8"))
    sections = [int(a["data-step"]) for tag, a in page.tags if tag == "section"]
    assert len(sections) == 100 and sections[0] == 0 and sections[-1] == 249 and sections == sorted(sections)
    assert "100 of 250 steps" in "".join(page.text)


def test_a_run_without_samples_has_a_page(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(0, {"reward": 0.5})
    _, path = report(tmp_path)
    assert "Sampled groups" not in path.read_text(encoding="utf-8")


def test_no_run(tmp_path):
    for act in (report, figure, lambda directory: plot(directory, tmp_path / "p.png")):
        with pytest.raises(FileNotFoundError, match="no run in .*metrics.jsonl"):
            act(tmp_path)
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(0, {"unrelated": 1.0})
    with pytest.raises(ValueError, match=r"nothing to draw: none of reward.*\['unrelated'\]"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_matplotlib_is_imported_when_a_picture_is_asked_for():
    code = "import sys, grpo_jax.training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import sys; from grpo_jax.training.report import figure; figure({'reward': ([0, 1], [0, 1])});"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
