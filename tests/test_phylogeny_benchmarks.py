"""The benchmarks of phylogeny, without any of the programs that they compare with."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import phylogeny_posterior_report  # noqa: E402
import phylogeny_speed_report  # noqa: E402
from headwater.phylogeny.data import Alignment, read_alignment  # noqa: E402
from headwater.phylogeny.tree_files import TreeSample, parse_trees  # noqa: E402
from phylogeny_known import KNOWN, known  # noqa: E402
from phylogeny_posterior import MrBayes, agreement, reference_trees  # noqa: E402
from phylogeny_programs import Files, Program, Run, execute  # noqa: E402
from phylogeny_speed import Bench, measure  # noqa: E402

TAXA = ("a", "b", "c", "d", "e")
FIRST, SECOND = "(a:1,(b:1,c:1):1,(d:1,e:1):1);", "(a:1,(b:1,d:1):1,(c:1,e:1):1);"
FACTS = {"command": "", "date": "", "cpu": "", "cores": 1, "system": "", "python": "", "versions": {}, "commit": ""}


def sample(*trees: str) -> TreeSample:
    return parse_trees("\n".join(trees), TAXA)


def chain(path: Path, trees: list[str]) -> Path:
    rows = "\n".join(f"tree gen.{i} = [&U] {tree}" for i, tree in enumerate(trees))
    path.write_text(f"#NEXUS\nbegin trees;\n{rows}\nend;\n")
    return path


@pytest.fixture
def alignment(tmp_path: Path) -> Alignment:
    path = tmp_path / "five.fasta"
    rows = ("ACGTRYAC-?", "ACGTACGTAC", "TCGTACGAAC", "TCGAAC-TNC", "AWGTACGTAC")
    path.write_text("".join(f">{name}\n{row}\n" for name, row in zip(TAXA, rows, strict=True)))
    return read_alignment(path)


def test_programs_read_the_alignment_that_we_read(alignment: Alignment, tmp_path: Path) -> None:
    files = Files(tmp_path, alignment, sample(FIRST, SECOND).trees, limit=10.0)
    for written in (files.alignment, tmp_path / "alignment.nex"):
        assert (read_alignment(written).states == alignment.states).all()
    missing = read_alignment(files.gaps_missing).states
    assert (missing == np.where(alignment.states == 16, 15, alignment.states)).all()
    assert ":" in files.trees(2)
    assert (
        files.trees(2, lengths=False) == "(t0000,(t0001,t0002),(t0003,t0004));\n(t0000,(t0001,t0003),(t0002,t0004));\n"
    )


def test_a_turn_of_a_program_leaves_out_what_it_costs_to_start() -> None:
    program = Program(lambda count: Run(5.0 + 0.01 * count, ""), least=10, most=1000)
    program.prepare(seconds=2.0)
    done, took = program.turn(2.0)
    assert done == pytest.approx(200, abs=1)
    assert done / took == pytest.approx(100)
    assert program.is_fair
    slow = Program(lambda count: Run(5.0 + 3.0 * count, ""), least=1, most=10)
    slow.prepare(seconds=2.0)
    assert not slow.is_fair


def test_a_program_that_fails_is_quoted_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    spin = "sum(range(3_000_000)); print('done')"
    run = execute([sys.executable, "-c", spin], tmp_path, limit=60.0)
    assert run.cpu > 0.01
    assert "done" in run.text
    with pytest.raises(RuntimeError, match="status 3:\nno such tree"):
        execute([sys.executable, "-c", "import sys; print('no such tree'); sys.exit(3)"], tmp_path, limit=60.0)
    with pytest.raises(TimeoutError, match="not done after"):
        execute([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, limit=0.3)


def test_ours_is_measured_where_no_peer_is_there(alignment: Alignment, tmp_path: Path) -> None:
    options = argparse.Namespace(
        alignment=alignment.source, groups=("parsimony", "likelihood", "lengths", "proposals", "training"),
        without=("phylogfn", "mrbayes", "iq-tree", "raxml", "phylip"), seconds=0.01, limit=10.0,
    )  # fmt: skip
    with ExitStack() as stack:
        groups = [measure(group, 2, 0.01) for group in Bench(options, tmp_path, stack).groups()]
    assert [len(group["contenders"]) for group in groups] == [1, 1, 1, 1, 1, 1, 1, 2]  # type: ignore[arg-type]
    assert all(group["left_out"] for group in groups)
    assert all(min(each["rates"]) > 1 for group in groups for each in group["contenders"])  # type: ignore[attr-defined]


def test_agreement_is_perfect_with_itself_and_total_variation_is_one_between_strangers() -> None:
    one, other = sample(FIRST, FIRST, FIRST), sample(SECOND, SECOND)
    same = agreement(one, [one])
    assert (same.topology_distance, same.split_deviation, same.covered, same.draws) == (0.0, 0.0, 1.0, 3)
    apart = agreement(one, [other])
    assert (apart.topology_distance, apart.covered) == (1.0, 0.0)
    assert apart.split_deviation == pytest.approx(1 / math.sqrt(2))
    halves = agreement(one, [one, other], effective=0.5)
    assert (halves.topology_distance, halves.draws) == (0.5, 2)


def test_the_first_part_of_a_chain_is_compared_without_its_burn_in_at_its_share_of_the_time(tmp_path: Path) -> None:
    # The first 8 of 32 trees are off; then the chain is where it should be.
    files = [chain(tmp_path / f"x.run{run}.t", [SECOND] * 8 + [FIRST] * 24) for run in (1, 2)]
    (tmp_path / "x.log").write_text("      Analysis used 12.50 seconds of CPU time\n")
    theirs = MrBayes(files, TAXA, None)
    assert theirs.cpu == 12.5
    whole = theirs.after(1.0, sample(FIRST))
    assert whole is not None
    assert (whole[0], whole[1].topology_distance, whole[1].draws) == (12.5, pytest.approx(0), 48)
    half = theirs.after(0.5, sample(FIRST))  # 16 trees of each, of which 12 count, 4 of them off
    assert half is not None
    assert (half[0], half[1].topology_distance) == (6.25, pytest.approx(1 / 3))
    alone = theirs.after(0.5, None)  # each run with the other's whole, at the cost of one run
    assert alone is not None
    assert (alone[0], alone[1].topology_distance) == (3.125, pytest.approx(1 / 3))
    assert theirs.after(0.05, None) is None


def test_a_table_of_topologies_reads_by_name_and_by_number(tmp_path: Path) -> None:
    named, numbered = tmp_path / "named.tsv", tmp_path / "numbered.tsv"
    named.write_text(f"# exact\n0.75\t-3.5\t{FIRST}\n0.25\t-4.5\t{SECOND}\n")
    numbered.write_text("# taxa e d c b a\n0.75\t(5,(4,3),(2,1));\n0.25\t(5,(4,2),(3,1));\n")
    for path in (named, numbered):
        found = agreement(reference_trees(path, TAXA), [sample(FIRST, FIRST, FIRST, SECOND)])
        assert found.topology_distance == pytest.approx(0)


def test_known_values_agree_with_each_other_where_methods_are_precise() -> None:
    for name, each in KNOWN.items():
        assert known(each.taxa, each.sites) == (name, each.values)
        precise = [value for source, (value, spread) in each.values.items() if spread < 0.2 and "bins" not in source]
        assert max(precise) - min(precise) < 0.3
    assert known(3, 7) == ("", {})


def test_pages_show_ratios_and_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    rows = [
        {"name": "ours", "note": "", "agreement": None, "rates": [200.0, 400.0, 300.0]},
        {"name": "theirs", "note": "", "agreement": [-0.01, 0.02, 7], "rates": [100.0, 100.0, 100.0]},
    ]
    groups = [{"title": "Trees", "unit": "trees", "note": "", "left_out": ["X: not there"], "contenders": rows}]
    data = {"name": "five", "taxa": 5, "sites": 10, "patterns": 9}
    path.write_text(json.dumps({"provenance": FACTS, "load": [1, 1], "alignment": data, "rounds": 3, "seconds": 1,
                                "trees_at_once": 9, "groups": groups, "peers": {}}))  # fmt: skip
    page = phylogeny_speed_report.write_report(path).read_text()
    assert "| theirs | 100 (100 to 100) | 3.00 (2.00 to 4.00) | -0.01 to 0.02 (7 trees) |" in page
    assert "- X: not there" in page


def test_the_page_of_a_posterior_has_curves_by_time(tmp_path: Path) -> None:
    path = tmp_path / "posterior.json"
    row = {"split_deviation": 0.02, "largest_deviation": 0.1, "topology_distance": 0.3, "floor": 0.1, "covered": 0.9,
           "topologies": 4, "draws": 9}  # fmt: skip
    evidence = {"log_marginal_likelihood": -10.0, "interval": 0.1, "effective": 0.5, "draws": 9}
    ours = {"iterations": 5, "trajectories": 50, "training_wall": 2.0, "training_cpu": 1.5, "drawing_cpu": 1.0,
            "evidence": evidence, "weighted": row, "drawn": row}  # fmt: skip
    ours["curve"] = [{"cpu": float(k), "evidence": evidence, "weighted": row} for k in (1, 2)]
    ours["metrics"] = [{"iteration": 5, "seconds": 2.0, "eval/log_z_estimate": -10.5, "eval/log_z_interval": 0.25,
                        "eval/effective_sample_size": 0.125}]  # fmt: skip
    theirs = {"cpu": 4.0, "runs": 2, "agreement": row, "curve": [{"cpu": float(k), **row} for k in (1, 4)]}
    path.write_text(json.dumps({"provenance": FACTS, "load": 1, "samples": 9, "target": "golden", "known": {},
                                "alignment": {"name": "five", "taxa": 5, "sites": 10}, "headwater": ours,
                                "mrbayes": theirs}))  # fmt: skip
    page = phylogeny_posterior_report.write_report(path).read_text()
    assert "| Headwater, with importance weights | 0.0200 | 0.1000 | 0.3000 | 0.1000 | 0.9000 | 4 | 9 |" in page
    assert "| 2.0 | Headwater | 0.0200 | 0.3000 | 0.9000 | -10.00 +- 0.10 | 50.0% |" in page
    assert "| 5 | 2 | -10.50 +- 0.25 | 12.5% |" in page
    assert page.count("![") == 2
    assert all((tmp_path / f"posterior-{tail}.svg").is_file() for tail in ("topologies", "splits"))
