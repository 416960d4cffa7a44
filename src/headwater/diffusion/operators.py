"""Forward operators y = A(x) of inverse problems, over images `[N, C, H, W]` and vectors `[N, d]`: what is measured of
an object before there is noise. All are differentiable, and the adjoint of a linear one is its vector-Jacobian product,
so an operator is one function; `<A x, y> = <x, A' y>` holds for it to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

Padding = Literal["reflect", "circular", "constant"]
Forward: TypeAlias = Callable[[Tensor], Tensor]

MATRIX_LIMIT = 2**26
"""Most entries of an operator's matrix that is written out."""

_DARKEST = 1e-4  # of full light: a camera's response is infinitely steep at zero


class Operator(nn.Module, ABC):
    """A(x) of objects of one shape.

    shape:     of one object x: `(channels, height, width)` or `(d,)`.
    measured:  shape of one measurement y.
    is_linear: whether A is linear, and so has an adjoint and a matrix.
    """

    is_linear: bool = True

    def __init__(self, shape: Sequence[int], measured: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.measured = tuple(shape), tuple(measured)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """A(x) of `[N, *shape]`, differentiable: `[N, *measured]`."""

    def forward(self, x: Tensor) -> Tensor:
        """A(x) of `[N, *shape]`: `[N, *measured]`. Raises ValueError where x has another shape."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"{self.title} takes objects of shape {self.shape}, these have {tuple(x.shape[1:])}")
        return self.compute(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y of `[N, *measured]`: `[N, *shape]`, without gradient. Raises TypeError where A is not linear, ValueError
        where y has another shape."""
        self._require_linear("adjoint")
        if y.shape[1:] != self.measured:
            raise ValueError(f"{self.title} measures shape {self.measured}, this y has {tuple(y.shape[1:])}")
        with torch.enable_grad():
            x = y.new_zeros(len(y), *self.shape).requires_grad_()
            (transposed,) = torch.autograd.grad(self.compute(x), x, y)
        return transposed

    def matrix(self) -> Tensor:
        """A as `[measured values, object values]`. Raises TypeError where A is not linear, ValueError above
        `MATRIX_LIMIT` entries."""
        self._require_linear("matrix")
        height, width = math.prod(self.measured), math.prod(self.shape)
        if height * width > MATRIX_LIMIT:
            raise ValueError(f"the matrix of {self.title} has {height} x {width} entries, at most {MATRIX_LIMIT} fit")
        like = next(self.buffers(), torch.empty(0))
        units = torch.eye(width, device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        with torch.no_grad():
            return self.compute(units.reshape(width, *self.shape)).flatten(1).T.contiguous()

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"the operator {type(self).__name__}"

    def _require_linear(self, what: str) -> None:
        if not self.is_linear:
            raise TypeError(f"{self.title} is not linear: it has no {what}")


class Identity(Operator):
    """All of x."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, shape)

    def compute(self, x: Tensor) -> Tensor:
        return x


class Mask(Operator):
    """The values that are seen, in order: inpainting. seen: bool, in the shape of x or broadcast to it (`[H, W]` for
    all channels)."""

    seen: Tensor

    def __init__(self, shape: Sequence[int], seen: Tensor) -> None:
        try:
            seen = seen.bool().expand(tuple(shape))
        except RuntimeError:
            raise ValueError(
                f"mask has shape {tuple(seen.shape)}, which does not fit objects of shape {tuple(shape)}"
            ) from None
        index = seen.flatten().nonzero()[:, 0]
        if not len(index):
            raise ValueError("mask hides everything: at least one value must be seen")
        super().__init__(shape, (len(index),))
        self.register_buffer("seen", index)

    def compute(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self.seen]


def box_mask(shape: Sequence[int], rows: slice, columns: slice = slice(None)) -> Tensor:
    """True in a box of an image `(C, H, W)`: bool `[H, W]`. Of a vector `(d,)`, True at `rows`: bool `[d]`."""
    seen = torch.zeros(tuple(shape[-2:]), dtype=torch.bool)
    seen[(rows, columns) if len(shape) > 1 else rows] = True
    return seen


def random_mask(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """True at a random `share` of the pixels, the same in all channels: bool `[H, W]`, of a vector `[d]`."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    seen = torch.zeros(tuple(shape[-2:]), dtype=torch.bool)
    chosen = torch.randperm(seen.numel(), generator=generator)[: max(1, round(share * seen.numel()))]
    return seen.flatten().index_fill(0, chosen, True).reshape(seen.shape)


class Downsample(Operator):
    """Means of blocks: `factor` x `factor` pixels of an image, `factor` values of a vector."""

    def __init__(self, shape: Sequence[int], factor: int) -> None:
        sizes = tuple(shape[-2:])
        if factor < 1 or any(size % factor for size in sizes):
            raise ValueError(f"factor is {factor}, must divide {' and '.join(map(str, sizes))}")
        super().__init__(shape, (*shape[:-2], *(size // factor for size in sizes)))
        self.factor = factor

    def compute(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.reshape(len(x), -1, self.factor).mean(2)
        return functional.avg_pool2d(x, self.factor)


class Blur(Operator):
    """Convolution of each channel with one kernel `[K, L]` of odd sizes; `padding` says what lies beyond the edge."""

    kernel: Tensor

    def __init__(self, shape: Sequence[int], kernel: Tensor, padding: Padding = "reflect") -> None:
        require_image("a blur", shape)
        if kernel.dim() != 2 or not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}, must be two odd numbers")
        reach = kernel.shape[0] // 2, kernel.shape[1] // 2
        if padding != "constant" and (reach[0] >= shape[1] or reach[1] >= shape[2]):
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}, too large for images {shape[1]} x {shape[2]}")
        super().__init__(shape, shape)
        self.register_buffer("kernel", kernel.flip(0, 1).float())  # conv2d correlates
        self.padding = padding
        self._edges = (reach[1], reach[1], reach[0], reach[0])

    def compute(self, x: Tensor) -> Tensor:
        channels = x.flatten(0, 1)[:, None]
        padded = functional.pad(channels, self._edges, mode=self.padding)
        return functional.conv2d(padded, self.kernel[None, None]).reshape(x.shape)


def gaussian_kernel(size: int, deviation: float) -> Tensor:
    """A Gaussian of `deviation` pixels, `[size, size]`, size odd; adds up to 1."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size is {size}, must be odd")
    if not 0 < deviation < math.inf:
        raise ValueError(f"deviation is {deviation}, must be above 0")
    weight = (-0.5 * ((torch.arange(size) - size // 2) / deviation).square()).exp()
    kernel = weight[:, None] * weight
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> Tensor:
    """A straight movement of `length` pixels, at `angle` degrees against the clock from the right; adds up to 1."""
    if not 0 < length < math.inf:
        raise ValueError(f"length is {length}, must be above 0")
    reach = math.ceil(length / 2)
    along = torch.linspace(-length / 2, length / 2, 16 * reach + 1)
    grid = torch.arange(-reach, reach + 1)
    turn = math.radians(angle)
    column = (1 - (grid - along[:, None] * math.cos(turn)).abs()).relu()
    row = (1 - (grid + along[:, None] * math.sin(turn)).abs()).relu()
    kernel = torch.einsum("tr,tc->rc", row, column)
    return kernel / kernel.sum()


class NonlinearBlur(Operator):
    """Blur of the light, not of the pixel values: x is turned to light by the inverse of a camera's response
    v = light^(1 / gamma), blurred, and turned back (Nah et al. 2017, arXiv 1612.02177, make their blurred photographs
    so). `value_range`: the pixel values that are black and white.
    """

    is_linear = False

    def __init__(
        self,
        shape: Sequence[int],
        kernel: Tensor,
        gamma: float = 2.2,
        value_range: tuple[float, float] = (-1.0, 1.0),
        padding: Padding = "reflect",
    ) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma is {gamma}, must be above 0")
        _require_range(value_range)
        super().__init__(shape, shape)
        self.blur = Blur(shape, kernel, padding)
        self.gamma, self.value_range = gamma, value_range

    def compute(self, x: Tensor) -> Tensor:
        low, high = self.value_range
        light = ((x - low) / (high - low)).clamp(min=_DARKEST) ** self.gamma
        return low + (high - low) * self.blur.compute(light) ** (1 / self.gamma)


class Matrix(Operator):
    """y = M x of the flattened object; M is `[m, object values]`: a lens, an array, any linear map."""

    entries: Tensor

    def __init__(self, shape: Sequence[int], matrix: Tensor) -> None:
        width = math.prod(shape)
        if matrix.dim() != 2 or matrix.shape[1] != width or not len(matrix):
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, must have {width} columns, one a value of x")
        if not matrix.isfinite().all():
            raise ValueError("matrix holds values that are not finite")
        super().__init__(shape, (len(matrix),))
        self.register_buffer("entries", matrix.float())

    def compute(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.entries.T


class DynamicRange(Operator):
    """gain * x cut off at both ends of `value_range`: what a sensor keeps of a scene with too much contrast."""

    is_linear = False

    def __init__(self, shape: Sequence[int], gain: float = 2.0, value_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        if not 0 < gain < math.inf:
            raise ValueError(f"gain is {gain}, must be above 0")
        _require_range(value_range)
        super().__init__(shape, shape)
        self.gain, self.value_range = gain, value_range

    def compute(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(*self.value_range)


@runtime_checkable
class Physics(Protocol):
    """What is used of a `deepinv.physics.Physics`; the linear ones have `A_adjoint` too."""

    def A(self, x: Tensor) -> Tensor: ...


class Function(Operator):
    """An operator from a function `[N, *shape] -> [N, *measured]`, such as a decoder and then another operator; what it
    measures is found by a call on zeros. `adjoint_function` is needed only where a linear one is not differentiable.

    Raises ValueError where the function returns something else than real numbers, one row for each object.
    """

    def __init__(
        self,
        shape: Sequence[int],
        function: Forward,
        is_linear: bool = False,
        adjoint_function: Forward | None = None,
    ) -> None:
        with torch.no_grad():
            y = function(torch.zeros(2, *shape))
        if not isinstance(y, Tensor) or y.dim() < 2 or len(y) != 2 or not y.is_floating_point():
            got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"the operator {function!r} must return real numbers [2, ...] for 2 objects, returned {got}; "
                "of complex ones return the real and the imaginary parts"
            )
        super().__init__(shape, y.shape[1:])
        self.function, self.adjoint_function = function, adjoint_function
        self.is_linear = is_linear

    def compute(self, x: Tensor) -> Tensor:
        return self.function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        if self.adjoint_function is None:
            return super().adjoint(y)
        self._require_linear("adjoint")
        return self.adjoint_function(y)


def as_operator(given: Operator | Physics | Forward, shape: Sequence[int]) -> Operator:
    """An operator over objects of `shape`, from one of ours, from a `deepinv.physics.Physics` or whatever else has its
    method `A` (linear where it has `A_adjoint`), or from a function. Raises ValueError where the shape does not fit,
    TypeError where it is none of these."""
    if isinstance(given, Operator):
        if given.shape != tuple(shape):
            raise ValueError(f"{given.title} takes objects of shape {given.shape}, the prior's have {tuple(shape)}")
        return given
    if isinstance(given, Physics):
        adjoint = getattr(given, "A_adjoint", None)
        operator = Function(shape, given.A, adjoint is not None, adjoint)
        if isinstance(given, nn.Module):
            operator.add_module("physics", given)  # moves to another device with the operator
        return operator
    if not callable(given):
        raise TypeError(f"{given!r} is no operator: it is not callable and has no method A")
    return Function(shape, given)


def require_image(what: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless `shape` is an image's."""
    if len(shape) != 3:
        raise ValueError(f"{what} is of images (channels, height, width), these objects have shape {tuple(shape)}")


def _require_range(value_range: tuple[float, float]) -> None:
    if not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ValueError(f"value_range is {value_range}, must be a low and a higher number")
