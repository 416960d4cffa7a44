"""Forward operators that measure an image in another domain: its Fourier transform at any points, the squared modulus
of its discrete transform, its projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.diffusion.operators import Operator, require_image


class Fourier(Operator):
    """The Fourier transform of each channel at P points, V(u, v) = sum over pixels of x exp(-2 pi i (u column / width +
    v row / height)): complex visibilities, real parts above imaginary ones, `(channels, 2, P)`.

    points:      `[P, 2]`, each (u, v) in cycles per image; whole numbers are the frequencies of the discrete transform.
    origin:      the (column, row) that phases are counted from.
    orthonormal: divide by the root of the number of pixels.
    """

    along_columns: Tensor
    along_rows: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        points: Tensor,
        origin: tuple[float, float] = (0.0, 0.0),
        orthonormal: bool = False,
    ) -> None:
        require_image("a Fourier transform", shape)
        if points.dim() != 2 or points.shape[1] != 2 or not len(points):
            raise ValueError(f"points have shape {tuple(points.shape)}, must be [P, 2] with P at least 1")
        if not points.isfinite().all():
            raise ValueError("points hold values that are not finite")
        super().__init__(shape, (shape[0], 2, len(points)))
        height, width = shape[1:]
        scale = (height * width) ** -0.5 if orthonormal else 1.0
        self.register_buffer("along_columns", _waves(points[:, 0], width, origin[0]) * scale)
        self.register_buffer("along_rows", _waves(points[:, 1], height, origin[1]))

    def compute(self, x: Tensor) -> Tensor:
        columns, rows = torch.view_as_complex(self.along_columns), torch.view_as_complex(self.along_rows)
        by_row = torch.einsum("nchw,pw->nchp", x.to(columns.dtype), columns)
        return torch.view_as_real(torch.einsum("nchp,ph->ncp", by_row, rows)).movedim(-1, -2)


def _waves(frequency: Tensor, size: int, origin: float) -> Tensor:
    """exp(-2 pi i f (pixel - origin) / size), `[P, size, 2]`; in double precision, for phases of many turns."""
    turns = frequency.double()[:, None] * (torch.arange(size).double() - origin) / size
    return torch.view_as_real(torch.polar(torch.ones_like(turns), -2 * math.pi * turns)).float()


def frequencies(mask: Tensor) -> Tensor:
    """The points `[P, 2]` of a mask over the discrete transform, bool `[H, W]` with frequency zero in the corner."""
    v, u = mask.bool().nonzero(as_tuple=True)
    wrapped = [torch.fft.fftfreq(size, 1 / size)[index] for index, size in ((u, mask.shape[1]), (v, mask.shape[0]))]
    return torch.stack(wrapped, 1)


class Radon(Operator):
    """Parallel-beam projections: each pixel's value falls on the line of detectors, one pixel apart, at its distance
    from the axis, shared by the two detectors beside it; so each projection adds up to the image. At 0 degrees it is
    the sums of the columns. angles: `[A]` in degrees. Measures `(channels, A, detectors)`, with detectors for the
    image's diagonal.
    """

    detector: Tensor
    share: Tensor

    def __init__(self, shape: Sequence[int], angles: Tensor) -> None:
        require_image("a Radon transform", shape)
        if angles.dim() != 1 or not len(angles) or not angles.isfinite().all():
            raise ValueError(f"angles have shape {tuple(angles.shape)}, must be one finite number or more")
        height, width = shape[1:]
        count = math.ceil(math.hypot(height - 1, width - 1)) + 2
        count += (count - width) % 2  # so that at 0 degrees columns fall on detectors, not between them
        super().__init__(shape, (shape[0], len(angles), count))
        row, column = torch.meshgrid(
            torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
        )
        turn = torch.deg2rad(angles.double())[:, None]
        place = column.flatten() * turn.cos() + row.flatten() * turn.sin() + (count - 1) / 2
        before = place.floor()
        first = torch.arange(len(angles))[:, None] * count + before.long()
        self.register_buffer("detector", torch.stack([first, first + 1]).flatten())
        self.register_buffer("share", torch.stack([1 - (place - before), place - before]).float())

    def compute(self, x: Tensor) -> Tensor:
        parts = x.flatten(2)[:, :, None, None] * self.share
        flat = x.new_zeros(*x.shape[:2], math.prod(self.measured[1:]))
        return flat.index_add(2, self.detector, parts.flatten(2)).reshape(len(x), *self.measured)


class PhaseRetrieval(Operator):
    """|F x|^2, the squared modulus of the orthonormal discrete transform, of each channel or of the vector, padded with
    zeros to `oversampling` times its size: the phases are lost, so x, -x and its mirror image measure alike.
    """

    is_linear = False

    def __init__(self, shape: Sequence[int], oversampling: float = 2.0) -> None:
        if not 1 <= oversampling < math.inf:
            raise ValueError(f"oversampling is {oversampling}, must be at least 1")
        sizes = tuple(round(size * oversampling) for size in shape[-2:])
        super().__init__(shape, (*shape[:-2], *sizes))
        self._sizes = sizes

    def compute(self, x: Tensor) -> Tensor:
        axes = tuple(range(-len(self._sizes), 0))
        spectrum = torch.fft.fftn(x, s=self._sizes, dim=axes, norm="ortho")
        return spectrum.real.square() + spectrum.imag.square()
