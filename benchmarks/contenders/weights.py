"""Weights of one multilayer perceptron on the hypergrid that every contender can load, so that all of them draw
trajectories of the same lengths: untrained, trained, or leaving after a given number of steps.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.recipes.hypergrid import HypergridRecipe
from headwater.training import Trainer, Training

Weights = dict[str, NDArray[np.float32]]


def weights_of(policy: EnvironmentPolicy) -> Weights:
    """The weights by the names that `protocol.Contender.load` lists."""
    actions, undos = policy.sizes[0], policy.sizes[1]
    *layers, (weight, bias) = _layers(policy)
    named = {}
    for number, (table, offset) in enumerate(layers):
        named |= {f"weight_{number}": table, f"bias_{number}": offset}
    named |= {"forward_weight": weight[:, :actions], "forward_bias": bias[:actions]}
    named |= {"backward_weight": weight[:, actions:][:, :undos], "backward_bias": bias[actions:][:undos]}
    return {name: tensor.detach().numpy().copy() for name, tensor in named.items()}


def load_weights(policy: EnvironmentPolicy, weights: Weights) -> None:
    """The inverse of `weights_of`; the flow head starts at zero."""
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    flow = torch.zeros(tensors["forward_weight"].shape[0], 1)
    heads = torch.cat([tensors["forward_weight"], tensors["backward_weight"], flow], dim=1)
    offsets = torch.cat([tensors["forward_bias"], tensors["backward_bias"], torch.zeros(1)])
    *layers, (weight, bias) = _layers(policy)
    with torch.no_grad():
        for number, (table, offset) in enumerate(layers):
            table.copy_(tensors[f"weight_{number}"])
            offset.copy_(tensors[f"bias_{number}"])
        weight.copy_(heads)
        bias.copy_(offsets)


def untrained(dimensions: int, side: int) -> Weights:
    """torch's own initialisation in every layer, the heads too: nearly uniform."""
    return weights_of(_untrained_policy(dimensions, side))


def trained(dimensions: int, side: int, iterations: int = 1500) -> tuple[Weights, dict[str, float]]:
    """Fitted by maximum likelihood to exact samples of the target: the lengths of a trained sampler. Also returns how
    close it came.
    """
    recipe = HypergridRecipe(dimensions=dimensions, side=side, network=Network(width=256, layers=2))
    problem, policy = recipe.problem(), _untrained_policy(dimensions, side)
    exact = ExactDistribution(recipe.environment(), problem.reward)
    given = exact.sample(200_000, torch.Generator().manual_seed(0))
    training = Training(iterations=iterations, batch_size=48, learning_rate=2e-3)
    trainer = Trainer(policy, problem.reward, NoCondition(), Objective("mle"), training, given=given)
    trainer.run(progress_bar=False)
    return weights_of(policy), exact.compare(policy)


def leaving_after(dimensions: int, side: int, steps: float) -> Weights:
    """All moves alike, and exit so likely that a trajectory far from the border has `steps` steps in the mean."""
    weights = untrained(dimensions, side)
    weights["forward_weight"] = np.zeros_like(weights["forward_weight"])
    bias = np.zeros_like(weights["forward_bias"])
    bias[-1] = math.log(dimensions / (steps - 1))
    return weights | {"forward_bias": bias}


def saved(weights: Weights, path: Path) -> Path:
    """Write an .npz file that a contender loads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **weights)
    return path


def _layers(policy: EnvironmentPolicy) -> list[tuple[Tensor, Tensor]]:
    """Weight `[inputs, outputs]` and bias of every layer in turn, heads last: views that can be written to."""
    torso, heads = policy.torso, policy.heads
    others = zip(torso.hidden, torso.hidden_bias, strict=True)
    return [(torso.table, torso.bias), *others, (heads.weight, heads.bias)]


def _untrained_policy(dimensions: int, side: int) -> EnvironmentPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = HypergridRecipe(dimensions=dimensions, side=side, network=Network(width=256, layers=2))
        policy = recipe.problem().policy
        assert isinstance(policy, EnvironmentPolicy)
        bound = policy.heads.weight.numel() ** -0.5 * policy.heads.bias.numel() ** 0.5  # 1 / sqrt(inputs)
        torch.nn.init.uniform_(policy.heads.weight, -bound, bound)
        torch.nn.init.uniform_(policy.heads.bias, -bound, bound)
    return policy
