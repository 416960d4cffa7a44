"""The page of `diffusion_speed.py`, made from its results file.

python benchmarks/diffusion_speed_report.py benchmarks/results/diffusion-speed.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from contest import OURS, spread

THROUGH_ALL, AT_ONCE, LIMITED = "autograd through all steps", OURS, "headwater, steps_at_once"
THEIR_NETWORK = "headwater, their network"
Results = dict[str, Any]
NETWORKS = {
    "plane": "25 Gaussians to 9 (`ResidualMLP`, width 128, 2 blocks; exploding noise)",
    "images": "8x8 images, top half measured (`ResidualMLP`, width 256, 3 blocks; cosine noise)",
}


def write_report(path: Path) -> Path:
    """Write the page beside the results file; returns where."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    page.write_text(
        "\n\n".join(part for part in (_head(results), _autograd(results), _torchgfn(results)) if part) + "\n"
    )
    return page


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Theirs over ours, turn by turn: median, lowest and highest."""
    found = spread([one / other for one, other in zip(theirs, ours, strict=True)])
    return f"**{found['median']:.2f}** ({found['low']:.2f} to {found['high']:.2f})"


def _head(results: Results) -> str:
    facts = results["provenance"]
    loads = [case["load"] for case in results["cases"].values() if "load" in case]
    return f"""# Speed and memory of learning a diffusion posterior

How many updates of relative trajectory balance does a second of one core make, and how much memory does one take:
beside the loop that most research code has, which keeps the graph of all T steps of a chain until one backward pass,
and beside torchgfn's relative trajectory balance?

Times are CPU seconds of one thread (torch.set_num_threads(1)), since other work ran on the machine: the load was
{min(loads, default=0):.0f} to {max(loads, default=0):.0f} on {facts["cores"]} cores. Contenders take turns, the order
reversed each time; ratios are taken turn by turn: median (lowest to highest), above 1 where ours is faster.

`{facts["command"]}`; commit {facts["commit"]}; {facts["date"]}; {facts["cpu"]}, {facts["cores"]} cores; Python
{facts["python"]}, torch {facts["versions"]["torch"]}."""


def _autograd(results: Results) -> str:
    cases = results["cases"]
    parts = []
    for kind, what in NETWORKS.items():
        rows = []
        for key, case in cases.items():
            if not key.startswith(f"autograd {kind} "):
                continue
            steps, batch = (word.split("=")[1] for word in key.split()[2:])
            cpu = case["cpu"]
            speeds = " | ".join(f"{1e3 / spread(cpu[name])['median']:.3g}" for name in (THROUGH_ALL, AT_ONCE, LIMITED))
            gains = " | ".join(ratio(cpu[THROUGH_ALL], cpu[name]) for name in (AT_ONCE, LIMITED))
            rows.append(f"| {steps} | {batch} | {speeds} | {gains} |")
        if rows:
            header = (
                "| T | batch | through all steps, updates/s | ours | ours, limited | ours over theirs | limited over "
                "theirs |\n|--:|--:|--:|--:|--:|:--|:--|"
            )
            parts.append(f"### {what}\n\n{header}\n" + "\n".join(rows))
    if not parts:
        return ""
    text = """## Beside autograd through all steps

Networks, process, objective (tb with a learned log Z), reward, Adam (fused) and clipping are the same on both sides,
and so is the gradient. The loop asks posterior and prior once at every step, the prior without a graph, and goes back
once. Ours is the ordinary `Trainer.update()`: chains are drawn without a graph, and then prior and posterior are asked
about all T x batch steps at once. "Limited" is `DiffusionPolicy(steps_at_once=1024)`: activations of 1,024 steps are
held at once, and computed again on the way back. (At T = 20 and a batch of 32 there are only 640.)

What to expect: with a pass back counted as two, the loop makes four passes through a network, ours five, and limited
six. Where the matrix products take the time, ours is therefore slower, by a factor of 0.8, and limited by 0.67; where
the cost of T small calls takes it, ours is faster, since half of its passes are few large calls. (The count leaves out
what memory traffic costs.) What the additional pass buys: chains may come from anywhere (a replay, a walk back from
data, a wider sampler, other processes), which the loop cannot learn from, and memory can be limited."""
    return "\n\n".join([text, *parts, _gradient(cases), _memory(cases)])


def _gradient(cases: Results) -> str:
    errors = {
        name: [case[name] for key, case in cases.items() if key.startswith("gradient ")] for name in (AT_ONCE, LIMITED)
    }
    if not errors[AT_ONCE]:
        return ""
    return (
        "The gradient is the same: on the same chains, with weights away from the prior's, ours differs from that "
        f"through all steps by at most {max(errors[AT_ONCE]):.1e} of its norm, and in chunks of 128 steps by "
        f"{max(errors[LIMITED]):.1e} (float32, over {len(errors[AT_ONCE])} cases)."
    )


def _memory(cases: Results) -> str:
    rows = []
    for kind in NETWORKS:
        for key, case in cases.items():
            if not key.startswith(f"memory {kind} "):
                continue
            steps, batch = key.split()[2:]
            sizes = " | ".join(f"{case[name] / 2**20:.0f}" for name in (THROUGH_ALL, AT_ONCE, LIMITED))
            rows.append(f"| {kind} | {steps[2:]} | {batch[6:]} | {sizes} | {case[THROUGH_ALL] / case[LIMITED]:.1f} |")
    if not rows:
        return ""
    return (
        "### Peak memory of an update\n\nMiB by which the peak of resident memory grows during a first update, in a "
        "fresh process that has made one of two chains of two steps before. With limited activations it still grows "
        "with T, since states and a few numbers of every step are kept, but far more slowly.\n\n"
        "| | T | batch | through all steps | ours | ours, limited | through all steps over limited |\n"
        "|:--|--:|--:|--:|--:|--:|--:|\n" + "\n".join(rows)
    )


def _torchgfn(results: Results) -> str:
    rows, about = [], {}
    for key, case in results["cases"].items():
        if not key.startswith("torchgfn "):
            continue
        steps, batch = (word.split("=")[1] for word in key.split()[1:])
        about, cpu = case["about"], case["cpu"]
        times = " | ".join(f"{spread(cpu[name])['median']:.1f}" for name in ("torchgfn", OURS, THEIR_NETWORK))
        gains = " | ".join(ratio(cpu["torchgfn"], cpu[name]) for name in (OURS, THEIR_NETWORK))
        rows.append(f"| {steps} | {batch} | {times} | {gains} |")
    if not rows:
        return ""
    count = {name: f"{about[name]['parameters']:,}" for name in about}
    theirs = about["torchgfn"]["versions"]
    return f"""## Beside torchgfn

25 Gaussians to 9 with torchgfn {theirs["torchgfn"]} (torch {theirs["torch"]}, {results["peer"]["address"]}, commit
{results["peer"]["commit"][:12]}), whose own training script for this task has T = 100 and a batch of 500. The loop is
that of the script, without logging. On both sides: a pinned Brownian motion of variance 20 at its end, prior and
posterior two networks of one shape, trajectory balance with a learned log Z, Adam at 0.001 and 0.1 for log Z, fresh
chains of the posterior in every iteration.

Their network has {count["torchgfn"]} parameters. Ours is tried with a network of the same layers and sizes
({count[THEIR_NETWORK]}), and with our own `ResidualMLP`, width 64, one block of two layers ({count[OURS]}), which
embeds each different time once, not once for each chain. What differs: their last step is an exit, so that T - 1 of
their T steps have a Gaussian law where T of ours have; ours clips gradients, and computes the reward in double
precision.

| T | batch | torchgfn, ms | ours, ms | ours, their network, ms | torchgfn / ours | torchgfn / ours, their network |
|--:|--:|--:|--:|--:|:--|:--|
""" + "\n".join(rows)


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
