"""State: weights, optimizers, schedules, random numbers and position; all that a resume needs, in one safetensors file.

Or in shards, where several ranks have the same state and each writes a part: a safetensors file each, and a JSON that lists them. The
JSON is written last, so it is the commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyfit.errors import InputError, StateError
from anyfit.run import shard_path
from anyfit.tree import pack, unpack
from anyfit.values import atomic, canonical, digest, parse, write_atomic

__all__ = ["Position", "State", "load_weights", "save_weights"]

T = TypeVar("T")
FORMAT = 1
OWN = ("rng", "progress")  # what each rank has for itself; those of rank 0 are kept
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
        parts, tensors = self._taken_apart()
        _write(path, tensors, {"format": FORMAT, "parts": parts, "position": list(self.position)})

    def save_shard(self, path: Path, index: int, count: int) -> dict[str, Any]:
        """Write the part of rank `index` of `count` beside `path`, the JSON to come; returns its file, sha256 and bytes.

        Only names, shapes and types say who writes what, so that ranks need not ask each other.
        """
        assert path.suffix == ".json" and 0 <= index < count
        stored, tied = _untied(self._taken_apart()[1])
        dealt = _dealt(stored, count)[index]
        orders = {name: _order(stored[name]) for name in dealt}
        pieces = {name: stored[name] if rows is None else stored[name][slice(*rows)] for name, rows in dealt.items()}
        content = _apart({name: _dense(piece, orders[name]) for name, piece in pieces.items()})
        header = {
            "format": FORMAT,
            "shard": [index, count],
            "position": list(self.position),
            "layout": _layout(stored, tied),
            "rows": {name: rows for name, rows in dealt.items() if rows is not None},
            "strides": {name: order for name, order in orders.items() if order is not None},
        }
        file = shard_path(path, index, count)
        sha256 = _store(file, content, header)
        return {"file": file.name, "sha256": sha256, "bytes": file.stat().st_size}

    def commit(self, path: Path, count: int, told: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Make a checkpoint of the shards that `count` ranks have written; until then there is none.

        This is for rank 0, whose random numbers and progress are kept. `told` is what the ranks' `save_shard` returned, by rank: without
        it a shard that an attempt at the same step left behind, before a kill, would pass for a new one. Headers are read, not data.
        """
        assert path.suffix == ".json" and count > 0
        parts, tensors = self._taken_apart()
        stored, tied = _untied(tensors)
        layout, shards = _layout(stored, tied), []
        for index, dealt in enumerate(_dealt(stored, count)):
            file = shard_path(path, index, count) if told is None else path.with_name(told[index]["file"])
            if not file.is_file():
                raise StateError(f"{file} is missing, so {path.name} cannot be written; all ranks must write to the same folder")
            names, header = _content(file, lambda opened: set(opened.keys()))
            if header is None or header.get("shard") != [index, count] or "sha256" not in header:
                raise StateError(f"{file} is not shard {index} of {count}; delete it and save again")
            if header.get("position") != list(self.position):
                raise StateError(f"{file} is of {_spell(header.get('position'))}, not of {_spell(list(self.position))}")
            if header.get("layout") != layout or names != set(dealt):
                raise StateError(f"{file} is of a state with other tensors than that of rank 0; all ranks must train the same model")
            shard = {"file": file.name, "sha256": header["sha256"], "bytes": file.stat().st_size}
            if told is not None and shard != dict(told[index]):
                raise StateError(
                    f"{file} is not what rank {index} wrote ({shard}, not {dict(told[index])}); is another run in this folder?"
                )
            shards.append(shard)
        whole = {
            "format": FORMAT,
            "parts": parts,
            "position": list(self.position),
            "strides": {name: order for name, tensor in stored.items() if (order := _order(tensor)) is not None},
            "tied": tied,
            "layout": layout,
            "shards": shards,
        }
        write_atomic(path, canonical({**whole, "sha256": digest(whole)}))

    def _taken_apart(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        return {part.name: pack(getattr(self, part.name), tensors, part.name) for part in fields(self) if part.name != "position"}, tensors

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a checkpoint, in one file or in shards (by its JSON); a torn or altered one is refused."""
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
    if header is None or "parts" not in header:
        return tensors
    try:
        weights: dict[str, Tensor] = unpack(header["parts"]["model"], tensors)
    except MALFORMED as error:
        raise StateError(f"{path} is malformed: {error!r}") from error
    return weights


# ------------------------------------------------------------------ how tensors lie


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the names that are other names of one."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor
    return stored, tied


def _order(tensor: Tensor) -> list[int] | None:
    """The order of dimensions in which memory lies, where it is another than that of the shape; moments of a channels-last model
    reloaded dense would give other weights in silence.
    """
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=lambda dimension: (-int(tensor.stride()[dimension]), dimension))
    return order if tensor.permute(order).is_contiguous() else None


def _dense(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The memory as it lies."""
    return (tensor if order is None else tensor.permute(order)).contiguous().cpu()


def _shaped(dense: Tensor, order: list[int] | None) -> Tensor:
    """The way back from `_dense`, without a copy."""
    return dense if order is None else dense.permute(sorted(range(len(order)), key=order.__getitem__))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two views of one memory that are not the same tensor are written apart."""
    memories: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    return apart


# ------------------------------------------------------------------ who writes what


def _shared(name: str) -> bool:
    return name.partition(".")[0] not in OWN


def _layout(stored: Mapping[str, Tensor], tied: Mapping[str, str]) -> str:
    """What ranks must agree on before their shards make one state."""
    known = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(stored.items()) if _shared(name)]
    return digest([known, sorted((name, source) for name, source in tied.items() if _shared(name))])


def _dealt(stored: Mapping[str, Tensor], count: int) -> list[dict[str, tuple[int, int] | None]]:
    """Which tensors each shard holds, and which rows (None: all), so that all have about as many bytes."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items() if _shared(name)}
    limit = sum(sizes.values()) / (2 * count)
    pieces: list[tuple[int, str, tuple[int, int] | None]] = []
    for name, size in sizes.items():
        rows = stored[name].shape[0] if stored[name].dim() else 1
        cuts = min(count, rows) if size > limit else 1
        bounds = [rows * cut // cuts for cut in range(cuts + 1)]
        if cuts == 1:
            pieces.append((size, name, None))
        else:
            pieces += [(size // rows * (last - first), name, (first, last)) for first, last in pairwise(bounds)]
    shards: list[dict[str, tuple[int, int] | None]] = [{} for _ in range(count)]
    bytes_of = [0] * count
    for size, name, part in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2] or (0, 0))):
        index = min((index for index in range(count) if name not in shards[index]), key=bytes_of.__getitem__)
        shards[index][name] = part
        bytes_of[index] += size
    shards[0] |= {name: None for name in stored if not _shared(name)}
    return shards


# ------------------------------------------------------------------ files


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    stored, tied = _untied(tensors)
    orders = {name: _order(tensor) for name, tensor in stored.items()}
    content = _apart({name: _dense(tensor, orders[name]) for name, tensor in stored.items()})
    _store(path, content, {**header, "strides": {name: order for name, order in orders.items() if order is not None}, "tied": tied})


def _store(path: Path, content: dict[str, Tensor], header: Mapping[str, Any]) -> str:
    """One safetensors file; returns its checksum."""
    sha256 = _checksum(content, header)
    # safetensors begins with a file of a name of its own; in a folder of ours what a kill leaves of it can be found
    with atomic(path) as temporary, TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        try:
            save_file(content, Path(folder, path.name), metadata={KEY: canonical({**header, "sha256": sha256}).decode()})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        Path(folder, path.name).replace(temporary)
    return sha256


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(canonical({key: value for key, value in header.items() if key != "sha256"}))
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.contiguous().as_strided([tensor.numel()], [1])  # where a dimension of one has another stride, view() would refuse
        hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _content(path: Path, take: Callable[[Any], T]) -> tuple[T, dict[str, Any] | None]:
    """What `take` reads of a safetensors file, and our header where there is one."""
    if not path.is_file():
        raise StateError(f"{path} does not exist; give a run folder or a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            metadata, taken = file.metadata() or {}, take(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path} is torn or is no safetensors file ({error})") from error
    return taken, _header(path, metadata[KEY]) if KEY in metadata else None


def _header(path: Path, text: bytes | str) -> dict[str, Any]:
    try:
        header = parse(text, f"the header of {path}")
    except InputError as error:
        raise StateError(f"{path} was altered: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StateError(f"{path} has another format than this version reads ({FORMAT})")
    return header


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors as they lie in one file, and our header where there is one; its checksum holds."""
    tensors, header = _content(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    if header is not None and header.get("sha256") != _checksum(tensors, header):
        raise StateError(f"{path} was altered: its checksum does not fit its content")
    return tensors, header


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and our header where there is one."""
    tensors, header = _joined(path) if path.suffix == ".json" else _tensors(path)
    if header is None:
        return tensors, None
    if "shard" in header:
        raise StateError(f"{path} is one shard of a checkpoint; give the .json beside it ({path.name.partition('.')[0]}.json)")
    try:
        if "shards" not in header:
            tensors |= {name: _shaped(tensors[name], order) for name, order in header["strides"].items()}
        tensors |= {name: tensors[source] for name, source in header["tied"].items()}
    except MALFORMED as error:
        raise StateError(f"{path} is malformed: {error!r}") from error
    return tensors, header


def _joined(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of all shards, put together as they were."""
    if not path.is_file():
        raise StateError(f"{path} does not exist; give a run folder or a checkpoint")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    header = _header(path, data)
    try:
        fits = header["sha256"] == digest({key: value for key, value in header.items() if key != "sha256"}) and canonical(header) == data
    except MALFORMED as error:
        raise StateError(f"{path} is no checkpoint, or was altered: {error!r}") from error
    if not fits:
        raise StateError(f"{path} was altered: its checksum does not fit its content")
    try:
        pieces: dict[str, list[_Piece]] = {}
        for index, listed in enumerate(header["shards"]):
            for name, piece in _shard(path, header, index, listed).items():
                pieces.setdefault(name, []).append(piece)
        whole = {name: _whole(found, header["strides"].get(name)) for name, found in pieces.items()}
        if _layout(whole, header["tied"]) != header["layout"]:
            raise ValueError("the shards do not make the state that was saved")
    except StateError:
        raise
    except MALFORMED as error:
        raise StateError(f"{path} is malformed: {error!r}") from error
    return whole, header


class _Piece(NamedTuple):
    """Rows of a tensor (None: all), from the memory of one rank."""

    rows: list[int] | None
    order: list[int] | None
    dense: Tensor


def _shard(path: Path, commit: Mapping[str, Any], index: int, listed: Mapping[str, Any]) -> dict[str, _Piece]:
    """What one shard holds; refused unless it is what the JSON lists."""
    count = len(commit["shards"])
    file = path.with_name(listed["file"])  # refuses a name with a folder
    if not file.name.startswith(f"{path.stem}."):
        raise ValueError(f"{file.name!r} is no name of a shard")
    if not file.is_file():
        raise StateError(f"{file} is missing, but {path.name} lists it; copy all files of a checkpoint, or go on from another one")
    tensors, header = _tensors(file)
    if header is None or header.get("shard") != [index, count]:
        raise StateError(f"{file} is not shard {index} of {count}, as which {path.name} lists it")
    if header["position"] != commit["position"]:
        raise StateError(f"{file} is of {_spell(header['position'])}, but {path.name} of {_spell(commit['position'])}")
    if header["sha256"] != listed["sha256"] or file.stat().st_size != listed["bytes"]:
        raise StateError(f"{file} was altered or replaced after {path.name} was written")
    return {name: _Piece(header["rows"].get(name), header["strides"].get(name), dense) for name, dense in tensors.items()}


def _whole(pieces: Sequence[_Piece], order: list[int] | None) -> Tensor:
    """One tensor of its rows, in the memory order that it has on rank 0; a rank on another device may have another."""
    if len(pieces) == 1 and pieces[0].rows is None and pieces[0].order == order:
        return _shaped(pieces[0].dense, order)
    parts = sorted((((rows or [0])[0], _shaped(dense, its)) for rows, its, dense in pieces), key=lambda part: part[0])
    end = 0
    for first, part in parts:
        if first != end:
            raise ValueError(f"rows {end} to {first} of a tensor are in no shard, or in two")
        end += len(part)
    shape = [end, *parts[0][1].shape[1:]]
    whole = _shaped(torch.empty([shape[dimension] for dimension in order or range(len(shape))], dtype=parts[0][1].dtype), order)
    for first, part in parts:
        whole[first : first + len(part)] = part
    return whole


def _spell(position: Any) -> str:
    return f"step {position[0]}" if isinstance(position, list) and position else f"no step ({position!r})"
