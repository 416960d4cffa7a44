"""torchgfn with the loop of its own `tutorials/examples/train_hypergrid_simple.py`, without the parts that only check
or log: sample, loss from trajectories, backward, step.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gfn.estimators import DiscretePolicyEstimator, ScalarEstimator  # noqa: E402
from gfn.gflownet import DBGFlowNet, SubTBGFlowNet, TBGFlowNet  # noqa: E402
from gfn.gym import HyperGrid, NonAutoregressiveBitSequence  # noqa: E402
from gfn.preprocessors import IdentityPreprocessor, KHotPreprocessor  # noqa: E402
from gfn.samplers import Sampler  # noqa: E402
from gfn.utils.modules import MLP, DiscreteUniform  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor, nn  # noqa: E402

WIDTH, WORDS, SYMBOLS = 256, 15, 256


class SlotTransformer(nn.Module):
    """The transformer of gfnx's bit-sequence script in torch's own layers (torchgfn brings none for slots): three
    post-norm layers of width 64 with 8 heads and feed-forward width 64, logits of a slot's symbols at that slot."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 3, 64)
        self.position = nn.Parameter(torch.randn(WORDS + 1, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 8, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.symbols, self.exit = nn.Linear(64, SYMBOLS), nn.Linear(64, 1)
        self.input_dim, self.output_dim = WORDS, WORDS * SYMBOLS + 1

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.reshape(-1, WORDS).long()
        tokens = torch.where(tokens < 0, SYMBOLS, tokens)
        tokens = torch.cat([tokens.new_full((len(tokens), 1), SYMBOLS + 1), tokens], dim=1)
        hidden = self.encoder(self.embedding(tokens) + self.position)
        logits = torch.cat([self.symbols(hidden[:, 1:]).flatten(1), self.exit(hidden[:, 0])], dim=1)
        return logits.view(*states.shape[:-1], -1)


def hypergrid(task: Task) -> tuple[HyperGrid, KHotPreprocessor, nn.Module, nn.Module]:
    environment = HyperGrid(
        ndim=task.dimensions,
        height=task.side,
        reward_fn_str="original",
        reward_fn_kwargs={"R0": 1e-3, "R1": 0.5, "R2": 2.0},
        device="cpu",
        calculate_partition=False,
        store_all_states=False,
        debug=False,
    )
    preprocessor = KHotPreprocessor(height=task.side, ndim=task.dimensions)
    forward = MLP(input_dim=preprocessor.output_dim, output_dim=environment.n_actions, hidden_dim=WIDTH)
    backward = MLP(input_dim=preprocessor.output_dim, output_dim=environment.n_actions - 1, trunk=forward.trunk)
    return environment, preprocessor, forward, backward


def bits() -> tuple[NonAutoregressiveBitSequence, IdentityPreprocessor, nn.Module, nn.Module]:
    environment = NonAutoregressiveBitSequence(
        word_size=8, seq_size=120, n_modes=60, reward_exponent=3.0, device_str="cpu", debug=False
    )
    preprocessor = IdentityPreprocessor(output_dim=environment.words_per_seq)
    return environment, preprocessor, SlotTransformer(), DiscreteUniform(output_dim=environment.n_actions - 1)


def contender(task: Task) -> Contender:
    torch.manual_seed(task.seed)
    environment, preprocessor, forward, backward = hypergrid(task) if task.environment == "hypergrid" else bits()
    policy = DiscretePolicyEstimator(forward, environment.n_actions, preprocessor=preprocessor, is_backward=False)
    undo = DiscretePolicyEstimator(backward, environment.n_actions, preprocessor=preprocessor, is_backward=True)
    if task.objective == "tb":
        model = TBGFlowNet(pf=policy, pb=undo, init_logZ=0.0)
    else:
        head = MLP(input_dim=preprocessor.output_dim, output_dim=1, trunk=forward.trunk)
        flow = ScalarEstimator(module=head, preprocessor=preprocessor)
        if task.objective == "db":
            model = DBGFlowNet(pf=policy, pb=undo, logF=flow)
        else:
            model = SubTBGFlowNet(pf=policy, pb=undo, logF=flow, weighting="geometric_within", lamda=0.9)
    networks = [tensor for name, tensor in model.named_parameters() if name != "logZ" and tensor.requires_grad]
    optimizer = torch.optim.Adam(networks, lr=task.learning_rate)
    if task.objective == "tb":
        optimizer.add_param_group({"params": model.logz_parameters(), "lr": task.log_z_learning_rate})
    sampler = Sampler(estimator=policy)
    done = {"iterations": 0}

    def epsilon() -> float:
        left = max(0.0, 1 - done["iterations"] / task.epsilon_iterations)
        return task.epsilon_end + (task.epsilon - task.epsilon_end) * left

    def draw(count: int, epsilon: float = 0.0):  # type: ignore[no-untyped-def]
        return sampler.sample_trajectories(
            environment, n=count, save_logprobs=False, save_estimator_outputs=False, epsilon=epsilon
        )

    def update(iterations: int) -> None:
        for _ in range(iterations):
            trajectories = draw(task.batch_size, epsilon())
            optimizer.zero_grad()
            loss = model.loss_from_trajectories(environment, trajectories, recalculate_all_logprobs=True)
            loss.backward()
            optimizer.step()
            done["iterations"] += 1

    def lengths(count: int) -> NDArray[np.int64]:
        with torch.no_grad():
            return draw(count).terminating_idx.numpy()

    def bytes_a_trajectory() -> dict[str, float]:
        drawn = draw(task.batch_size)
        held = [drawn.states.tensor, drawn.actions.tensor]
        content = sum(tensor.element_size() * tensor.numel() for tensor in held)
        held += [drawn.terminating_idx, drawn.log_rewards]
        size = sum(tensor.element_size() * tensor.numel() for tensor in held)
        return {"bytes": size / task.batch_size, "states_and_actions": content / task.batch_size}

    def load(weights: dict[str, NDArray[np.float32]]) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        layers = [module for module in forward.trunk.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                layer.weight.copy_(tensors[f"weight_{number}"].T)
                layer.bias.copy_(tensors[f"bias_{number}"])
            for head, name in ((forward, "forward"), (backward, "backward")):
                head.last_layer.weight.copy_(tensors[f"{name}_weight"].T)
                head.last_layer.bias.copy_(tensors[f"{name}_bias"])

    def logits(states: NDArray[np.int64]) -> NDArray[np.float32]:
        hot = torch.nn.functional.one_hot(torch.from_numpy(states).long(), task.side).flatten(1).float()
        with torch.no_grad():
            return torch.cat([forward(part) for part in torch.split(hot, 16384)]).numpy()

    return Contender(
        update=update,
        parameters=sum({id(tensor): tensor.numel() for tensor in model.parameters()}.values()),
        lengths=lengths,
        bytes_a_trajectory=bytes_a_trajectory,
        load=load,
        logits=logits,
        about={"versions": {"torchgfn": version("torchgfn"), "torch": torch.__version__}},
    )


if __name__ == "__main__":
    serve(contender(TASK), ANSWERS, STARTED)
