from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from anyfit.errors import InputError, StateError, StorageError
from anyfit.state import Position, State, load_weights, save_weights


def trained(channels_last: bool, sgd: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9) if sgd else torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def state(channels_last: bool = False, sgd: bool = False) -> State:
    model, optimizer = trained(channels_last, sgd)
    return State(
        model=model.state_dict(),
        optimizers={"main": optimizer.state_dict()},
        rng={"cpu": torch.get_rng_state()},
        schema={"columns": [], "target": None},
        progress={"best": {"step": 3, "loss": 0.1}, "pending": [{"at": [1, 2]}], "none": None, "inf": float("inf")},
        position=Position(7, 1, 2),
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().as_strided([tensor.numel()], [1]).view(torch.uint8)


@pytest.mark.parametrize("sgd", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_save_and_load_are_the_identity_strides_included(channels_last: bool, sgd: bool, tmp_path: Path) -> None:
    before = state(channels_last, sgd)
    weight = before.model["0.weight"]
    moment = next(value for value in before.optimizers["main"]["state"][0].values() if value.dim() == 4)
    assert weight.is_contiguous() is moment.is_contiguous() is not channels_last, "else the strides would be those of any tensor"
    before.save(tmp_path / "s.safetensors")
    after = State.load(tmp_path / "s.safetensors")
    assert after.position == before.position and after.progress == before.progress and after.schema == before.schema
    for name, tensor in before.model.items():
        assert torch.equal(after.model[name], tensor) and after.model[name].stride() == tensor.stride(), name
    for key, moments in before.optimizers["main"]["state"].items():
        for name, tensor in moments.items():
            loaded = after.optimizers["main"]["state"][key][name]
            assert torch.equal(loaded, tensor) and loaded.stride() == tensor.stride(), name
    assert after.optimizers["main"]["param_groups"] == before.optimizers["main"]["param_groups"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3).bfloat16(),
        torch.tensor([True, False]),
        torch.tensor(3),
        torch.empty(0, 4),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(1).expand(5),
        torch.randn(6)[::2],
        torch.randn(2)[::2],
        torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=["bfloat16", "bool", "scalar", "empty", "permuted", "expanded", "strided", "one of a stride", "one channel", "not finite"],
)
def test_tensors_of_every_kind_come_back_to_the_bit(tensor: torch.Tensor, tmp_path: Path) -> None:
    State(model={"t": tensor}).save(tmp_path / "s")
    loaded = State.load(tmp_path / "s").model["t"]
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
    assert torch.equal(bits(loaded), bits(tensor))


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x.view(16), lambda x: x[:2]], ids=["transposed", "flat", "part"])
def test_two_views_of_one_memory_are_both_written(view: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    State(model={"x": x, "view": view(x)}).save(tmp_path / "s")
    loaded = State.load(tmp_path / "s").model
    assert torch.equal(loaded["x"], x) and torch.equal(loaded["view"], view(x))


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        state(True).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_tensors_are_written_once_and_tied_again(tmp_path: Path) -> None:
    x = torch.randn(1000)
    State(model={"a": x, "b": x, "part": x[:10], "other": x.clone()}).save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        assert len(list(file.keys())) == 3
    model = State.load(tmp_path / "s").model
    assert model["a"].data_ptr() == model["b"].data_ptr() != model["other"].data_ptr()
    assert torch.equal(model["part"], x[:10])


def test_a_torn_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    state().save(file)
    whole = file.read_bytes()
    for length in (0, 4, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StateError, match="torn"):
            State.load(file)
    file.write_bytes(whole)
    assert State.load(file).position.step == 7


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """In the header too: the last good checkpoint is looked for where this one raises StateError."""
    file = tmp_path / "s.safetensors"
    State(model={"w": torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last)}, progress={"best": None}).save(file)
    whole = file.read_bytes()
    wrong = set()
    for place in range(0, len(whole), 3):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        file.write_bytes(altered)
        try:
            State.load(file)
            wrong.add("was read")
        except StateError:
            pass
        except InputError as error:
            wrong.add(f"{type(error).__name__}: {str(error).partition(str(file))[2]}")
    assert not wrong


def test_any_safetensors_file_serves_as_weights_but_not_as_a_state(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors")["w"].tolist() == [1, 1]
    with pytest.raises(StateError, match="pass it as weights="):
        State.load(tmp_path / "w.safetensors")
    save_weights(tmp_path / "own.safetensors", {"w": torch.zeros(1)})
    assert list(load_weights(tmp_path / "own.safetensors")) == ["w"]
    state().save(tmp_path / "s.safetensors")
    assert set(load_weights(tmp_path / "s.safetensors")) == set(state().model)
    with pytest.raises(StateError, match="does not exist"):
        load_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_is_refused_with_the_lines_that_convert_it(suffix: str, tmp_path: Path) -> None:
    """The lines that the message gives are run, and what they write is read."""
    model = nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / f"w{suffix}")
    with pytest.raises(StateError, match="may be a pickle, which can run code when it is opened") as refused:
        load_weights(tmp_path / f"w{suffix}")
    exec(str(refused.value).partition("\n")[2].replace("\n  ", "\n").strip())
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == model.state_dict().keys() and torch.equal(loaded["weight"], model.weight)


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "s"
    state().save(file)
    before = file.read_bytes()
    bad: Any = {"extra": object()}
    with pytest.raises(StateError, match=r"extras.extra \(a object\) cannot be saved"):
        State(extras=bad).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_a_kill_leaves_of_a_write_has_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors begins with a file of another name, which nobody could know as part of this one."""
    seen: list[list[str]] = []

    def watched(tensors: Any, path: Path, metadata: Any) -> None:
        path.with_name(".tmp123456").touch()
        seen.append(sorted(entry.name for entry in tmp_path.iterdir()))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("anyfit.state.save_file", watched)
    state().save(tmp_path / "s.safetensors")
    assert all(re.fullmatch(r"\.s\.safetensors\..*\.(tmp|part)", name) for name in seen[0]) and len(seen[0]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_state_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/s"):
        state().save(tmp_path / "file" / "s")
