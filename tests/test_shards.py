"""Checkpoints in shards: the same state as in one file, whole or not at all.

Run as a script, `python test_shards.py FOLDER`, it is a cluster that is killed, over and over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import anyfit
import anyfit.state as state_module
from anyfit.errors import InputError, StateError, StorageError
from anyfit.record import last_state, weights_file
from anyfit.run import Folder, Writer, committed
from anyfit.state import Position, State, load_weights
from anyfit.tree import leaves
from anyfit.values import canonical, digest

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def save(state: State, path: Path, count: int) -> list[Path]:
    """As `count` ranks do; all files of the checkpoint, the JSON first."""
    told = [state.save_shard(path, index, count) for index in range(count)]
    state.commit(path, count, told)
    return [path, *(path.with_name(shard["file"]) for shard in told)]


def same(a: State, b: State) -> bool:
    """To the bit, in types, shapes, memory order and ties."""
    (parts, tensors), (other_parts, others) = a._taken_apart(), b._taken_apart()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        other = others[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride()), name
        assert torch.equal(bits(tensor), bits(other)), name
    assert state_module._untied(tensors)[1] == state_module._untied(others)[1]
    return canonical(parts) == canonical(other_parts) and a.position == b.position


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().as_strided([tensor.numel()], [1]).view(torch.uint8)


def every_kind(step: int = 7) -> State:
    """Channels-last moments, ties, views, and tensors that are odd in other ways."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 5)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    x = torch.randn(50, 9)
    extras = {
        "bfloat16": torch.randn(31, 7).bfloat16(),
        "bool": torch.rand(9) < 0.5,
        "empty": torch.empty(0, 4),
        "also empty": torch.empty(3, 0),
        "scalar": torch.tensor(3),
        "expanded": torch.randn(1, 7).expand(60, 7),
        "strided": torch.randn(90, 3)[::2],
        "transposed": torch.randn(5, 70).t(),
        "permuted": torch.randn(2, 30, 4).permute(2, 0, 1),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "view": x.view(450),
        "part": x[3:],
    }
    return State(
        model={**model.state_dict(), "x": x, "tied": x},
        optimizers={"main": optimizer.state_dict()},
        rng={"cpu": torch.get_rng_state(), "python": {"state": [1, 2]}},
        extras=extras,
        schema={"columns": [], "target": None},
        progress={"best": {"step": 3, "loss": 0.1}, "inf": float("inf"), "sum": torch.tensor([step])},
        position=Position(step, 1, 2),
    )


# ------------------------------------------------------------------ the same state


@pytest.mark.parametrize("count", range(1, 7))
def test_shards_hold_what_one_file_holds(count: int, tmp_path: Path) -> None:
    before = every_kind()
    before.save(tmp_path / "whole.safetensors")
    paths = save(before, tmp_path / "step-000000007.json", count)
    assert [path.name for path in paths[1:]] == [f"step-000000007.{index}-of-{count}.safetensors" for index in range(count)]
    after = State.load(paths[0])
    assert same(after, State.load(tmp_path / "whole.safetensors"))
    assert not after.model["0.weight"].is_contiguous() and not after.optimizers["main"]["state"][0]["exp_avg"].is_contiguous()
    assert after.model["x"].data_ptr() == after.model["tied"].data_ptr() != after.extras["view"].data_ptr()
    after.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    weights, whole = load_weights(paths[0]), load_weights(tmp_path / "whole.safetensors")
    assert weights.keys() == whole.keys() == before.model.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    kind = draw(st.sampled_from(TYPES))
    made = torch.randint(-100, 100, [size + 1 for size in shape]).to(kind)
    layout = draw(st.sampled_from(["plain", "permuted", "strided", "expanded", "part"]))
    if layout == "plain" or not shape:
        return made
    if layout == "permuted":
        return made.permute(draw(st.permutations(range(len(shape)))))
    if layout == "strided":
        return made[..., ::2]
    return made[:1].expand([5, *made.shape[1:]]) if layout == "expanded" else made[1:]


@settings(max_examples=100)
@given(drawn=st.lists(tensors(), max_size=8), ties=st.lists(st.integers(0, 7), max_size=2), count=st.integers(1, 5))
def test_any_tensors_come_back_from_any_number_of_shards(
    drawn: list[Tensor], ties: list[int], count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    model = {f"t{index}": tensor for index, tensor in enumerate(drawn)}
    model |= {f"tied{number}": drawn[index] for number, index in enumerate(ties) if index < len(drawn)}
    before = State(model=model)
    before.save(folder / "whole")
    save(before, folder / "step-1.json", count)
    after = State.load(folder / "step-1.json")
    assert same(after, State.load(folder / "whole"))
    assert all(torch.equal(bits(after.model[name]), bits(tensor)) for name, tensor in model.items())


def test_equal_states_make_equal_shards(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    files = [save(every_kind(), tmp_path / name / "step-7.json", 3) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_the_random_numbers_and_the_progress_of_rank_0_count(tmp_path: Path) -> None:
    """The other ranks have others, even with other names; and memory may lie in another order on another device."""
    first = every_kind()
    moved = {**first.extras, "transposed": first.extras["transposed"].contiguous(), "permuted": first.extras["permuted"].contiguous()}
    other = replace(first, rng={"cpu": first.rng["cpu"] + 1, "cuda": torch.ones(9)}, progress={"sum": torch.tensor(5)}, extras=moved)
    path = tmp_path / "step-7.json"
    told = [(other if index else first).save_shard(path, index, 3) for index in range(3)]
    first.commit(path, 3, told)
    first.save(tmp_path / "whole")
    assert same(State.load(path), State.load(tmp_path / "whole"))


def test_shards_are_of_like_size(tmp_path: Path) -> None:
    """As of a small transformer with its moments: one great table, and layers."""
    layers = {f"layers.{index}.{name}": torch.zeros(64, 64 * wide) for index in range(6) for name, wide in (("out", 1), ("up", 4))}
    weights = {"table": torch.zeros(4001, 64), **layers, "bias": torch.zeros(64), "one row": torch.zeros(1, 5)}
    state = State(model=weights, optimizers={"main": {"state": {name: torch.ones_like(tensor) for name, tensor in weights.items()}}})
    total = sum(tensor.numel() * tensor.element_size() for part in (state.model, state.optimizers) for tensor in leaves(part))
    for count in (2, 3, 4, 7):
        sizes = [path.stat().st_size for path in save(state, tmp_path / f"step-{count}.json", count)[1:]]
        assert max(sizes) - min(sizes) < 0.05 * total / count and sum(sizes) < 1.02 * total
        assert all("model.table" in names_in(tmp_path / f"step-{count}.{index}-of-{count}.safetensors") for index in range(count))


def names_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=12),
    count=st.integers(1, 6),
)
def test_every_row_is_dealt_once_and_values_decide_nothing(sizes: list[tuple[int, int]], count: int) -> None:
    stored = {f"model.{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    dealt = state_module._dealt(stored, count)
    assert dealt == state_module._dealt({name: torch.ones(tensor.shape[::-1]).t() for name, tensor in reversed(stored.items())}, count)
    rows = {
        name: sorted(row for shard in dealt if name in shard for row in range(*(shard[name] or (0, len(tensor)))))
        for name, tensor in stored.items()
    }
    assert rows == {name: list(range(len(tensor))) for name, tensor in stored.items()}
    loads = [
        sum(
            (slice(*(part or (0, None))).indices(len(stored[name]))[1] - (part or (0, 0))[0]) * stored[name].shape[1]
            for name, part in shard.items()
        )
        for shard in dealt
    ]
    total = sum(a * b for a, b in sizes)
    widest = max(size for _, size in sizes)
    assert max(loads) <= total / count + max(total / (2 * count), widest)


# ------------------------------------------------------------------ the commit


def test_without_its_json_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", resume=True)
    path = folder.checkpoint_path(7, sharded=True)
    told = [every_kind().save_shard(path, index, 2) for index in range(2)]
    assert folder.checkpoints() == [] and last_state(folder) is None
    with pytest.raises(StateError, match="does not exist"):
        State.load(path)
    every_kind().commit(path, 2, told)
    assert folder.checkpoints() == [path]
    folder.close()


def test_a_commit_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, path = every_kind(), tmp_path / "step-7.json"
    told = [state.save_shard(path, index, 2) for index in range(2)]

    class Opened:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> Any:
            file = self.file.__enter__()
            return SimpleNamespace(keys=file.keys, metadata=file.metadata)  # and no get_tensor

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "safe_open", Opened)
        state.commit(path, 2, told)
        with pytest.raises(StateError, match="get_tensor"):
            State.load(path)
    assert State.load(path).position == state.position


Shards = Callable[[State, Path], Any]


def _other_model(state: State, path: Path) -> None:
    replace(state, model={**state.model, "more": torch.ones(2)}).save_shard(path, 1, 3)


def _untied(state: State, path: Path) -> None:
    replace(state, model={**state.model, "tied": state.model["tied"].clone()}).save_shard(path, 1, 3)


def _torn(state: State, path: Path) -> None:
    file = path.with_name("step-7.1-of-3.safetensors")
    os.truncate(file, file.stat().st_size - 5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state, path: path.with_name("step-7.1-of-3.safetensors").unlink(), "is missing, so step-7.json cannot be written"),
        (lambda state, path: replace(state, position=Position(6, 1, 1)).save_shard(path, 1, 3), "is of step 6, not of step 7"),
        (lambda state, path: path.with_name("step-7.0-of-3.safetensors").replace(path.with_name("step-7.1-of-3.safetensors")), None),
        (
            lambda state, path: path.with_name("step-7.2-of-3.safetensors").replace(path.with_name("step-7.1-of-3.safetensors")),
            "is not shard 1 of 3",
        ),
        (lambda state, path: state.save(path.with_name("step-7.1-of-3.safetensors")), "is not shard 1 of 3"),
        (_other_model, "other tensors than that of rank 0"),
        (_untied, "other tensors than that of rank 0"),
        (_torn, "is torn"),
    ],
    ids=["missing", "step", "two", "index", "whole", "model", "ties", "torn"],
)
def test_shards_that_do_not_make_one_state_are_not_committed(spoil: Shards, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "step-7.json"
    told = [every_kind().save_shard(path, index, 3) for index in range(3)]
    spoil(every_kind(), path)
    with pytest.raises(StateError, match=message) as refused:
        every_kind().commit(path, 3, told)
    assert f"step-7.{1 if message else 0}-of-3.safetensors" in str(refused.value)
    assert not path.exists()


def test_a_shard_that_an_earlier_attempt_left_is_not_committed(tmp_path: Path) -> None:
    """A kill came before the commit; the fork that went on instead reaches the same step with other weights."""
    path = tmp_path / "step-7.json"
    for index in range(2):
        small(7).save_shard(path, index, 2)
    now = replace(small(7), model={name: tensor + 1 for name, tensor in small(7).model.items()})
    told = [now.save_shard(path, 0, 2), {**now.save_shard(tmp_path / "elsewhere.json", 1, 2), "file": "step-7.1-of-2.safetensors"}]
    with pytest.raises(StateError, match=r"1-of-2.safetensors is not what rank 1 wrote"):
        now.commit(path, 2, told)


def test_a_step_that_is_saved_again_is_the_old_one_until_it_is_the_new(tmp_path: Path) -> None:
    """Even with other content under the same step and number of ranks: no shard is written over one that is listed."""
    path, first = tmp_path / "checkpoints" / "step-000000007.json", every_kind()
    save(first, path, 2)
    for number in range(1, 4):
        new = replace(first, extras={"number": torch.full((40,), number)})
        old = State.load(path)
        told = []
        for index in range(2):
            told.append(new.save_shard(path, index, 2))
            assert same(State.load(path), old), "half of a new checkpoint has spoilt the old one"
        new.commit(path, 2, told)
        assert State.load(path).extras["number"][0] == number
    folder = Folder(tmp_path, resume=True)
    folder.keep()
    assert len(list(path.parent.iterdir())) == 3 and State.load(path).extras["number"][0] == 3
    folder.close()


def test_ranks_that_saw_the_commit_before_and_ranks_that_did_not_make_one_checkpoint(tmp_path: Path) -> None:
    """A step is saved again while rank 0 still commits the first attempt: names then differ, and what the ranks told counts."""
    path, state = tmp_path / "step-7.json", every_kind()
    before = [state.save_shard(path, index, 2) for index in range(2)]
    early = state.save_shard(path, 1, 2)
    state.commit(path, 2, before)
    told = [state.save_shard(path, 0, 2), early]
    assert [shard["file"] for shard in told] == ["step-7.0-of-2.again.safetensors", "step-7.1-of-2.safetensors"]
    state.commit(path, 2, told)
    state.save(tmp_path / "whole")
    assert same(State.load(path), State.load(tmp_path / "whole"))


# ------------------------------------------------------------------ what was altered


@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_that_is_missing_torn_altered_or_of_another_step_is_named(count: int, tmp_path: Path) -> None:
    path, other = tmp_path / "step-7.json", tmp_path / "other.json"
    for file in save(every_kind(), path, count)[1:]:
        whole = file.read_bytes()
        index = int(file.name.split(".")[1][0])

        def refused(message: str, file: Path = file) -> None:
            with pytest.raises(StateError, match=message) as error:
                State.load(path)
            assert str(file) in str(error.value)

        file.unlink()
        refused("is missing")
        for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            refused("torn")
        file.write_bytes(whole + b"\0")
        refused("torn")
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        refused("altered")
        other.with_name(every_kind(8).save_shard(other, index, count)["file"]).replace(file)
        refused("is of step 8, but step-7.json of step 7")
        changed = replace(every_kind(), model={name: tensor + 1 for name, tensor in every_kind().model.items()})
        other.with_name(changed.save_shard(other, index, count)["file"]).replace(file)
        refused("was altered or replaced after step-7.json was written")
        other.with_name(every_kind().save_shard(other, index, count + 1)["file"]).replace(file)
        refused(f"is not shard {index} of {count}")
        file.write_bytes(whole)
    assert same(State.load(path), State.load(path))


def test_a_torn_or_altered_json_is_refused_wherever_it_was(tmp_path: Path) -> None:
    path = tmp_path / "step-7.json"
    save(State(model={"w": torch.randn(30, 2).t()}, progress={"best": None}), path, 2)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for altered in (whole[:place], whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]):
            path.write_bytes(altered)
            with pytest.raises(StateError, match=re.escape(str(path))):
                State.load(path)
    path.write_bytes(whole)
    assert State.load(path).model["w"].shape == (2, 30)


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[bytes], State]:
    folder = tmp_path_factory.mktemp("corrupted")
    files = save(every_kind(), folder / "step-7.json", 3)
    return files, [file.read_bytes() for file in files], State.load(files[0])


def loads(path: Path) -> bool:
    try:
        State.load(path)
    except StateError:
        return False
    return True


@settings(max_examples=300)
@given(which=st.integers(0, 3), place=st.floats(0, 1, exclude_max=True), length=st.integers(1, 40), noise=st.randoms(use_true_random=False))
def test_noise_in_any_file_is_refused_or_changes_nothing(
    which: int, place: float, length: int, noise: random.Random, corrupted: tuple[list[Path], list[bytes], State]
) -> None:
    files, contents, state = corrupted
    # half of it in the first two thousand bytes, where the headers are
    start = int(place * 2 * min(2000, len(contents[which]))) if place < 0.5 else int((place - 0.5) * 2 * len(contents[which]))
    altered = contents[which][:start] + noise.randbytes(length) + contents[which][start + length :]
    files[which].write_bytes(altered)
    try:
        with contextlib.suppress(StateError):
            assert same(State.load(files[0]), state)  # white space in a header
        if start >= len(contents[which]) // 2:  # where there are only tensors, and of the JSON
            assert altered == contents[which] or not loads(files[0])
    finally:
        files[which].write_bytes(contents[which])


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 3},
        {"shards": []},
        {"shards": [{"file": "step-7.0-of-1.safetensors"}]},
        {"shards": [{"file": "../step-7.0-of-1.safetensors", "sha256": "", "bytes": 1}]},
        {"shards": [{"file": "other.safetensors", "sha256": "", "bytes": 1}]},
        {"shards": [{"file": 5, "sha256": "", "bytes": 1}]},
        {"strides": {"model.w": [9, 9]}},
        {"strides": {"model.w": [0]}},
        {"strides": 5},
        {"tied": {"model.x": "nowhere"}},
        {"tied": [1]},
        {"layout": "0"},
        {"parts": 3},
        {"parts": {"model": {"tensor": "nowhere"}}},
        {"parts": {"model": {"map": [["a"]]}}},
        {"parts": {"unknown": None}},
        {"position": "abc"},
        {"format": 2},
    ],
    ids=range(18),
)
def test_a_forged_json_with_the_right_checksum_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run" / "step-7.json"
    State(model={"w": torch.ones(4, 2)}, position=Position(7)).save(tmp_path / "step-7.0-of-1.safetensors")
    State(model={"w": torch.ones(4, 2)}, position=Position(7)).save(path.with_name("other.safetensors"))
    save(State(model={"w": torch.ones(4, 2)}, position=Position(7)), path, 1)
    header = {name: value for name, value in (json.loads(path.read_bytes()) | change).items() if name != "sha256"}
    path.write_bytes(canonical({**header, "sha256": digest(header)}))
    with pytest.raises(StateError):
        State.load(path)
    if "parts" not in change or "model" in (change["parts"] if isinstance(change["parts"], dict) else {"model"}):
        with pytest.raises(StateError):
            load_weights(path) and State.load(path)


def test_rows_that_are_in_no_shard_or_in_two_are_refused() -> None:
    piece = state_module._Piece
    ones = torch.ones(2, 3)
    assert state_module._whole([piece([2, 4], None, ones), piece([0, 2], None, ones)], None).shape == (4, 3)
    for rows in ([[0, 2], [3, 5]], [[0, 2], [0, 2]], [[1, 3], [3, 5]], [None, None]):
        with pytest.raises(ValueError, match="rows"):
            state_module._whole([piece(part, None, ones) for part in rows], None)


def test_one_shard_is_neither_a_state_nor_weights(tmp_path: Path) -> None:
    shard = save(every_kind(), tmp_path / "step-7.json", 2)[2]
    for read in (State.load, load_weights):
        with pytest.raises(StateError, match=r"is one shard of a checkpoint; give the .json beside it \(step-7.json\)"):
            read(shard)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(StateError, match=r"config.json"):
        load_weights(tmp_path / "config.json")


def test_a_disk_that_fails_is_a_storage_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    save(every_kind(1), tmp_path / "step-1.json", 2)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*step-2.0-of-2"):
        every_kind(2).save_shard(tmp_path / "file" / "step-2.json", 0, 2)
    assert State.load(tmp_path / "step-1.json").position.step == 1


# ------------------------------------------------------------------ the folder


def small(step: int) -> State:
    return State(model={"w": torch.full((30, 3), float(step)), "b": torch.ones(3)}, rng={"cpu": torch.ones(4)}, position=Position(step))


def names(folder: Folder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_a_run_with_both_kinds_goes_on_from_the_newest(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", resume=True)
    for step in (900, 1_000, 2_000_000_000, 10_000_000_000):
        for sharded in (False, True):
            if sharded:
                save(small(step + 5), folder.checkpoint_path(step + 5, sharded=True), 3)
            else:
                small(step).save(folder.checkpoint_path(step))
            newest = step + 5 * sharded
            state = last_state(folder)
            assert state is not None and state.position.step == newest == State.load(weights_file(folder.path)).position.step
            assert load_weights(weights_file(folder.path))["w"][0, 0] == float(newest)
    steps = [int(path.stem.rpartition("-")[2]) for path in folder.checkpoints()]
    assert steps == sorted(steps) and len(steps) == 8 and folder.checkpoints() == committed(folder.path)
    last = folder.checkpoints()[-1]
    last.with_name(f"{last.stem}.1-of-3.safetensors").unlink()
    with pytest.raises(
        StateError, match=rf"1-of-3.safetensors is missing.*the last good one is .*step-10000000000.safetensors; delete {last.name}"
    ):
        last_state(folder)
    folder.close()


def test_keep_drops_old_checkpoints_and_what_kills_left_but_nothing_in_the_making(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", resume=True)
    for step, sharded in ((10, True), (20, False), (30, True), (40, True)):
        path = folder.checkpoint_path(step, sharded=sharded)
        save(small(step), path, 2) if sharded else small(step).save(path)
    checkpoints = folder.path / "checkpoints"
    for step, index in ((5, 0), (25, 1), (50, 0)):  # a kill left the first two; the last is being made
        small(step).save_shard(folder.checkpoint_path(step, sharded=True), index, 3)
    small(40).save_shard(checkpoints / "step-000000040.json", 2, 3)  # by an attempt of three ranks
    small(40).save(folder.best)
    (checkpoints / ".step-000000050.2-of-3.safetensors.abc.tmp").touch()  # of another rank, at work
    for left in (
        ".step-000000050.2-of-3.safetensors.abc.part",
        ".step-000000040.1-of-3.safetensors.abc.part",
        ".best.safetensors.abc.part",
    ):
        (checkpoints / left).mkdir()
        (checkpoints / left / ".tmp123456").touch()
    for left in (
        ".step-000000040.2-of-3.safetensors.abc.tmp",
        ".best.safetensors.xyz.tmp",
        ".best.tmp",
        ".step-000000060.safetensors.abc.tmp",
    ):
        (checkpoints / left).touch()
    (checkpoints / "step-notes.txt").touch()
    folder.keep()
    committed_files = [f"step-0000000{step}.{kind}" for step in (30, 40) for kind in ("0-of-2.safetensors", "1-of-2.safetensors", "json")]
    making = [f".step-000000050.2-of-3.safetensors.abc.{kind}" for kind in ("part", "tmp")] + ["step-000000050.0-of-3.safetensors"]
    assert names(folder) == sorted([*committed_files, *making, "best.safetensors", "step-notes.txt"])
    assert [State.load(path).position.step for path in folder.checkpoints()] == [30, 40]
    folder.sweep()
    assert names(folder) == sorted([*committed_files, "best.safetensors", "step-notes.txt"])
    (checkpoints / "step-000000040.json").write_text("{")  # what it was may be found out by hand
    small(50).save(folder.checkpoint_path(50))
    folder.keep()
    assert len(list(checkpoints.glob("step-000000040.*-of-2.*"))) == 2 and not list(checkpoints.glob("step-000000030*"))
    folder.close()


def test_an_empty_folder_keeps_shards_in_the_making(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", resume=True)
    small(1).save_shard(folder.checkpoint_path(1, sharded=True), 0, 2)
    folder.keep()
    assert names(folder) == ["step-000000001.0-of-2.safetensors"]
    folder.sweep()
    assert names(folder) == []
    folder.close()


def test_the_best_of_a_sharded_run_is_one_whole_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", resume=True)
    path = folder.checkpoint_path(7, sharded=True)
    save(every_kind(), path, 3)
    with pytest.raises(InputError, match=r"state \(=None\) must be given to make step-000000007.json the best"):
        folder.mark_best(path)
    assert not folder.best.exists()
    folder.mark_best(path, State.load(path))
    every_kind().save(tmp_path / "whole")
    assert folder.best.read_bytes() == (tmp_path / "whole").read_bytes() and weights_file(folder.path) == folder.best
    small(8).save(folder.checkpoint_path(8))
    folder.mark_best(folder.checkpoint_path(8), small(8))
    assert folder.best.samefile(folder.checkpoint_path(8)), "a whole file is given another name, not written twice"
    folder.close()


# ------------------------------------------------------------------ the writer


def test_the_writer_does_one_job_at_a_time_and_in_order() -> None:
    writer, done, at_work = Writer(), [], []

    def job(number: int) -> None:
        at_work.append(number)
        time.sleep(0.005)
        done.append(number)
        assert at_work == done, "two at once"

    for number in range(5):
        writer.start(lambda number=number: job(number))  # type: ignore[misc]
        assert done == list(range(number))
    writer.finish()
    assert done == [0, 1, 2, 3, 4]
    writer.finish()


def test_the_writer_raises_what_a_job_raised_once() -> None:
    writer, began = Writer(), []

    def fails() -> None:
        raise StorageError("the disk is full")

    writer.start(fails)
    with pytest.raises(StorageError, match="disk is full"):
        writer.start(lambda: began.append(1))
    assert not began
    writer.start(lambda: began.append(2))
    writer.finish()
    assert began == [2]
    writer.start(lambda: sys.exit(3))
    with pytest.raises(SystemExit):
        writer.finish()
    writer.finish()


def test_the_writer_tells_where_a_job_is_not_done_in_time() -> None:
    writer, go = Writer(), threading.Event()
    writer.start(go.wait)
    with pytest.raises(StorageError, match=r"still being written after timeout_s \(=0.01\)"):
        writer.finish(0.01)
    go.set()
    writer.finish()


ENDS = """
import sys, time, torch
from pathlib import Path
from anyfit.run import Writer
from anyfit.state import State
state, writer, path = State(model={"w": torch.zeros(500_000)}), Writer(), Path(sys.argv[1])
def job():
    for number in range(8):
        state.save(path)
    path.with_suffix(".done").touch()
    raise ValueError("nobody waited for this")
writer.start(job)
while not path.exists():
    time.sleep(0.001)
sys.exit(7)
"""


@pytest.mark.slow
def test_a_process_that_ends_ends_its_job_first_and_tells_of_its_error(tmp_path: Path) -> None:
    """An interpreter that ends while a thread is in compiled code would abort, whatever the exit code was to be."""
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path / "s")], capture_output=True, text=True, check=False)
    assert done.returncode == 7 and "nobody waited for this" in done.stderr
    assert (tmp_path / "s.done").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.done"]


# ------------------------------------------------------------------ a fit


class Line(anyfit.Task):
    """A small net with dropout, and tied weights."""

    def build_model(self, schema: Any) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 4), nn.Linear(4, 3))
        net[3].weight = net[0].weight
        return net


def points() -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_fit_goes_on_from_shards_as_if_nothing_had_happened(ranks: int, tmp_path: Path) -> None:
    """And run.json may say more than a single process knows: another number of ranks is no fork."""
    options: dict[str, Any] = {"epochs": 4, "batch_size": 50, "log_every": 3, "checkpoint_every_s": 0.0, "seed": 4}

    class Stop(Exception):
        pass

    whole = anyfit.fit(Line(), points(), run=tmp_path / "whole", **options)
    run = tmp_path / "cut"

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        anyfit.fit(Line(), points(), run=run, on_event=interrupt, **options)
    folder = Folder(run, resume=True)
    for file in folder.checkpoints():
        state = State.load(file)
        save(state, file.with_suffix(".json"), ranks)
        file.unlink()
    folder.close()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "ranks": {"number": ranks, "hosts": ["a"], "shares": [[0.5, 0.5]]}}))
    again = anyfit.fit(Line(), points(), run=run, resume=True, **options)
    assert again.record["forks"] == []
    last = f"checkpoints/step-{whole.result['steps']:09d}.safetensors"
    assert (run / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    assert again.history == whole.history


# ------------------------------------------------------------------ kills


def content(step: int) -> State:
    """What a checkpoint after `step` steps must hold."""
    generator = torch.Generator().manual_seed(step)
    model = {"table": torch.randn(300, 20, generator=generator), "b": torch.randn(20, generator=generator)}
    model["tied"] = model["table"]
    moments = {"m": torch.randn(4, 6, 5, 5, generator=generator).to(memory_format=torch.channels_last)}
    return State(
        model=model, optimizers={"main": moments}, rng={"cpu": generator.get_state()}, progress={"step": step}, position=Position(step)
    )


def cluster(run: Path, ranks: int, steps: int, told: Callable[[int], object], background: bool) -> None:
    """Resume, then a checkpoint at each step: what `ranks` ranks do, their writing in the background or one after another."""
    folder = Folder(run, resume=True)
    state = last_state(folder)
    first = 1 if state is None else state.position.step + 1
    folder.sweep()
    for step in range(first, first + steps):
        path, state = folder.checkpoint_path(step, sharded=True), content(step)
        reports: list[dict[str, Any]] = [{}] * ranks

        def job(index: int, path: Path = path, state: State = state, reports: list[dict[str, Any]] = reports) -> None:
            reports[index] = state.save_shard(path, index, ranks)

        writers = [Writer() for _ in range(ranks)]
        for index, writer in enumerate(writers):
            writer.start(lambda index=index, job=job: job(index))  # type: ignore[misc]
            if not background:
                writer.finish()
        for writer in writers:
            writer.finish()
        state.commit(path, ranks, reports)
        told(step)
        if step % 2:
            folder.mark_best(path, state)
        folder.keep()
    folder.close()


def killed_at(operation: int) -> None:
    """Die before the numbered change of the disk, or in the middle of it where it writes data."""
    seen = itertools.count(1)
    save_file, replaces, unlinks, syncs = state_module.save_file, Path.replace, Path.unlink, os.fsync

    def reached() -> bool:
        return next(seen) == operation

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(tensors: Any, path: Path, metadata: Any) -> None:
        if reached():
            die()
        save_file(tensors, path, metadata=metadata)
        if reached():
            os.truncate(path, path.stat().st_size // 2)
            die()

    def dies_before(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if reached():
                die()
            return function(*arguments, **named)

        return call

    state_module.save_file = torn  # type: ignore[assignment]
    Path.replace, Path.unlink, os.fsync = dies_before(replaces), dies_before(unlinks), dies_before(syncs)  # type: ignore[method-assign]


def forked(
    run: Path, ranks: int, steps: int, *, operation: int | None = None, seconds: float | None = None, works: bool = False
) -> tuple[bool, int]:
    """A cluster in a process of its own, with a kill at an operation, or some seconds after it began (`works`: after its first checkpoint),
    or without; -> whether it was killed, and the last step that it said was saved.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if operation is not None:
                killed_at(operation)
            cluster(run, ranks, steps, lambda step: os.write(writing, b"%d\n" % step), background=operation is None)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    told = b""
    if seconds is not None:
        told = os.read(reading, 100) if works else b""
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading, "rb") as pipe:
        saved = [int(line) for line in (told + pipe.read()).splitlines()]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status), saved[-1] if saved else 0


def holds(run: Path, at_least: int, at_most: int | None = None) -> int:
    """Each checkpoint is one, with what belongs in it, and the newest is the last one told of or the one after; -> its step."""
    newest = 0
    for path in committed(run):
        state = State.load(path)
        newest = state.position.step
        assert path.name.startswith(f"step-{newest:09d}.") and same(state, reloaded(newest)), f"{path} holds something else"
    assert at_least <= newest <= (at_least + 1 if at_most is None else at_most), (at_least, newest)
    best = run / "checkpoints" / "best.safetensors"
    if best.exists():
        state = State.load(best)
        assert same(state, reloaded(state.position.step)) and state.position.step % 2 and state.position.step <= newest
    return newest


KNOWN: dict[int, State] = {}


def reloaded(step: int) -> State:
    """Written and read whole, in a file of its own."""
    if step not in KNOWN:
        path = Path(sys.argv[1]) / "whole.safetensors"
        content(step).save(path)
        KNOWN[step] = State.load(path)
    return KNOWN[step]


def tidy(run: Path, ranks: int, newest: int) -> None:
    """What the last process left is two checkpoints and a best one, and nothing of those that were killed."""
    expected = {
        f"step-{step:09d}.{kind}"
        for step in (newest - 1, newest)
        for kind in ("json", *(f"{i}-of-{ranks}.safetensors" for i in range(ranks)))
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == expected | {"best.safetensors"}


def main(folder: Path, seed: int, every: int, rounds: int) -> None:
    """Kills before or in the middle of each (`every`-th) change of the disk, then at random moments with ranks at work side by side."""
    torch.set_num_threads(1)
    operations = 0
    for operation in itertools.count(1, every):
        run = folder / f"operation-{operation}"
        forked(run, 2, 1)
        killed, saved = forked(run, 2, 3, operation=operation)
        if not killed:
            break
        operations += 1
        newest = holds(run, max(saved, 1))
        assert forked(run, 3, 2) == (False, newest + 2)  # by another number of ranks
        tidy(run, 3, holds(run, newest + 2))
    draw, kills, run = random.Random(seed), 0, folder / "random"
    newest = 0
    for number in range(rounds):
        killed, saved = forked(run, draw.randint(1, 4), 1000, seconds=draw.uniform(0.0, 0.06), works=number % 4 > 0)
        kills += killed
        newest = holds(run, max(saved, newest))
    assert forked(run, 2, 2) == (False, newest + 2)
    tidy(run, 2, holds(run, newest + 2))
    print(operations, kills, newest)


def survives(folder: Path, seed: int, every: int, rounds: int) -> list[int]:
    arguments = [sys.executable, __file__, str(folder), str(seed), str(every), str(rounds)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_kills_leave_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    operations, kills, steps = survives(tmp_path, seed=1, every=6, rounds=8)
    assert operations > 5 and kills == 8 and steps >= 6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_before_each_change_of_the_disk_leave_the_old_checkpoint_or_the_new_one(seed: int, tmp_path: Path) -> None:
    operations, kills, steps = survives(tmp_path, seed=seed + 2, every=1, rounds=60)
    assert operations > 50 and kills == 60 and steps >= 45


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:]))
