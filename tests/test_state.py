from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from anyfit.errors import StateError, StorageError
from anyfit.state import Position, State, load_weights, save_weights


def trained(channels_last: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def state(channels_last: bool = False) -> State:
    model, optimizer = trained(channels_last)
    return State(
        model=model.state_dict(),
        optimizers={"main": optimizer.state_dict()},
        rng={"cpu": torch.get_rng_state()},
        schema={"columns": [], "target": None},
        progress={"best": {"step": 3, "loss": 0.1}, "pending": [{"at": [1, 2]}], "none": None, "inf": float("inf")},
        position=Position(7, 1, 2),
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_save_and_load_are_the_identity_strides_included(channels_last: bool, tmp_path: Path) -> None:
    before = state(channels_last)
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


def test_a_torn_or_altered_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    state().save(file)
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StateError, match="torn"):
            State.load(file)
    for place in (len(whole) - 1, len(whole) - 1000, len(whole) // 2):
        altered = bytearray(whole)
        altered[place] ^= 4
        file.write_bytes(altered)
        with pytest.raises(StateError):
            State.load(file)
    file.write_bytes(whole)
    assert State.load(file).position.step == 7


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


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "s"
    state().save(file)
    before = file.read_bytes()
    bad: Any = {"extra": object()}
    with pytest.raises(StateError, match=r"extras.extra \(a object\) cannot be saved"):
        State(extras=bad).save(file)
    assert file.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, OSError)):
        state().save(tmp_path / "file" / "s")
