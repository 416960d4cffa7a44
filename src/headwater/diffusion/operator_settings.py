"""The settings of an operator, and the operator that they name: `--operator.name inpaint --operator.rows 0:1`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from headwater.diffusion import operators, transforms
from headwater.diffusion.measurements import read_array
from headwater.diffusion.operators import Forward, Operator, Padding
from headwater.reward_worker import RewardError, load_function

Kernel = Literal["gaussian", "motion"]
Value = TypeVar("Value")

_KERNEL = ("kernel", "size", "deviation", "angle", "padding")
_USES = {
    "identity": (),
    "inpaint": ("rows", "columns", "hidden", "share", "seed", "mask"),
    "downsample": ("factor",),
    "blur": _KERNEL,
    "nonlinear-blur": (*_KERNEL, "gamma", "value_range"),
    "fourier": ("points", "mask", "orthonormal", "centred"),
    "radon": ("angles",),
    "matrix": ("matrix",),
    "phase-retrieval": ("oversampling",),
    "dynamic-range": ("gain", "value_range"),
}


@dataclass(frozen=True)
class OperatorSettings:
    """What is measured of an object. Most settings are of some operators only: another's is an error."""

    name: str = "identity"
    """identity, inpaint, downsample, blur, nonlinear-blur, fourier, radon, matrix, phase-retrieval, dynamic-range, or a
    function of yours as module:function, tensor [N, ...] in, tensor [N, ...] out; or module:name of an object with a
    method A (a deepinv physics)."""
    rows: str | None = None
    """inpaint: the rows that are seen, as first:end; 0:1 is the top one. Of vectors, the values."""
    columns: str | None = None
    """inpaint: the columns that are seen; with rows, a box."""
    hidden: bool = False
    """inpaint: rows, columns, share or mask say what is hidden, not what is seen."""
    share: float | None = None
    """inpaint: see this share of all pixels, drawn at random."""
    seed: int | None = None
    """inpaint: seed of that drawing; 0 unless told."""
    mask: Path | None = None
    """inpaint: file (.npy, .csv, .png) with what is seen above 0. fourier: the frequencies that are measured, frequency
    zero in the corner."""
    factor: int | None = None
    """downsample: pixels along a side of the blocks that are averaged."""
    kernel: Kernel | None = None
    """blur, nonlinear-blur: gaussian unless told."""
    size: int | None = None
    """blur, nonlinear-blur: pixels across the kernel, odd for a gaussian one (9 unless told); the length of a motion (5
    unless told)."""
    deviation: float | None = None
    """blur, nonlinear-blur: of a gaussian kernel, in pixels; 1.5 unless told."""
    angle: float | None = None
    """blur, nonlinear-blur: of a motion, in degrees against the clock from the right; 45 unless told."""
    padding: Padding | None = None
    """blur, nonlinear-blur: what lies beyond the edge; reflect unless told."""
    gamma: float | None = None
    """nonlinear-blur: of the camera's response; 2.2 unless told."""
    value_range: tuple[float, float] | None = None
    """nonlinear-blur: the values of black and white. dynamic-range: where values are cut off. -1 1 unless told."""
    points: Path | None = None
    """fourier: file (.csv, .npy) of points u, v in cycles per image."""
    orthonormal: bool = False
    """fourier: divide by the root of the number of pixels."""
    centred: bool = False
    """fourier: phases are counted from the centre of the image, not from the first pixel."""
    angles: int | None = None
    """radon: projections, evenly over 180 degrees; 30 unless told."""
    matrix: Path | None = None
    """matrix: file (.npy, .csv) with one row a measured value, one column a value of the object."""
    oversampling: float | None = None
    """phase-retrieval: zeros are added to this many times the object's size; 2 unless told."""
    gain: float | None = None
    """dynamic-range: values are multiplied by it before they are cut off; 2 unless told."""

    def __post_init__(self) -> None:
        if self.name not in _USES and ":" not in self.name:
            raise ValueError(
                f"operator.name is {self.name!r}, must be one of {', '.join(_USES)}, or a function as module:function"
            )
        uses = _USES.get(self.name, ())
        for one in fields(self)[1:]:
            if getattr(self, one.name) != one.default and one.name not in uses:
                owners = " and ".join(name for name, used in _USES.items() if one.name in used)
                raise ValueError(f"operator.{one.name} is of {owners}: {self.name} has no such setting")


def operator_of(settings: OperatorSettings, shape: Sequence[int]) -> Operator:
    """The operator over objects of `shape`. Raises ValueError naming the setting that does not fit, or what is wrong
    with its file."""
    try:
        if settings.name not in _USES:
            return operators.as_operator(cast("Forward", load_function(settings.name, "operator")), shape)
        return _BUILDERS[settings.name](settings, tuple(shape))
    except RewardError:
        raise
    except ValueError as error:
        raise ValueError(f"operator {settings.name}: {error}") from error


def _inpaint(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    said = [name for name in ("rows", "columns", "share", "mask") if getattr(settings, name) is not None]
    if not said or (len(said) > 1 and said != ["rows", "columns"]):
        raise ValueError(f"say what is seen by rows, columns or both, by share, or by mask; given: {said or 'none'}")
    if settings.columns is not None and len(shape) == 1:
        raise ValueError(f"columns are of images, these objects have shape {shape}: use rows")
    if settings.seed is not None and settings.share is None:
        raise ValueError("seed is of a random mask: give its share")
    if settings.mask is not None:
        seen = _fitted_mask(read_array(settings.mask), shape) > 0
    elif settings.share is not None:
        generator = torch.Generator().manual_seed(settings.seed or 0)
        seen = operators.random_mask(shape, settings.share, generator)
    else:
        rows = _stretch("rows", settings.rows, shape[-2:][0])
        seen = operators.box_mask(shape, rows, _stretch("columns", settings.columns, shape[-1]))
    return operators.Mask(shape, ~seen if settings.hidden else seen)


def _fitted_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Without the axes of length one that it has more than the objects."""
    while mask.dim() > len(shape) and mask.shape[0] == 1:
        mask = mask[0]
    return mask


def _stretch(name: str, text: str | None, size: int) -> slice:
    """`first:end` within a size, as a slice."""
    if text is None:
        return slice(None)
    first, colon, end = text.partition(":")
    try:
        stretch = slice(int(first or 0), int(end) if end else size)
    except ValueError:
        colon = ""
    if not colon or not 0 <= stretch.start < stretch.stop <= size:
        raise ValueError(f"{name} is {text!r}, must be first:end with 0 <= first < end <= {size}")
    return stretch


def _kernel(settings: OperatorSettings) -> Tensor:
    if settings.kernel == "motion":
        if settings.deviation is not None:
            raise ValueError("deviation is of a gaussian kernel, this one is motion")
        return operators.motion_kernel(_or(settings.size, 5), _or(settings.angle, 45.0))
    if settings.angle is not None:
        raise ValueError("angle is of a motion kernel, this one is gaussian")
    return operators.gaussian_kernel(_or(settings.size, 9), _or(settings.deviation, 1.5))


def _blur(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    return operators.Blur(shape, _kernel(settings), settings.padding or "reflect")


def _nonlinear_blur(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    value_range, padding = _or(settings.value_range, (-1.0, 1.0)), settings.padding or "reflect"
    return operators.NonlinearBlur(shape, _kernel(settings), _or(settings.gamma, 2.2), value_range, padding)


def _fourier(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    if (settings.points is None) == (settings.mask is None):
        raise ValueError("give either points or mask")
    if settings.points is not None:
        points = read_array(settings.points)
    else:
        mask = _fitted_mask(read_array(_required(settings, "mask")), shape[-2:])
        if mask.shape != shape[-2:]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, must have the images' {shape[-2:]}")
        points = transforms.frequencies(mask > 0)
    origin = ((shape[-1] - 1) / 2, (shape[-2:][0] - 1) / 2) if settings.centred else (0.0, 0.0)
    return transforms.Fourier(shape, points, origin, settings.orthonormal)


def _radon(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    count = _or(settings.angles, 30)
    if count < 1:
        raise ValueError(f"angles is {count}, must be at least 1")
    return transforms.Radon(shape, torch.arange(count) * (180 / count))


def _matrix(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    return operators.Matrix(shape, read_array(_required(settings, "matrix")))


def _downsample(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    if settings.factor is None:
        raise ValueError("factor is missing: the pixels along a side of a block")
    return operators.Downsample(shape, settings.factor)


def _phase_retrieval(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    return transforms.PhaseRetrieval(shape, _or(settings.oversampling, 2.0))


def _dynamic_range(settings: OperatorSettings, shape: tuple[int, ...]) -> Operator:
    return operators.DynamicRange(shape, _or(settings.gain, 2.0), _or(settings.value_range, (-1.0, 1.0)))


_BUILDERS: dict[str, Callable[[OperatorSettings, tuple[int, ...]], Operator]] = {
    "identity": lambda settings, shape: operators.Identity(shape),
    "inpaint": _inpaint,
    "downsample": _downsample,
    "blur": _blur,
    "nonlinear-blur": _nonlinear_blur,
    "fourier": _fourier,
    "radon": _radon,
    "matrix": _matrix,
    "phase-retrieval": _phase_retrieval,
    "dynamic-range": _dynamic_range,
}


def _or(given: Value | None, usual: Value) -> Value:
    return usual if given is None else given


def _required(settings: OperatorSettings, name: str) -> Path:
    path: Path | None = getattr(settings, name)
    if path is None:
        raise ValueError(f"{name} is missing: the file to read it from")
    return path
