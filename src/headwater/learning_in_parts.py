"""One batch, learned from in parts: as many as it takes for the activations to fit, and for every learner to have its
own. The gradient is that of the whole batch at once.

The loss is taken at leaves, the log-probabilities of the whole batch without a graph, so that an objective may compare
trajectories of different parts; then its gradient there is carried on to the parameters, part by part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwater.learners import Learners
from headwater.policies.base import LogProbs, Policy
from headwater.trajectories import Trajectories


@dataclass(frozen=True)
class Parts:
    """A batch as consecutive `parts`, one of them where nothing asks for more. learners: those that share them."""

    parts: list[Trajectories]
    learners: Learners | None

    @staticmethod
    def of(batch: Trajectories, steps_at_once: int, learners: Learners | None) -> Parts:
        """In parts of up to `steps_at_once` steps, 0 for no limit, and in enough of them for all learners."""
        limit = steps_at_once or batch.n_steps
        if learners is not None:
            limit = min(limit, -(-batch.n_steps // learners.size))
        sizes, steps = [0], 0
        for length in batch.lengths.tolist():
            if sizes[-1] and steps + length > limit:
                sizes.append(0)
                steps = 0
            sizes[-1] += 1
            steps += length
        return Parts(batch.split(sizes) if len(sizes) > 1 else [batch], learners)

    def log_probs(self, policy: Policy) -> LogProbs:
        """What the policy says of the batch: leaves where there are several parts, of which each learner asks the
        policy about its own."""
        if len(self.parts) == 1:
            return policy.log_probs(self.parts[0])
        with torch.no_grad():
            mine = {number: policy.log_probs(part) for number, part in enumerate(self.parts) if self._is_mine(number)}
            if self.learners is None:
                return LogProbs.concatenate(list(mine.values())).as_leaves()
            like = next(iter(mine.values())) if mine else policy.log_probs(self.parts[0])
            said = [mine[n] if n in mine else like.zeros_for(part) for n, part in enumerate(self.parts)]
            whole = LogProbs.concatenate(said)
            self.learners.sum(list(whole.tensors().values()))
            return whole.as_leaves()

    def backward(self, policy: Policy, leaves: LogProbs) -> None:
        """Carry the gradient of a loss on from the leaves to the policy's parameters; where there is one part, it has
        got there by itself."""
        if len(self.parts) == 1:
            return
        for number, upstream in enumerate(leaves.split_gradients(self.parts)):
            if self._is_mine(number):
                policy.log_probs(self.parts[number]).backward_with(upstream)
        if self.learners is not None:
            self.learners.sum_gradients(policy)

    def _is_mine(self, part: int) -> bool:
        return self.learners is None or part % self.learners.size == self.learners.rank
