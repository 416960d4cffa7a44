"""A causal language model as a Policy: a trajectory is a completion, a step is a token, the reference path measure is
the model that training started from.

Trajectory balance then asks that log Z(prompt) + log pi(y) - log pi_ref(y) = r(y) / beta for every completion y, so
that pi becomes pi_ref(y) exp(r(y) / beta) / Z (Bartoldson et al. 2025, arXiv 2503.18929, equations 3 to 7). No
log-probability of whatever drew a completion enters: it may come from any policy of any age.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.environments.base import Objects
from headwater.language.backbone import Backbone
from headwater.language.backends import Remote
from headwater.language.data import Completion
from headwater.language.generation import Generated, ModelGenerator, Sampling
from headwater.objectives import STEP_BEHAVIOUR, path_log_ratio
from headwater.policies.base import Exploration, LogProbs, Policy
from headwater.trajectories import Trajectories

REFERENCE = "log_reference"
"""The per-step tensor `[S]` of each token's log-probability under the reference, as who drew it knew it."""
REFERENCE_VERSION = "reference_version"
"""The per-step tensor `[S]`, int32, of the reference that `REFERENCE` is of."""

_STALENESS_FROM = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class LanguagePolicy(Policy):
    """Draws completions of prompts.

    model: a causal language model, or a PEFT model around one, whose adapters alone learn then; the reference is the
    model without them, at no cost in memory. Otherwise the reference is a copy. prompts: token numbers of each prompt,
    at least one; a condition row `[index]` names one. reset_every: updates after which the reference becomes what the
    policy is; 0 for never. learns_log_z: whether log Z(prompt) is learned, as a linear function of the model's state
    at the prompt's end, rather than estimated from a group. remote: who writes the completions, if not this process.
    places: what errors call each prompt, such as its file and line.

    Steps of a trajectory: `token`, int32; and of each token its log-probability when it was drawn (`STEP_BEHAVIOUR`)
    and under the reference (`REFERENCE`). The end of sequence is a step where the model chose it. Where the length
    limit or a stop text cut a completion off, nothing was chosen and there is no such step.
    """

    reference_version: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        reset_every: int = 0,
        learns_log_z: bool = False,
        remote: Remote | None = None,
        places: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.sampling, self.reset_every = model, tokenizer, sampling, reset_every
        self.prompts = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
        inner = model.get_base_model() if _is_peft(model) else model
        model.eval()  # before it is copied: a reference with dropout would be another one each time
        self.backbone = Backbone(inner)
        self._require_prompts_that_fit(places or [f"prompt {number + 1}" for number in range(len(prompts))])
        self.register_buffer("reference_version", torch.zeros((), dtype=torch.int64))
        self._reference = self._make_reference()
        hidden = inner.config.get_text_config().hidden_size
        self.log_z_head = nn.Linear(hidden, 1) if learns_log_z else None
        if self.log_z_head is not None:
            nn.init.zeros_(self.log_z_head.weight), nn.init.zeros_(self.log_z_head.bias)
        self.local, self.remote = ModelGenerator(self.backbone, tokenizer), remote

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """Draw one completion for each row of `condition`; `exploration.temperature` multiplies the sampler's own."""
        if exploration.epsilon:
            raise ValueError("epsilon: a language model explores by temperature, not by uniform tokens")
        numbers = condition[:, 0].long().tolist()
        seed = int(torch.randint(2**62, (), generator=generator))
        sampling = Sampling(
            self.sampling.temperature * exploration.temperature, self.sampling.max_new_tokens, self.sampling.stop
        )
        writer = self.local if self.remote is None else self.remote.up_to_date(self.model, self.version)
        written = writer.generate([self.prompts[n].tolist() for n in numbers], sampling, seed)
        return self.trajectories(condition, written)

    @torch.no_grad()
    def trajectories(self, condition: Tensor, written: Sequence[Generated]) -> Trajectories:
        """Completions, however they were written, as trajectories of the conditions `[T, 1]`."""
        lengths = torch.tensor([len(one.tokens) for one in written])
        tokens = torch.tensor([token for one in written for token in one.tokens], dtype=torch.int32)
        behaviour = torch.tensor([value for one in written for value in one.log_probs])
        count = len(written)
        drawn = Trajectories(
            steps={"token": tokens, STEP_BEHAVIOUR: behaviour},
            lengths=lengths,
            condition=condition.cpu(),
            log_reward=torch.full((count,), torch.nan),
            log_behaviour=torch.zeros(count).index_add(0, torch.repeat_interleave(lengths), behaviour),
            version=torch.full((count,), self.version),
            identity=torch.tensor([_identity(one) for one in written], dtype=torch.int64),
        )
        drawn.steps[REFERENCE] = self.reference_log_probs(drawn)
        drawn.steps[REFERENCE_VERSION] = torch.full_like(tokens, int(self.reference_version))
        return drawn.to(self.backbone.device)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        """Of every token under the model, at the sampling temperature, and under the reference as it is now."""
        forward, last = self._token_log_probs(self.backbone, trajectories)
        backward = trajectories.steps.get(REFERENCE)
        if backward is None or bool((trajectories.steps[REFERENCE_VERSION] != self.reference_version).any()):
            backward = self.reference_log_probs(trajectories)
        log_z = forward.new_zeros(len(trajectories))
        if self.log_z_head is not None:
            of_prompts = self.log_z_head(last.detach().to(self.log_z_head.weight.dtype))[:, 0].float()
            log_z = of_prompts[self._prompts_of(trajectories)[1]]
        return LogProbs(forward, backward.to(forward.device), log_z)

    @torch.no_grad()
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        """Of every token under the reference: float32 `[S]`."""
        with self._as_reference() as backbone:
            return self._token_log_probs(backbone, trajectories)[0]

    def objects(self, trajectories: Trajectories) -> Objects:
        """The completions' texts, as `Completion`."""
        pieces = torch.split(trajectories.steps["token"].cpu(), trajectories.lengths.tolist())
        texts = self.tokenizer.batch_decode([piece.tolist() for piece in pieces], skip_special_tokens=True)
        finished = self.finished(trajectories).tolist()
        return [Completion(text, finished=done) for text, done in zip(texts, finished, strict=True)]

    def finished(self, trajectories: Trajectories) -> Tensor:
        """Whether the model itself ended each completion: bool `[T]`."""
        ends = torch.tensor(self.local.ends, device=trajectories.device)
        return torch.isin(trajectories.steps["token"][trajectories.last], ends)

    def measures(self, log_probs: LogProbs, batch: Trajectories) -> dict[str, float]:
        """Divergence from the reference and entropy a completion, by the batch's own completions; how stale they are;
        shares that were cut off, and that are given twice."""
        with torch.no_grad():
            staleness = (self.version - batch.version).float()
            return {
                "divergence": float(path_log_ratio(log_probs, batch).mean()),
                "entropy_per_token": float(-log_probs.forward.mean()),
                "staleness_mean": float(staleness.mean()),
                "staleness_max": float(staleness.max()),
                "truncated": float((~self.finished(batch)).float().mean()),
                "distinct_in_batch": len(torch.unique(batch.identity)) / len(batch),
                **_staleness_shares(staleness),
            }

    def after_update(self) -> None:
        if self.reset_every and self.version % self.reset_every == 0:
            self.reset_reference()

    @torch.no_grad()
    def reset_reference(self) -> None:
        """The reference becomes what the policy is now. Log-probabilities under the old one are asked for anew."""
        if _is_peft(self.model):
            adapters = dict(self.model.named_parameters())
            for name, parameter in adapters.items():
                if (
                    ".default." in name
                    and (copied := adapters.get(name.replace(".default.", ".reference."))) is not None
                ):
                    copied.copy_(parameter)
        else:
            assert self._reference is not None
            self._reference.model.load_state_dict(self.model.state_dict())
        self.reference_version += 1

    def log_z_parameters(self) -> list[nn.Parameter]:
        return [] if self.log_z_head is None else list(self.log_z_head.parameters())

    def published(self) -> dict[str, Tensor]:
        """What searchers must have the newest of: what learns, and the reference where it is reset."""
        learned = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self.reset_every:
            learned |= {name for name in self.state_dict() if "reference" in name}
        return {name: tensor for name, tensor in self.state_dict().items() if name in learned}

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Dropout stays off: log-probabilities must be those of the sampler."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguagePolicy:
        """Whatever moves or casts the model does the same to a reference that is no part of a checkpoint."""
        if self._reference is not None and not self.reset_every:
            self._reference.model._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # The reference

    def _make_reference(self) -> Backbone | None:
        if not _is_peft(self.model):
            reference = copy.deepcopy(self.model).requires_grad_(False)
            if self.reset_every:  # part of a checkpoint; otherwise it is where training started from, for ever
                self.reference = reference
            return Backbone(reference)
        if self.reset_every:
            self.model.add_adapter("reference", self.model.peft_config["default"])
            self.model.set_adapter("default")
        return None

    @contextmanager
    def _as_reference(self) -> Iterator[Backbone]:
        if self._reference is not None:
            yield self._reference
            return
        if not self.reset_every:
            with self.model.disable_adapter():
                yield self.backbone
            return
        self.model.set_adapter("reference", inference_mode=True)
        try:
            yield self.backbone
        finally:
            self.model.set_adapter("default")

    # Inside

    def _token_log_probs(self, backbone: Backbone, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
        device = backbone.device
        numbers, prompt_of = self._prompts_of(trajectories)
        prompts = [self.prompts[number].to(device) for number in numbers.tolist()]
        return backbone.log_probs(
            prompts, prompt_of.to(device), trajectories.steps["token"].to(device).long(),
            trajectories.lengths.to(device), self.sampling.temperature,
        )  # fmt: skip

    def _prompts_of(self, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
        """The prompts that there are, by number, and which of them each trajectory has."""
        return torch.unique(trajectories.condition[:, 0].long(), return_inverse=True)

    def _require_prompts_that_fit(self, places: Sequence[str]) -> None:
        context, vocabulary = self.backbone.context, self.backbone.model.get_input_embeddings().weight.shape[0]
        for place, prompt in zip(places, self.prompts, strict=True):
            if not len(prompt):
                raise ValueError(f"{place} has no tokens")
            if int(prompt.max()) >= vocabulary:
                raise ValueError(
                    f"{place} has token {int(prompt.max())}, and the model a vocabulary of {vocabulary}: "
                    "this tokenizer belongs to another model"
                )
            if context is not None and len(prompt) + self.sampling.max_new_tokens > context:
                raise ValueError(
                    f"{place} has {len(prompt)} tokens and max_new_tokens = "
                    f"{self.sampling.max_new_tokens}: together more than the model's context of {context}"
                )


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _identity(one: Generated) -> int:
    """A hash of the completion, and of how it ended."""
    told = ",".join(map(str, one.tokens)) + str(one.finished)
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big", signed=True)


def _staleness_shares(staleness: Tensor) -> dict[str, float]:
    """Shares of completions, `[T]`, by how many updates old they are: 0, 1, 2 to 3, 4 to 7, ..., 128 and more."""
    lowest = torch.tensor(_STALENESS_FROM, device=staleness.device)
    place = torch.bucketize(staleness.long(), lowest, right=True) - 1
    shares = torch.bincount(place.clamp(min=0), minlength=len(_STALENESS_FROM)).double() / len(staleness)
    return {f"staleness/from_{low}": share for low, share in zip(_STALENESS_FROM, shares.tolist(), strict=True)}
