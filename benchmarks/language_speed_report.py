"""The page of `language_speed.py`: `python benchmarks/language_speed_report.py results/language-speed.json` writes it
again, next to the file.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
OURS = "headwater"


def write_report(path: Path) -> Path:
    """Write the tables beside the results file at `path`. Returns the page."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    page.write_text("\n\n".join([_head(results, path), *(_group(group) for group in results["groups"])]) + "\n")
    return page


def _head(results: Row, path: Path) -> str:
    facts, about = results["provenance"], results["groups"][0]["about"]
    sides = (
        f"{name} with " + ", ".join(f"{package} {number}" for package, number in said["versions"].items())
        for name, said in about.items()
    )
    where = (
        f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores, shared with other work (load {results['load'][0]} "
        f"at the start, {results['load'][1]} at the end); {facts['system']}, Python {facts['python']}; "
        f"{'; '.join(sides)}; ours at {facts['commit'][:10]}. All numbers: `{path.name}`."
    )
    how = (
        f"{results['prompts']} prompts an iteration, {results['completions']} completions each, at most "
        f"{results['max_new_tokens']} new tokens, temperature 1, float32, from the same weights, which stand still. "
        f"Median of {results['rounds']} rounds (lowest to highest); in a round each has a turn of "
        f"{results['iterations']} iteration{'s' * (results['iterations'] > 1)} on the same cores, and a ratio is taken "
        "within the round: above 1 where ours is faster. TRL's trainer runs its own loop, without logging, "
        "checkpoints, recomputed activations or half precision, with the reference model that our objective needs "
        "too. Sampling is the generation of tokens alone; a learner step is forward, backward and optimizer; an "
        "iteration adds the reference's log-probabilities and the reward. Seconds are of wall-clock time; the ratio "
        "stands for CPU time too, which what else runs on the machine disturbs less."
    )
    command = "    " + facts["command"]
    return "\n\n".join(["# Language models: sampling and learning beside TRL", command, _filled(where), _filled(how)])


def _group(group: Row) -> str:
    ours, peers = group["turns"][OURS], {name: turns for name, turns in group["turns"].items() if name != OURS}
    kind = ", random weights" if group["random_weights"] else ""
    lengths = ", ".join(
        f"{sum(turn['tokens'] for turn in turns) / sum(turn['iterations'] for turn in turns):,.0f} ({name})"
        for name, turns in group["turns"].items()
    )
    lines = [
        f"## {group['model']}{kind}, {group['threads']} thread{'s' * (group['threads'] > 1)}",
        "",
        f"Tokens an iteration: {lengths}.",
        "",
        "| | " + " | ".join([OURS, *peers, "ratio, wall", "ratio, CPU"]) + " |",
        "|-" * (4 + len(peers)) + "|",
    ]
    measures = (
        ("sampling, tokens a second", _rate, 1),
        ("learner step, seconds", _seconds("learning"), -1),
        ("iteration, seconds", _seconds("iteration"), -1),
    )
    for title, measure, better in measures:
        cells = [title, _spread([measure(turn, "wall") for turn in ours])]
        cells += [_spread([measure(turn, "wall") for turn in turns]) for turns in peers.values()]
        for clock in ("wall", "cpu"):
            cells.append(
                " / ".join(
                    _spread(
                        [
                            (measure(mine, clock) / measure(other, clock)) ** better
                            for mine, other in zip(ours, turns, strict=True)
                        ]
                    )
                    for turns in peers.values()
                )
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(turn: Row, clock: str) -> float:
    return float(turn["tokens"] / turn[clock]["sampling"])


def _seconds(part: str):  # type: ignore[no-untyped-def]
    def seconds(turn: Row, clock: str) -> float:
        return float(turn[clock][part] / turn["iterations"])

    return seconds


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _spread(values: list[float]) -> str:
    return f"{_short(median(values))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
