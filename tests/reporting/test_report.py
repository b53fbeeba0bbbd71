"""The report of a run: what it shows is what the files say, whatever state the run is in."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from support.helpers import environment

from fastgrpo.reporting.charts import ticks
from fastgrpo.reporting.report import write_report
from fastgrpo.reporting.saved_run import read_run

FILES = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "samples")
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)> $name {x} & 'quoted' \ud800"
BASE = {"overall": 0.6125, "single_object": 0.9, "counting": 0.5}
FINAL = {"overall": 0.9583, "single_object": 0.8875, "counting": 0.94}


class Page(HTMLParser):
    """The text of each section (by id), all attributes, and the tags that were never closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {"": ""}
        self.section = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("section", "details", "header"):
            self.section = dict(attrs).get("id", tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data + " "

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def metrics_row(iteration: int, **more: object) -> dict:
    seconds = {"rollout": 2.0, "decode": 0.5, "reward": 0.25, "update": 1.25}
    row = {"iteration": iteration, "reward": 0.5 + iteration / 100, "kl": 1e-5 * iteration, "grad_norm": 0.4}
    row |= {"clip_fraction": 0.02, "zero_groups": 0.1, "images": 256 * iteration, "seconds": seconds}
    return {**row, **more}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_samples(run: Path, iterations: list[int], prompts: list[dict], size: int = 32) -> None:
    for iteration in iterations:
        folder = run / "samples" / f"{iteration:05d}"
        folder.mkdir(parents=True)
        for number in range(len(prompts)):
            Image.new("RGB", (size, size), (iteration, 10 * number, 0)).save(folder / f"{number:03d}.png")
        Image.new("RGB", (4 * size, size)).save(run / "samples" / f"{iteration:05d}.png")
    (run / "samples" / "prompts.json").write_text(json.dumps(prompts))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    run = tmp_path / "a <run>"
    run.mkdir()
    (run / "config.yaml").write_text("model:\n  path: /models/tiny & small\nseed: 7\n")
    write_lines(run / "metrics.jsonl", [metrics_row(i) for i in range(1, 41)])
    middle = {"overall": 0.8, "single_object": 0.9, "counting": 0.7}
    accuracies = zip((0, 20, 40), (BASE, middle, FINAL), strict=True)
    rows = [{"iteration": i, "accuracy": a, "percent": [*BASE], "images": 400, "seconds": 3.0} for i, a in accuracies]
    write_lines(run / "evaluations.jsonl", [{**row, "scores": {"graded": {"overall": 0.7}}} for row in rows])
    summary = {"base_accuracy": BASE["overall"], "final_accuracy": FINAL["overall"], "train_seconds": 612.3}
    summary |= {"base": BASE, "final": FINAL, "percent": [*BASE], "images": 10240, "seed": 7, "status": "finished"}
    (run / "summary.json").write_text(json.dumps(summary))
    tags = ("counting", "position")
    prompts = [{"prompt": f"a red circle, number {i}", "tag": tags[i % 2]} for i in range(6)]
    make_samples(run, [0, 20, 40], prompts)
    return run


def test_page_is_whole_and_needs_nothing_else(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert page.open == []
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert not page.count("script") and not page.count("link") and not page.count("iframe")
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_headline_and_facts_are_those_of_the_summary(run: Path) -> None:
    text = Page(write_report(run)).text["header"]
    for expected in ("a <run>", "finished", "61.3%", "95.8%", "+34.5 points", "10,240", "10 min 12 s", "400"):
        assert expected in text
    assert "/models/tiny & small" in text and re.search(r"seed\s+7\b", text)
    assert "device" not in text


def test_what_drawing_an_image_took_is_said_where_it_was_counted(run: Path) -> None:
    assert "forward passes" not in Page(write_report(run)).text["header"]
    (run / "summary.json").unlink()
    write_lines(run / "metrics.jsonl", [metrics_row(i, rollout_forwards=256 * passes) for i, passes in ((1, 8), (2, 7))])
    assert re.search(r"forward passes to draw one\s+7\.5\b", Page(write_report(run)).text["header"])
    write_lines(run / "metrics.jsonl", [metrics_row(1, rollout_forwards="many"), metrics_row(2)])
    assert "forward passes" not in Page(write_report(run)).text["header"]


def test_scores_of_another_range_are_no_percentages(run: Path) -> None:
    """Kilobytes of a JPEG, say: negative, with no bars and no percent sign."""
    accuracies = ({"overall": -35.25, "animals": -35.25}, {"overall": -30.5, "animals": -30.5})
    rows = [{"iteration": i * 20, "images": 64, "seconds": 1.0, "accuracy": a} for i, a in enumerate(accuracies)]
    write_lines(run / "evaluations.jsonl", rows)
    (run / "summary.json").unlink()
    page = Page(write_report(run))
    text = " ".join(page.text.values())
    assert "\N{MINUS SIGN}35.25" in text or "-35.25" in text
    assert "+4.75" in text and "score" in text and "-3525" not in text and "points" not in page.text["header"]


def test_what_is_a_share_is_said_and_not_guessed(run: Path) -> None:
    """A cosine may lie between 0 and 1 too; and of several rewards each is shown in its own unit."""
    accuracies = ({"overall": 0.75, "ocr": 0.5, "cosine": 0.25}, {"overall": 0.875, "ocr": 0.625, "cosine": 0.3125})
    rows = [{"iteration": i * 20, "images": 64, "accuracy": a, "percent": ["ocr"]} for i, a in enumerate(accuracies)]
    write_lines(run / "evaluations.jsonl", rows)
    (run / "summary.json").unlink()
    page = Page(write_report(run))
    assert "0.875" in page.text["header"] and "%" not in page.text["header"] and "points" not in page.text["header"]
    assert "62.5%" in page.text["categories"] and "0.3125" in page.text["categories"]
    write_lines(run / "evaluations.jsonl", [{key: row[key] for key in row if key != "percent"} for row in rows])
    assert "%" not in Page(write_report(run)).text["categories"]


def test_summary_has_the_last_word(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"final_accuracy": 0.987, "final": {**FINAL, "overall": 0.987, "counting": 0.432}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert "98.7%" in page.text["header"] and "43.2%" in page.text["categories"]


def test_device_is_named_where_the_summary_knows_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "device": "one <fast> device"}))
    assert "one <fast> device" in Page(write_report(run)).text["header"]


def test_categories_before_and_after(run: Path) -> None:
    page = Page(write_report(run))
    text = " ".join(page.text["categories"].split())
    assert "overall 61.3% 95.8% +34.5" in text
    assert "single object 90.0% 88.8% \N{MINUS SIGN}1.2" in text
    assert "counting 50.0% 94.0% +44.0" in text
    styles = [attributes.get("style") for _, attributes in page.tags]
    assert "--share:61.3%" in styles and "--share:94.0%" in styles
    assert 'class="worse"' in page.source


def test_curves_hold_every_iteration(run: Path) -> None:
    page = Page(write_report(run))
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    for name in ("accuracy", "reward", "kl", "clip_fraction", "grad_norm", "zero_groups"):
        assert f"{name} over iterations" in labels
    lengths = [len(attributes["points"].split()) for tag, attributes in page.tags if tag == "polyline"]
    assert lengths.count(40) == 10 and lengths.count(3) == 3  # raw and smooth of five metrics; accuracies
    assert "0.9 at iteration 40" in page.text["training"] and "iteration 20: 80%" in page.text["training"]
    assert "0.0004 at iteration 40" in page.text["health"] and "2% at iteration 40" in page.text["health"]


def test_time_shares_add_up(run: Path) -> None:
    text = " ".join(Page(write_report(run)).text["time"].split())
    assert "rollout 50.0% 2 s 1 min 20 s" in text
    assert "decode 12.5% 0.5 s 20.0 s" in text
    assert "update 31.2% 1.25 s 50.0 s" in text


def test_samples_are_embedded_in_pairs_and_as_a_film(run: Path) -> None:
    page = Page(write_report(run))
    assert page.count("figure") == 6 + 2  # every pair, and a strip for each tag
    images = page.images()
    assert len(images) == 6 * 2 + 2 * 3 and {image.size for image in images} == {(32, 32)}
    pixels = [image.getpixel((0, 0)) for image in images]
    assert pixels[:4] == [(0, 0, 0), (40, 0, 0), (0, 10, 0), (40, 10, 0)]
    assert pixels[-6:-3] == [(0, 0, 0), (20, 0, 0), (40, 0, 0)]
    assert {attributes["class"] for tag, attributes in page.tags if tag == "img"} == {"pixels"}
    assert "a red circle, number 5" in page.text["samples"] and "trained" in page.text["samples"]


def test_large_images_are_shrunk(tmp_path: Path) -> None:
    make_samples(tmp_path, [0, 5], [{"prompt": "a", "tag": "b"}], size=1024)
    page = Page(write_report(tmp_path))
    assert [image.size for image in page.images()] == [(384, 384)] * 2
    assert {attributes["class"] for tag, attributes in page.tags if tag == "img"} == {"photo"}


def test_nothing_from_a_prompt_becomes_markup(run: Path) -> None:
    hostile = [{"prompt": HOSTILE, "tag": HOSTILE} for _ in range(6)]
    (run / "samples" / "prompts.json").write_text(json.dumps(hostile))
    (run / "config.yaml").write_text(f"model:\n  path: {json.dumps(HOSTILE)}\n", encoding="utf-8")
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 60, "accuracy": {**FINAL, HOSTILE: 0.5}}) + "\n")
    page = Page(write_report(run))
    assert page.open == [] and not page.count("script")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.count("img") == 6 * 2 + 6 * 3  # with one tag only, every prompt has a strip
    shown = HOSTILE.replace("\ud800", "?")
    assert shown in page.text["samples"] and shown.split("\\")[0] in page.text["header"]


def test_repeated_iterations_count_once_and_the_last_wins(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for i in (39, 40):
            file.write(json.dumps(metrics_row(i, reward=0.123)) + "\n")
    metrics = read_run(run).metrics
    assert [row["iteration"] for row in metrics] == list(range(1, 41))
    assert [row["reward"] for row in metrics[-3:]] == [0.88, 0.123, 0.123]
    text = Page(write_report(run)).text
    assert "0.123 at iteration 40" in text["training"] and "1 min 20 s" in text["time"]


def test_interrupted_run(run: Path) -> None:
    """No summary, half a line at the end, half an image, an evaluation's images not yet all there."""
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-60])
    newest = run / "samples" / "00040"
    (newest / "005.png").unlink()
    (newest / "004.png").write_bytes((newest / "004.png").read_bytes()[:40])
    page = Page(write_report(run))
    assert "running, or interrupted" in page.text["header"]
    assert "61.3%" in page.text["header"] and "95.8%" in page.text["header"]
    assert f"{256 * 39:,}" in page.text["header"] and "2 min 36 s" in page.text["header"]
    assert "iteration 40" in page.text["samples"] and "number 5" not in page.text["samples"]
    assert "Unreadable lines left out: 1" in page.source


def test_line_joined_to_half_a_line_after_a_resume_is_left_out(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[10] = lines[10][:30] + lines[10]
    (run / "metrics.jsonl").write_text("\n".join([*lines, "3", "[]"]))
    data = read_run(run)
    assert len(data.metrics) == 39 and data.unreadable == 3


def test_only_an_evaluation(run: Path) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (run / name).unlink()
    write_lines(run / "evaluations.jsonl", [{"iteration": 0, "accuracy": BASE, "percent": [*BASE], "images": 400}])
    for iteration in (20, 40):
        for path in (run / "samples" / f"{iteration:05d}").glob("*"):
            path.unlink()
        (run / "samples" / f"{iteration:05d}").rmdir()
    page = Page(write_report(run))
    assert "61.3%" in page.text["header"] and "points" not in page.text["header"]
    assert "No training iteration" in page.text["training"] and "No training iteration" in page.text["health"]
    assert "No training iteration" in page.text["time"] and not page.count("svg")
    assert page.count("img") == 6 and "at least three" in page.text["film"]


@pytest.mark.parametrize("name", FILES)
def test_each_file_may_be_missing_and_each_may_be_alone(run: Path, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (run / name).rename(alone / name)
    for folder in (run, alone):
        page = Page(write_report(folder))
        assert page.open == [] and page.count("h2") == 6


def test_values_that_are_not_numbers_are_gaps(run: Path) -> None:
    rows = [metrics_row(i, kl=float("nan"), reward=None if i % 2 else 0.5, seconds=None) for i in range(1, 11)]
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "evaluations.jsonl", [{"iteration": i, "accuracy": {"overall": None}} for i in (0, 1)])
    (run / "summary.json").write_text('{"base_accuracy": 0.5, "fin')
    page = Page(write_report(run))
    assert "KL" not in page.text["health"] and "Gradient norm" in page.text["health"]
    assert "Not evaluated yet" in page.text["header"]
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page.source).lower()


def test_one_iteration_is_a_dot(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics_row(1)])
    assert "iteration 1: 0.51" in Page(write_report(run)).text["training"]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.53, 0.96, [0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (0.0, 1.1e-4, [0, 5e-5, 1e-4, 1.5e-4]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.0, 1.0 + 1e-15, [1, 1.2, 1.4, 1.6, 1.8, 2]),
        (-3.0, 4.0, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_numbers_around_the_data(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == expected


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_folder_without_a_run_is_refused_by_name(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "nothing here"
    if make:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match="nothing here.*metrics.jsonl"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.processes
def test_command_line_without_torch(run: Path, tmp_path: Path) -> None:
    """As a command; it loads no torch, and a wrong folder is one line, not a traceback."""
    code = "import sys; from fastgrpo.commands.cli import main; main(); assert 'torch' not in sys.modules"
    good = subprocess.run(
        [sys.executable, "-c", code, "report", str(run)], env=environment(), capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    assert good.stdout.strip() == str(run / "report.html")
    command = [sys.executable, "-m", "fastgrpo.report", str(tmp_path / "none")]
    bad = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and "none" in bad.stderr


def test_several_rewards_have_a_curve_each(run: Path) -> None:
    rows = [metrics_row(i, rewards={"ocr": i / 100, "pick_score": 20.0 + i}) for i in range(1, 41)]
    write_lines(run / "metrics.jsonl", rows)
    page = Page(write_report(run))
    assert "Reward ocr" in page.source and "Reward pick score" in page.source
    assert page.source.count("<polyline") + page.source.count("<path") > 0


def test_odd_numbers_and_names_of_rows_are_left_out(run: Path) -> None:
    rows = [metrics_row(i, rewards={f"name {i}": 1.0}, seconds={f"phase {i}": 1.0}) for i in range(1, 100)]
    rows += [metrics_row(1) | {"iteration": 10**400}, metrics_row(-1)]
    rows += [metrics_row(100, kl=10**400, reward=-1e308, grad_norm=1e300)]
    write_lines(run / "metrics.jsonl", rows)
    (run / "summary.json").write_text(
        json.dumps({"images": 10**400, "train_seconds": 10**400, "final_accuracy": 1e308, "base": -1})
    )
    page = Page(write_report(run))
    assert "Unreadable lines left out: 2." in page.source and "Rewards that are not shown: 59." in page.source
    assert "nan" not in page.source and "inf," not in page.source


def test_a_long_run_makes_no_long_page_and_keeps_its_extremes(run: Path) -> None:
    def written(count: int) -> str:
        rows = [metrics_row(i, kl=1.0 + (i == 777) * 8) for i in range(1, count + 1)]
        write_lines(run / "metrics.jsonl", rows)
        return Page(write_report(run)).source

    short, long = written(2000), written(16000)
    assert len(long) < 1.5 * len(short)
    chart = long.split("KL to the base")[1].split("</svg>")[0]
    assert ">10<" in chart  # the tick above the one high value
