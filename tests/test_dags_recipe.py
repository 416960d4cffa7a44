"""Learning the structure of Bayesian networks: a user's table, the exact posterior, what a run leaves behind."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater import jobs
from headwater.environments import Dags
from headwater.environments.dags import text_graphs
from headwater.policies import Network
from headwater.recipes import dags_data
from headwater.recipes.dags import DagsRecipe, area_under_curve, edge_marginals
from headwater.recipes.dags_data import DataError, linear_gaussian_network, read_table
from headwater.recipes.dags_figures import edges_section, matrix_svg, network_svg
from headwater.runs import Run
from headwater.sampler import Sampler
from headwater.training import Trainer, Training

ROWS = "".join(f"{i},{i * i % 7},-{i}.5e-1\n" for i in range(12))


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "cells.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_a_table_is_read_as_it_stands(tmp_path: Path) -> None:
    data = read_table(table(tmp_path, "cell size,dose , response\n" + ROWS, "utf-8-sig"))
    assert data.names == ("cell_size", "dose", "response")
    assert data.truth is None
    np.testing.assert_array_equal(data.values[:3], [[0, 0, -0.05], [1, 1, -0.15], [2, 4, -0.25]])
    tabbed = read_table(table(tmp_path, ("a,b,c\n" + ROWS).replace(",", "\t") + "\n\n"))
    np.testing.assert_array_equal(tabbed.values, data.values)
    scaled = data.standardized().values
    np.testing.assert_allclose([scaled.mean(0), scaled.std(0)], [[0] * 3, [1] * 3], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n" + ROWS + "1,two,3\n", "cells.csv, line 14, column 'b': 'two' is not a number"),
        ("a,b,c\n1,,3\n" + ROWS, "cells.csv, line 2, column 'b': a value is missing"),
        ("a,b,c\n1,2,nan\n" + ROWS, "line 2, column 'c': 'nan' is not a finite number"),
        ("a,b,c\n1,2\n" + ROWS, "line 2: 2 fields, the header has 3"),
        ("a,b\n" + "".join(f"{i},4\n" for i in range(12)), "column 'b': every value is 4"),
        ("a,b\n" + "".join(f"{i},{i}e-200\n" for i in range(12)), "column 'b': every value is 0"),
        ("a,b,c\n" + ROWS[:30], "rows of data; at least 10"),
        ("a,b,a\n" + ROWS, "line 1, column 'a': there are two columns"),
        ("a,,c\n" + ROWS, "line 1: column 2 has no name"),
        ("a,b->c,d\n" + ROWS, "line 1, column 'b->c'"),
        (ROWS, "line 1: numbers where the names"),
        ("a\n1\n", "line 1: 1 columns; from 2 to 62"),
        (",".join(f"x{i}" for i in range(63)) + "\n", "63 columns"),
        ("", "line 1: 0 columns"),
        ("a,b\n" + "".join(f"{i},1e{100 + i}\n" for i in range(12)), "column .b.: 1e.111 is too large to be squared"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(table(tmp_path, text))


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_table(tmp_path / "cells.csv")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_table(tmp_path)
    monkeypatch.setattr(dags_data, "LARGEST_FILE", 8)
    with pytest.raises(DataError, match="9 bytes; at most 8"):
        read_table(table(tmp_path, "a,b\n1,2\n1"[:9]))
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "nowhere.csv")


def test_the_random_network_is_acyclic_has_one_parent_a_node_and_noise_of_a_tenth() -> None:
    edges = []
    for seed in range(200):
        data = linear_gaussian_network(8, 10, seed)
        assert data.truth is not None
        Dags(8).states(data.truth[None])  # raises for a cycle
        edges.append(int(data.truth.sum()))
    assert np.mean(edges) == pytest.approx(8, abs=0.5)
    data = linear_gaussian_network(6, 50_000, 3)
    assert data.truth is not None
    assert int(data.truth.sum()) > 3
    for node, parents in enumerate((data.truth.numpy() > 0).T):
        design = data.values[:, parents]
        weights = np.linalg.lstsq(design, data.values[:, node], rcond=None)[0]
        residual = data.values[:, node] - design @ weights
        assert residual.var() == pytest.approx(0.1, rel=0.03)


def test_the_recipe_learns_the_exact_posterior() -> None:
    recipe = DagsRecipe(nodes=3, data_seed=3)
    exact = recipe.exact_distribution()
    assert exact is not None
    torch.manual_seed(0)
    problem = recipe.problem()
    before = exact.compare(problem.policy)["total_variation"]
    trainer = Trainer(
        problem.policy, problem.reward, problem.conditions, recipe.objective,
        replace(recipe.training, iterations=400, batch_size=16, replayed=16), recipe.exploration, recipe.replay, seed=0,
    )  # fmt: skip
    trainer.run(progress_bar=False)
    assert before > 0.5
    assert exact.compare(problem.policy)["total_variation"] < 0.03


def test_area_under_the_curve_counts_ordered_pairs() -> None:
    score = np.array([0.1, 0.4, 0.4, 0.9])
    assert area_under_curve(score, np.array([False, False, True, True])) == pytest.approx(0.875)
    assert np.isnan(area_under_curve(score, np.zeros(4, dtype=bool)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run on a user's table of four variables."""
    folder = tmp_path_factory.mktemp("dags")
    data = linear_gaussian_network(4, 60, 3)
    lines = ["in put,b,<i>c</i>,d", *(",".join(map(repr, row)) for row in data.values.tolist())]
    recipe = DagsRecipe(
        data=table(folder, "\n".join(lines)),
        samples=300,
        network=Network(width=32),
        training=Training(iterations=60, batch_size=16, learning_rate=1e-2),
    )
    jobs.train(recipe, "dags", folder / "run", progress_bar=False)
    return Run.open(folder / "run")


def test_a_run_leaves_edge_marginals_of_its_samples_beside_the_exact_ones(trained: Run) -> None:
    samples = trained.samples()
    assert samples is not None
    with (trained.folder / "edge_marginals.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["from", "to", "probability", "exact"]
    assert len(rows) == 4 * 3
    recipe = Sampler.load(trained.folder).recipe
    assert isinstance(recipe, DagsRecipe)
    graphs, exact = torch.as_tensor(recipe.objects(samples.objects)), recipe.exact_distribution()
    assert exact is not None
    names = recipe.dataset.names
    for row in rows:
        i, j = names.index(row["from"]), names.index(row["to"])
        assert float(row["probability"]) == pytest.approx(float(graphs[:, i, j].double().mean()), abs=1e-5)
        by_hand = exact.probabilities[exact.states[:, 4 * i + j] > 0].sum()
        assert float(row["exact"]) == pytest.approx(float(by_hand), abs=1e-5)
    assert samples.extra["edges"] == graphs.sum((1, 2)).tolist()


def test_a_run_reports_its_edges_by_name_and_escapes_them(trained: Run) -> None:
    html = (trained.folder / "report.html").read_text()
    assert "<h2>Edges</h2>" in html
    assert "in_put" in html
    assert "<i>c" not in html
    assert "&lt;i&gt;c" in html
    assert list((trained.folder / "figures").glob("edges_*.svg"))
    figures = trained.evaluation()
    assert {"total_variation", "jensen_shannon", "expected_edges", "edge_marginal_correlation"} <= set(figures)
    assert "expected_distance_to_truth" not in figures


def test_a_known_network_is_compared_with_its_true_graph() -> None:
    recipe = DagsRecipe(nodes=3, data_seed=3)
    truth = recipe.dataset.truth
    assert truth is not None
    line = recipe.text(truth[None])[0]
    assert recipe.columns([line, "no edges"])["distance_to_truth"] == [0, int(truth.sum())]
    exact = recipe.exact_distribution()
    assert exact is not None
    samples = Sampler(recipe, recipe.problem()).sample(50)
    figures = recipe.measures(samples)
    distances = [recipe.distance(one, line) for one in samples.objects]
    assert figures["expected_distance_to_truth"] == pytest.approx(np.mean(distances))
    assert figures["expected_edges"] == pytest.approx(
        float(text_graphs(samples.objects, recipe.dataset.names).sum((1, 2)).double().mean())
    )
    assert 0 <= figures["edge_area_under_curve"] <= 1


def test_twelve_variables_train_and_report_without_an_exact_posterior(tmp_path: Path) -> None:
    recipe = DagsRecipe(
        nodes=12, samples=50, max_parents=3, network=Network(width=32), training=Training(iterations=20, batch_size=8)
    )
    assert recipe.exact_distribution() is None
    jobs.train(recipe, "dags", tmp_path / "run", progress_bar=False)
    samples = Run.open(tmp_path / "run").samples()
    assert samples is not None
    recipe.environment().states(recipe.objects(samples.objects))  # raises for a cycle or a fourth parent
    assert "<h2>Edges</h2>" in (tmp_path / "run" / "report.html").read_text()


def test_figures_show_every_probable_edge_and_mark_the_true_ones() -> None:
    values = np.array([[0.0, 0.9, 0.05], [0.1, 0.0, 0.0], [0.0, 0.5, 0.0]])
    truth = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]) > 0
    matrix, network = matrix_svg(["x", "y", "z"], values, truth, "edges"), network_svg(["x", "y", "z"], values, truth)
    assert "x → y: 0.900" in matrix
    assert matrix.count("→") == 6
    assert matrix.count('stroke-width="2.5"') == 1
    assert [edge in network for edge in ("x → y", "y → x", "z → y", "x → z")] == [True, True, True, False]
    section = edges_section([f"v{i}" for i in range(30)], np.full((30, 30), 0.2), None, None)
    assert section.html.count("<svg") == 1  # too many nodes for a network
    assert "Exact" not in section.html


def test_edge_marginals_weigh_graphs_by_their_probability() -> None:
    states = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    marginals = edge_marginals(states, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64))
    np.testing.assert_allclose(marginals, [[0, 0.5], [0.2, 0]])


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"nodes": 1}, "nodes = 1"),
        ({"rows": 9}, "rows = 9"),
        ({"max_parents": 0}, "max_parents = 0"),
        ({"alpha_w": 2.0}, "alpha_w = 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DagsRecipe(**settings)  # type: ignore[arg-type]
