"""Objects that are rows of integers, as a user hands them over: lists, tuples, arrays or tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headwater.environments.base import Objects


def integer_rows(objects: Objects, width: int, end: int) -> Tensor:
    """The objects as int32 `[T, width]`, on the CPU.

    Raises ValueError unless each is `width` integers in `0 .. end - 1`: rounding, wrapping round or reshaping what was
    given would make other objects of it.
    """
    if not len(objects):
        return torch.zeros(0, width, dtype=torch.int32)
    try:
        rows = np.asarray(objects.cpu() if isinstance(objects, Tensor) else objects)
    except ValueError as error:
        raise ValueError(f"each object must be {width} integers: they differ in length") from error
    if rows.shape != (len(objects), width) or rows.dtype.kind not in "iub":
        raise ValueError(f"each object must be {width} integers, got {rows.dtype} of shape {rows.shape}")
    outside = ((rows < 0) | (rows >= end)).any(1)
    if outside.any():
        raise ValueError(f"{tuple(rows[outside][0].tolist())} has an entry outside 0 .. {end - 1}")
    return torch.from_numpy(rows.astype(np.int32))
