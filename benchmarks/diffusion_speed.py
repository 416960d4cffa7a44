"""How fast a diffusion posterior learns, and in how much memory: beside autograd through all steps of a chain, and
beside torchgfn's relative trajectory balance.

    python benchmarks/diffusion_speed.py                         # all parts; about half an hour of one core
    python benchmarks/diffusion_speed.py --parts autograd --rounds 3

One thread. What is compared takes turns, and a ratio is taken turn by turn. Writes results/diffusion-speed.json after
each case, and leaves out cases that are there already; diffusion-speed.md is made from it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from contenders.protocol import Task
from contest import OURS, Runtime, Worker
from diffusion_speed_report import AT_ONCE, LIMITED, THEIR_NETWORK, THROUGH_ALL, write_report
from headwater.adam import clip_gradient
from headwater.conditions import NoCondition
from headwater.diffusion.denoisers import ResidualMLP
from headwater.diffusion.policy import STATE, DiffusionPolicy
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.targets import DensityRatio, nine_of_twenty_five, twenty_five
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.reward import Reward
from headwater.training import Trainer, Training
from peers import PEERS, install
from provenance import load, provenance

HERE = Path(__file__).resolve().parent
PATH = HERE / "results" / "diffusion-speed.json"
PARTS = ("autograd", "memory", "torchgfn")
LIMIT = 1024
"""Steps whose activations are held at once, of `LIMITED`."""
TRAINING = Training(iterations=1_000_000, schedule="constant")
VARIANCE = 20.0
"""Of the pinned Brownian motion at its end: torchgfn's script has sigma 2 and a scale of 5."""
Update = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A chain to learn: 25 Gaussians to 9 by a small network, or 8x8 images of which the top half is seen, by a larger
    one."""

    images: bool
    steps: int
    batch: int

    @property
    def process(self) -> GaussianProcess:
        if self.images:
            return GaussianProcess.of((1, 8, 8), self.steps, "cosine", final_noise=0.1)
        return GaussianProcess.of((2,), self.steps, "exploding", largest_noise=30.0, smallest_noise=0.2)

    @property
    def reward(self) -> Reward:
        return top_half if self.images else DensityRatio(nine_of_twenty_five(), twenty_five())

    @property
    def network(self) -> ResidualMLP:
        return ResidualMLP((1, 8, 8), 0, 256, 3) if self.images else ResidualMLP((2,), 0, 128, 2)

    def policy(self, steps_at_once: int = 0) -> DiffusionPolicy:
        """A posterior that is a copy of its prior, of random weights: what they are changes nothing in the work."""
        torch.manual_seed(0)
        prior = self.network
        return DiffusionPolicy(self.process, prior, copy.deepcopy(prior), steps_at_once=steps_at_once)


def top_half(objects: Objects, condition: Tensor) -> Tensor:
    """log r of images `[N, 1, 8, 8]`, of which the top half was measured as 0 with a deviation of 1."""
    return -0.5 * torch.as_tensor(objects)[:, 0, :4].square().sum((1, 2))


class ThroughAllSteps:
    """What most research code does: a chain drawn by a loop over its steps, with the graph of all of them kept until
    one backward pass. Process, networks, objective and optimizer are those of `policy`."""

    def __init__(self, policy: DiffusionPolicy, reward: Reward, batch: int) -> None:
        self.policy, self.reward, self.batch = policy, reward, batch
        self.generator = torch.Generator().manual_seed(0)
        log_z = policy.log_z_parameters()
        groups = [
            {"params": list(policy.posterior.parameters()), "lr": TRAINING.learning_rate},
            {"params": log_z, "lr": TRAINING.log_z_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def loss(self) -> tuple[Tensor, list[Tensor]]:
        """The squared residual of trajectory balance, mean over chains; and the states of the chains, step by step."""
        policy, process = self.policy, self.policy.process
        state, condition = process.start(self.batch, self.generator), torch.empty(self.batch, 0)
        states, log_ratio = [state], torch.zeros(self.batch)
        for step in range(process.n_steps):
            number = torch.full((self.batch,), step)
            time = process.time(number)
            law = process.law(policy.posterior(state, time, condition), state, number)
            with torch.no_grad():
                following = law.sample(self.generator)
                of_prior = process.law(policy.prior(state, time, condition), state, number).log_prob(following)
            log_ratio = log_ratio + law.log_prob(following) - of_prior
            state = following
            states.append(state)
        assert isinstance(policy.log_z, nn.Parameter)
        residual = policy.log_z + log_ratio - self.reward(state, condition)
        return residual.square().mean(), states

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.loss()[0].backward()  # type: ignore[no-untyped-call]
        clip_gradient(self.policy, TRAINING.clip_gradient)
        self.optimizer.step()


def updater(case: Case, contender: str) -> Update:
    """One update of a contender, ready to be made."""
    if contender == THROUGH_ALL:
        return ThroughAllSteps(case.policy(), case.reward, case.batch).update
    policy = case.policy(LIMIT if contender == LIMITED else 0)
    training = replace(TRAINING, batch_size=case.batch)
    return Trainer(policy, case.reward, NoCondition(), Objective("tb"), training).update


def gradient_error(case: Case, steps_at_once: int) -> float:
    """By how much our gradient differs from that through all steps, on the same chains, as a share of its norm; the
    posterior is moved away from the prior first."""
    policy = case.policy(steps_at_once)
    with torch.no_grad():
        for parameter in policy.posterior.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    loop = ThroughAllSteps(policy, case.reward, case.batch)
    loss, states = loop.loss()
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, learned)
    chains = policy.sample_to(states[-1], torch.empty(case.batch, 0))
    chains = replace(chains, steps={STATE: torch.stack(states, 1).flatten(0, 1)})
    chains = chains.with_log_reward(case.reward(states[-1], chains.condition))
    found = torch.autograd.grad(Objective("tb")(policy.log_probs(chains), chains), learned)
    off = sum(float((one - two).double().square().sum()) for one, two in zip(expected, found, strict=True))
    return math.sqrt(off / sum(float(one.double().square().sum()) for one in expected))


def gradient_errors(case: Case) -> dict[str, object]:
    return {AT_ONCE: gradient_error(case, 0), LIMITED: gradient_error(case, LIMIT // 8)}


def timings(case: Case, rounds: int, seconds: float) -> dict[str, object]:
    """CPU and wall milliseconds of an update of each contender, turn by turn; a turn of ours takes about `seconds`."""
    updates = {name: updater(case, name) for name in (THROUGH_ALL, AT_ONCE, LIMITED)}
    for update in updates.values():
        update()  # what a first one loads is no part of the work
    began = time.process_time()
    updates[AT_ONCE]()
    number = max(1, round(seconds / (time.process_time() - began)))
    cpu: dict[str, list[float]] = {name: [] for name in updates}
    wall: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(rounds if number > 1 else min(rounds, 3)):
        for name in list(updates) if turn % 2 == 0 else list(updates)[::-1]:
            began, began_wall = time.process_time(), time.perf_counter()
            for _ in range(number):
                updates[name]()
            cpu[name].append((time.process_time() - began) / number * 1e3)
            wall[name].append((time.perf_counter() - began_wall) / number * 1e3)
    return {"updates_a_turn": number, "cpu": cpu, "wall": wall, "load": load()}


def peak_memory(case: Case, contender: str) -> int:
    """Bytes by which the peak of resident memory grows during a first update, in a fresh process."""
    asked = json.dumps({"case": asdict(case), "contender": contender})
    done = subprocess.run(
        [sys.executable, __file__, "--measure-memory", asked], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{contender}, {case}: {done.stderr[-3000:]}")
    return int(done.stdout)


def peak_memories(case: Case) -> dict[str, object]:
    return {contender: peak_memory(case, contender) for contender in (THROUGH_ALL, AT_ONCE, LIMITED)}


def measure_memory(asked: str) -> None:
    """What the fresh process does: a smallest update, which loads what any needs, and then the one that is asked."""
    chosen = json.loads(asked)
    case = Case(**chosen["case"])
    updater(replace(case, steps=2, batch=2), chosen["contender"])()
    update = updater(case, chosen["contender"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now; getrusage would count the parent's too
    before = peak_resident()
    update()
    print(peak_resident() - before)


def peak_resident() -> int:
    """Bytes, as Linux counts them."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def beside_torchgfn(runtimes: dict[str, Runtime], steps: int, batch: int, rounds: int) -> dict[str, object]:
    """CPU and wall milliseconds of an iteration of ours, ours with their network, and theirs, turn by turn."""
    contenders = {OURS: "residual", THEIR_NETWORK: "theirs", "torchgfn": ""}
    number = max(2, round(60_000 / (steps * batch)))
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as living:
        workers = {}
        for name, network in contenders.items():
            settings = {"steps": steps, "variance": VARIANCE, "network": network}
            task = Task("diffusion", batch_size=batch, settings=settings)
            runtime = runtimes["torchgfn" if name == "torchgfn" else OURS]
            workers[name] = living.enter_context(Worker(runtime, task, 1, HERE / ".work"))
            workers[name].milliseconds(2)
        for turn in range(rounds):
            for name in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
                one, other = workers[name].milliseconds(number)
                cpu[name].append(one)
                wall[name].append(other)
        about = {name: worker.about for name, worker in workers.items()}
    return {"about": about, "iterations_a_turn": number, "cpu": cpu, "wall": wall, "load": load()}


def without_folders(words: list[str]) -> list[str]:
    """The command's words but for the checkout that it was told of."""
    at = words.index("--torchgfn") if "--torchgfn" in words else len(words)
    return words[:at] + words[at + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 500], help="of a chain, beside autograd")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="beside autograd")
    parser.add_argument("--rounds", type=int, default=5, help="of turns")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.15,
        help="of CPU time that a turn of ours takes; where an update takes longer, there are 3 rounds",
    )
    parser.add_argument("--torchgfn", type=Path, help="a checkout that you have")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    (HERE / ".work").mkdir(exist_ok=True)
    facts = provenance(["python", "benchmarks/diffusion_speed.py", *without_folders(sys.argv[1:])])
    results = json.loads(PATH.read_text()) if PATH.exists() else {"provenance": facts, "cases": {}}

    def keep(key: str, make: Callable[[], dict[str, object]]) -> None:
        if key not in results["cases"]:
            print(key, file=sys.stderr)
            results["cases"][key] = make()
            PATH.write_text(json.dumps(results, indent=1) + "\n")

    every = itertools.product((False, True), options.steps, options.batches)
    cases = [Case(images, steps, batch) for images, steps, batch in every]
    if "torchgfn" in options.parts:
        peer = install("torchgfn", HERE / ".peers", options.torchgfn)
        runtimes = {
            OURS: Runtime(Path(sys.executable), "headwater_diffusion.py"),
            "torchgfn": Runtime(peer.python, "torchgfn_diffusion.py", peer.checkout),
        }
        results["peer"] = {"address": PEERS["torchgfn"].address, "commit": peer.commit}
        for steps, batch in ((20, 128), (100, 128), (100, 500)):
            key = f"torchgfn T={steps} batch={batch}"
            keep(key, partial(beside_torchgfn, runtimes, steps, batch, options.rounds))
    for case in cases:
        name = f"{'images' if case.images else 'plane'} T={case.steps} batch={case.batch}"
        if "autograd" in options.parts:
            keep(f"autograd {name}", partial(timings, case, options.rounds, options.seconds))
            if case.batch == min(options.batches):
                keep(f"gradient {name}", partial(gradient_errors, case))
        if "memory" in options.parts and case.batch == max(options.batches):
            keep(f"memory {name}", partial(peak_memories, case))
    print(write_report(PATH))


if __name__ == "__main__":
    main()
