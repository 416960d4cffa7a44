"""A diffusion prior: a chain, and the denoiser that makes it draw data. On disk it is a folder, `prior.json` in plain
words and the weights in `model.safetensors`; nothing in it is run or unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headwater.diffusion.denoisers import Denoiser, Network, ResidualMLP, TokenTransformer
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process
from headwater.diffusion.tokens import MaskedProcess, OneByOneProcess, UniformProcess
from headwater.runs import atomic

SETTINGS, WEIGHTS, FOLDER = "prior.json", "model.safetensors", "prior"
AUTOENCODER = "autoencoder.json"
"""In a folder with it the prior is of latents: `latent.py`."""
_FORMAT = "headwater.prior.1"
_LARGEST_SETTINGS = 4_000_000
_Built = TypeVar("_Built")

_PROCESSES: dict[str, type[Process]] = {
    "gaussian": GaussianProcess,
    "brownian": BrownianProcess,
    "masked": MaskedProcess,
    "one-by-one": OneByOneProcess,
    "uniform": UniformProcess,
}


@dataclass(frozen=True)
class Units:
    """What the numbers of an object are in the units of the data: offset + factor * number."""

    offset: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and abs(self.offset) + self.factor < float("inf")):
            raise ValueError(f"units: offset = {self.offset}, factor = {self.factor}: must be finite, factor above 0")

    def of_data(self, objects: Tensor) -> Tensor:
        """Objects in the units of the data."""
        return objects if self == Units() else self.offset + self.factor * objects

    def of_objects(self, data: Tensor) -> Tensor:
        """The inverse."""
        return data if self == Units() else (data - self.offset) / self.factor


@dataclass
class Prior:
    """A chain that draws data.

    denoiser: what it says, `process` makes steps of. units: of the data that it has learned. alphabet: the character of
    each token, where objects are strings of them.
    """

    process: Process
    denoiser: Denoiser
    units: Units = field(default_factory=Units)
    alphabet: str = ""

    @torch.no_grad()
    def sample(self, condition: Tensor, generator: torch.Generator, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """One object for each row of `condition`, `[N, *shape]`; and what one walk back along the path that drew it
        says of its log-probability, log p(path) - log q(path | object): `[N]`.
        """
        process, count = self.process, len(condition)
        state = process.start(count, generator).to(condition.device)
        log_prob = process.start_log_prob(state)
        for step in range(process.n_steps):
            number = torch.full((count,), step, device=state.device)
            law = process.law(self.denoiser(state, process.time(number), condition), state, number)
            following = (law if temperature == 1 else law.tempered(temperature)).sample(generator)
            log_prob = log_prob + law.log_prob(following) - process.noise_log_prob(state, following, number)
            state = following
        return state, log_prob

    @torch.no_grad()
    def log_prob_bound(self, objects: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """log p(path) - log q(path | object) along a path that the noising process walks back from each object: in the
        mean a lower bound on the log-probability that the chain draws it, `[N]`.
        """
        process, state = self.process, objects
        log_ratio = torch.zeros(len(objects), device=objects.device)
        for step in reversed(range(process.n_steps)):
            number = torch.full((len(objects),), step, device=objects.device)
            before = process.noise(state, number, generator)
            law = process.law(self.denoiser(before, process.time(number), condition), before, number)
            log_ratio = log_ratio + law.log_prob(state) - process.noise_log_prob(before, state, number)
            state = before
        return log_ratio + process.start_log_prob(state)


def save_prior(prior: Prior, folder: Path) -> None:
    """Write the folder. Raises ValueError for a network that is not one of Headwater's, such as a diffusers model,
    whose own folder holds it already."""
    networks, name = _networks(), _kind(_PROCESSES, prior.process)
    if name is None or not isinstance(prior.denoiser, Network):
        what = prior.process if name is None else prior.denoiser
        raise ValueError(f"a prior with a {type(what).__name__} cannot be written")
    content = {
        "format": _FORMAT,
        "process": {"kind": name, **dataclasses.asdict(prior.process)},  # type: ignore[call-overload]
        "network": {"kind": _kind(networks, prior.denoiser), **prior.denoiser.settings()},
        "units": dataclasses.asdict(prior.units),
        "alphabet": prior.alphabet,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in prior.denoiser.state_dict().items()}
    with atomic(folder / WEIGHTS) as partial:
        save_file(weights, str(partial))
    with atomic(folder / SETTINGS) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def load_prior(path: str | Path, n_steps: int = 0, eta: float = 1.0) -> Prior:
    """The prior in a folder that `save_prior` has written, in a run folder of `headwater train prior`, or in a pipeline
    folder of diffusers, whose steps are `n_steps` (0 for the number that its scheduler was trained with) with noise
    `eta` where the scheduler takes one.

    Raises ValueError naming the file, and the field in it, that is missing or makes no sense.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    for own in (folder, folder / FOLDER):
        if (own / SETTINGS).is_file():
            if n_steps:
                raise ValueError(f"n_steps = {n_steps}: the prior in {own} has its own number of steps")
            return _load_own(own)
    if (folder / AUTOENCODER).is_file():
        raise ValueError(f"{folder}: its prior is of latents: latent.load_latent_prior takes it")
    if (folder / "settings.toml").is_file():
        raise ValueError(f"{folder}: a run without {FOLDER}/{SETTINGS}: not of train prior, or it has not ended")
    from headwater.diffusion.diffusers_prior import load_pipeline

    return load_pipeline(folder, n_steps, eta)


def _load_own(folder: Path) -> Prior:
    file = folder / SETTINGS
    content = read_settings(file)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{file}: format is {content.get('format')!r}, must be {_FORMAT!r}")
    process = build(file, "process", _PROCESSES, content.get("process"))
    with torch.device("meta"):  # nothing is allocated for sizes that the weights do not have
        denoiser = build(file, "network", _networks(), content.get("network"))
    load_weights(denoiser, folder / WEIGHTS)
    units = build(file, "units", {"": Units}, {"kind": "", **_table(file, "units", content.get("units", {}))})
    alphabet = content.get("alphabet", "")
    if not isinstance(alphabet, str):
        raise ValueError(f"{file}: alphabet is {alphabet!r}, must be a string")
    prior = Prior(process, denoiser.eval().requires_grad_(False), units, alphabet)
    _require_fit(file, prior)
    return prior


def read_settings(file: Path) -> dict[str, object]:
    """The table in a file of JSON. Raises ValueError naming it."""
    try:
        if file.stat().st_size > _LARGEST_SETTINGS:
            raise ValueError(f"larger than {_LARGEST_SETTINGS} bytes")
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    return _table(file, "the file", content)


def _table(file: Path, name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {name} is {value!r}, must be a table of settings")
    return value


def build(file: Path, name: str, kinds: Mapping[str, type[_Built]], value: object) -> _Built:
    """An instance of one of `kinds` by the table `name` of the file."""
    arguments = dict(_table(file, name, value))
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{file}: {name}.kind is {kind!r}, must be one of {', '.join(kinds)}")
    frozen = {key: tuple(item) if isinstance(item, list) else item for key, item in arguments.items()}
    try:
        return kinds[kind](**frozen)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{file}: {name}: {error}") from error


def load_weights(network: nn.Module, file: Path) -> None:
    """Fill a network that has no weights yet. Raises ValueError naming the file, and the weight that does not fit."""
    try:
        weights = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            shapes = f"has shape {found.get(name)} here and {expected.get(name)} in its settings"
            raise ValueError(f"{file}: {name} {shapes} (None: not there)")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{file}: {name} has a number that is not finite")
    network.load_state_dict(weights, assign=True)


def _require_fit(file: Path, prior: Prior) -> None:
    """Raise ValueError unless the network takes the states of the process, and says what it must of them."""
    process = prior.process
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            state, number = process.start(2, generator), torch.zeros(2, dtype=torch.int64)
            condition = torch.zeros(2, prior.denoiser.condition)
            said = process.law(prior.denoiser(state, process.time(number), condition), state, number)
            said.log_prob(process.noised(state, number + 1, generator))
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"{file}: the network does not fit the process: {error}") from error


def _networks() -> dict[str, type[Network]]:
    from headwater.diffusion.diffusers_prior import ConvolutionalNetwork

    return {"mlp": ResidualMLP, "transformer": TokenTransformer, "unet": ConvolutionalNetwork}


def _kind(kinds: Mapping[str, type[object]], one: object) -> str | None:
    return next((name for name, kind in kinds.items() if type(one) is kind), None)
