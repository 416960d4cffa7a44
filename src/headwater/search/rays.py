"""Searchers as actors on a Ray cluster: many machines, or this one. Weights go out once a version, trajectories come
back as safetensors.

An actor that dies, or whose machine leaves the cluster, is replaced by a new one wherever there is room; what it was to
draw is drawn by another.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from headwater.replay import Replay
from headwater.reward import cache_of
from headwater.search.asynchronous import AsynchronousSearch, Delivery, Ended, Event, Raised
from headwater.search.base import SearchError, SearchSettings
from headwater.search.ledger import Lease
from headwater.search.messages import Answers, event_of, header_of
from headwater.search.processes import on_cpu
from headwater.search.searcher import Searcher

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
except ImportError as error:
    raise ImportError("search.runtime = 'ray': needs the extra ray: pip install headwater[ray]") from error


def ray_search(
    settings: SearchSettings, searcher: Searcher, replay: Replay | None, generator: torch.Generator
) -> AsynchronousSearch:
    """Asynchronous search by actors of a cluster."""
    return AsynchronousSearch(searcher, replay, generator, settings, lambda: Actors(searcher, settings))


class Member:
    """What lives in an actor: a searcher, with the newest weights that it was given.

    keeps: whether the learner wants to know all that was paid for.
    """

    def __init__(self, searcher: Searcher, seed: int, keeps: bool) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.searcher, self.answers = searcher, Answers(searcher)
        self.cache = cache_of(searcher.reward) if keeps else None

    def search(self, lease: dict[str, object], version: int, weights: bytes) -> tuple[dict[str, object], bytes]:
        """Draw and score one batch."""

        def renew() -> int:
            if version != self.searcher.policy.version:
                new = load(weights)
                with torch.no_grad():
                    for name, tensor in self.searcher.drawing.published().items():
                        tensor.copy_(new[name])
            return version

        if self.cache is not None:
            self.cache.paid = []
        header, payload = self.answers.answer(lease, renew)
        return header | {"paid": [] if self.cache is None else self.cache.paid}, payload


class Actors:
    """The `Runtime` of Ray actors."""

    def __init__(self, searcher: Searcher, settings: SearchSettings) -> None:
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            _join(settings)
        self._drawing, self._cache = searcher.drawing, cache_of(searcher.reward)
        self._keeps = self._cache is not None and self._cache.table is not None
        if searcher.device.type != "cpu" and not settings.gpus:
            searcher = on_cpu(searcher)
        try:
            self._member = ray.put(searcher)
        except TypeError as error:
            if self._owns_cluster:
                ray.shutdown()
            raise ValueError(
                f"search.runtime = 'ray': policy and reward must be such that they can be sent to an actor, but "
                f"{error.__cause__ or error}"
            ) from error
        self._make = ray.remote(Member).options(
            max_restarts=0, max_task_retries=0, num_cpus=settings.cpus, num_gpus=settings.gpus,
            resources=settings.custom_resources,
        )  # fmt: skip
        self._actors: dict[int, Any] = {}
        self._places: dict[int, int] = {}
        self._pending: dict[Any, int] = {}
        self._version, self._weights = 0, ray.put(b"")

    def start(self, searcher: int, place: int) -> None:
        self._places[searcher] = place
        self._actors[searcher] = self._make.remote(self._member, torch.initial_seed() + 1 + searcher, self._keeps)

    def lease(self, searcher: int, lease: Lease) -> None:
        actor = self._actors.get(searcher)
        if actor is None:
            return
        self._pending[actor.search.remote(header_of(lease), self._version, self._weights)] = searcher

    def publish(self, version: int) -> None:
        self._version, self._weights = version, ray.put(_packed(self._drawing.published()))

    def wait(self, seconds: float) -> list[Event]:
        if not self._pending:
            time.sleep(min(seconds, 0.01))
            return []
        waiting = list(self._pending)
        ray.wait(waiting, num_returns=1, timeout=seconds, fetch_local=True)
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=True)
        events: list[Event] = []
        for answer in ready:
            searcher = self._pending.pop(answer, None)
            if searcher is not None:  # not of an actor that this very loop has found dead
                events.append(self._event(searcher, answer))
        return events

    def is_receiving(self) -> bool:
        return False

    def stop(self, searcher: int) -> None:
        actor = self._actors.pop(searcher, None)
        self._pending = {answer: owner for answer, owner in self._pending.items() if owner != searcher}
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        for searcher in list(self._actors):
            self.stop(searcher)
        if self._owns_cluster:
            ray.shutdown()

    def _event(self, searcher: int, answer: Any) -> Event:
        try:
            header, payload = ray.get(answer, timeout=60)
        except RayTaskError as error:  # before the searcher itself could say what went wrong
            return Raised(searcher, SearchError(f"a search actor failed: {error}"))
        except (RayActorError, RayError, GetTimeoutError) as error:
            self.stop(searcher)
            return Ended(searcher, f"ended: {_told(error)}")
        event = event_of(searcher, header, payload, "search actor")
        if isinstance(event, Delivery) and self._cache is not None:
            self._cache.record(header["paid"], f"worker {self._places[searcher]}", event.version)
        return event


def _room(settings: SearchSettings) -> dict[str, Any]:
    """What a cluster that is started here must have, beside GPUs; nothing for one that is there."""
    if settings.address:
        return {}
    resources = {name: settings.searchers * each for name, each in settings.custom_resources.items()}
    return {"num_cpus": max(math.ceil(settings.searchers * settings.cpus), 1), "resources": resources}


def _join(settings: SearchSettings) -> None:
    """Join the cluster of these settings, or start one here that has what all searchers need."""
    polite = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=settings.address or "local", include_dashboard=False, log_to_driver=False,
        logging_level=logging.WARNING, **_room(settings),
    )  # fmt: skip
    if polite is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, polite)  # Ray has put its own there, which ends the learner without a checkpoint
    needed, there = settings.searchers * settings.gpus, ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if not settings.address and needed > there:
        ray.shutdown()
        raise ValueError(
            f"search.gpus = {settings.gpus:g}: this machine has {there:g} for {settings.searchers} searchers"
        )


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})


def _told(error: Exception) -> str:
    """The first and the last line of what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys(lines[:1] + lines[-1:])) or type(error).__name__
