"""Writes the reports of the commands on phase retrieval, latents and visibilities from their results.

python benchmarks/diffusion_inverse_report.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from diffusion_learning import RESULTS, Figures, interval, number, read, table

LOG_Z = {
    "log_z_away": "log Z reweighted, off by",
    "below": "lower bound, off by",
    "above": "upper bound, off by",
    "effective_sample_size": "ESS",
    "seconds": "CPU s of training",
}
COST = {
    "reward_calls": "objects scored",
    "gradient_calls": "gradients of log r",
    "effective_sample_size": "ESS",
}


PHASE_PROBLEM = """\
y = |F x|² + noise, with the discrete transform of a vector of 2 or 16 numbers padded to twice its length, does not
change where x is negated or mirrored. The prior is a mixture of 16 Gaussians: 4 objects, each with all of its four
images under these symmetries, with weights 4 : 3 : 2 : 1 (x, -x, mirrored x, its negative). So the posterior has
modes in just this proportion, whatever y. The other figures are held against a sum over a grid (2 dimensions) or
importance sampling of 200,000 draws from Gaussians at all modes (16 dimensions; its error of log Z is at most 0.01)."""
PHASE_SAMPLERS = """\
The sampler is trained for one measurement by relative trajectory balance on the prior's closed form, chains of 20
steps, with the gradient of log r at the predicted data as an input. DPS has the step size of those tried that comes
nearest to the exact draws by sliced Wasserstein distance, which no user could know. Resampling weighs 300,000 exact
draws of the prior. Chains weighted: the sampler's own draws resampled by the weights of their chains. A cell is the
mean over measurements with its 95 % interval."""
PHASE_DPS = """\
- DPS does not collapse to one of the modes, as it was expected to: each chain takes one, but chains start anywhere,
  and the prior leads as many to each as it should. Its error is in the widths, the components and, in 16 dimensions,
  in how many of its chains fit the data at all."""
LATENT_PROBLEM = """\
A prior draws latents z, a decoder makes the object, and p(z | y) ∝ p(z) p(y | decode(z)) is wanted. *linear*: a
random linear decoder from 4 numbers to 16 of which 3 are measured with noise 0.3, and a mixture of 20 Gaussians as
the prior; everything has a closed form, and total variation is over the components' weights. *digits*: an autoencoder
with 2 latents trained on 1,347 of scikit-learn's 8 x 8 digits (`headwater.diffusion.latent_fitting`), the density of
their latents as the prior, and the means of a digit's four quarters measured with noise 0.1; the truth is a sum over
600 x 600 cells, and total variation is over 24 x 24 of them."""
LATENT_SAMPLERS = """\
Latent DPS is `guidance.dps` with the decoder in the likelihood, at the step size of least total variation of those
tried, which no user could know. The sampler is trained for one measurement by relative trajectory balance on the
prior's closed form, chains of 20 steps. Resampling weighs 300,000 exact draws of the prior; in so few dimensions it
is right, and cheap: these problems are here since their truth is known. A cell is the mean over measurements with its
95 % interval."""
ARRAY_PROBLEM = """\
Five stations make 10 baselines, and 10 hours 100 points (u, v) of the Fourier transform of an 8 x 8 image, by direct
sums (`transforms.Fourier`); each part of a visibility has noise of deviation 2.5, beside visibilities of 0.3 to 30.
The prior is a mixture of eight crescents, bright in eight directions with weights 1 to 8, with smooth Gaussian
variation around each. *complex*: both parts are measured, and the posterior has a closed form. *amplitudes*: only
absolute values are, which an image shares with its point reflection, so that the posterior has two modes in the
proportion of the prior's weights; the truth is importance sampling of 200,000 draws from Gaussians at all modes,
whose log Z has a standard error of at most 0.02."""
ARRAY_SAMPLERS = """\
Chains of 30 steps draw the image's 64 standardised coordinates, turned to the directions that the array sees each by
itself. The sampler is trained for one measurement by relative trajectory balance on the prior's closed form from the
step that Bayes' rule says of one Gaussian (pseudo-inverse guidance) on. DPS has the step size of those tried that is
nearest to the exact draws by sliced Wasserstein distance. Resampling weighs 300,000 exact draws of the prior.
Coverage: 2,000 draws of the exact posterior in the place of truths, each against 64 of the sampler's, by balls around
other exact draws (TARP); the largest difference from the level. A cell is the mean over measurements with its 95 %
interval."""
ARRAY_PICTURE = """\
![Truth, samples, their mean and deviation, and those of exact draws](diffusion-visibilities.png)"""
ARRAY_CAPTION = """\
Above from complex visibilities, below from amplitudes alone, where samples are of both modes and their mean is of
neither."""


def with_bounds(row: Figures) -> Figures:
    """The row with what its bounds are off by, and what its weights correct by name."""
    known = row.get("log_z_exact")
    more: Figures = {}
    if known is not None:
        more = {name: number(row[of]) - number(known) for name, of in (("below", "lower"), ("above", "upper"))}
    corrected = row.get("corrected")
    if isinstance(corrected, dict):
        more |= {f"{name}_corrected": value for name, value in corrected.items() if isinstance(value, float)}
    return row | more


def goal(rows: list[Figures], name: str, met: Callable[[float], bool]) -> str:
    """How many rows keep the goal, with the worst of them."""
    values = [number(row[name]) for row in rows]
    good = sum(map(met, values))
    return f"{good} of {len(values)} measurements ({', '.join(f'{value:.3f}' for value in values)})"


def phase(rows: list[Figures]) -> list[str]:
    ours = [row for row in rows if row["sampler"] == "trained"]
    by = ("dimensions", "sampler")
    masses = {
        "mass_error": "largest error of a mode's mass",
        "mass_error_corrected": "the same, chains weighted",
        "sign_error": "error of a sign's mass",
        "total_variation": "TV of 16 components",
        "total_variation_corrected": "the same, chains weighted",
        "total_variation_floor": "its floor",
        "sliced_wasserstein": "sliced W",
        "sliced_wasserstein_floor": "its floor",
    }
    return [
        "# Phase retrieval: modes that no measurement tells apart",
        "",
        PHASE_PROBLEM,
        "",
        PHASE_SAMPLERS,
        "",
        *table(rows, by, masses),
        "",
        "## log Z and cost",
        "",
        *table(rows, by, LOG_Z | COST),
        "",
        "## Against the goals",
        "",
        *(
            f"- {dimensions} dimensions, every symmetric mode's mass within 0.05: "
            + goal([row for row in ours if row["dimensions"] == dimensions], "mass_error", lambda it: it <= 0.05)
            for dimensions in dict.fromkeys(row["dimensions"] for row in ours)
        ),
        PHASE_DPS,
    ]


def latent(rows: list[Figures]) -> list[str]:
    ours = [row for row in rows if row["sampler"] == "trained"]
    by = ("problem", "sampler")
    columns = {
        "total_variation": "total variation",
        "total_variation_corrected": "the same, chains weighted",
        "total_variation_floor": "its floor",
        "sliced_wasserstein": "sliced W",
        "sliced_wasserstein_floor": "its floor",
    }
    theirs = [row for row in rows if row["sampler"] == "latent DPS"]
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        one, two = ([row for row in some if row["problem"] == problem] for some in (ours, theirs))
        lines += [
            f"- {problem}, trained sampler at most 0.1: {goal(one, 'total_variation', lambda it: it <= 0.1)}",
            f"- {problem}, latent DPS 0.3 or more, as was expected of it: "
            f"{goal(two, 'total_variation', lambda it: it >= 0.3)}",
        ]
    return [
        "# Posteriors in a latent space",
        "",
        LATENT_PROBLEM,
        "",
        LATENT_SAMPLERS,
        "",
        *table(rows, by, columns),
        "",
        "## log Z and cost",
        "",
        *table(rows, by, LOG_Z | COST),
        "",
        "## Against the goals",
        "",
        *lines,
    ]


def visibilities(rows: list[Figures]) -> list[str]:
    ours = [row for row in rows if row["sampler"] == "trained"]
    by = ("visibilities", "sampler")
    fit = {
        "chi_squared": "chi² per value",
        "chi_squared_exact": "exact draws'",
        "ratio": "ratio",
        "coverage_off": "coverage off by",
        "coverage_off_floor": "exact draws'",
        "mass_off": "a half's mass off by",
        "total_variation": "TV of 8 directions",
        "total_variation_floor": "its floor",
        "sliced_wasserstein": "sliced W",
        "sliced_wasserstein_floor": "its floor",
    }
    weighted = {f"{name}_corrected": title for name, title in fit.items() if "floor" not in name and name != "ratio"}
    weighted.pop("chi_squared_exact_corrected")
    lines = []
    for kind in dict.fromkeys(row["visibilities"] for row in ours):
        some = [row for row in ours if row["visibilities"] == kind]
        lines += [
            f"- {kind}, chi² over the exact posterior's own in 0.95 to 1.05: "
            + goal(some, "ratio", lambda it: 0.95 <= it <= 1.05),
            f"- {kind}, coverage within 5 points: " + goal(some, "coverage_off", lambda it: it <= 0.05),
            f"- {kind}, log Z reweighted within 0.5: " + goal(some, "log_z_away", lambda it: abs(it) <= 0.5),
        ]
    return [
        "# Imaging from the visibilities of a rotating array",
        "",
        ARRAY_PROBLEM,
        "",
        ARRAY_SAMPLERS,
        "",
        *table(rows, by, fit),
        "",
        "The trained sampler's draws resampled by the weights of their chains:",
        "",
        *table(ours, by, weighted),
        "",
        "## log Z and cost",
        "",
        *table(rows, by, LOG_Z | COST),
        "",
        "## Against the goals",
        "",
        *lines,
        "",
        "## Pictures",
        "",
        ARRAY_PICTURE,
        "",
        ARRAY_CAPTION,
    ]


def picture(rows: list[Figures], path: Path) -> None:
    """The first measurement of each kind: a few kB."""
    ours = [row for row in rows if row["sampler"] == "trained" and row["seed"] == 0]
    figure, axes = plt.subplots(len(ours), 9, figsize=(9, 1.15 * len(ours)), squeeze=False)
    for line, row in zip(axes, ours, strict=True):
        shown = json.loads(json.dumps(row["pictures"]))
        brightness = [shown["truth"], *shown["samples"], shown["mean"], shown["exact mean"]]
        tiles = [*brightness[:6], shown["deviation"], brightness[6], shown["exact deviation"]]
        titles = ["truth", *["sample"] * 4, "mean", "deviation", "exact mean", "exact dev."]
        low, high = min(map(min, brightness)), max(map(max, brightness))
        widest = max(max(shown["deviation"]), max(shown["exact deviation"]))
        for axis, tile, title in zip(line, tiles, titles, strict=True):
            limits = (0.0, widest) if "dev" in title else (low, high)
            axis.imshow(np.reshape(tile, (8, 8)), cmap="inferno", vmin=limits[0], vmax=limits[1])
            axis.set_title(title, fontsize=7)
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_report(output: Path, lines: list[str]) -> None:
    """The lines beside the results, with the command and the machine that gave them at the end."""
    source = json.loads(output.read_text())["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    machine = (
        f"{source['cpu']}, one thread beside other work; Python {source['python']}, {versions}; "
        f"commit {source['commit'][:7]}, {source['date']}."
    )
    text = "\n".join([*lines, "", "## Command and machine", "", f"    {source['command']}", "", machine, ""])
    output.with_suffix(".md").write_text(text)


def main() -> None:
    for name, report in (("phase", phase), ("latent", latent), ("visibilities", visibilities)):
        output = RESULTS / f"diffusion-{name}.json"
        rows = [with_bounds(row) for row in read(output)]
        for row in rows:
            if "chi_squared" in row:
                row["ratio"] = number(row["chi_squared"]) / number(row["chi_squared_exact"])
        if rows:
            write_report(output, report(rows))
            if name == "visibilities":
                picture(rows, output.with_suffix(".png"))
            print(name, len(rows), interval(number(row["seconds"]) for row in rows if "seconds" in row), "s")


if __name__ == "__main__":
    main()
