"""State: weights, optimizers, schedules, random numbers and position; all that a resume needs, in one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyfit.errors import InputError, StateError
from anyfit.tree import pack, unpack
from anyfit.values import atomic, canonical, parse

__all__ = ["Position", "State", "load_weights", "save_weights"]

FORMAT = 1
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError)  # what a forged header can bring about
KEY = "anyfit"  # one metadata key: safetensors writes several in random order


class Position(NamedTuple):
    """Where a fit stands: optimizer steps done, and the epoch and step within it that come next."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """A value: taking a snapshot clones, restoring copies."""

    model: Mapping[str, Tensor] = field(default_factory=dict)
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    schedules: Mapping[str, Any] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    position: Position = Position(0, 0, 0)  # noqa: RUF009 - a tuple cannot change

    def save(self, path: Path) -> None:
        """Write atomically. Equal states make equal files."""
        tensors: dict[str, Tensor] = {}
        parts = {part.name: pack(getattr(self, part.name), tensors, part.name) for part in fields(self) if part.name != "position"}
        position = [self.position.step, self.position.epoch, self.position.offset]
        _write(path, tensors, {"format": FORMAT, "parts": parts, "position": position})

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a checkpoint; a torn or altered one is refused."""
        tensors, header = _read(path)
        if header is None or "parts" not in header:
            raise StateError(f"{path} holds weights but no state to go on from; pass it as weights= instead")
        try:
            parts = {name: unpack(packed, tensors) for name, packed in header["parts"].items()}
            return cls(**parts, position=Position(*(int(number) for number in header["position"])))
        except MALFORMED as error:
            raise StateError(f"{path} is malformed: {error!r}") from error


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A plain safetensors file of a model's weights."""
    _write(path, dict(weights), {"format": FORMAT})


def load_weights(path: Path) -> dict[str, Tensor]:
    """The model's weights from a checkpoint or from any safetensors file."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise StateError(
            f"weights (={str(path)!r}) may be a pickle, which can run code when it is opened; convert it where you trust it:\n"
            "  import torch; from safetensors.torch import save_file\n"
            f"  save_file(torch.load({str(path)!r}, weights_only=True), {str(path.with_suffix('.safetensors'))!r})"
        )
    tensors, header = _read(path)
    if header is not None and "parts" in header:
        weights: dict[str, Tensor] = unpack(header["parts"]["model"], tensors)
        return weights
    return tensors


def _physical(tensor: Tensor) -> tuple[Tensor, list[int] | None]:
    """A contiguous view of the memory as it lies, and the order of dimensions that leads back; moments of a channels-last model
    reloaded dense would give other weights in silence.
    """
    if tensor.is_contiguous():
        return tensor, None
    order = sorted(range(tensor.dim()), key=lambda dimension: (-int(tensor.stride()[dimension]), dimension))
    permuted = tensor.permute(order)
    return (permuted, order) if permuted.is_contiguous() else (tensor.contiguous(), None)


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    stored: dict[str, Tensor] = {}
    strides: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    memories: set[int] = set()
    seen: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        dense, order = _physical(tensor.cpu())
        memory = dense.untyped_storage().data_ptr()
        whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
        # two views of one memory that are not the same tensor are written apart
        stored[name] = dense if whole and memory not in memories else dense.clone()
        memories.add(memory)
        if order is not None:
            strides[name] = order
    header = {**header, "strides": strides, "tied": tied}
    header["sha256"] = _checksum(stored, header)
    with atomic(path) as temporary:
        try:
            save_file(stored, temporary, metadata={KEY: canonical(header).decode()})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(canonical({key: value for key, value in header.items() if key != "sha256"}))
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and our header where there is one."""
    if not path.is_file():
        raise StateError(f"{path} does not exist; give a run folder or a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path} is torn or is no safetensors file ({error})") from error
    if KEY not in metadata:
        return tensors, None
    try:
        header: dict[str, Any] = parse(metadata[KEY], f"the header of {path}")
    except InputError as error:
        raise StateError(f"{path} was altered: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StateError(f"{path} has another format than this version reads ({FORMAT})")
    if header.get("sha256") != _checksum(tensors, header):
        raise StateError(f"{path} was altered: its checksum does not fit its content")
    try:
        for name, order in header["strides"].items():
            inverse = sorted(range(len(order)), key=order.__getitem__)
            tensors[name] = tensors[name].permute(inverse)
        for name, source in header["tied"].items():
            tensors[name] = tensors[source]
    except MALFORMED as error:
        raise StateError(f"{path} is malformed: {error!r}") from error
    return tensors, header
