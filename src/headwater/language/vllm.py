"""Completions by vLLM, which runs as a server in an environment of its own (`vllm serve`). Prompts and completions are
exchanged as token ids, by the OpenAI-compatible completions API; new weights come between pause and resume.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

from headwater.language.generation import Generated, Sampling
from headwater.language.vllm_server import Server, ServerError, ServerUnavailable
from headwater.language.vllm_weights import WeightTransfer

PauseMode: TypeAlias = Literal["keep", "wait", "abort"]
_COLDEST = 0.01  # vLLM raises temperatures below to this one
_COMPLETIONS = "/v1/completions"
_Kind = TypeVar("_Kind")


class VLLMGenerator:
    """A `Generator` that asks a vLLM server.

    pause: what becomes of completions that are under way when weights come. "keep": they go on with the new weights
    (trajectory balance may learn from what two versions wrote, each token with its own log-probability); "wait": they
    end first; "abort": they are begun anew.
    """

    def __init__(
        self,
        server: Server,
        transfer: WeightTransfer,
        *,
        vocabulary: int,
        ends: Collection[int],
        model: str | None = None,
        concurrency: int = 64,
        pause: PauseMode = "keep",
        start: float = 600.0,
    ) -> None:
        """vocabulary: the number of token ids of the model that learns. ends: the ids with which it ends a sequence.
        model: the server's name for it, needed where it serves several. concurrency: requests at once. start: seconds
        in which the server has to come up. Raises ServerError if it does not, or is not set up as it must be."""
        if vocabulary < 1 or not all(0 <= end < vocabulary for end in ends):
            raise ValueError(f"vocabulary = {vocabulary}, ends = {sorted(ends)}: must be ids from 0 to vocabulary - 1")
        if concurrency < 1:
            raise ValueError(f"concurrency = {concurrency}: must be at least 1")
        if pause not in ("keep", "wait", "abort"):
            raise ValueError(f"pause = {pause!r}: must be keep, wait or abort")
        self.server, self.transfer, self.vocabulary, self.ends = server, transfer, vocabulary, frozenset(ends)
        self.concurrency, self.pause = concurrency, pause
        self._loading = threading.Lock()
        self._checked = False
        self._unusable: str | None = None  # why nothing may be drawn
        self._wait_until_healthy(start)
        self.model, self.longest = self._served_model(model)
        if self._is_paused():
            self._unusable = "is paused, as after weights that did not arrive whole: load weights first"
        else:
            self._checked = self._gives_tempered_log_probs()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Generated]:
        """One completion for each prompt, equal prompts in one request. The seed decides them together with the
        server's weights and, since its sums depend on what else is in its batch, only up to rounding."""
        if self._unusable:
            raise ServerUnavailable(f"{self.server.url} {self._unusable}")
        if sampling.temperature < _COLDEST:
            raise ValueError(f"temperature = {sampling.temperature}: vLLM draws at no less than {_COLDEST}")
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(tuple(prompt), []).append(index)
        for prompt, places in groups.items():
            self._check_prompt(prompt, places[0], sampling)
        if not self._checked:
            self._checked = self._gives_tempered_log_probs()
        # The n completions of a request have the seeds from its own on, so those of requests must lie far apart.
        seeds = random.Random(seed)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="vllm")
        try:
            asked = [
                (places, pool.submit(self._complete, prompt, len(places), sampling, seeds.getrandbits(62)))
                for prompt, places in groups.items()
            ]
            wait([future for _, future in asked], return_when=FIRST_EXCEPTION)
            failed = [error for _, future in asked if future.done() and (error := future.exception()) is not None]
            if failed:
                raise failed[0]
            found = {place: one for places, future in asked for place, one in zip(places, future.result(), strict=True)}
            return [found[place] for place in range(len(prompts))]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Make the server go on with these weights, named as in the model's checkpoint. Only one loads into a server.
        Raises ServerError if they do not arrive whole: the server stays paused and nothing is drawn until a load does.
        """
        with self._loading:
            self.transfer.prepare(self.server, weights, version)
            try:
                self._replace(weights, version)
            except BaseException:
                self._unusable = f"stays paused: version {version} did not arrive whole"
                raise
            self._unusable = None

    def _replace(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.server.post(f"/pause?mode={self.pause}")
        self.transfer.send(self.server, weights, version)
        # What was computed of prompts and unfinished completions belongs to the old weights.
        reset = self.server.post("/reset_prefix_cache?reset_running_requests=true&reset_external=true")
        if isinstance(reset, dict) and reset.get("success") is False:
            raise ServerError(f"{self.server.url}/reset_prefix_cache: the server kept what old weights computed")
        self.server.post("/resume")

    def _wait_until_healthy(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        impatient = replace(self.server, attempts=1, timeout=min(self.server.timeout, 10.0))
        while True:
            try:
                impatient.get("/health")
                return
            except ServerUnavailable as error:
                if time.monotonic() >= deadline:
                    raise ServerUnavailable(f"no healthy server within {seconds:g} s: {error}") from error
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))

    def _served_model(self, name: str | None) -> tuple[str, float]:
        """The server's name of the model, and how many tokens of prompt and completion it takes at most."""
        answer, url = self.server.get("/v1/models"), f"{self.server.url}/v1/models"
        try:
            served = {_field(card, "id", str): card for card in _field(answer, "data", list)}
        except ValueError as error:
            raise ServerError(f"{url}: {error}") from error
        if (name is None and len(served) != 1) or (name is not None and name not in served):
            raise ServerError(f"{url}: model = {name!r}: must be one of {', '.join(map(repr, served))}")
        chosen = name if name is not None else next(iter(served))
        longest = served[chosen].get("max_model_len")
        return chosen, longest if isinstance(longest, int) else math.inf

    def _is_paused(self) -> bool:
        try:
            answer = self.server.get("/is_paused")
            return _field(answer, "is_paused", bool)
        except ServerUnavailable:
            raise
        except (ServerError, ValueError) as error:
            raise ServerError(
                f"{self.server.url} takes no new weights: start it with VLLM_SERVER_DEV_MODE=1 ({error})"
            ) from error

    def _gives_tempered_log_probs(self) -> bool:
        """Whether reported log-probabilities follow the temperature; False where that cannot be told, since the model
        has no preference. At temperature 2 the differences between those of two tokens are half as large as at 1."""
        tops: list[dict[str, float]] = []
        for temperature in (1.0, 2.0):
            answer = self.server.post(_COMPLETIONS, self._body((0,), 1, Sampling(temperature, 1), 0) | {"logprobs": 5})
            try:
                choice = _field(answer, "choices", list)[0]
                _field(choice, "token_ids", list)
                top = _field(_field(choice, "logprobs", dict), "top_logprobs", list)[0]
                tops.append({name: float(value) for name, value in top.items()})
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ServerError(
                    f"{self.server.url}{_COMPLETIONS} gives no token ids with their log-probabilities: it must be a "
                    f"vLLM that knows return_token_ids ({type(error).__name__}: {error})"
                ) from error
        both = sorted(tops[0].keys() & tops[1].keys(), key=tops[0].__getitem__)  # the token drawn is in one at times
        masses = [sum(math.exp(min(value, 1.0)) for value in top.values()) for top in tops]
        gaps = [top[both[-1]] - top[both[0]] if both else 0.0 for top in tops]
        if max(masses) > 1.001 or abs(gaps[1] - gaps[0] / 2) > abs(gaps[1] - gaps[0]):
            raise ServerError(
                f"{self.server.url} reports logits, or log-probabilities before the temperature, which are not those "
                "that tokens are drawn with: start it with --logprobs-mode processed_logprobs"
            )
        return gaps[0] > 0

    def _check_prompt(self, prompt: tuple[int, ...], place: int, sampling: Sampling) -> None:
        if not prompt or not all(0 <= token < self.vocabulary for token in prompt):
            raise ValueError(f"prompts[{place}]: must be token ids from 0 to {self.vocabulary - 1}, at least one")
        if len(prompt) + sampling.max_new_tokens > self.longest:
            raise ValueError(
                f"prompts[{place}] has {len(prompt)} tokens, which with max_new_tokens = {sampling.max_new_tokens} is "
                f"over the server's --max-model-len, {self.longest}"
            )

    def _body(self, prompt: tuple[int, ...], count: int, sampling: Sampling, seed: int) -> dict[str, object]:
        """The request. Whatever the model's generation config may say of sampling is said here, or it would hold."""
        return {
            "model": self.model, "prompt": list(prompt), "n": count, "seed": seed, "stream": False, "echo": False,
            "max_tokens": sampling.max_new_tokens, "min_tokens": 0, "stop": list(sampling.stop),
            "stop_token_ids": sorted(self.ends), "ignore_eos": False, "temperature": sampling.temperature,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip

    def _complete(self, prompt: tuple[int, ...], count: int, sampling: Sampling, seed: int) -> list[Generated]:
        body = self._body(prompt, count, sampling, seed)
        for attempt in range(self.server.attempts):
            answer = self.server.post(_COMPLETIONS, body)
            try:
                choices = _field(answer, "choices", list)
                if sorted(_field(choice, "index", int) for choice in choices) != list(range(count)):
                    raise ValueError(f"{len(choices)} completions instead of {count}, or not numbered from 0")
                if not any(choice.get("finish_reason") == "abort" for choice in choices):
                    choices = sorted(choices, key=lambda choice: choice["index"])
                    return [self._read(choice, prompt, sampling) for choice in choices]
            except ValueError as error:
                raise ServerError(f"{self.server.url}{_COMPLETIONS}: {error}") from error
            time.sleep(self.server.backoff * 2**attempt)  # cut short by someone's new weights
        raise ServerUnavailable(f"{self.server.url}{_COMPLETIONS}: aborted {self.server.attempts} times")

    def _read(self, choice: object, prompt: tuple[int, ...], sampling: Sampling) -> Generated:
        """Raises ValueError saying what a server must not answer."""
        tokens = _field(choice, "token_ids", list)
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in tokens):
            raise ValueError(f"token_ids must be ids from 0 to {self.vocabulary - 1}: {tokens!r:.200}")
        if not 1 <= len(tokens) <= sampling.max_new_tokens:
            raise ValueError(f"{len(tokens)} tokens where 1 to {sampling.max_new_tokens} were asked for")
        log_probs = _field(_field(choice, "logprobs", dict), "token_logprobs", list)
        if len(log_probs) != len(tokens):
            raise ValueError(f"{len(log_probs)} log-probabilities of {len(tokens)} tokens")
        if not all(type(value) in (int, float) and -math.inf < value < 1e-3 for value in log_probs):
            raise ValueError(f"token_logprobs must be finite and at most 0: {log_probs!r:.200}")
        if _field(choice, "prompt_token_ids", list) != list(prompt):
            raise ValueError("prompt_token_ids is not the prompt that was sent")
        reason = _field(choice, "finish_reason", str)
        if reason not in ("stop", "length"):
            raise ValueError(f"finish_reason must be 'stop' or 'length', not {reason!r}")
        assert isinstance(choice, dict)
        finished = tokens[-1] in self.ends
        if reason == "stop" and not finished and not isinstance(choice.get("stop_reason"), str):
            raise ValueError(f"ended by itself with token {tokens[-1]}, which is not among ends = {sorted(self.ends)}")
        return Generated(tokens, [min(0.0, float(value)) for value in log_probs], finished)


def _field(value: object, name: str, kind: type[_Kind]) -> _Kind:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name} must be a JSON {kind.__name__} and is {found!r:.100}")
    return found
