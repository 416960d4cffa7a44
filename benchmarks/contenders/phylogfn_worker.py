"""The public repository of PhyloGFN with the loop of its own `train.py`: a batch from its loader (half from the policy,
half walked back from the best trees), loss, backward, step; without logs, figures, evaluations and checkpoints.

settings: configuration, a YAML file of its `src/configs`; sequences, a FASTA file of aligned DNA.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()
CHECKOUT = Path(os.environ["PEER_CHECKOUT"])
sys.path.insert(0, str(CHECKOUT))
sys.dont_write_bytecode = True

import torch  # noqa: E402
from src.configs.defaults import get_cfg_defaults  # noqa: E402
from src.env import build_env  # noqa: E402
from src.gfn.build import build_gfn  # noqa: E402
from src.gfn.rollout_worker_phylo import RolloutWorker  # noqa: E402
from src.gfn.training_data_loader import TrainingDataLoader  # noqa: E402
from src.utils.utils import correct_cfg_data  # noqa: E402


def contender(task: Task) -> Contender:
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)  # noqa: NPY002 (what the peer draws from)
    lines = Path(task.settings["sequences"]).read_text().split(">")[1:]
    sequences = ["".join(record.split("\n")[1:]).replace("?", "-") for record in lines]  # as its reader does
    configuration = get_cfg_defaults()
    configuration.merge_from_file(str(CHECKOUT / "src" / "configs" / task.settings["configuration"]))
    configuration = correct_cfg_data(sequences, 1, configuration)
    environment = build_env(configuration, sequences)
    environment.to("cpu")
    generator = build_gfn(configuration, environment, "cpu", ddp=False)
    loader = TrainingDataLoader(configuration, environment, RolloutWorker(environment), "")
    exploring = {"random_action_prob": configuration.GFN.TRAINING_DATA_LOADER.EXPLORATION.START_VALUE}

    def update(iterations: int) -> None:
        for _ in range(iterations):
            batch, _ = loader.generate_batch(generator, exploring)
            generator.accumulate_loss(batch, 1)
            generator.update_model()

    return Contender(
        update,
        parameters=sum(weight.numel() for weight in generator.full_model.parameters()),
        lengths=lambda count: np.full(count, len(sequences) - 1, dtype=np.int64),
        bytes_a_trajectory=dict,
        about={"batch": loader.batch_size, "torch": torch.__version__},
    )


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
serve(contender(TASK), ANSWERS, STARTED)
