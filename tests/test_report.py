"""The report: one safe, self-contained file at every stage of a run, and figures that show what they are given."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from headwater.report import Card, Findings, Section, Term, common_findings, figures_of, numbers, write_report
from headwater.report.charts import calibration_chart, pearson, spearman
from headwater.report.figures import heat_maps, histogram_figure, line_figure, scatter_figure
from headwater.runs import Run, Samples

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def metric_rows(count: int = 60) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i in range(count):
        row: dict[str, object] = {
            "iteration": i + 1,
            "loss": 10 * math.exp(-i / 10),
            "log_z": 5 - math.exp(-i / 10),
            "mean_log_reward": -1 + i / count,
            "mean_length": 7.5,
            "trajectories": 16 * (i + 1),
            "seconds": 0.5 * (i + 1),
            "failed": 0,
            "reward_calls": 16 * (i + 1),
        }
        if i % 10 == 9:
            row |= {"eval/total_variation": 0.9 * math.exp(-i / 20), "eval/elbo": 4.0, "eval/eubo": 6.0}
        rows.append(row)
    return rows


def samples(count: int = 50, text: str = "object") -> Samples:
    log_reward = np.linspace(-3, 2, count)
    return Samples([f"{text} {i}" for i in range(count)], log_reward, log_reward - 5, {"energy": [1.5] * count})


EVALUATION = {
    "total_variation": 0.0312,
    "log_z_exact": 5.0126,
    "pearson": 0.973,
    "a_figure_of_my_own": 41.5,
    "baseline_log_reward": [-3.0, -2.5, -2.0],
}


def make_run(folder: Path, rows: list[dict[str, object]], name: str = "grid", side: object = 8) -> Run:
    run = Run.create(folder, name, {"side": side, "training": {"iterations": 60}}, ["headwater", "train", name], 3)  # type: ignore[dict-item]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def full_run(folder: Path) -> Run:
    run = make_run(folder, metric_rows())
    run.write_samples(samples())
    run.write_json("evaluation.json", EVALUATION)
    return run


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_shows_its_figures_tables_and_how_to_repeat_it(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    path = write_report(run, [Section("Drawn as the field draws", "<p>a picture</p>")])
    assert path == run.folder / "report.html"
    text = read(path).text
    for expected in (
        "within 0.0312 of the target",  # verdict
        "5.013",  # log Z beside its exact value
        "Drawn as the field draws",
        "A figure of my own",
        "41.5",
        "object 49",
        "headwater train grid",
        "headwater resume",
        ".sample(1000)",
        "Pearson 1.000, Spearman 1.000",
        "32 overall",  # 16 trajectories each half second
    ):
        assert expected in text, expected
    assert "Failed rewards" not in text


def test_a_domain_says_what_its_run_amounts_to(tmp_path: Path) -> None:
    findings = Findings(
        verdict=["The posterior is covered."],
        cards=[Card("Coverage", "0.9", "of 12 modes"), Card(HOSTILE, HOSTILE)],
        terms={"a_figure_of_my_own": Term("Coverage of modes", "Share of them that is drawn."),
               "total_variation": Term("Distance", "In another word.")},
        shown=["pearson"],
    )  # fmt: skip
    path = write_report(full_run(tmp_path / "run"), [], findings=findings)
    page, html = read(path), path.read_text()
    assert '<p class="verdict">The posterior is covered.</p>' in html
    assert '<dt>Coverage</dt><dd>0.9</dd><dd class="note">of 12 modes</dd>' in html
    assert "<dt>Total variation</dt>" not in html
    assert "<dt>Mean log-reward</dt>" in html  # of the samples, whatever the domain
    table = html[html.index('<table class="evaluation">') :]
    rows = re.findall(r'row">(.*?)</th><td class="number">(.*?)</td><td class="meaning">(.*?)</td>', table)
    assert rows == [
        ("Coverage of modes", "41.5", "Share of them that is drawn."),
        ("Distance", "0.0312", "In another word."),
        ("log Z, exact", "5.013", "Logarithm of the sum of all rewards, computed exactly."),
    ]  # pearson is a section's to show
    assert "<h3>Distance</h3>" in html  # its curve over training
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.elements}


def test_what_is_not_known_is_left_out_of_the_common_findings(tmp_path: Path) -> None:
    assert common_findings({}) == Findings([], [], [])
    run = full_run(tmp_path / "run")
    figures = figures_of(run)
    assert figures["trajectories"] == 960
    assert figures["log_z"] == pytest.approx(5 - math.exp(-5.9))
    found = common_findings({**figures, "pearson": None})
    assert found.headline == ["total variation from the exact distribution: 0.0312"]
    assert [card.label for card in found.cards] == ["log Z", "Total variation"]
    assert found.cards[0].note == "exact 5.013"
    searched = {"baseline_calls": 1200, "top_100_mean_log_reward": 2.0, "baseline_top_100_mean_log_reward": 1.0}
    assert "with 1,200 reward calls" in common_findings(searched).headline[0]
    assert "1,200 reward calls have 1." in common_findings(searched).verdict[0]


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    page = read(write_report(full_run(tmp_path / "run"), []))
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, name, value)
        assert not re.search(r"@import|url\((?!#)", attributes.get("style") or "")
    html = (tmp_path / "run" / "report.html").read_text()
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_hostile_texts_are_shown_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{**metric_rows(1)[0], f"eval/{HOSTILE}": 1.0}], name=HOSTILE, side=HOSTILE)
    extra: dict[str, list[object]] = {HOSTILE: [HOSTILE] * 5}
    run.write_samples(Samples([f"{HOSTILE}{i}" for i in range(5)], np.arange(5.0), -np.arange(5.0), extra))
    run.write_json("evaluation.json", {HOSTILE: 1.0, "note": HOSTILE})
    path = write_report(run, [Section(HOSTILE, "")])
    page = read(path)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) >= 8
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize("with_evaluation", [False, True])
def test_a_report_can_be_written_at_any_stage(
    tmp_path: Path, rows: int, with_samples: bool, with_evaluation: bool
) -> None:
    run = make_run(tmp_path / "run", metric_rows(rows))
    if with_samples:
        run.write_samples(samples(2))
    if with_evaluation:
        run.write_json("evaluation.json", EVALUATION)
    text = read(write_report(run, [])).text
    assert ("Nothing has been logged yet" in text) == (rows == 0)
    if rows:
        assert ("There are no samples yet" in text) == (not with_samples)
        assert ("has not been evaluated yet" in text) == (not with_evaluation)


def test_numbers_that_are_not_finite_leave_a_report_standing(tmp_path: Path) -> None:
    rows = metric_rows()
    rows[3] |= {"loss": "inf", "log_z": "nan", "mean_log_reward": "-inf"}
    rows[4] = {"iteration": 5}
    for row in rows:
        row["mean_length"] = "nan"
    run = make_run(tmp_path / "run", rows)
    run.write_samples(
        Samples(
            ["a", "b", "c", "d", "e"], np.array([0.0, -np.inf, np.nan, 1.0, 2.0]), np.array([-1.0, -2, -3, np.nan, 0])
        )
    )
    run.write_json("evaluation.json", {"log_z_exact": math.nan, "total_variation": math.inf})
    page = read(write_report(run, []))
    assert "2 draws without a finite log-reward are left out" in page.text
    names = {path.stem for path in (run.folder / "figures").glob("*.svg")}
    assert {"loss", "log_z", "reward_distribution", "throughput"} <= names
    assert "mean_length" not in names
    for svg in (run.folder / "figures").glob("*.svg"):
        assert "nan" not in svg.read_text().lower()


def test_failed_rewards_are_announced_before_anything_else(tmp_path: Path) -> None:
    rows = metric_rows()
    rows[-1] |= {"failed": 48}
    text = read(write_report(make_run(tmp_path / "run", rows), [])).text
    assert "48 of 960 (5%) reward calls failed" in text
    assert text.index("48 of 960") < text.index("What was asked")


def test_with_defaults_the_report_opens_with_what_differs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metric_rows())
    path = write_report(run, [], defaults={"side": 20, "training": {"iterations": 60}})
    html = path.read_text()
    opening = html[html.index('id="asked"') : html.index("<details")]
    assert "side" in opening
    assert "training.iterations" not in opening
    assert "training.iterations" in html
    assert "Every setting is the recipe" in write_report(run, [], defaults=run.settings).read_text()


def test_every_id_of_the_page_is_its_own(tmp_path: Path) -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    pictures = heat_maps(matrix, matrix, title="a") + heat_maps(matrix + 1, matrix, title="b")
    page = read(write_report(full_run(tmp_path / "run"), [Section("Maps", pictures)]))
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    used = re.findall(r'(?:url\(|href=")#([^")]+)', (tmp_path / "run" / "report.html").read_text())
    assert used
    assert set(used) <= ids.keys()


def test_figures_are_written_as_files_that_stand_alone(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    section = Section("Learned distribution", f"<figure>{heat_maps(np.eye(3), np.eye(3), title='t')}</figure>")
    write_report(run, [section])
    files = {path.stem: path.read_text() for path in (run.folder / "figures").glob("*.svg")}
    assert {"loss", "log_z", "eval_total_variation", "log_z_bounds", "calibration", "learned_distribution"} <= set(
        files
    )
    for name, svg in files.items():
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg", name
        assert "var(--" not in svg, name  # a file has no page to take its colours from
    in_page = re.findall(r"<svg role=.*?</svg>", (run.folder / "report.html").read_text(), re.DOTALL)
    assert len(in_page) == len(files)
    assert all("var(--ink)" in svg and "#1d2733" not in svg for svg in in_page)


def test_a_second_report_is_the_same_to_the_byte(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    first = write_report(run, []).read_bytes()
    assert write_report(run, []).read_bytes() == first
    assert not list(run.folder.glob(".*.partial"))


def test_the_best_objects_are_distinct_and_in_order_of_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metric_rows())
    run.write_samples(
        Samples(["poor", "best", "good", "best", "unknown"], np.array([-1.0, 3, 2, 3, np.nan]), np.full(5, -2.0))
    )
    html = write_report(run, []).read_text()
    table = html[html.index('id="best"') :]
    assert re.findall(r'<td class="object short">(\w+)</td>', table) == ["best", "good", "poor", "unknown"]
    assert "20.09" in table  # exp(3)


def pictures_of(svg: str) -> list[np.ndarray]:
    encoded = re.findall(r'xlink:href="data:image/png;base64,([^"]+)"', svg)
    return [imread(io.BytesIO(base64.b64decode(text))) for text in encoded]


def test_heat_maps_show_the_arrays_the_first_axis_rightwards_the_second_upwards() -> None:
    learned, true = np.zeros((2, 2)), np.zeros((2, 2))
    learned[1, 0] = 0.4  # right, bottom
    true[0, 1] = 0.8  # left, top
    svg = heat_maps(learned, true, title="corners")
    maps = [picture for picture in pictures_of(svg) if picture.shape[0] == picture.shape[1]]
    assert len(maps) == 3

    def corners(picture: np.ndarray) -> dict[str, np.ndarray]:
        edge = picture.shape[0] // 4
        upright = picture if "scale(1 -1)" not in svg else picture[::-1]
        return {
            "top left": upright[edge, edge, :3],
            "top right": upright[edge, -edge, :3],
            "bottom left": upright[-edge, edge, :3],
            "bottom right": upright[-edge, -edge, :3],
        }

    shown, wanted, difference = map(corners, maps)
    darkness = {name: 1 - colour.mean() for name, colour in shown.items()}
    assert max(darkness, key=darkness.__getitem__) == "bottom right"
    assert 1 - wanted["top left"].mean() > darkness["bottom right"] > 1.5 * darkness["top right"]  # one scale for both
    assert difference["bottom right"][2] > difference["bottom right"][0]  # more than the truth: blue
    assert difference["top left"][0] > difference["top left"][2]  # less: orange


def test_heat_maps_refuse_arrays_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        heat_maps(np.zeros((2, 3)), np.zeros((3, 2)), title="t")


def test_figures_stay_small_whatever_they_are_given() -> None:
    generator = np.random.default_rng(0)
    x, noise = np.arange(50_000), generator.normal(size=50_000)
    assert len(line_figure({"y": (x, noise)}, x_label="x", title="t", smooth=True)) < 40_000
    assert len(scatter_figure(noise, noise[::-1], x_label="x", y_label="y", title="t")) < 300_000
    assert len(histogram_figure({"y": noise}, x_label="x", title="t")) < 20_000


def test_a_thinned_curve_keeps_its_spike() -> None:
    flat = np.zeros(10_000)
    spiked = np.where(np.arange(10_000) == 5_001, 7e5, flat)
    svg = line_figure({"y": (np.arange(10_000), spiked)}, x_label="x", title="t", smooth=True)
    assert "600k" in svg  # the axis reaches up to it


def test_labels_are_text_and_are_escaped() -> None:
    svg = line_figure({"a<b $x$": ([1, 2], [1, 2]), "c": ([1, 2], [2, 1])}, x_label="<x>", title='"<t>"')
    root = ElementTree.fromstring(svg)
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b $x$", "<x>"} <= texts
    assert root.get("aria-label") == '"<t>"'


def test_figures_of_nothing_are_empty_axes() -> None:
    for svg in (
        histogram_figure({"none": []}, x_label="x", title="t"),
        scatter_figure([], [], x_label="x", y_label="y", title="t", line=(1.0, 0.0)),
        line_figure({"none": ([], [])}, x_label="x", title="t", log_y=True),
        heat_maps(np.full((2, 2), np.nan), np.zeros((2, 2)), title="t"),
    ):
        ElementTree.fromstring(svg)


def test_correlations_are_those_of_known_data() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16])
    assert spearman(x, y) == pytest.approx(1)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, np.array([2.0, 2, 1, 3])) == pytest.approx(np.corrcoef(x, [2.5, 2.5, 1, 4])[0, 1])


def test_calibration_counts_each_object_once() -> None:
    repeated = Samples(["a", "b", "c"] * 40, np.array([0.0, 1, 2] * 40), np.array([-3.0, -2, -1] * 40))
    chart = calibration_chart(repeated, log_z=3.0)
    assert chart is not None
    assert "Each of the 3 distinct objects" in chart.caption


@pytest.mark.parametrize(
    ("value", "text"),
    [(12500, "12,500"), (0.03120, "0.0312"), (8.643297, "8.643"), (4.1e-7, "4.10 × 10⁻⁷"), (-2.5, "−2.5"), (0.0, "0"),
     (math.nan, "not a number"), (-math.inf, "−∞"), (1e-3, "0.001"), (999999.7, "1,000,000")],
)  # fmt: skip
def test_numbers_are_written_for_a_reader(value: float, text: str) -> None:
    assert numbers.number(value) == text


def test_a_reward_beyond_floating_point_is_still_written() -> None:
    assert numbers.reward(1000 * math.log(10)) == "1.00 × 10¹⁰⁰⁰"
    assert numbers.reward(-1000 * math.log(10) + math.log(2.5)) == "2.50 × 10⁻¹⁰⁰⁰"
    assert numbers.reward(0.0) == "1"
    assert numbers.reward(-math.inf) == "0"


def test_durations_are_written_in_their_two_largest_units() -> None:
    written = [numbers.duration(seconds) for seconds in (3.14159, 112, 59.99, 7384)]
    assert written == ["3.14 s", "1 min 52 s", "60 s", "2 h 3 min"]
