"""gfnx by its own training scripts (`baselines/*.py`), unchanged, with their one outer loop cut into chunks.

The script is run up to its `jax.lax.fori_loop`; the body of that loop is compiled once, and a chunk of n iterations is
one call of it. Unless {"logging": true} is set, all that the script does besides learning is taken out first: metrics,
host callbacks, progress bar; what only they used, the compiler then removes.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
import types
from importlib.metadata import version
from typing import Any

from protocol import Contender, Task, prepare, serve

STARTED = time.perf_counter()
TASK, ANSWERS = prepare()
CHECKOUT = os.environ["PEER_CHECKOUT"]
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.path.join(CHECKOUT, "baselines"))
for missing in ("utils.checkpoint", "utils.logger"):  # they need packages that training does not
    sys.modules[missing] = types.ModuleType(missing)
sys.modules["utils.checkpoint"].save_checkpoint = None  # type: ignore[attr-defined]
sys.modules["utils.logger"].Writer = object  # type: ignore[attr-defined]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

if not hasattr(jax, "tree_map"):  # removed from newer versions of jax; flashbax and friends still call it
    jax.tree_map = jax.tree.map

import equinox as eqx  # noqa: E402
import gfnx  # noqa: E402
import gfnx.metrics  # noqa: E402
import jax_tqdm  # noqa: E402

LOOP_END = 987_654_321  # by this bound the training loop is told from every other loop


class LoopReached(Exception):
    """Carries the body and the initial value of the training loop out of the script."""


def settings(task: Task) -> list[str]:
    """The script's settings, in its own words (hydra)."""
    common = [
        f"num_train_steps={LOOP_END}", f"seed={task.seed + 111}", f"num_envs={task.batch_size}",
        f"agent.learning_rate={task.learning_rate}", f"agent.start_eps={task.epsilon}",
        f"agent.end_eps={task.epsilon_end}", f"agent.exploration_steps={task.epsilon_iterations}",
        "logging.use_writer=false", f"logging.eval_each={LOOP_END - 2}", "logging.tqdm_print_rate=20",
        "hydra.run.dir=.", "hydra.output_subdir=null", "hydra.job_logging.root.level=ERROR",
    ]  # fmt: skip
    if task.objective == "tb":
        common.append(f"agent.logZ_learning_rate={task.log_z_learning_rate}")
    if task.environment == "hypergrid":
        common += [f"environment.dim={task.dimensions}", f"environment.side={task.side}", "network.hidden_size=256"]
    if task.environment == "hypergrid" and task.objective == "subtb":
        common.append("agent.lmbd=0.9")
    return common


def strip_metrics(with_logging: bool) -> None:
    """Take the evaluation out of the compiled step (it would not run at the timed iterations anyway); without logging,
    take out what feeds it too."""
    for name in dir(gfnx.metrics):
        module = getattr(gfnx.metrics, name)
        if not (isinstance(module, type) and name.endswith("Module")):
            continue
        module.process = lambda self, metrics_state, *args, **named: metrics_state
        if not with_logging:
            module.init = lambda self, *args, **named: {}
            module.update = lambda self, metrics_state, *args, **named: metrics_state
            module.get = lambda self, *args, **named: {}
    if not with_logging:
        jax.debug.callback = lambda *args, **named: None
        jax_tqdm.loop_tqdm = lambda *args, **named: lambda body: body
        gfnx.utils.bitseq.construct_binary_test_set = lambda key, modes: modes


def reach_loop(task: Task) -> tuple[Any, Any, Any]:
    """Run the script up to its training loop: the loop's body, its initial value, and the static half of the state."""
    loop, partition, halves = jax.lax.fori_loop, eqx.partition, []

    def watched_loop(lower: Any, upper: Any, body_fun: Any, init_val: Any, **named: Any) -> Any:
        if isinstance(upper, int) and upper == LOOP_END:
            raise LoopReached(body_fun, init_val)
        return loop(lower, upper, body_fun, init_val, **named)

    def watched_partition(tree: Any, *args: Any, **named: Any) -> Any:
        result = partition(tree, *args, **named)
        if hasattr(tree, "env_params"):
            halves.append(result[1])
        return result

    jax.lax.fori_loop, eqx.partition = watched_loop, watched_partition
    name = {"hypergrid": "hypergrid", "bits": "bitseq", "sequences": "tfbind"}[task.environment]
    script = os.path.join(CHECKOUT, "baselines", f"{task.objective}_{name}.py")
    sys.argv = [script, *settings(task)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        runpy.run_path(script, run_name="__main__")
    except LoopReached as reached:
        return *reached.args, halves[-1]
    finally:
        jax.lax.fori_loop, eqx.partition = loop, partition
    raise RuntimeError(f"{script} came to its end without a loop to {LOOP_END}")


def contender(task: Task) -> Contender:
    strip_metrics(bool(task.settings.get("logging", False)))
    body, state, static = reach_loop(task)
    reached = time.perf_counter()
    wall, cpu = time.perf_counter(), time.process_time()
    chunk = jax.jit(lambda first, last, value: jax.lax.fori_loop(first, last, body, value))
    chunk = chunk.lower(0, 1, state).compile()
    about = {
        "set_up_seconds": reached - STARTED,
        "compile_seconds": time.perf_counter() - wall,
        "compile_cpu_seconds": time.process_time() - cpu,
        "versions": {name: version(name) for name in ("gfnx", "jax", "equinox", "optax")},
    }
    now = {"state": state, "iteration": 0, "key": jax.random.PRNGKey(task.seed)}

    def update(iterations: int) -> None:
        first = now["iteration"]
        now["state"] = jax.block_until_ready(chunk(first, first + iterations, now["state"]))
        now["iteration"] = first + iterations

    @functools.partial(jax.jit, static_argnums=0)
    def draw(count: int, key: Any, value: Any) -> tuple[Any, Any]:
        full = eqx.combine(value, static)
        arrays, rest = eqx.partition(full.model, eqx.is_array)

        def policy(key: Any, observed: Any, model: Any) -> tuple[Any, Any]:
            outputs = jax.vmap(eqx.combine(model, rest))(observed)
            return outputs["forward_logits"], outputs

        return gfnx.utils.forward_rollout(key, count, policy, arrays, full.env, full.env_params)

    def rollout(count: int) -> tuple[Any, Any]:
        now["key"], key = jax.random.split(now["key"])
        return draw(count, key, now["state"])

    @jax.jit
    def forward(rows: Any, value: Any) -> Any:
        model = eqx.combine(value, static).model
        return jax.vmap(lambda row: model(jax.nn.one_hot(row, task.side).reshape(-1))["forward_logits"])(rows)

    def lengths(count: int) -> NDArray[np.int64]:
        return np.asarray(rollout(count)[1]["trajectory_length"])

    def bytes_a_trajectory() -> dict[str, float]:
        drawn = rollout(task.batch_size)[0]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(drawn))
        content = sum(leaf.nbytes for leaf in jax.tree.leaves((drawn.state, drawn.action)))
        return {"bytes": size / task.batch_size, "states_and_actions": content / task.batch_size}

    def load(weights: dict[str, NDArray[np.float32]]) -> None:
        layers = now["state"].model.network.layers
        flow = np.zeros((len(weights["forward_weight"]), 1), np.float32)
        orders = {"tb": "forward backward", "db": "forward flow backward", "subtb": "forward backward flow"}
        weights = weights | {"flow_weight": flow, "flow_bias": np.zeros(1, np.float32)}
        order = orders[task.objective].split()
        last = np.concatenate([weights[f"{head}_weight"] for head in order], axis=1)
        new = [(weights[f"weight_{number}"], weights[f"bias_{number}"]) for number in range(len(layers) - 1)]
        new.append((last, np.concatenate([weights[f"{head}_bias"] for head in order])))
        for number, (weight, bias) in enumerate(new):
            assert layers[number].weight.shape == weight.T.shape
            now["state"] = eqx.tree_at(
                lambda tree, n=number: (tree.model.network.layers[n].weight, tree.model.network.layers[n].bias),
                now["state"],
                (jnp.asarray(weight.T), jnp.asarray(bias)),
            )

    def logits(states: NDArray[np.int64]) -> NDArray[np.float32]:
        parts = np.array_split(states, max(1, len(states) // 20000))
        return np.concatenate([np.asarray(forward(part, now["state"])) for part in parts])

    return Contender(
        update=update,
        parameters=sum(leaf.size for leaf in jax.tree.leaves((state.model, getattr(state, "logZ", None)))),
        lengths=lengths,
        bytes_a_trajectory=bytes_a_trajectory,
        load=load,
        logits=logits,
        about=about,
    )


if __name__ == "__main__":
    serve(contender(TASK), ANSWERS, STARTED)
