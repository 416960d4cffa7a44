"""torchgfn's relative trajectory balance from 25 Gaussians to 9, with the loop of its own
`tutorials/examples/train_diffusion_rtb.py` without what only logs: sample, loss with all log-probabilities, backward,
step. No noise is added for exploration, and the prior is the untrained one: neither changes what is computed.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gfn.estimators import PinnedBrownianMotionForward  # noqa: E402
from gfn.gflownet import RelativeTrajectoryBalanceGFlowNet  # noqa: E402
from gfn.gym.diffusion_sampling import DiffusionSampling  # noqa: E402
from gfn.samplers import Sampler  # noqa: E402
from gfn.utils.modules import DiffusionPISGradNetForward  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

SCALE = 5.0


def contender(task: Task) -> Contender:
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    steps, sigma = task.settings["steps"], (task.settings["variance"] / SCALE) ** 0.5
    environment = DiffusionSampling("gmm25_posterior9", None, steps, device=torch.device("cpu"), debug=False)

    def estimator() -> PinnedBrownianMotionForward:
        network = DiffusionPISGradNetForward(environment.dim, zero_init=True, t_scale=SCALE)
        return PinnedBrownianMotionForward(environment.dim, network, sigma, steps)

    policy, prior = estimator(), estimator()
    prior.load_state_dict(policy.state_dict())
    prior.eval().requires_grad_(False)
    model = RelativeTrajectoryBalanceGFlowNet(pf=policy, prior_pf=prior, init_logZ=0.0)
    optimizer = torch.optim.Adam(
        [
            {"params": model.pf.parameters(), "lr": task.learning_rate},
            {"params": model.logz_parameters(), "lr": task.log_z_learning_rate},
        ]
    )
    sampler = Sampler(estimator=policy)

    def draw(count: int):  # type: ignore[no-untyped-def]
        return sampler.sample_trajectories(environment, n=count, save_logprobs=False, save_estimator_outputs=False)

    def update(iterations: int) -> None:
        for _ in range(iterations):
            trajectories = draw(task.batch_size)
            optimizer.zero_grad()
            loss = model.loss(environment, trajectories, recalculate_all_logprobs=True)
            loss.backward()
            optimizer.step()

    def lengths(count: int) -> NDArray[np.int64]:
        with torch.no_grad():
            return draw(count).terminating_idx.numpy()

    def bytes_a_trajectory() -> dict[str, float]:
        drawn = draw(task.batch_size)
        held = (drawn.states.tensor, drawn.actions.tensor)
        return {"bytes": sum(tensor.element_size() * tensor.numel() for tensor in held) / task.batch_size}

    return Contender(
        update=update,
        parameters=sum(tensor.numel() for tensor in policy.parameters()),
        lengths=lengths,
        bytes_a_trajectory=bytes_a_trajectory,
        about={"versions": {"torchgfn": version("torchgfn"), "torch": torch.__version__}},
    )


if __name__ == "__main__":
    serve(contender(TASK), ANSWERS, STARTED)
