"""The policy over trees: at each step which two trees to merge and, where trees have branch lengths, how long the two
new edges are, the second given the first. PhyloGFN (Zhou et al. 2024, arXiv 2310.08774), with lengths from continuous
densities.

All trajectories have n - 1 steps, so a batch goes in step: forest t of each has n - t trees. In learning, all forests
of all steps are seen at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwater.environments.base import Objects, identity
from headwater.phylogeny.blocks import Blocks
from headwater.phylogeny.environment import Forests
from headwater.phylogeny.evidence import Evidence, Grown
from headwater.phylogeny.network import ForestEncoder, ForestNetwork, LengthHead, PairScore
from headwater.phylogeny.pairs import PAIR_FEATURES, describe, pair_index, pair_number
from headwater.phylogeny.parameters import ParameterDensity
from headwater.phylogeny.walks import forests_on_the_way, merges_of, tables_of, walks_to
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, StatePolicy
from headwater.policies.layers import Linear
from headwater.trajectories import Trajectories

TreeBackward = Literal["uniform", "learned"]

_AT_ONCE = 64  # trajectories drawn together: what is known of their trees stays in the processor's cache
_MOST_AT_ONCE = 256  # trajectories looked at together without gradient, lest their partial likelihoods fill the memory
NEVER = -1e9


class TreePolicy(StatePolicy):
    """Draws trees merge by merge.

    Per-step tensors: `merge` int32 `[S, 2]`, the nodes merged, as in `walks.py`; `length` float32 `[S, 2]` above them,
    of the last merge in column 0 only, zeros where trees have no lengths. Objects are tables, int32 `[T, 2 (n-1)]`, or,
    with lengths, float32 `[T, 2 (n-1) + 2n-1 + p]`: the table and the lengths of `walks.tables_of`, and p coordinates
    of model parameters, where they are sampled: before the first merge, from a normal density. They are in the per-step
    tensor `parameters` `[S, p]`, equal in all steps of a trajectory.

    backward: "uniform" over the trees that are no leaf, and over the edges of a finished tree; or "learned" over the
    former. condition_size: C, the columns of the condition; 0 for none. parameter_density: what sampled
    model parameters are drawn from; None where there are none.
    """

    def __init__(
        self,
        evidence: Evidence,
        network: ForestNetwork | None = None,
        backward: TreeBackward = "uniform",
        condition_size: int = 0,
        parameter_density: ParameterDensity | None = None,
    ) -> None:
        super().__init__()
        if backward not in get_args(TreeBackward):
            raise ValueError(f"backward = {backward!r}: must be one of {', '.join(get_args(TreeBackward))}")
        network = network or ForestNetwork()
        self.evidence, self.backward_kind, self.condition_size = evidence, backward, condition_size
        self.environment = Forests(evidence.n)
        self.embed = Linear(evidence.features, network.width)
        self.is_leaf = nn.Parameter(torch.randn(evidence.n, network.width) * 0.1)
        self.encoder, self.score = ForestEncoder(network), PairScore(network)
        self.flow = Linear(network.width, 1)
        self.undo = Linear(network.width, 1) if backward == "learned" else None
        self.density = network.density(evidence.n_sites) if evidence.has_lengths else None
        self.parameter_density = parameter_density
        if self.parameter_density is not None:
            self.embed_parameters = Linear(evidence.parameters, network.width)
        if self.density is not None:
            self.lengths = LengthHead(network, self.density.outputs)
            self.last_length = LengthHead(network, self.density.outputs)
        self.log_z = nn.Parameter(torch.zeros(()))
        if condition_size:
            self.embed_condition = nn.Sequential(
                nn.Linear(condition_size, network.width), nn.SiLU(), nn.Linear(network.width, network.width)
            )
            self.log_z_of_condition = nn.Sequential(nn.Linear(condition_size, 64), nn.SiLU(), nn.Linear(64, 1))

    @property
    def n(self) -> int:
        return self.evidence.n

    def log_z_parameters(self) -> list[nn.Parameter]:
        return [self.log_z, *(self.log_z_of_condition.parameters() if self.condition_size else [])]

    def sample(
        self,
        condition: Tensor,
        exploration: Exploration = NO_EXPLORATION,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        """With probability `epsilon` a step merges a uniform pair; its lengths are always the policy's."""
        condition, generator = self._checked(condition), generator or torch.default_generator
        with torch.no_grad():
            parts = [self._draw(part, exploration, generator) for part in torch.split(condition, _AT_ONCE)]
        return Trajectories.concatenate(parts)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator | None = None) -> Trajectories:
        """Walks by the uniform backward policy, whatever `backward` is: `log_behaviour` is their log-probability."""
        tables, above = self._finished(trajectories)
        parameters = self._coordinates(trajectories)
        return self._walked(tables, above, parameters, trajectories.condition, trajectories.log_reward, generator)

    def sample_to(self, objects: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """Trajectories to given objects, not yet scored, by the uniform backward policy."""
        n = self.n
        tables, rest = objects[:, : 2 * (n - 1)].int(), objects[:, 2 * (n - 1) :]
        above = None if self.density is None else rest[:, : 2 * n - 1]
        parameters = None if self.parameter_density is None else rest[:, 2 * n - 1 :]
        unknown = torch.full((len(tables),), torch.nan)
        return self._walked(tables, above, parameters, self._checked(condition), unknown, generator)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        if torch.is_grad_enabled() or len(trajectories) <= _MOST_AT_ONCE:
            return self._log_probs(trajectories)
        parts = [
            self._log_probs(trajectories.select(rows))
            for rows in torch.split(torch.arange(len(trajectories)), _MOST_AT_ONCE)
        ]
        flows = [part.log_flow for part in parts if part.log_flow is not None]
        forward, backward = (torch.cat([getattr(part, name) for part in parts]) for name in ("forward", "backward"))
        return LogProbs(forward, backward, torch.cat([part.log_z for part in parts]), torch.cat(flows))

    def _log_probs(self, trajectories: Trajectories) -> LogProbs:
        count, n = len(trajectories), self.n
        merges = trajectories.steps["merge"].view(count, n - 1, 2)
        lengths = trajectories.steps["length"].view(count, n - 1, 2)
        roots, places, internal = forests_on_the_way(merges)
        parameters = self._coordinates(trajectories)
        grown = self._regrow(merges, lengths, roots, parameters)
        context = self._context(trajectories.condition, parameters)
        blocks = Blocks(count, tuple((self._forests(count, t), n - t) for t in range(n - 1)))
        features, guesses = torch.empty(sum(blocks.pairs), PAIR_FEATURES), []
        for t, part in enumerate(torch.split(features, blocks.pairs)):
            forests, size = blocks.sizes[t]
            _, guess = describe(grown.apart, roots[t, :forests, :size], part.view(forests, -1, PAIR_FEATURES))
            guesses.append(guess[blocks.forest(t)[:, None], places[:, t], places[:, t].flip(1)])

        nodes = self._nodes(grown.features)
        hidden = self.encoder(self._trees(nodes, roots, blocks, context), blocks.sizes)
        forward, flow = [], []
        for t, logits in enumerate(blocks.of_pairs(self.score(hidden, features, blocks.sizes))):
            chosen = pair_number(places[:, t, 0], places[:, t, 1], n - t)
            forward.append(logits.log_softmax(1)[blocks.forest(t), chosen])
        for t, of_trees in enumerate(blocks.of_trees(self.flow(hidden)[:, 0])):
            flow.append(of_trees.mean(1)[blocks.forest(t)])
        log_forward = torch.stack(forward, 1)
        if self.density is not None:
            chosen = torch.stack([blocks.rows(places[:, :, side].t()) for side in range(2)])
            log_forward = log_forward + self._log_lengths(hidden, chosen, torch.stack(guesses), lengths)
        if self.parameter_density is not None and parameters is not None:  # drawn with the first step
            first = log_forward[:, :1] + self.parameter_density.log_prob(parameters)[:, None]
            log_forward = torch.cat([first, log_forward[:, 1:]], 1)
        log_backward = self._uniform_backward(internal)
        if self.undo is not None and n > 2:
            learned = []
            for t, logits in enumerate(blocks.of_trees(self.undo(hidden)[:, 0])[1:], 1):
                logits = logits.masked_fill(roots[t, :, : n - t] < n, NEVER)
                learned.append(logits.log_softmax(1).gather(1, places[:, t - 1, :1])[:, 0])
            log_backward = torch.cat([torch.stack(learned, 1), log_backward[:, -1:]], 1)
        return LogProbs(
            forward=log_forward.flatten(),
            backward=log_backward.flatten(),
            log_z=self._log_z(trajectories.condition),
            log_flow=torch.stack(flow, 1).flatten(),
        )

    def action_log_probs(self, states: Tensor, condition: Tensor) -> Tensor:
        """log P_F of every action of `Forests` in each of N states under one condition row: `[N, n_actions]`, very low
        where illegal. For trees without lengths.
        """
        if self.density is not None:
            raise TypeError("trees with branch lengths have no finite number of states")
        out = torch.full((len(states), self.environment.n_actions), NEVER)
        made = (states.view(len(states), -1, 2)[:, :, 0] >= 0).sum(1)
        for steps in range(self.n):
            rows = (made == steps).nonzero()[:, 0]
            if steps == self.n - 1:
                out[rows, -1] = 0.0
            elif len(rows):
                for part in torch.split(rows, 16 * _AT_ONCE):
                    out[part] = self._forest_log_probs(states[part], steps, condition)
        return out

    def objects(self, trajectories: Trajectories) -> Objects:
        return self.assembled(*self._finished(trajectories), self._coordinates(trajectories))

    def assembled(self, tables: Tensor, above: Tensor | None, parameters: Tensor | None = None) -> Tensor:
        """Objects of tables and, where trees have them, the lengths above their nodes and their parameters."""
        if self.density is None or above is None:
            return tables
        return torch.cat([tables.float(), above] + ([] if parameters is None else [parameters]), 1)

    # Drawing

    def _draw(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        count, n = len(condition), self.n
        here = torch.arange(count)
        parameters = None if self.parameter_density is None else self.parameter_density.sample(count, generator)
        grown, context = self.evidence.start(count, parameters), self._context(condition, parameters)
        nodes = self._nodes(grown.features[:, :0], spare=n - 2)
        internal = nodes[n:].view(count, n - 2, nodes.shape[1])
        roots = torch.arange(n).repeat(count, 1)
        merges, lengths = torch.empty(count, n - 1, 2, dtype=torch.int32), torch.zeros(count, n - 1, 2)
        log_behaviour = torch.zeros(count)
        if self.parameter_density is not None and parameters is not None:
            log_behaviour += self.parameter_density.log_prob(parameters)
        for t in range(n - 1):
            size = n - t
            blocks = Blocks(count, ((self._forests(count, t), size),))
            forests = blocks.sizes[0][0]
            tokens = self.encoder(self._trees(nodes, roots[None], blocks, context), blocks.sizes)
            features, guesses = describe(grown.apart, roots[:forests])
            (logits,) = blocks.of_pairs(self.score(tokens, features.flatten(0, 1), blocks.sizes))
            chosen, log_prob = _choose(logits.expand(count, -1), exploration, generator)
            pair = pair_index(size)[:, chosen]
            left, right = roots.gather(1, pair.t()).unbind(1)
            merges[:, t, 0], merges[:, t, 1] = left, right
            log_behaviour += log_prob
            if self.density is not None:
                guess = guesses[blocks.forest(0), pair, pair.flip(0)].t()
                own, other = tokens.index_select(0, blocks.rows(pair).flatten()).view(2, count, tokens.shape[1])
                drawn, log_density = self._draw_lengths(own, other, guess, size == 2, generator)
                lengths[:, t, : drawn.shape[1]] = drawn
                log_behaviour += log_density
            if size == 2:
                break
            roots[here, pair[0]] = n + t
            columns = torch.arange(size - 1)
            roots = roots.gather(1, columns + (columns >= pair[1, :, None]))
            grown.join(t, merges[:, t, 0].contiguous(), merges[:, t, 1].contiguous(), lengths[:, t], roots)
            internal[:, t] = self.embed(grown.features[:, t])
        return self._trajectories(merges, lengths, parameters, condition, log_behaviour)

    def _draw_lengths(
        self, own: Tensor, other: Tensor, guess: Tensor, is_last: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert self.density is not None
        if is_last:
            both = own + other
            drawn, log_density = self.density.draw(self.last_length(both, both, guess), guess[:, 0], generator)
            return drawn[:, None], log_density
        left, log_left = self.density.draw(self.lengths(own, other, guess), guess[:, 0], generator)
        output = self.lengths(other, own, guess.flip(1), left)
        right, log_right = self.density.draw(output, guess[:, 1], generator)
        return torch.stack([left, right], 1), log_left + log_right

    # Learning

    def _regrow(self, merges: Tensor, lengths: Tensor, roots: Tensor, parameters: Tensor | None) -> Grown:
        """What is known of every node of given trajectories, whose forests are `roots`."""
        grown = self.evidence.start(len(merges), parameters)
        left, right = merges.permute(2, 1, 0).contiguous()
        for t in range(self.n - 2):
            grown.join(t, left[t], right[t], lengths[:, t], roots[t + 1, :, : self.n - t - 1])
        return grown

    def _log_lengths(self, hidden: Tensor, chosen: Tensor, guess: Tensor, lengths: Tensor) -> Tensor:
        """Log-density of the lengths of every step, `[T, n-1]`.

        chosen: rows of the two trees merged, `[2, n-1, T]`. guess: `[n-1, T, 2]`.
        """
        assert self.density is not None
        count, steps, _ = lengths.shape
        own, other = hidden.index_select(0, chosen.flatten()).view(2, steps * count, hidden.shape[1])
        guess = guess.flatten(0, 1)
        both, last = own[-count:] + other[-count:], guess[-count:]
        output = self.last_length(both, both, last)
        log_last = self.density.log_prob(output, last[:, 0], lengths[:, -1, 0])[:, None]
        if steps == 1:
            return log_last
        own, other, guess = own[:-count], other[:-count], guess[:-count]
        left, right = lengths[:, :-1].permute(2, 1, 0).flatten(1)
        log_left = self.density.log_prob(self.lengths(own, other, guess), guess[:, 0], left)
        log_right = self.density.log_prob(self.lengths(other, own, guess.flip(1), left), guess[:, 1], right)
        return torch.cat([(log_left + log_right).view(-1, count).t(), log_last], 1)

    def _uniform_backward(self, internal: Tensor) -> Tensor:
        """log P_B of undoing each step: one of the trees that are no leaf, at the end one of 2n - 3 edges."""
        choices = internal.float()
        choices[:, -1] = 2 * self.n - 3
        return -choices.log()

    # Small things

    def _context(self, condition: Tensor, parameters: Tensor | None) -> Tensor | None:
        """What is added to every tree of a trajectory's forests: `[T, width]`; None for nothing."""
        context = self.embed_condition(condition) if self.condition_size else None
        if self.parameter_density is None or parameters is None:
            return context
        embedded = self.embed_parameters(self.parameter_density.standardised(parameters))
        return embedded if context is None else context + embedded

    def _coordinates(self, trajectories: Trajectories) -> Tensor | None:
        """Of the model parameters of each trajectory: `[T, p]`; None where none are sampled."""
        return None if self.parameter_density is None else trajectories.steps["parameters"][trajectories.starts]

    def _forests(self, count: int, step: int) -> int:
        """Before the first step all of `count` forests are the same, but for their context."""
        return count if step or self.condition_size or self.parameter_density is not None else min(count, 1)

    def _nodes(self, features: Tensor, spare: int = 0) -> Tensor:
        """Embeddings of the leaves, then of the nodes that are none, features `[T, K, features]` a trajectory, then
        `spare` rows a trajectory: `[n + T (K + spare), width]`.
        """
        leaves = self.embed(self.evidence.leaves) + self.is_leaf
        internal = self.embed(features.flatten(0, 1))
        return torch.cat([leaves, internal, leaves.new_empty(len(features) * spare, leaves.shape[1])])

    def _trees(self, nodes: Tensor, roots: Tensor, blocks: Blocks, context: Tensor | None) -> Tensor:
        """What the encoder takes, `[rows, width]`, for forests of nodes `roots` `[blocks, T, n]`."""
        count = roots.shape[1]
        of = torch.arange(count)[:, None]
        own = (len(nodes) - self.n) // max(count, 1)
        trees = nodes.index_select(0, blocks.pack(torch.where(roots < self.n, roots, roots + of * own)))
        if context is not None:
            trees = trees + context.index_select(0, blocks.pack(of.expand(roots.shape)))
        return trees

    def _forest_log_probs(self, states: Tensor, steps: int, condition: Tensor) -> Tensor:
        count, n = len(states), self.n
        merges, roots, smallest = merges_of(states, steps)
        grown = self.evidence.start(count)
        for t in range(steps):
            every = torch.arange(n + t + 1).repeat(count, 1)
            grown.join(t, merges[:, t, 0].contiguous(), merges[:, t, 1].contiguous(), torch.zeros(count, 2), every)
        blocks = Blocks(count, ((count, n - steps),))
        nodes = self._nodes(grown.features[:, :steps])
        context = self._context(condition.expand(count, -1), None)
        hidden = self.encoder(self._trees(nodes, roots[None], blocks, context), blocks.sizes)
        (logits,) = blocks.of_pairs(self.score(hidden, describe(grown.apart, roots)[0].flatten(0, 1), blocks.sizes))
        i, j = pair_index(n - steps)
        a, b = smallest[:, i], smallest[:, j]
        out = torch.full((count, self.environment.n_actions), NEVER)
        return out.scatter(1, pair_number(a, b, n), logits.log_softmax(1))

    def _finished(self, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
        shape = (len(trajectories), self.n - 1, 2)
        return tables_of(trajectories.steps["merge"].view(shape), trajectories.steps["length"].view(shape))

    def _walked(
        self,
        tables: Tensor,
        above: Tensor | None,
        parameters: Tensor | None,
        condition: Tensor,
        log_reward: Tensor,
        generator: torch.Generator | None,
    ) -> Trajectories:
        generator = generator or torch.default_generator
        uniform = torch.rand(len(tables), self.n - 1, dtype=torch.float64, generator=generator)
        merges, lengths = walks_to(tables, above, uniform)
        log_behaviour = self._uniform_backward(forests_on_the_way(merges)[2]).sum(1)
        walked = self._trajectories(merges, lengths, parameters, condition, log_behaviour)
        return replace(walked, log_reward=log_reward)

    def _trajectories(
        self, merges: Tensor, lengths: Tensor, parameters: Tensor | None, condition: Tensor, log_behaviour: Tensor
    ) -> Trajectories:
        count = len(merges)
        tables, above = tables_of(merges, lengths)
        steps, parts = {"merge": merges.flatten(0, 1), "length": lengths.flatten(0, 1)}, [above]
        if parameters is not None:
            steps["parameters"] = parameters.repeat_interleave(self.n - 1, 0)
            parts.append(parameters)
        return Trajectories(
            steps=steps,
            lengths=torch.full((count,), self.n - 1, dtype=torch.int64),
            condition=condition,
            log_reward=torch.full((count,), torch.nan),
            log_behaviour=log_behaviour,
            version=torch.full((count,), self.version, dtype=torch.int64),
            identity=identity(torch.cat([tables, torch.cat(parts, 1).view(torch.int32)], 1)),
        )

    def _log_z(self, condition: Tensor) -> Tensor:
        if not self.condition_size:
            return self.log_z.expand(len(condition))
        return self.log_z + self.log_z_of_condition(condition)[:, 0]

    def _checked(self, condition: Tensor) -> Tensor:
        if condition.ndim != 2 or condition.shape[1] != self.condition_size:
            raise ValueError(f"condition has shape {tuple(condition.shape)}, expected [T, {self.condition_size}]")
        return condition


def _choose(logits: Tensor, exploration: Exploration, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pair for each row, one uniform number a row, and its log-probability with exploration."""
    probability = (logits / exploration.temperature).softmax(1)
    if exploration.epsilon:
        probability = (1 - exploration.epsilon) * probability + exploration.epsilon / logits.shape[1]
    cumulative = probability.cumsum(1)
    uniform = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return chosen, probability.gather(1, chosen[:, None])[:, 0].log()
