"""Headwater's chains from 25 Gaussians to 9: a pinned Brownian process, a `Trainer`, `update()`, nothing switched.

The setting `network` says who predicts: "residual", our own `ResidualMLP`, or "theirs", the shape that torchgfn has.
"""

from __future__ import annotations

import copy
import time
from importlib.metadata import version

from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from headwater.conditions import NoCondition  # noqa: E402
from headwater.diffusion.denoisers import ResidualMLP  # noqa: E402
from headwater.diffusion.policy import STATE, DiffusionPolicy  # noqa: E402
from headwater.diffusion.process import BrownianProcess  # noqa: E402
from headwater.diffusion.targets import DensityRatio, nine_of_twenty_five, twenty_five  # noqa: E402
from headwater.objectives import Objective  # noqa: E402
from headwater.training import Trainer, Training  # noqa: E402

WIDTH, HARMONICS = 64, 64


class PathIntegralNetwork(nn.Module):
    """The network of path integral samplers (Zhang & Chen 2022, arXiv 2111.15141) with layers and sizes as torchgfn
    has them: an embedded state and an embedded time are added, and two hidden layers follow."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(HARMONICS))
        self.register_buffer("frequency", torch.linspace(0.1, 100, HARMONICS))
        self.time = nn.Sequential(nn.Linear(2 * HARMONICS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.state = nn.Linear(dimensions, WIDTH)
        hidden = (nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.both = nn.Sequential(*hidden, nn.Linear(WIDTH, dimensions))

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        angle = time[:, None] * self.frequency + self.phase
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        return self.both(self.state(state) + told)

    frequency: Tensor


def contender(task: Task) -> Contender:
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    process = BrownianProcess((2,), task.settings["steps"], task.settings["variance"])
    own = task.settings["network"] == "residual"
    prior = ResidualMLP((2,), 0, WIDTH, blocks=1) if own else PathIntegralNetwork(2)
    last = prior.last if isinstance(prior, ResidualMLP) else prior.both[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    policy = DiffusionPolicy(process, prior, copy.deepcopy(prior))
    training = Training(
        iterations=task.iterations,
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        log_z_learning_rate=task.log_z_learning_rate,
        schedule="constant",
    )
    reward = DensityRatio(nine_of_twenty_five(), twenty_five())
    trainer = Trainer(policy, reward, NoCondition(), Objective("tb"), training, seed=task.seed)

    def update(iterations: int) -> None:
        for _ in range(iterations):
            trainer.update()

    def lengths(count: int) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = policy.sample(torch.empty(count, 0)).lengths.numpy()
        return drawn

    def bytes_a_trajectory() -> dict[str, float]:
        states = policy.sample(torch.empty(task.batch_size, 0)).steps[STATE]
        return {"bytes": states.element_size() * states.numel() / task.batch_size}

    return Contender(
        update=update,
        parameters=sum(parameter.numel() for parameter in policy.posterior.parameters()),
        lengths=lengths,
        bytes_a_trajectory=bytes_a_trajectory,
        about={"versions": {"headwater": version("headwater"), "torch": torch.__version__}},
    )


if __name__ == "__main__":
    serve(contender(TASK), ANSWERS, STARTED)
