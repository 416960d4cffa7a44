"""Digits under a classifier: one digit, or the even ones, beside exact draws of the same posterior.

    python benchmarks/diffusion_classifier.py

The prior is the closed-form chain of the kernel density of scikit-learn's digits. The reward is a classifier's
probability, at most 1, so that draws of the prior kept with that probability are exact draws of the posterior. Writes
results/diffusion-classifier.json and .md; a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_rows import Figures, Rows, cell, machine, over_seeds, run_to_the_end, table
from headwater.conditions import NoCondition
from headwater.diffusion.chains import draw_chains
from headwater.diffusion.denoisers import Denoiser, ResidualMLP, time_features
from headwater.diffusion.digits import CLASSES, SHAPE, Digits, digits_prior, load_digits
from headwater.diffusion.estimators import log_z_estimates, resample
from headwater.diffusion.guidance import Draws, dps, lgd_mc, prior_draws
from headwater.diffusion.likelihoods import ClassifierLikelihood
from headwater.diffusion.measures import class_shares, effective_number, mean_discrepancy, total_variation
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser, step_numbers
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.process import GaussianProcess
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training

RESULTS = Path(__file__).parent / "results"
STEPS, IMAGES = 20, 150
PRIOR_DRAWS = 10_000
DRAWS, FEW = 2000, 500
BATCH = 32
WIDTH, BLOCKS = 128, 2
LARGEST_MOVE = 2.0
"""Of a pixel of the predicted data, by the gradient."""

EVEN, ODD = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)
Task = Literal["digit 3", "even, sum", "even, maximum"]
TASKS: tuple[Task, ...] = ("digit 3", "even, maximum", "even, sum")


class Guided(Denoiser):
    """A posterior that follows the reward's gradient: what the prior says, with the predicted data moved along the
    gradient of log r(x^) in the state as far as DPS moves them, times a factor that is learned as a function of time
    and log r(x^); and a network that is told the same adds to all. Where it starts is not the prior, but DPS.

    The closed-form prior and its gradient are costly and never change: they are remembered of the states asked last.
    """

    condition = 0

    def __init__(self, prior: Remembering, process: GaussianProcess, likelihood: ClassifierLikelihood) -> None:
        super().__init__()
        self.prior, self.process, self.likelihood = prior, process, likelihood
        self.correction = ResidualMLP(SHAPE, 2, WIDTH, BLOCKS, learned_variance=True)
        self.correction.silence()
        last = nn.Linear(32, 1)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.factor = nn.Sequential(nn.Linear(66, 32), nn.SiLU(), last)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        said, pulled, log_r = self.prior.with_pull(state, time, condition, self.process, self.likelihood)
        told = torch.stack((log_r.clamp(min=-30) / 10, log_r.exp()), 1)
        factor = self.factor(torch.cat((time_features(time), told), 1)).exp()[:, :, None, None]
        moved = torch.cat((factor * pulled, torch.zeros_like(pulled)), 1)
        return said + moved + self.correction(state, time, told)


class Remembering(Denoiser):
    """The closed-form prior, which is costly and is asked the same twice: by itself, and as a part of the posterior."""

    condition = 0

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.last: tuple[Tensor, Tensor] | None = None
        self.last_pull: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        if state.requires_grad:
            return self.denoiser(state, time, condition)
        if self.last is None or self.last[0] is not state:
            with torch.no_grad():
                self.last = (state, self.denoiser(state, time, condition))
        return self.last[1]

    def with_pull(
        self, state: Tensor, time: Tensor, condition: Tensor, process: GaussianProcess, likelihood: ClassifierLikelihood
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prior's prediction, how the gradient of log r changes what it says of the data, as DPS does, and log r of
        the predicted data, `[N]`."""
        if self.last is None or self.last[0] is not state or self.last_pull is None or self.last_pull[0] is not state:
            number = step_numbers(process, time)
            with torch.enable_grad():
                here = state.detach().requires_grad_()
                said = self.denoiser(here, time, condition)
                data = process.predicted_data(said, here, number)
                log_r = likelihood.log_prob(data, condition)
                (slope,) = torch.autograd.grad(log_r.sum(), here)
            alpha, sigma = (each.view(-1, 1, 1, 1) for each in process.alpha_sigma(number))
            move = (sigma.square() / alpha * slope).clamp(-LARGEST_MOVE, LARGEST_MOVE)
            first = said.detach()[:, :1]
            pulled = process.prediction_of(data.detach() + move, state, number) - first
            self.last, self.last_pull = (state, said.detach()), (state, pulled, log_r.detach())
        return self.last[1], self.last_pull[1], self.last_pull[2]

    def __deepcopy__(self, memo: dict[int, object]) -> Remembering:
        return self


@dataclass(frozen=True, eq=False)
class World:
    """The prior, the classifier, and draws of the prior's chains, `[PRIOR_DRAWS, 1, 8, 8]`, that no sampler sees."""

    process: GaussianProcess
    mixture: GaussianMixture
    denoiser: Remembering
    label: Tensor
    classifier: nn.Module
    accuracy: float
    draws: Tensor

    def likelihood(self, task: Task) -> ClassifierLikelihood:
        if task == "digit 3":
            return ClassifierLikelihood(self.classifier, group=3)
        return ClassifierLikelihood(self.classifier, 0, (EVEN, ODD), "sum" if task == "even, sum" else "maximum")


def world() -> World:
    train, held_out = load_digits()
    process = GaussianProcess.of(SHAPE, STEPS, "cosine", "noise", "learned", final_noise=0.1)
    mixture = digits_prior(Digits(train.images[:IMAGES], train.label[:IMAGES]))
    ends = mixture.noised(process.alphas[-1], process.sigmas[-1])
    denoiser = Remembering(MixtureDenoiser(mixture, process))
    classifier = fit(train.images, train.label, 0.3)
    noisy = held_out.images + 0.3 * torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(7))
    right = classifier(noisy).argmax(1) == held_out.label
    generator = torch.Generator().manual_seed(99)
    parts = torch.split(torch.empty(PRIOR_DRAWS, 0), 1000)
    draws = torch.cat([prior_draws(process, denoiser, part, generator) for part in parts])
    return World(process, ends, denoiser, train.label[:IMAGES], classifier, float(right.float().mean()), draws)


def fit(images: Tensor, label: Tensor, noise: float, steps: int = 1500) -> nn.Module:
    """A perceptron of one hidden layer that tells digits apart, with as much noise as the prior's draws have."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(classifier.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,), generator=generator)
        noisy = images[rows] + noise * torch.randn((128, *SHAPE), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(noisy), label[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier.requires_grad_(False).eval()


NONE = torch.empty(1, 0)


def kept(here: World, task: Task, seed: int) -> Tensor:
    """Exact draws of the posterior: those of the prior, each kept with probability r."""
    r = here.likelihood(task)(here.draws, NONE.expand(PRIOR_DRAWS, -1)).exp()
    uniform = torch.rand(PRIOR_DRAWS, generator=torch.Generator().manual_seed(seed))
    return here.draws[uniform < r]


def shares_of(here: World, draws: Tensor) -> Tensor:
    """Of the ten digits: `[10]`, by the mean responsibilities of the images."""
    return class_shares(here.mixture.responsibilities(draws).mean(0), here.label, CLASSES)


def diversity(draws: Tensor) -> float:
    """The mean distance of two draws."""
    return float(torch.pdist(draws[:FEW].flatten(1)).mean())


def look_at(here: World, task: Task, draws: Tensor, seed: int) -> Figures:
    """Draws beside exact ones of the same posterior; the expected log r by all draws of the prior, weighed."""
    likelihood = here.likelihood(task)
    log_r = likelihood(here.draws, NONE.expand(PRIOR_DRAWS, -1)).double()
    weight = log_r.softmax(0)
    expected = float((weight * log_r).sum())
    error = float((weight.square() * (log_r - expected).square()).sum().sqrt())
    exact, others = kept(here, task, seed), kept(here, task, seed + 500)
    target = class_shares(weight @ here.mixture.responsibilities(here.draws), here.label, CLASSES)
    ours, found = shares_of(here, draws), likelihood(draws, NONE.expand(len(draws), -1)).double()
    floor_draws = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    return {
        "log_reward": float(found.mean()),
        "log_reward_error": float(found.std() / len(found) ** 0.5),
        "log_reward_exact": expected,
        "log_reward_exact_error": error,
        "log_z_exact": float(log_r.logsumexp(0)) - float(torch.tensor(float(PRIOR_DRAWS)).log()),
        "shares": ours.tolist(),
        "shares_exact": target.tolist(),
        "shares_off": float((ours - target).abs().max()),
        "shares_total_variation": total_variation(ours, target),
        "shares_floor": total_variation(shares_of(here, floor_draws[: len(draws)]), target),
        "digits": effective_number(ours),
        "digits_exact": effective_number(target),
        "discrepancy": mean_discrepancy(draws[:FEW], exact[:FEW]),
        "discrepancy_floor": mean_discrepancy(floor_draws[-FEW:], exact[:FEW]),
        "diversity": diversity(draws),
        "diversity_exact": diversity(exact),
    }


def trained(here: World, task: Task, seed: int, iterations: int, objective: str) -> Figures:
    """balance: VarGrad with a replay that starts from draws of the prior. Else REINFORCE on own draws, with the weight
    of the divergence from the prior that is right, or with a hundredth of it."""
    torch.manual_seed(seed)
    began, balanced = time.process_time(), objective == "balance"
    likelihood = here.likelihood(task)
    policy = DiffusionPolicy(here.process, here.denoiser, Guided(here.denoiser, here.process, likelihood))
    training = Training(
        iterations=iterations, batch_size=BATCH if balanced else 2 * BATCH, replayed=BATCH if balanced else 0,
        replay_backward=balanced, learning_rate=1e-3, schedule="cosine",
    )  # fmt: skip
    trainer = Trainer(
        policy, likelihood, NoCondition(), Objective("vargrad" if balanced else "rloo"), training,
        ExplorationSettings(epsilon=0.0, average=0.98), ReplaySettings(rule="uniform", capacity=5000), seed,
        sharpness=Sharpness(0.01) if objective == "reward alone" else None,
    )  # fmt: skip
    run_to_the_end(trainer)
    sampler = trainer.sampler
    assert isinstance(sampler, DiffusionPolicy)
    seconds = time.process_time() - began
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_chains(here.process, here.denoiser, sampler.posterior, likelihood, NONE.expand(DRAWS, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward)
    calls = iterations * training.batch_size + DRAWS
    figures = look_at(here, task, drawn.objects, seed)
    return {"cpu_seconds": seconds, "reward_calls": calls} | dict(found.figures()) | figures


def guided(here: World, task: Task, seed: int, iterations: int, draw: Callable[..., Draws]) -> Figures:
    began = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    made = draw(here.process, here.denoiser, here.likelihood(task), NONE.expand(FEW, -1), generator)
    seconds = time.process_time() - began
    return {"cpu_seconds": seconds, "reward_calls": made.reward_calls} | look_at(here, task, made.objects, seed)


def resampled(here: World, task: Task, seed: int, iterations: int) -> Figures:
    """As many new draws of the prior as others give, weighed and drawn again."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.split(torch.empty(DRAWS, 0), 1000)
    draws = torch.cat([prior_draws(here.process, here.denoiser, part, generator) for part in parts])
    log_r = here.likelihood(task)(draws, NONE.expand(DRAWS, -1))
    found = log_z_estimates(torch.zeros(DRAWS), log_r)
    chosen = draws[resample(log_r, DRAWS, generator)]
    return {"reward_calls": DRAWS} | dict(found.figures()) | look_at(here, task, chosen, seed)


def rejected(here: World, task: Task, seed: int, iterations: int) -> Figures:
    """Other exact draws: the floor."""
    return look_at(here, task, kept(here, task, seed + 1000)[:DRAWS], seed)


def alone(here: World, task: Task, seed: int, iterations: int) -> Figures:
    """The prior."""
    generator = torch.Generator().manual_seed(seed)
    return look_at(here, task, prior_draws(here.process, here.denoiser, NONE.expand(DRAWS, -1), generator), seed)


def untrained(here: World, task: Task, seed: int, iterations: int) -> Figures:
    """Where training starts."""
    torch.manual_seed(seed)
    likelihood, generator = here.likelihood(task), torch.Generator().manual_seed(seed)
    denoiser = Guided(here.denoiser, here.process, likelihood)
    drawn = draw_chains(here.process, here.denoiser, denoiser, likelihood, NONE.expand(DRAWS, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward)
    return dict(found.figures()) | look_at(here, task, drawn.objects, seed)


SAMPLERS: dict[str, Callable[[World, Task, int, int], Figures]] = {
    "relative trajectory balance": partial(trained, objective="balance"),
    "REINFORCE with divergence": partial(trained, objective="with divergence"),
    "REINFORCE, a hundredth of it": partial(trained, objective="reward alone"),
    "where training starts": untrained,
    "DPS": partial(guided, draw=dps),
    "LGD-MC": partial(guided, draw=lgd_mc),
    "resampling, 2,000 calls": resampled,
    "the prior": alone,
    "exact draws": rejected,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=tuple(SAMPLERS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=1000, help="updates of training")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-classifier.json")
    asked = parser.parse_args()
    command = ["python benchmarks/diffusion_classifier.py", *sys.argv[1:]]
    rows, here = Rows(asked.output, command), world()
    print(f"classifier: {100 * here.accuracy:.1f} % of held-out digits with noise", flush=True)
    for seed in range(asked.seeds):
        for task in asked.tasks:
            for name in asked.samplers:
                key: Figures = {"task": task, "sampler": name, "seed": seed}
                rows.measure(key, partial(SAMPLERS[name], here, task, seed, asked.iterations))
    asked.output.with_suffix(".md").write_text(report(rows, here, " ".join(command)))


COLUMNS = {
    "log_reward": "mean log r", "shares_off": "largest share off by",
    "shares_total_variation": "shares' total variation",
    "digits": "digits, effectively", "discrepancy": "mean discrepancy", "diversity": "mean distance of two",
    "log_z": "log Z, reweighted", "lower": "lower bound", "effective_sample_size": "ESS of 2,000",
    "reward_calls": "reward calls", "cpu_seconds": "CPU s",
}  # fmt: skip
"""Of the tables."""


def report(rows: Rows, here: World, command: str) -> str:
    """What a reader needs."""
    parts = [[INTRODUCTION.format(accuracy=100 * here.accuracy)]]
    for task in TASKS:
        every = rows.where(task=task)
        if not every:
            continue
        known = every[0]
        parts.append(
            [
                f"## {task}",
                "",
                f"Exact: mean log r {cell(known['log_reward_exact'])} (error {cell(known['log_reward_exact_error'])}), "
                f"log Z {cell(known['log_z_exact'])}, {cell(known['digits_exact'])} digits, mean distance of two "
                f"{cell(known['diversity_exact'])}. Floors, of exact draws: in the last row.",
                "",
                *table(["sampler", *COLUMNS.values()], [
                    [name, *(over_seeds(rows.where(task=task, sampler=name), one) for one in COLUMNS)]
                    for name in SAMPLERS if rows.where(task=task, sampler=name)
                ]),
                "",
            ]
        )  # fmt: skip
    parts.append([GOALS, "", f"    {command}", "", machine(rows)])
    return "\n".join(line for part in parts for line in part) + "\n"


INTRODUCTION = """# Digits under a classifier

Does a sampler trained by relative trajectory balance draw the digits that a classifier's probability asks for, in the
prior's proportions? The prior is the closed-form chain, of 20 steps, of a kernel density of 150 of scikit-learn's
digits; the classifier tells {accuracy:.1f} % of held-out digits right, with noise as the prior's draws have it. Exact
draws: 10,000 of the prior's, each kept with probability r; the exact mean log r and shares are those of all 10,000,
weighed. Digits are told by the prior's own responsibilities; "digits, effectively" is the exponential of the entropy of
their shares. Discrepancy is the squared maximum mean discrepancy from exact draws (it may fall below 0). The trained
samplers start as DPS with a factor that is learned, and a network that adds to it.
"""
GOALS = ""


if __name__ == "__main__":
    main()
