"""A user's verifier as a reward: a Python function, maybe async, that judges one completion. Verifiers wait (for a
sandbox, a server, another model), so many calls run at once, each in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import inspect
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.language.data import Completion, Prompt
from headwater.language.failures import Fatal, InvalidSample, Judge, TryAgain, shortened
from headwater.reward_worker import RewardError, load_function

__all__ = ["Fatal", "InvalidSample", "TryAgain", "VerifierReward"]

Verifier: TypeAlias = Callable[..., object]
"""`(fields of the prompt, completion) -> float`, or of lists of them; or a coroutine function of the same."""

MOST_HUNG = 256
"""Calls that may hang at a time, each in a thread that cannot be ended."""


@dataclass(frozen=True, order=True)
class _Call:
    """Places of a batch that one call judges, and from when on."""

    at: float
    places: tuple[int, ...]
    attempt: int = 1


@dataclass(frozen=True)
class _Outcome:
    ticket: int
    returned: object = None
    error: BaseException | None = None


@dataclass
class _Batch:
    """A batch on its way: what waits, what runs (by ticket, with its deadline), what has come of it."""

    prompts: list[Prompt]
    completions: list[Completion]
    rewards: list[float]
    waiting: list[_Call]
    running: dict[int, tuple[_Call, float, threading.Thread]] = field(default_factory=dict)
    outcomes: queue.SimpleQueue[_Outcome] = field(default_factory=queue.SimpleQueue)


class VerifierReward(Judge):
    """The reward that a function gives: `function(fields, completion) -> float`, `fields` a dict of what the prompt's
    line says.

    function:    the function, plain or async, or "module:function", looked for in the current directory too. It is
        called from several threads; each async call has an event loop of its own.
    prompts:     what condition rows are indices of.
    concurrency: calls at once.
    timeout:     seconds that one call may take. A call that takes longer is left behind: the others and the end of the
        run do not wait for it.
    attempts:    calls of one completion in all, while they raise `TryAgain`.
    back_off:    seconds until the second attempt; they double with each one more.
    batch:       completions that one call judges: `function(list of fields, list of completions) -> list of floats`.
        None for a function that judges one. A batch that fails is tried again one by one.

    A call returns float32 `[T]`, NaN where judging failed, and raises RewardError at `Fatal`, naming prompt and
    completion, or when batch after batch fails on everything. `failures` counts, by kind: "timeout", "invalid"
    (`InvalidSample`), "try again" (all attempts), "exception" (any other), "no number" (what was returned is none, or
    not finite).
    """

    def __init__(
        self,
        function: Verifier | str,
        prompts: Sequence[Prompt],
        concurrency: int = 8,
        timeout: float = 10.0,
        attempts: int = 3,
        back_off: float = 0.5,
        batch: int | None = None,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("attempts", attempts, 1), ("batch", batch, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout!r}, must be above 0 seconds")
        if not 0 <= back_off < math.inf:
            raise ValueError(f"back_off is {back_off!r}, must be at least 0 seconds")
        loaded = load_function(function, "verifier") if isinstance(function, str) else function
        self._function = cast("Verifier", loaded)
        super().__init__(prompts)
        self._concurrency, self._timeout = concurrency, timeout
        self._attempts, self._back_off, self._size = attempts, back_off, batch
        self._tickets = 0
        self._hung: list[threading.Thread] = []

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        completions, prompts = self._asked(objects, condition)
        size = self._size or 1
        calls = [_Call(0.0, tuple(range(at, min(at + size, len(prompts))))) for at in range(0, len(prompts), size)]
        batch = _Batch(prompts, completions, [math.nan] * len(prompts), calls)
        while batch.waiting or batch.running:
            self._start(batch)
            self._take(batch)
            self._leave_hung(batch)
        self._count.end_batch(len(prompts), sum(map(math.isnan, batch.rewards)))
        return torch.tensor(batch.rewards, dtype=torch.float32, device=condition.device)

    def _start(self, batch: _Batch) -> None:
        """Start what is due, up to the limit."""
        now = time.monotonic()
        while batch.waiting and len(batch.running) < self._concurrency and batch.waiting[0].at <= now:
            call = heapq.heappop(batch.waiting)
            fields = [batch.prompts[place].fields for place in call.places]
            completions = [batch.completions[place] for place in call.places]
            arguments = (fields, completions) if self._size else (fields[0], completions[0])
            self._tickets += 1
            # A daemon, unlike the threads of a pool: the interpreter ends without waiting for one that hangs.
            given = (self._function, arguments, self._timeout, self._tickets, batch.outcomes)
            thread = threading.Thread(target=_judge, args=given, daemon=True)
            batch.running[self._tickets] = (call, now + self._timeout, thread)
            thread.start()

    def _take(self, batch: _Batch) -> None:
        """Wait for an outcome, for a deadline, or until a call is due; take what there is."""
        moments = [deadline for _, deadline, _ in batch.running.values()]
        if batch.waiting and len(batch.running) < self._concurrency:
            moments.append(batch.waiting[0].at)
        wait = max(min(moments) - time.monotonic(), 0.0)
        with contextlib.suppress(queue.Empty):
            while True:
                outcome = batch.outcomes.get(timeout=wait)
                wait = 0.0
                if outcome.ticket in batch.running:  # not one that was left behind
                    self._settle(batch, batch.running.pop(outcome.ticket)[0], outcome)

    def _leave_hung(self, batch: _Batch) -> None:
        now = time.monotonic()
        for ticket in [ticket for ticket, (_, deadline, _) in batch.running.items() if deadline <= now]:
            call, _, thread = batch.running.pop(ticket)
            self._hung = [one for one in self._hung if one.is_alive()] + [thread]
            if len(self._hung) > MOST_HUNG:
                raise RewardError(f"{len(self._hung)} calls of the verifier hang; it must end its calls itself")
            self._fail(batch, call, "timeout", f"no answer within {self._timeout:g} s")

    def _settle(self, batch: _Batch, call: _Call, outcome: _Outcome) -> None:
        error = outcome.error
        if error is None:
            self._note(batch, call, outcome.returned)
        elif isinstance(error, Fatal):
            place = call.places[0]
            raise RewardError(
                f"the verifier gave up on the completion {shortened(batch.completions[place])} to the prompt "
                f"{shortened(batch.prompts[place].text)}: {error}"
            ) from error
        elif isinstance(error, TryAgain) and call.attempt < self._attempts:
            wait = self._back_off * 2 ** (call.attempt - 1)
            heapq.heappush(batch.waiting, _Call(time.monotonic() + wait, call.places, call.attempt + 1))
        elif isinstance(error, TryAgain):
            self._fail(batch, call, "try again", f"failed {self._attempts} times, the last time: {error}")
        elif isinstance(error, InvalidSample):
            self._fail(batch, call, "invalid", str(error))
        else:
            # asyncio raises the TimeoutError of its own limit, and so may the verifier: both took too long
            kind: Literal["timeout", "exception"] = "timeout" if isinstance(error, TimeoutError) else "exception"
            self._fail(batch, call, kind, f"{type(error).__name__}: {error}")

    def _note(self, batch: _Batch, call: _Call, returned: object) -> None:
        values = list(returned) if self._size and isinstance(returned, Sequence | Tensor) else [returned]
        if len(values) != len(call.places):
            raise RewardError(f"the verifier returned {len(values)} rewards for {len(call.places)} completions")
        for place, value in zip(call.places, values, strict=True):
            try:
                reward = float(cast("float", value))
            except (TypeError, ValueError):
                reward = math.nan
            # as float32, which the rewards become, not as a Python float
            if math.isfinite(torch.tensor(reward, dtype=torch.float32).item()):
                batch.rewards[place] = reward
            else:
                text = f"the verifier returned {shortened(repr(value))}, no finite number"
                self._count.add("no number", text, batch.prompts[place], batch.completions[place])

    def _fail(self, batch: _Batch, call: _Call, kind: str, message: str) -> None:
        """The call came to nothing: what it was to judge is judged one by one, or left out."""
        if len(call.places) > 1:
            for place in call.places:
                heapq.heappush(batch.waiting, _Call(0.0, (place,)))
        else:
            (place,) = call.places
            self._count.add(kind, message, batch.prompts[place], batch.completions[place])


def _judge(
    function: Verifier,
    arguments: tuple[object, object],
    timeout: float,
    ticket: int,
    outcomes: queue.SimpleQueue[_Outcome],
) -> None:
    """One call, in a thread of its own."""
    try:
        returned = function(*arguments)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned, timeout))
        outcomes.put(_Outcome(ticket, returned))
    except BaseException as error:  # SystemExit too: whatever it was, it ends this call alone
        outcomes.put(_Outcome(ticket, error=error))


async def _awaited(returned: Awaitable[object], timeout: float) -> object:
    return await asyncio.wait_for(returned, timeout)  # an async call that is late can be ended
