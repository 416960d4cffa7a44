"""The training loop: search, replay, objective, step. Read `Trainer.run` and `Trainer.update`; the rest is keeping of
books.

Everything random comes from the run's own generator, and a checkpoint holds all that the loop carries from one
iteration to the next, so a run that is stopped and resumed ends where one that was never stopped does.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from headwater.adam import adam_step, clear_gradients, clip_gradient, load_state, state_of
from headwater.conditions import Conditions
from headwater.learners import Learners
from headwater.learning_in_parts import Parts
from headwater.native import keep_freed_memory
from headwater.objectives import Objective
from headwater.policies.base import LogProbs, Policy
from headwater.replay import Replay, ReplaySettings
from headwater.reward import Reward, cache_of
from headwater.runs import Checkpoint, Metrics, Run
from headwater.search import ExplorationSettings as ExplorationSettings  # also found here, beside Training
from headwater.search import Explorer, Searcher, SearchSettings, build_search
from headwater.training_log import TrainingLog
from headwater.training_settings import Sharpness as Sharpness
from headwater.training_settings import Training as Training
from headwater.trajectories import Trajectories

Evaluate = Callable[[Policy], Metrics]


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a finite number. The batch that caused it was written down."""


class Trainer:
    """Trains `policy` on `reward`. With a run folder it logs, checkpoints and resumes; without one it only learns.

    given: final states `[N, width]` of objects to learn from, in the place of drawing new ones; the objective "mle"
    needs them, every other may take them. explorer: makes who draws in the place of the policy that it is given, if
    `exploration` does not say. sharpness: if given, the reward says r and the target is exp(r / beta). learners: the
    processes that share the learning, if there are several.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        conditions: Conditions,
        objective: Objective,
        training: Training,
        exploration: ExplorationSettings | None = None,
        replay: ReplaySettings | None = None,
        seed: int = 0,
        run: Run | None = None,
        evaluate: Evaluate | None = None,
        given: Tensor | None = None,
        search: SearchSettings | None = None,
        explorer: Callable[[Policy], Explorer] | None = None,
        sharpness: Sharpness | None = None,
        learners: Learners | None = None,
    ) -> None:
        keep_freed_memory()
        self.policy, self.objective, self.training, self.sharpness = policy, objective, training, sharpness
        self.learners = learners
        self.exploration = exploration or ExplorationSettings()
        self.run_folder, self.evaluate = run, evaluate
        self.generator = torch.Generator().manual_seed(seed)
        self.replay = self._new_replay(replay or ReplaySettings()) if training.replayed else None
        self.average = copy.deepcopy(policy).requires_grad_(False) if self.exploration.average else None
        self.explorer = (explorer or self.exploration.explorer)(self.average or policy)
        if learners is not None and self.explorer is not None and self.explorer.learns:
            raise ValueError(
                f"several learners: {type(self.explorer).__name__} learns weights of its own beside the policy, whose "
                "gradients are not summed over processes; train with one learner, or explore without it"
            )
        if given is not None and (self.explorer or self.exploration.local_search.rounds):
            raise ValueError("given objects take the place of search: local_search, thompson and teacher must be off")
        searcher = Searcher(
            self.average or policy, reward, conditions, training.group_size, objective.needs_step_rewards, given,
            self.explorer, self.exploration.local_search,
        )  # fmt: skip
        self.search = build_search(search or SearchSettings(), searcher, self.replay, self.generator)
        self.optimizer = self._optimizer()
        self.iteration = 0
        self.seconds = 0.0
        self.calls_before = self.saved_before = 0
        self.interrupted = False

    @property
    def sampler(self) -> Policy:
        """The policy to draw from: the moving average where there is one."""
        return self.average or self.policy

    def run(self, progress_bar: bool = True) -> None:
        """Train up to `training.iterations`. Ctrl-C, or a polite kill, ends it early with a checkpoint and
        `interrupted` set.

        Raises NonFiniteLoss after writing the batch down; the checkpoint before it stays.
        """
        log = TrainingLog(self.run_folder, self.training.iterations, self.iteration, progress_bar)
        with self._interruptible(), closing(self.search), log, self._leading():
            if not self.iteration:
                self._warm_up()
            while self.iteration < self.training.iterations and not self.interrupted:
                began = time.perf_counter()
                metrics = self.update()
                self.seconds += time.perf_counter() - began
                if self._is_reported:
                    metrics |= self._bookkeeping()
                    if self.evaluate is not None and self._is_due(self.training.evaluate_every):
                        metrics |= {f"eval/{name}": value for name, value in self.evaluate(self.sampler).items()}
                    log.write(metrics)
                log.advance()
                if self._is_due(self.training.checkpoint_every) or self.interrupted:
                    self.save()

    def update(self) -> Metrics:
        """One iteration: draw, learn, step."""
        progress = self.iteration / self.training.iterations
        exploration = self.exploration.at(progress)
        batch = self.search.collect(self.training.batch_size, exploration)
        fresh = batch
        if self.replay is not None and len(self.replay):
            replayed = self._replayed()
            batch = replayed if self.training.only_replayed else Trajectories.concatenate([batch, replayed])
        self.iteration += 1
        if not len(batch):  # every reward of this batch failed
            return {"iteration": self.iteration, "epsilon": exploration.epsilon}
        beta = 1.0
        if self.sharpness is not None:
            beta = self.sharpness.at(progress, float((self.policy.version - batch.version).float().mean()))
            batch = batch.with_log_reward(batch.log_reward / beta)
        if self.learners is not None:
            self.learners.tell(batch, beta, progress)
        loss, log_probs, gradient_norm = self._step(batch, beta, progress)
        measures = self.policy.measures(log_probs, batch) if self._is_reported else {}
        self._count_update()
        self.search.publish()
        if not self._is_reported:
            return {}
        if self.sharpness is not None:
            measures["beta"] = beta
        return {
            "iteration": self.iteration,
            "loss": loss,
            "log_z": self.objective.log_z(log_probs, batch).mean().item(),
            "mean_log_reward" if self.sharpness is None else "mean_reward": fresh.log_reward.mean().item(),
            "mean_length": fresh.lengths.float().mean().item(),
            "gradient_norm": gradient_norm,
            "epsilon": exploration.epsilon,
            **measures,
        }

    def _warm_up(self) -> None:
        """Fill the replay before the first update."""
        at_random = dataclasses.replace(self.exploration.at(0), epsilon=1.0)
        for first in range(0, self.training.warm_up, self.training.batch_size):
            if not self.interrupted:
                self.search.collect(min(self.training.batch_size, self.training.warm_up - first), at_random)

    def follow(self) -> None:
        """Learn from what the leader of several learners hands out, until it has no more."""
        assert self.learners is not None
        while (told := self.learners.listen()) is not None:
            batch, beta, progress = told
            self._step(batch.to(self.search.searcher.device), beta, progress)
            self._count_update()

    def _step(self, batch: Trajectories, beta: float, progress: float) -> tuple[float, LogProbs, float]:
        """Change the weights; returns the objective's loss, what the policy said of the batch, and the norm of its
        gradient."""
        clear_gradients(self.optimizer)
        loss, total, log_probs = self._learn(batch, beta)
        gradient_norm = norms = clip_gradient(self.policy, self.training.clip_gradient)
        if self.explorer is not None:
            norms += clip_gradient(self.explorer.own, self.training.clip_gradient)
        if not (math.isfinite(norms) and math.isfinite(total)):
            self._refuse(batch, total, norms)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.training.rate(progress)
        adam_step(self.optimizer)
        return loss, log_probs, gradient_norm

    def _count_update(self) -> None:
        self.policy.version += 1
        self.policy.after_update()
        self._move_average()

    def _learn(self, batch: Trajectories, beta: float) -> tuple[float, float, LogProbs]:
        """Add the gradient of all that is learned to the parameters. Returns the objective's loss, the same with the
        explorer's beside it, and what the policy said of the batch.
        """
        parts = Parts.of(batch, self.training.steps_at_once, self.learners)
        log_probs = parts.log_probs(self.policy)
        loss = self.objective(log_probs, batch)
        if self.sharpness is not None:
            loss = self.objective.in_units_of_reward(loss, beta)
        total = loss
        if self.explorer is not None:
            total = loss + self.explorer.loss(self.objective, log_probs, batch, self.generator)
        total.backward()  # type: ignore[no-untyped-call]
        parts.backward(self.policy, log_probs)
        return loss.item(), total.item(), log_probs

    def _new_replay(self, settings: ReplaySettings) -> Replay:
        if self.training.replay_backward:
            return settings.build(self.policy.objects, self.policy.remembered)
        return settings.build(self.policy.objects)

    def _replayed(self) -> Trajectories:
        assert self.replay is not None
        replayed = self.replay.sample(self.training.replayed, self.generator)
        if not self.training.replay_backward:
            return replayed
        walked = self.policy.sample_backward(replayed, self.generator)
        return self.search.searcher.with_step_rewards(walked) if self.search.searcher.step_rewards else walked

    def _optimizer(self) -> torch.optim.Adam:
        log_z, learnt = self.policy.log_z_parameters(), list(self.policy.parameters())
        if self.explorer is not None:
            log_z, learnt = log_z + self.explorer.log_z_parameters(), learnt + list(self.explorer.own.parameters())
        chosen = {id(parameter) for parameter in log_z}
        rest = [p for p in learnt if p.requires_grad and id(p) not in chosen]
        groups = [{"params": rest}] + ([{"params": log_z}] if log_z else [])
        self._rates = [self.training.learning_rate, self.training.log_z_learning_rate][: len(groups)]
        return torch.optim.Adam(groups, lr=self.training.learning_rate, fused=True)

    def _move_average(self) -> None:
        if self.average is None:
            return
        with torch.no_grad():
            old = [parameter.detach() for parameter in self.average.parameters()]
            new = [parameter.detach() for parameter in self.policy.parameters()]
            torch._foreach_lerp_(old, new, 1 - self.exploration.average)
        self.average.version = self.policy.version

    @property
    def _is_reported(self) -> bool:
        """Whether this iteration's metrics are logged: at their own interval, and with every evaluation."""
        evaluated = self.evaluate is not None and self._is_due(self.training.evaluate_every)
        return evaluated or self._is_due(self.training.log_every)

    def _is_due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration == self.training.iterations

    def _bookkeeping(self) -> Metrics:
        return {
            "iteration": self.iteration,
            "trajectories": self.search.drawn,
            "trajectories_per_second": self.search.drawn / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "failed": self.search.failed,
            **self._reward_calls(),
            **{f"reward_failures/{kind}": count for kind, count in sorted(self.search.failures.items())},
            **self.search.metrics(),
            **(self.replay.summary(self.policy.version) if self.replay is not None else {}),
        }

    def _reward_calls(self) -> dict[str, int]:
        """Objects that the reward was really asked for, and those whose reward was known already, over all resumes."""
        calls = self.search.calls
        if calls is None:
            return {"reward_calls": self.search.drawn}
        saved = calls.requested - calls.evaluated
        return {"reward_calls": self.calls_before + calls.evaluated, "reward_calls_saved": self.saved_before + saved}

    def _refuse(self, batch: Trajectories, loss: float, gradient_norm: float) -> None:
        where = ""
        if self.run_folder is not None:
            path = self.run_folder.folder / "non-finite-batch.safetensors"
            batch.save(path)
            where = f"; the batch is in {path}, the last good checkpoint is kept"
        raise NonFiniteLoss(f"iteration {self.iteration}: loss {loss}, gradient norm {gradient_norm}{where}")

    # Checkpoints: all that one iteration hands to the next.

    def save(self) -> None:
        if self.run_folder is None:
            return
        cache = cache_of(self.search.searcher.reward)
        if cache is not None and cache.table is not None:
            cache.table.flush()  # a checkpoint stands for all that was scored before it
        self.run_folder.save_checkpoint(self.checkpoint())

    def checkpoint(self) -> Checkpoint:
        search = self.search.state()  # first: it puts what has arrived into the replay and the counts
        tensors = {
            "policy": dict(self.policy.state_dict()),
            "optimizer": state_of(self.optimizer),
            "random": {"generator": self.generator.get_state()},
        }
        if self.average is not None:
            tensors["average"] = dict(self.average.state_dict())
        if self.explorer is not None:
            tensors["explorer"] = dict(self.explorer.own.state_dict())
        if self.replay is not None:
            tensors["replay"] = self.replay.state()
        if search:
            tensors["search"] = search
        state: dict[str, object] = {
            "version": self.policy.version,
            "drawn": self.search.drawn,
            "failed": self.search.failed,
            "failures": dict(self.search.failures),
            "seconds": self.seconds,
            **self._reward_calls(),
        }
        return Checkpoint(self.iteration, tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up where `checkpoint` was made. Raises ValueError if it belongs to other settings."""
        try:
            self.policy.load_state_dict(checkpoint.tensors["policy"])
            if self.average is not None:
                self.average.load_state_dict(checkpoint.tensors["average"])
            if self.explorer is not None:
                self.explorer.own.load_state_dict(checkpoint.tensors["explorer"])
            load_state(self.optimizer, checkpoint.tensors["optimizer"])
            self.generator.set_state(checkpoint.tensors["random"]["generator"])
            if self.replay is not None:
                self.replay.load_state(checkpoint.tensors["replay"])
            self.search.load_state(checkpoint.tensors.get("search", {}))
            self.search.drawn, self.search.failed = (
                int(str(checkpoint.state["drawn"])),
                int(str(checkpoint.state["failed"])),
            )
            failures = checkpoint.state.get("failures")
            self.search.failures = Counter(failures if isinstance(failures, dict) else {})
            self.seconds = float(str(checkpoint.state["seconds"]))
            self.calls_before = int(str(checkpoint.state["reward_calls"]))
            self.saved_before = int(str(checkpoint.state.get("reward_calls_saved", 0)))
            self.policy.version = self.sampler.version = int(str(checkpoint.state["version"]))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint does not fit these settings: {error}") from error
        self.iteration = checkpoint.iteration

    @contextmanager
    def _leading(self) -> Iterator[None]:
        """Let the other learners go when there is no more to learn."""
        yield
        if self.learners is not None:
            self.learners.dismiss()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """A first Ctrl-C or SIGTERM lets the iteration end; a second one stops at once."""

        def ask_to_stop(number: int, frame: object) -> None:
            self.interrupted = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        try:
            for stop in (signal.SIGINT, signal.SIGTERM):
                before[stop] = signal.signal(stop, ask_to_stop)
        except ValueError:  # not in the main thread: whoever owns it handles signals
            before.clear()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
