"""The tables of results/diffusion-lattice.json and diffusion-digits.json, as pages that are read alone.

python benchmarks/diffusion_linear_report.py lattice digits
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""97.5 % quantiles of Student's t by degrees of freedom."""

INTRODUCTION = {
    "lattice": """# One sampler for all measurements: mixtures on a lattice

Can relative trajectory balance learn q(x | y) for every y at once, so that it is as good as exact draws under
measurements that it has not seen? The prior is a mixture of 25 Gaussians in 2, 8 and 80 dimensions (Cardoso et al.
2023, arXiv 2308.07983), its chain has 50 steps of learned variance and the closed-form denoiser, and y is linear with
Gaussian noise (1, 4 and 4 numbers). So posterior, log Z(y) and modes are known exactly, and what is seen is the error
of learning alone.

The sampler adds a correction to the prior's prediction: a residual network of width 128 that sees the state, y, the
prior's predicted data and how far Bayes' rule would move them. It learns from 20,000 simulated pairs (x, y), first the
likelihood of chains that are walked back from x, with no call of the reward (the row *imitation alone*), then by
log-partition variance in groups of four chains of one y, one of them walked back from x and three its own (the row
*learned*). Each training is looked at under three measurements that were not among the pairs; log Z(y) and coverage are
over 100 others, 64 draws each.
""",
    "digits": """# Handwritten digits of which little is seen

Can a sampler of one posterior be learned where importance resampling of the prior fails? The prior is a kernel density
of 1,347 digits of 8 x 8 pixels (deviation 0.3), its chain has 25 steps of learned variance and the closed-form
denoiser; what is seen is the top row of pixels, or 8 random projections, with noise of deviation 0.1. Posterior, log Z
and the shares of the ten classes are known exactly. Every seed is another measurement, of another digit.

The sampler adds a correction to the prior's prediction: a residual network of width 128 that sees the state, the
prior's predicted data and how far Bayes' rule would move them. Draws of the prior have almost no weight here, so
chains are walked back from 2,000 draws of twisted SMC, which need not be right: half of each batch of 128. The other
half are the sampler's own, by log-partition variance (the row *learned*), after a short time by the likelihood of the
former alone (the row *imitation alone*).
""",
}

COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "sliced W": lambda row: _first(row, "sliced_wasserstein"),
    "its floor": lambda row: _floor(row),
    "TV": lambda row: row.get("total_variation"),
    "log Z off by": lambda row: _away(row, "log_z"),
    "lower bound off by": lambda row: _away(row, "lower"),
    "ESS": lambda row: row.get("effective_sample_size"),
    "chi²": lambda row: row.get("chi_squared"),
    "log Z(y) rms": lambda row: row.get("log_z_over_measurements"),
    "coverage off": lambda row: row.get("coverage_largest"),
    "reward calls": lambda row: row.get("reward_calls"),
    "CPU s": lambda row: row.get("seconds"),
}


def report(what: str) -> str:
    content = json.loads((RESULTS / f"diffusion-{what}.json").read_text())
    rows: list[Row] = [row for row in content["rows"] if "failed" not in row]
    rows = [each for row in rows for each in (row, _weighed(row)) if each]
    lines = [INTRODUCTION[what]]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        of_problem = [row for row in rows if row["problem"] == problem]
        lines += [f"## {problem}", "", _table(of_problem), "", *_goals(what, of_problem), ""]
        lines += [_failures(content["rows"], problem)]
    made = content["provenance"]
    lines += [
        "## How to read it",
        "",
        "Means over measurements, with 95 % intervals (Student's t) where there are several. *sliced W*: 2-Wasserstein "
        "distance of 1,000 draws to 1,000 exact ones over 200 directions; *its floor*: between two exact sets. "
        "*TV*: of the shares of modes (lattice) or classes (digits). *log Z off by*: of the reweighted estimate, in "
        "nats, absolute; *lower bound off by* the same of the bound. *ESS*: of 1,000 draws, or of all draws of "
        "resampling. *weighed*: the same draws resampled by the weights of their chains, which costs 1,000 reward "
        "calls. *chi²*: per measured number. *log Z(y) rms*: over 100 measurements; *coverage off*: largest difference "
        "from the diagonal over these, 0.087 expected of exact draws. *reward calls* and *CPU s* hold training, which "
        "is done once for all y on the lattice. Resampling draws exactly from the prior, which costs no chain: its "
        "seconds flatter it. DPS has the best of three step sizes by the very figure shown. Guidance is limited in how "
        "far a step may move the predicted data (10 on the lattice, 1 on digits).",
        "",
        f"    {made['command']}",
        "",
        f"{made['cpu']}, one thread of {made['cores']} shared cores, torch {made['versions']['torch']}; "
        f"{made['date']}, commit {made['commit'][:12]}.",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _table(rows: list[Row]) -> str:
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if not name.startswith("DPS")]
    scales = [name for name in dict.fromkeys(row["contender"] for row in rows) if name.startswith("DPS")]
    if scales:
        best = min(scales, key=lambda name: _mean(rows, name, "sliced W"))
        names.insert(names.index("pseudo-inverse"), best)
    columns = [name for name in COLUMNS if any(COLUMNS[name](row) is not None for row in rows)]
    lines = ["| sampler | n | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name in names:
        mine = [row for row in rows if row["contender"] == name]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(_cell(mine, column) for column in columns) + " |")
    return "\n".join(lines)


def _cell(rows: list[Row], column: str) -> str:
    values = [value for row in rows if (value := COLUMNS[column](row)) is not None and math.isfinite(value)]
    if not values:
        return ""
    mean, count = sum(values) / len(values), len(values)
    if column in ("reward calls", "CPU s", "ESS"):
        return f"{mean:,.0f}"
    if count == 1 or column == "its floor":
        return f"{mean:.3f}"
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return f"{mean:.3f} ± {STUDENT[count - 1] * spread:.3f}"


def _goals(what: str, rows: list[Row]) -> Iterable[str]:
    """Which of the goals that were set beforehand are met, by these figures."""

    def said(goal: str, value: float, met: bool) -> str:
        return f"- {goal}: {value:.3g}, {'met' if met else '**missed**'}."

    if what == "digits":
        for name in ("learned", "learned, weighed"):
            value = _mean(rows, name, "TV")
            yield said(f"{name}: TV of classes at most 0.10", value, value <= 0.10)
        value = _mean(rows, "learned", "log Z off by")
        yield said("log Z within 0.5", value, value <= 0.5)
        return
    for name in ("learned", "learned, weighed"):
        value = _mean(rows, name, "sliced W") / _mean(rows, name, "its floor")
        yield said(f"{name}: sliced W at most twice its floor", value, value <= 2)
    value = _mean(rows, "learned", "log Z(y) rms")
    yield said("log Z(y) within 0.3 nats, rms over 100 measurements", value, value <= 0.3)
    for other in ("resampling", "resampling as learned", "DPS"):
        names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name.startswith(other)]
        names = [other] if other in names else names
        theirs = min(_mean(rows, name, "sliced W") for name in names)
        ours, weighed = (_mean(rows, name, "sliced W") for name in ("learned", "learned, weighed"))
        text = (
            f"- sliced W against {theirs:.3g} of {other}: {ours:.3g} as drawn, {'' if ours < theirs else 'not '}better"
        )
        yield f"{text}; {weighed:.3g} weighed, {'' if weighed < theirs else 'not '}better."


def _failures(rows: list[Row], problem: str) -> str:
    failed = [
        f"{row['contender']} (seed {row['seed']})" for row in rows if row["problem"] == problem and "failed" in row
    ]
    return f"Diverged: {', '.join(failed)}.\n" if failed else ""


def _weighed(row: Row) -> Row | None:
    if "sliced_wasserstein_weighed" not in row or row["contender"] == "closed form":
        return None
    kept = ("problem", "seed", "effective_sample_size")
    figures = {name: row[f"{name}_weighed"] for name in ("sliced_wasserstein", "total_variation")}
    return {name: row[name] for name in kept} | figures | {"contender": f"{row['contender']}, weighed"}


def _mean(rows: list[Row], contender: str, column: str) -> float:
    values = [COLUMNS[column](row) for row in rows if row["contender"] == contender]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _first(row: Row, name: str) -> float | None:
    return row[name][0] if name in row else None


def _floor(row: Row) -> float | None:
    return row["sliced_wasserstein"][1] if "sliced_wasserstein" in row else None


def _away(row: Row, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or "log_z_exact" not in row else abs(value - row["log_z_exact"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=INTRODUCTION)
    for what in parser.parse_args().what:
        (RESULTS / f"diffusion-{what}.md").write_text(report(what))


if __name__ == "__main__":
    main()
