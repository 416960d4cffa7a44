"""The packed batch against plain lists: what goes in comes out, whatever the cuts."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from headwater.trajectories import Trajectories
from helpers import same

lengths = st.lists(st.integers(1, 5), max_size=8)
numbers = st.integers(0, 10_000)


def batch_of(lengths: list[int], serial: int = 0, columns: int = 2) -> Trajectories:
    """A batch in which every row of every tensor is different."""
    count, total = len(lengths), sum(lengths)
    step = torch.arange(total) + 1000 * serial
    row = torch.arange(count) + 100 * serial
    return Trajectories(
        steps={"state": torch.stack([step, -step], 1).int(), "action": step, "noise": step[:, None, None] / 7},
        lengths=torch.tensor(lengths, dtype=torch.int64),
        condition=row[:, None].expand(-1, columns) + torch.arange(columns) / 10,
        log_reward=torch.where(row % 3 == 0, torch.nan, row / 3),
        log_behaviour=-row / 9,
        version=row * 2,
        identity=row * 2**40,
    )


def one(batch: Trajectories, index: int) -> dict[str, list[object]]:
    """Trajectory `index`, cut out by hand."""
    begin = sum(batch.lengths[:index].tolist())
    end = begin + int(batch.lengths[index])
    steps = {f"steps.{name}": tensor[begin:end].tolist() for name, tensor in batch.steps.items()}
    names = ("lengths", "condition", "log_reward", "log_behaviour", "version", "identity")
    return steps | {name: getattr(batch, name)[index : index + 1].nan_to_num(1e9).tolist() for name in names}


@settings(deadline=None)
@given(lengths, st.data())
def test_select_gives_the_chosen_trajectories_in_the_chosen_order(sizes: list[int], data: st.DataObject) -> None:
    batch = batch_of(sizes)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=10)) if sizes else []
    selected = batch.select(torch.tensor(chosen, dtype=torch.int64))
    selected.validate()
    assert [one(selected, i) for i in range(len(selected))] == [one(batch, i) for i in chosen]


@settings(deadline=None)
@given(lengths, st.data())
def test_a_mask_selects_what_its_indices_select(sizes: list[int], data: st.DataObject) -> None:
    batch = batch_of(sizes)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))), dtype=torch.bool)
    assert same(batch.select(mask), batch.select(mask.nonzero()[:, 0]))


@settings(deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4))
def test_split_undoes_concatenate(sizes: list[list[int]]) -> None:
    batches = [batch_of(part, serial) for serial, part in enumerate(sizes)]
    together = Trajectories.concatenate(batches)
    together.validate()
    assert len(together) == sum(map(len, sizes))
    assert together.n_steps == sum(map(sum, sizes))
    parts = together.split([len(part) for part in sizes])
    assert all(same(part, batch) for part, batch in zip(parts, batches, strict=True))


@settings(deadline=None, max_examples=30)
@given(lengths)
def test_load_undoes_save(sizes: list[int]) -> None:
    batch = batch_of(sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.safetensors"
        batch.save(path)
        assert same(Trajectories.load(path), batch)
        assert [file.name for file in Path(folder).iterdir()] == ["batch.safetensors"]


def test_a_selection_that_shares_memory_is_saved_whole(tmp_path: Path) -> None:
    batch = batch_of([2, 3, 1])
    strided = replace(batch, condition=torch.zeros(1, 2).expand(3, 2), steps={"state": torch.arange(12).view(2, 6).T})
    strided.save(tmp_path / "batch")
    assert same(Trajectories.load(tmp_path / "batch"), strided)


@settings(deadline=None)
@given(lengths, numbers)
def test_a_sum_over_each_trajectory_equals_the_naive_one(sizes: list[int], seed: int) -> None:
    values = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    naive = [float(part.sum()) for part in values.split(sizes)] if sizes else []
    torch.testing.assert_close(batch_of(sizes).sum(values), torch.tensor(naive, dtype=torch.float64))


@settings(deadline=None)
@given(lengths)
def test_starts_last_and_index_point_at_each_trajectorys_steps(sizes: list[int]) -> None:
    batch = batch_of(sizes)
    rows = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
    assert batch.starts.tolist() == [row[0] for row in rows]
    assert batch.last.tolist() == [row[-1] for row in rows]
    assert batch.index.tolist() == [i for i, row in enumerate(rows) for _ in row]


def test_trajectories_of_equal_condition_share_a_group() -> None:
    batch = replace(batch_of([1, 2, 1, 3]), condition=torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0], [0.0, 2.0]]))
    group = batch.group.tolist()
    assert group[0] == group[2]
    assert sorted(set(group)) == [0, 1, 2]
    assert batch_of([1, 2, 1], columns=0).group.tolist() == [0, 0, 0]


def test_a_score_is_kept_as_float32_and_must_be_one_a_trajectory() -> None:
    batch = batch_of([1, 2])
    scored = batch.with_log_reward(torch.tensor([1.5, -2.0], dtype=torch.float64))
    assert scored.log_reward.dtype == torch.float32
    assert scored.log_reward.tolist() == [1.5, -2.0]
    with pytest.raises(ValueError, match=r"log_reward.*\(3,\).*\(2,\)"):
        batch.with_log_reward(torch.zeros(3))


def test_split_sizes_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1\].*2.*3"):
        batch_of([1, 1, 1]).split([1, 1])


def test_batches_of_different_steps_do_not_concatenate() -> None:
    batch = batch_of([2])
    other = replace(batch, steps={"token": batch.steps["action"]})
    with pytest.raises(ValueError, match="token"):
        Trajectories.concatenate([batch, other])
    with pytest.raises(ValueError, match="nothing"):
        Trajectories.concatenate([])


@pytest.mark.parametrize("name", ["condition", "log_reward", "log_behaviour", "version", "identity"])
def test_a_tensor_of_the_wrong_length_is_named(name: str) -> None:
    tensors = batch_of([2, 1]).tensors()
    tensors[name] = tensors[name][:1]
    with pytest.raises(ValueError, match=f"{name} has 1 rows, expected 2"):
        Trajectories.from_tensors(tensors)


def test_steps_that_do_not_fit_their_lengths_are_named() -> None:
    tensors = batch_of([2, 1]).tensors()
    with pytest.raises(ValueError, match=r"steps\.action has 2 rows, expected 3"):
        Trajectories.from_tensors(tensors | {"steps.action": tensors["steps.action"][:2]})
    with pytest.raises(ValueError, match="lengths"):
        Trajectories.from_tensors(tensors | {"lengths": torch.tensor([3, 0])})


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in batch_of([1]).tensors().items() if not key.startswith(name)}


@pytest.mark.parametrize(("missing", "named"), [("identity", "identity"), ("steps.", "every per-step tensor")])
def test_a_missing_tensor_is_named(missing: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"missing {named}"):
        Trajectories.from_tensors(_without(missing))


def test_a_file_that_holds_no_trajectories_is_named(tmp_path: Path) -> None:
    foreign, garbage, cut = (tmp_path / name for name in ("foreign.safetensors", "garbage.bin", "cut.safetensors"))
    save_file(batch_of([1]).tensors(), foreign)
    garbage.write_bytes(b"not a tensor file at all")
    batch_of([3, 2]).save(cut)
    cut.write_bytes(cut.read_bytes()[:-8])
    for path in (foreign, garbage, cut):
        with pytest.raises(ValueError, match=f"{path.name}: not a saved batch of trajectories"):
            Trajectories.load(path)


def test_a_file_whose_tensors_do_not_fit_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "torn.safetensors"
    tensors = batch_of([2, 1]).tensors() | {"version": torch.tensor([1])}
    save_file(tensors, path, metadata={"format": "headwater.trajectories.1"})
    with pytest.raises(ValueError, match=r"torn\.safetensors.*version has 1 rows, expected 2"):
        Trajectories.load(path)


@settings(deadline=None)
@given(lengths, numbers)
def test_a_permutation_can_be_undone(sizes: list[int], seed: int) -> None:
    batch = batch_of(sizes)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    assert same(batch.select(order).select(order.argsort()), batch)
