"""Handwritten digits, 8 x 8, as a prior of which everything is known: a kernel density of the images, that is a mixture
of 1,347 Gaussians, whose posterior under a linear measurement has a closed form, with many modes where little is seen.

The images are those of scikit-learn (Alpaydin & Kaynak 1998, UCI machine learning repository), read from the installed
package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.diffusion.mixtures import GaussianMixture

SHAPE = (1, 8, 8)
CLASSES = 10
TRAINING = 1347
"""Images that make the prior: three of four. The others are held out, to be measured."""

View = Literal["top row", "block average", "random projections"]


@dataclass(frozen=True)
class Digits:
    """images: float32 `[N, 1, 8, 8]`, from -1, paper, to 1, ink. label: int64 `[N]`, the digits."""

    images: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """All 1,797 images in random order, the first 1,347 for the prior and the others held out. Raises
    ModuleNotFoundError that names the package, where it is not installed."""
    try:
        from sklearn.datasets import load_digits as read  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "sklearn":  # it is there, and lacks something itself
            raise
        raise ModuleNotFoundError("the digits are part of scikit-learn: pip install scikit-learn") from error
    data = read()
    images = torch.from_numpy(data.images).float().view(-1, *SHAPE) / 8 - 1
    label = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return tuple(Digits(images[part], label[part]) for part in (order[:TRAINING], order[TRAINING:]))  # type: ignore[return-value]


def digits_prior(digits: Digits, width: float = 0.3) -> GaussianMixture:
    """A Gaussian of deviation `width` around each image, all of one weight: its modes are the images, in their order,
    so that `measures.class_shares` of its weights by the digits' labels are those of the classes."""
    if not width > 0:
        raise ValueError(f"width = {width}: must be above 0")
    return GaussianMixture.of(torch.ones(len(digits)), digits.images.flatten(1), width**2)


def view_matrix(view: View, generator: torch.Generator | None = None) -> Tensor:
    """What is seen of an image, as a matrix `[C, 64]`: the 8 pixels of the top row; the means of its four 4 x 4 blocks;
    or 8 random projections, rows of unit length drawn by `generator`."""
    if view == "top row":
        return torch.eye(64)[:8]
    if view == "block average":
        pixel = torch.arange(64)
        block = pixel // 32 * 2 + pixel % 8 // 4
        return (block == torch.arange(4)[:, None]).float() / 16
    if view == "random projections":
        rows = torch.randn(8, 64, generator=generator)
        return rows / rows.norm(dim=1, keepdim=True)
    raise ValueError(f"view = {view!r}: must be one of {', '.join(get_args(View))}")
