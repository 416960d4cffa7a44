"""Operators: each measures what it says, and each linear one has its adjoint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headwater.diffusion import operators, transforms
from headwater.diffusion.operator_settings import OperatorSettings, operator_of
from headwater.diffusion.operators import Blur, Downsample, Function, Identity, Mask, Matrix, Operator, as_operator
from headwater.diffusion.transforms import Fourier, PhaseRetrieval, Radon
from headwater.reward_worker import RewardError

IMAGE, VECTOR = (2, 6, 8), (12,)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


class Doubled:
    """A linear physics as deepinv has it: A and A_adjoint, and no gradient through A."""

    def A(self, x: Tensor) -> Tensor:
        return 2 * x.detach().flip(-1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 2 * y.flip(-1)


class Squared(nn.Module):
    """A nonlinear physics as deepinv has it, a module with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(3.0))

    def A(self, x: Tensor) -> Tensor:
        return self.gain * x.square()


LINEAR = {
    "identity": Identity(IMAGE),
    "mask": Mask(IMAGE, operators.random_mask(IMAGE, 0.3, seeded(0))),
    "mask of a vector": Mask(VECTOR, operators.box_mask(VECTOR, slice(2, 7))),
    "downsample": Downsample(IMAGE, 2),
    "downsample of a vector": Downsample(VECTOR, 3),
    "blur, reflect": Blur(IMAGE, operators.gaussian_kernel(5, 1.2)),
    "blur, circular": Blur(IMAGE, operators.motion_kernel(4.5, 30), "circular"),
    "blur, constant": Blur(IMAGE, normal(3, 5), "constant"),
    "fourier": Fourier(IMAGE, normal(7, 2), origin=(3.5, 2.5)),
    "radon": Radon(IMAGE, torch.tensor([0.0, 20.0, 90.0, 133.0])),
    "matrix": Matrix(IMAGE, normal(5, 96)),
    "matrix of a vector": Matrix(VECTOR, normal(5, 12)),
    "function": Function(VECTOR, lambda x: x.cumsum(1)[:, ::3], is_linear=True),
    "physics": as_operator(Doubled(), VECTOR),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_operator_has_its_adjoint_and_its_matrix(name: str) -> None:
    operator = LINEAR[name]
    x, y = normal(3, *operator.shape, seed=1), normal(3, *operator.measured, seed=2)
    left, right = (operator(x) * y).flatten(1).sum(1), (x * operator.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    matrix = operator.matrix()
    torch.testing.assert_close(x.flatten(1) @ matrix.T, operator(x).flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.flatten(1) @ matrix, operator.adjoint(y).flatten(1), rtol=1e-4, atol=1e-4)


def test_a_mask_keeps_the_values_that_are_seen() -> None:
    x = torch.arange(2 * 96.0).reshape(2, *IMAGE)
    top = operator_of(OperatorSettings("inpaint", rows="0:1"), IMAGE)
    assert torch.equal(top(x), x[:, :, 0, :].flatten(1))
    around = operator_of(OperatorSettings("inpaint", rows="1:5", columns="2:6", hidden=True), IMAGE)
    assert around.measured == (2 * (48 - 16),)
    assert not set(around(x)[0].tolist()) & set(x[0, :, 1:5, 2:6].flatten().tolist())
    drawn = operators.random_mask(IMAGE, 0.25, seeded(1))
    assert int(drawn.sum()) == 12
    assert not torch.equal(drawn, operators.random_mask(IMAGE, 0.25, seeded(2)))


def test_blocks_are_averaged() -> None:
    x = normal(3, *IMAGE)
    expected = x.reshape(3, 2, 3, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(Downsample(IMAGE, 2)(x), expected)
    assert Downsample(VECTOR, 4)(torch.arange(12.0)[None]).tolist() == [[1.5, 5.5, 9.5]]


def test_a_circular_blur_is_a_product_of_transforms() -> None:
    x, kernel = normal(3, *IMAGE), normal(3, 5)
    spread = torch.zeros(6, 8)
    spread[:3, :5] = kernel
    spread = spread.roll((-1, -2), (0, 1))
    expected = torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.fft2(spread)).real
    torch.testing.assert_close(Blur(IMAGE, kernel, "circular")(x), expected, rtol=1e-4, atol=1e-4)


def test_kernels_have_the_spread_that_was_asked_for() -> None:
    grid = torch.arange(-15.0, 16)
    gaussian = operators.gaussian_kernel(31, 2.5)
    assert gaussian.sum().item() == pytest.approx(1, abs=1e-5)
    assert (gaussian.sum(0) * grid.square()).sum().item() == pytest.approx(2.5**2, rel=1e-3)
    right, up = operators.motion_kernel(8, 0), operators.motion_kernel(8, 90)
    reach = torch.arange(-4.0, 5)
    # An even movement of length L has variance L^2 / 12; sharing between two pixels adds t (1 - t), on average 1 / 6.
    assert (right.sum(0) * reach.square()).sum().item() == pytest.approx(64 / 12 + 1 / 6, rel=0.05)
    assert right[4].sum().item() == pytest.approx(1)
    torch.testing.assert_close(up, right.T)
    diagonal = operators.motion_kernel(8, 45)
    assert diagonal.flip(1).trace() > 2 * diagonal.trace()  # up to the right: row 0 is the top


def test_a_nonlinear_blur_averages_light() -> None:
    x = torch.rand(2, *IMAGE, generator=seeded(3)) * 1.8 - 0.9
    kernel = operators.gaussian_kernel(3, 0.8)
    expected = 2 * Blur(IMAGE, kernel)(((x + 1) / 2) ** 2.2) ** (1 / 2.2) - 1
    blur = operators.NonlinearBlur(IMAGE, kernel)
    torch.testing.assert_close(blur(x), expected)
    torch.testing.assert_close(operators.NonlinearBlur(IMAGE, kernel, gamma=1.0)(x), Blur(IMAGE, kernel)(x))
    dark = torch.full((1, *IMAGE), -2.0, requires_grad=True)
    blur(dark).sum().backward()
    assert dark.grad is not None
    assert dark.grad.isfinite().all()


def test_visibilities_are_the_fourier_transform() -> None:
    x = normal(3, *IMAGE)
    mask = torch.rand(6, 8, generator=seeded(0)) < 0.4
    measured = Fourier(IMAGE, transforms.frequencies(mask))(x)
    expected = torch.fft.fft2(x)[..., mask]
    torch.testing.assert_close(measured, torch.stack([expected.real, expected.imag], 2), rtol=1e-4, atol=1e-4)
    whole = Fourier(IMAGE, transforms.frequencies(torch.ones(6, 8)), orthonormal=True)(x)
    torch.testing.assert_close(whole.square().flatten(1).sum(1), x.square().flatten(1).sum(1))


def test_visibilities_between_the_frequencies_are_sums_of_waves() -> None:
    x, points = normal(1, *IMAGE), torch.tensor([[0.3, -1.7]])
    row, column = torch.meshgrid(torch.arange(6) - 2.5, torch.arange(8) - 3.5, indexing="ij")
    phase = 2 * math.pi * (0.3 * column / 8 - 1.7 * row / 6)
    expected = torch.stack([(x * phase.cos()).sum((2, 3)), -(x * phase.sin()).sum((2, 3))], 2)[..., None]
    torch.testing.assert_close(Fourier(IMAGE, points, origin=(3.5, 2.5))(x), expected, rtol=1e-4, atol=1e-4)


def test_projections_add_up_to_the_image_and_follow_the_angle() -> None:
    x = torch.rand(2, 1, 7, 9, generator=seeded(0))
    radon = Radon((1, 7, 9), torch.arange(0.0, 180, 15))
    torch.testing.assert_close(radon(x).sum(3), x.sum((2, 3))[..., None].expand(-1, -1, 12))
    beyond = (radon.measured[2] - 9) // 2
    torch.testing.assert_close(radon(x)[:, :, 0, beyond:-beyond], x.sum(2))
    point = torch.zeros(1, 1, 7, 9)
    point[0, 0, 1, 7] = 1  # three columns right and two rows above the middle
    place = (radon(point)[0, 0] * (torch.arange(radon.measured[2]) - (radon.measured[2] - 1) / 2)).sum(1)
    angle = torch.deg2rad(torch.arange(0.0, 180, 15))
    torch.testing.assert_close(place, 3 * angle.cos() - 2 * angle.sin(), rtol=1e-4, atol=1e-4)


def test_phase_retrieval_loses_sign_and_reflection() -> None:
    x = normal(2, *IMAGE)
    operator = PhaseRetrieval(IMAGE, 2.0)
    assert operator.measured == (2, 12, 16)
    torch.testing.assert_close(operator(-x), operator(x))
    torch.testing.assert_close(operator(x.flip(2, 3)), operator(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(operator(x).sum((2, 3)), x.square().sum((2, 3)))
    torch.testing.assert_close(
        PhaseRetrieval(VECTOR, 1.0)(normal(1, 12)), torch.fft.fft(normal(1, 12)).abs().square() / 12
    )


def test_dynamic_range_is_cut_off() -> None:
    operator = operators.DynamicRange((4,), gain=2.0)
    assert operator(torch.tensor([[-3.0, -0.25, 0.4, 0.6]])).tolist() == [[-1, -0.5, pytest.approx(0.8), 1]]


def test_a_nonlinear_operator_has_no_adjoint() -> None:
    with pytest.raises(TypeError, match="PhaseRetrieval is not linear: it has no adjoint"):
        PhaseRetrieval(VECTOR)(normal(1, 12)), PhaseRetrieval(VECTOR).adjoint(normal(1, 24))
    with pytest.raises(TypeError, match="no matrix"):
        as_operator(Squared(), VECTOR).matrix()


def test_physics_of_another_package_are_operators() -> None:
    x = normal(2, 12)
    physics = Squared()
    operator = as_operator(physics, VECTOR)
    torch.testing.assert_close(operator(x), 3 * x.square())
    assert (operator.is_linear, operator.measured) == (False, VECTOR)
    operator.double()
    assert physics.gain.dtype == torch.float64  # it moves with its operator
    assert as_operator(Doubled(), VECTOR).is_linear
    decoded = as_operator(lambda z: Downsample(VECTOR, 3)(z.repeat(1, 4)), (3,))
    assert decoded.measured == (4,)


def test_what_is_no_operator_is_told() -> None:
    with pytest.raises(ValueError, match=r"takes objects of shape \(2, 6, 8\), the prior's have \(12,\)"):
        as_operator(LINEAR["blur, reflect"], VECTOR)
    with pytest.raises(ValueError, match=r"Blur takes objects of shape \(2, 6, 8\), these have \(1, 6, 8\)"):
        LINEAR["blur, reflect"](torch.zeros(3, 1, 6, 8))
    with pytest.raises(ValueError, match=r"measures shape \(2, 3, 4\), this y has \(2, 6, 8\)"):
        LINEAR["downsample"].adjoint(torch.zeros(3, *IMAGE))
    with pytest.raises(TypeError, match="no method A"):
        as_operator(3, VECTOR)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="return the real and the imaginary parts"):
        as_operator(lambda x: torch.fft.fft(x), VECTOR)
    with pytest.raises(ValueError, match=r"for 2 objects, returned torch.float32 of shape \(12,\)"):
        as_operator(lambda x: x.sum(0), VECTOR)
    with pytest.raises(ValueError, match="has 16777216 x 16777216 entries"):
        Identity((1, 4096, 4096)).matrix()


def test_settings_build_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "matrix.npy", np.eye(96)[:4])
    np.save(tmp_path / "mask.npy", np.arange(48).reshape(6, 8) % 2)
    (tmp_path / "points.csv").write_text("u,v\n0.5,1\n2,-3\n")
    (tmp_path / "own_operators.py").write_text("def half(x):\n    return x / 2\n")
    monkeypatch.chdir(tmp_path)
    built = {
        Identity: OperatorSettings(),
        operators.DynamicRange: OperatorSettings("dynamic-range", gain=3.0, value_range=(0.0, 1.0)),
        operators.NonlinearBlur: OperatorSettings("nonlinear-blur", kernel="motion", size=5, angle=10.0),
        Downsample: OperatorSettings("downsample", factor=2),
        Radon: OperatorSettings("radon", angles=5),
        PhaseRetrieval: OperatorSettings("phase-retrieval", oversampling=1.5),
        Matrix: OperatorSettings("matrix", matrix=tmp_path / "matrix.npy"),
        Function: OperatorSettings("own_operators:half"),
    }
    for kind, settings in built.items():
        assert type(operator_of(settings, IMAGE)) is kind
    blurs = [operator_of(OperatorSettings("blur", size=size, padding="circular"), IMAGE) for size in (3, 5)]
    assert [tuple(blur.get_buffer("kernel").shape) for blur in blurs] == [(3, 3), (5, 5)]
    assert operator_of(OperatorSettings("fourier", points=tmp_path / "points.csv"), IMAGE).measured == (2, 2, 2)
    assert operator_of(OperatorSettings("fourier", mask=tmp_path / "mask.npy"), IMAGE).measured == (2, 2, 24)
    masked = operator_of(OperatorSettings("inpaint", mask=tmp_path / "mask.npy"), IMAGE)
    assert torch.equal(masked(torch.arange(96.0).reshape(1, *IMAGE))[0], torch.arange(1.0, 96, 2))
    half: Operator = operator_of(OperatorSettings("own_operators:half"), IMAGE)
    assert half(torch.ones(1, *IMAGE)).sum() == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "magic"}, "operator.name is 'magic', must be one of identity, inpaint"),
        ({"name": "blur", "factor": 2}, "operator.factor is of downsample: blur has no such setting"),
        ({"name": "inpaint"}, "inpaint: say what is seen by rows, columns or both"),
        ({"name": "inpaint", "rows": "0:1", "share": 0.5}, "given: \\['rows', 'share'\\]"),
        ({"name": "inpaint", "rows": "4:9"}, "rows is '4:9', must be first:end with 0 <= first < end <= 6"),
        ({"name": "inpaint", "rows": "2"}, "rows is '2', must be first:end"),
        ({"name": "inpaint", "share": 1.5}, "share is 1.5, must be above 0 and at most 1"),
        ({"name": "inpaint", "share": 1.0, "hidden": True}, "mask hides everything"),
        ({"name": "downsample", "factor": 5}, "factor is 5, must divide 6 and 8"),
        ({"name": "downsample"}, "factor is missing"),
        ({"name": "blur", "size": 13}, "kernel has shape \\(13, 13\\), too large for images 6 x 8"),
        ({"name": "blur", "size": 4}, "size is 4, must be odd"),
        ({"name": "blur", "angle": 4.0}, "angle is of a motion kernel"),
        ({"name": "fourier"}, "give either points or mask"),
        ({"name": "radon", "angles": 0}, "angles is 0, must be at least 1"),
        ({"name": "phase-retrieval", "oversampling": 0.5}, "oversampling is 0.5, must be at least 1"),
        ({"name": "dynamic-range", "value_range": (1.0, 1.0)}, "value_range is \\(1.0, 1.0\\)"),
        ({"name": "matrix"}, "matrix is missing"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator_of(OperatorSettings(**settings), IMAGE)  # type: ignore[arg-type]


def test_an_operator_of_images_refuses_vectors() -> None:
    for name, more in (("blur", {}), ("radon", {}), ("inpaint", {"columns": "0:2"})):
        with pytest.raises(ValueError, match=rf"operator {name}: .*these objects have shape \(12,\)"):
            operator_of(OperatorSettings(name, **more), VECTOR)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="operator 'no_such_module:a': there is no module"):
        operator_of(OperatorSettings("no_such_module:a"), VECTOR)
