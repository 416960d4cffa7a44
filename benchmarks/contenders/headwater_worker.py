"""Headwater as a user has it: a recipe's policy and reward, a `Trainer`, and `trainer.update()` in a loop."""

from __future__ import annotations

import time

from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from weights import load_weights  # noqa: E402

import headwater  # noqa: E402
from headwater.objectives import Objective  # noqa: E402
from headwater.policies import EnvironmentPolicy, Network  # noqa: E402
from headwater.recipes.base import EnvironmentRecipe, Problem  # noqa: E402
from headwater.recipes.bits import BitsRecipe  # noqa: E402
from headwater.recipes.hypergrid import HypergridRecipe  # noqa: E402
from headwater.recipes.sequences import SequencesRecipe  # noqa: E402
from headwater.replay import ReplaySettings  # noqa: E402
from headwater.training import ExplorationSettings, Trainer, Training  # noqa: E402

BITS_NETWORK = Network("transformer", width=64, layers=3, heads=8, feed_forward=1)  # gfnx's configuration
STILL = 1e-20  # a learning rate has to be positive; this one moves no float32 weight


def recipe(task: Task) -> EnvironmentRecipe:
    if task.environment == "hypergrid":
        return HypergridRecipe(dimensions=task.dimensions, side=task.side, network=Network(width=256, layers=2))
    if task.environment == "bits":
        return BitsRecipe(construction="slots", backward="uniform", network=BITS_NETWORK)
    # the peer's perceptron has a third hidden layer here
    table = task.settings["table"]
    return SequencesRecipe(
        table=table, exponent=3.0, scale_maximum_to=10.0, floor=1e-3, network=Network(width=256, layers=3)
    )


def trainer_of(task: Task, problem: Problem) -> Trainer:
    rates = {"learning_rate": task.learning_rate or STILL, "log_z_learning_rate": task.log_z_learning_rate}
    length = {"iterations": task.iterations, "batch_size": task.batch_size}
    plain = {"schedule": "constant", "clip_gradient": 0.0}  # as the peers have it
    decay = min(1.0, task.epsilon_iterations / task.iterations)
    uniform = {"epsilon": task.epsilon, "epsilon_end": task.epsilon_end, "decay": decay}
    own = task.settings
    training = Training(**rates | length | plain | own.get("training", {}))
    exploration = ExplorationSettings(**uniform | own.get("exploration", {}))
    objective = Objective(task.objective, **{"subtb_lambda": 0.9} | own.get("objective", {}))
    replay = ReplaySettings(**own.get("replay", {}))
    return Trainer(
        problem.policy, problem.reward, problem.conditions, objective, training, exploration, replay, seed=task.seed
    )


def contender(task: Task) -> Contender:
    torch.manual_seed(task.seed)
    problem = recipe(task).problem()
    policy = problem.policy
    assert isinstance(policy, EnvironmentPolicy)
    trainer = trainer_of(task, problem)
    apart = torch.Generator().manual_seed(task.seed + 1)  # what is drawn for a look leaves the run's numbers alone
    began = time.perf_counter()
    policy.sample(torch.empty(2, 0), generator=apart)  # compiles the native rollout
    compiling = time.perf_counter() - began

    def update(iterations: int) -> None:
        for _ in range(iterations):
            trainer.update()

    def bytes_a_trajectory() -> dict[str, float]:
        batch = policy.sample(torch.empty(1024, 0), generator=apart)
        size = sum(tensor.element_size() * tensor.numel() for tensor in batch.tensors().values())
        content = sum(tensor.element_size() * tensor.numel() for tensor in batch.steps.values())
        return {"bytes": size / len(batch), "states_and_actions": content / len(batch)}

    def logits(states: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(states).to(torch.int32), 16384)
            return torch.cat([policy.action_log_probs(part, torch.empty(1, 0)) for part in parts]).numpy()

    return Contender(
        update=update,
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        lengths=lambda count: policy.sample(torch.empty(count, 0), generator=apart).lengths.numpy(),
        bytes_a_trajectory=bytes_a_trajectory,
        load=lambda weights: load_weights(policy, weights),
        logits=logits,
        about={
            "compile_seconds": compiling,
            "versions": {"torch": torch.__version__, "headwater": headwater.__version__},
        },
    )


if __name__ == "__main__":
    serve(contender(TASK), ANSWERS, STARTED)
