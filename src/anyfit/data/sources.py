"""Sources: files, arrays, torch data sets and the digits that scikit-learn ships become rows, by split."""

from __future__ import annotations

import collections
import gzip
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from anyfit.data import frames
from anyfit.data.blocks import Blocks, hold, odd_of, with_odd
from anyfit.data.files import Files, expand, kind_of, plain_column, plain_type, without_words
from anyfit.data.folders import SPLITS, ImageFiles, decoded, open_folder
from anyfit.data.hashes import image_column, row_hashes
from anyfit.data.stream import Stream
from anyfit.errors import DataError
from anyfit.schema import ColumnType
from anyfit.tree import leaves, map_tensors
from anyfit.values import without_secrets

__all__ = ["Rows", "Source", "fingerprint", "num_rows"]

# A table goes through schema, statistics and build_dataset; tensors (a tuple or dict whose first dimensions agree), a torch
# Dataset and a DataLoader are what they are.
Rows = Any


@dataclass(frozen=True)
class Source:
    """Where rows come from, and what is known of their columns.

    `origin`: a path, pattern, URL or list of them (CSV, TSV, JSON lines, Parquet, Feather, text, gzip or zstd on top; IDX; a folder
    or zip of images or texts; a saved Hugging Face data set), a database URL, "digits", a pyarrow table or what gives one (pandas,
    polars, `datasets`), a `Stream`, arrays or tensors as a tuple or dict, a torch Dataset or a DataLoader.

    `target`: the column to learn, or several. `group` keeps rows of one value in one split; `split` names a column of train,
    validation, test; `weight` one of sample weights. `types` forces semantic types; a column of names forced to image is read.
    `missing`: further words for a missing value. `size`: (height, width) that images are brought to.
    """

    origin: Any
    target: str | Sequence[str] | None = None
    group: str | None = None
    split: str | None = None
    ignore: Sequence[str] = ()
    types: Mapping[str, ColumnType] = field(default_factory=dict)
    weight: str | None = None
    missing: Sequence[str] = ()
    delimiter: str | None = None
    encoding: str | None = None
    table: str | None = None
    query: str | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, origin: Any, target: str | None = None) -> Source:
        """A source as it is, or made from what a user gives."""
        if isinstance(origin, Source):
            return origin if target is None else Source(**{**origin.__dict__, "target": target})
        return cls(origin, target)

    @property
    def name(self) -> str:
        """A short name for records."""
        origin = self.origin
        if isinstance(origin, str | os.PathLike):
            return _hidden(str(origin))
        if _are_paths(origin):
            return f"{len(origin)} files from {_hidden(str(origin[0]))}"
        if isinstance(origin, DataLoader):
            return "DataLoader"
        rows = num_rows(origin)
        return type(origin).__name__ if rows is None else f"{type(origin).__name__} of {rows} rows"

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the target columns that were given."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target or ())

    def read(self) -> dict[str, Rows]:
        """Rows by split: always `train`; more where the origin has them (the IDX files or the folders of a folder, a DatasetDict)."""
        origin = self.origin
        if self.size is not None and (len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.size)):
            raise DataError(f"size (={self.size!r}) must be (height, width) in pixels, e.g. size=(64, 64)")
        if isinstance(origin, str | os.PathLike) or _are_paths(origin):
            read = self._read_paths(origin)
        elif isinstance(origin, pa.Table | pa.RecordBatch):
            read = {"train": pa.table(origin)}
        elif isinstance(origin, TensorDataset):
            read = {"train": _tensors(origin.tensors)}
        elif (found := frames.tables_of(origin)) is not None:
            read = dict(found)
        elif isinstance(origin, Stream | Blocks | Dataset | DataLoader):
            read = {"train": origin}
        elif isinstance(origin, tuple | Mapping) and origin:
            read = {"train": _tensors(origin)}
        elif hasattr(origin, "__getitem__") and hasattr(origin, "__len__") and not isinstance(origin, list | tuple | Mapping):
            read = {"train": origin}
        else:
            raise DataError(
                f"data (a {type(origin).__name__}) is no source; give a path, 'digits', a table or data frame, a tuple or dict of arrays, "
                "a torch Dataset, a DataLoader, or rows that come one by one as anyfit.Stream(rows)"
            )
        return {split: self._checked(rows, self.name) for split, rows in read.items()}

    def _read_paths(self, origin: Any) -> dict[str, Rows]:
        """Whatever a path, a list of them, a URL or a pattern means."""
        text = str(origin) if isinstance(origin, str | os.PathLike) else str(origin[0])
        if text == "digits":
            return {"train": _digits()}
        if self.table is not None or self.query is not None or _is_database(text):
            from anyfit.data.sql import read_sql

            return {"train": hold(_Database(lambda: read_sql(text, table=self.table, query=self.query), self.missing), self.name)}
        paths = expand(origin)
        place = Path(paths[0])
        if len(paths) == 1 and place.is_dir():
            return self._read_folder(place)
        if len(paths) == 1 and place.suffix.lower() == ".zip":
            return self._read_files_of(place)
        if len(paths) == 1 and kind_of(place.name) is None and ("-ubyte" in place.name or "idx" in place.name):
            return {"train": _idx_table(place, _labels_beside(place))}
        return {"train": hold(Files(paths, self.delimiter, self.encoding, self.missing), self.name)}

    def _read_folder(self, folder: Path) -> dict[str, Rows]:
        if any(folder.glob("*images*ubyte*")):
            return _read_idx_folder(folder)
        if frames.is_saved(folder):
            return dict(frames.saved(folder))
        visible = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        tables = sorted(str(path) for path in visible if kind_of(path.name) not in (None, "text"))
        if tables:
            return {
                split: hold(Files(paths, self.delimiter, self.encoding, self.missing), str(folder))
                for split, paths in _by_split(tables).items()
            }
        return self._read_files_of(folder)

    def _read_files_of(self, path: Path) -> dict[str, Rows]:
        folder = open_folder(path)
        return {split: hold(ImageFiles(folder, split, self.size, self.encoding), str(path)) for split in folder.files}

    def _checked(self, rows: Rows, name: str) -> Rows:
        if not isinstance(rows, pa.Table | Blocks):
            return rows
        if rows.num_rows == 0:
            raise DataError(f"data (={name!r}) has no rows; give a source with at least one")
        twice = sorted(column for column, count in collections.Counter(rows.column_names).items() if count > 1)
        if twice:
            raise DataError(f"column {twice[0]!r} stands twice in {name}; rename one of them")
        if isinstance(rows, pa.Table):
            for index, entry in enumerate(rows.schema):  # a column's values, not how they are stored
                if (plain := plain_type(entry.type)) is not entry.type:
                    rows = rows.set_column(index, entry.name, plain_column(rows.column(index), plain))
            rows = without_words(rows, self.missing)
            rows = with_odd(rows, odd_of(rows))
        named = (("target", target) for target in self.targets)
        others = (("group", self.group), ("split", self.split), ("weight", self.weight), *(("ignore", c) for c in self.ignore))
        for what, column in (*named, *others):
            if column is not None and column not in rows.column_names:
                raise DataError(f"{what} (={column!r}) is not a column of {name}; the columns are: {', '.join(rows.column_names)}")
        return self._with_images(rows, name)

    def _with_images(self, rows: Rows, name: str) -> Rows:
        """Columns of file names that are forced to be images, read; names are relative to the table's folder."""
        for column in [column for column, kind in self.types.items() if kind == "image" and column in rows.column_names]:
            if not pa.types.is_string(rows.schema.field(column).type):
                continue
            if isinstance(rows, Blocks):
                raise DataError(f"column {column!r} of {name} names images, but the table is too large to be held; give a folder of images")
            base = Path(self.origin).parent if isinstance(self.origin, str | os.PathLike) else Path()
            files = [word if word is None else str(base / word) for word in rows[column].to_pylist()]
            lacking = next((place for place, word in enumerate(files) if word is None or not Path(word).is_file()), None)
            if lacking is not None:
                raise DataError(
                    f"column {column!r} of {name} names the image {files[lacking]!r} in row {lacking + 1}, which does not exist"
                )
            pixels = decoded([(str(word), Path(str(word)).read_bytes()) for word in files], self.size)
            rows = rows.set_column(rows.column_names.index(column), column, image_column(pixels))
        return rows


@dataclass
class _Database:
    """A query that is read from the start as often as asked; nothing is kept for the next time."""

    read: Callable[[], Iterator[pa.RecordBatch]]
    missing: Sequence[str] = ()
    types: dict[str, pa.DataType] = field(default_factory=dict)

    def identity(self) -> None:
        return None

    def batches(self) -> Iterator[pa.RecordBatch]:
        return (without_words(batch, self.missing) for batch in self.read())


def _by_split(paths: list[str]) -> dict[str, list[str]]:
    """Files whose names all begin with a split (train.csv, test-00000-of-00001.parquet) are those splits; else all are to train on."""
    words = {path: re.match(r"[a-z]*", Path(path).name.lower())[0] for path in paths}  # type: ignore[index]
    if not all(word in SPLITS for word in words.values()) or "train" not in {SPLITS[word] for word in words.values()}:
        return {"train": paths}
    result: dict[str, list[str]] = {}
    for path, word in words.items():
        result.setdefault(SPLITS[word], []).append(path)
    return result


FILE_SYSTEMS = ("http", "https", "s3", "gs", "gcs", "file", "hdfs")


def _is_database(text: str) -> bool:
    scheme, colon, _ = text.partition("://")
    return bool(colon) and scheme not in FILE_SYSTEMS


def _hidden(text: str) -> str:
    """A URL without its password, and without what its query says."""
    if not _is_database(text):
        return without_secrets(text)
    from anyfit.data.sql import hidden

    return hidden(text)


def _are_paths(origin: Any) -> bool:
    return isinstance(origin, list | tuple) and bool(origin) and all(isinstance(item, str | os.PathLike) for item in origin)


def _digits() -> pa.Table:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.ascontiguousarray(digits.images.astype(np.uint8)[:, None])
    return pa.table({"image": image_column(images), "target": pa.array(digits.target)})


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The IDX format: two zero bytes, the type, the number of dimensions, their sizes (big-endian), the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
        zero, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if zero != 0 or kind != 8:
            raise ValueError("it does not start as an IDX file of unsigned bytes does")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"data (={str(path)!r}) cannot be read as IDX: {error}") from error


def _labels_beside(images: Path) -> Path:
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == images or not labels.exists():
        raise DataError(f"data (={str(images)!r}) has no labels beside it; expected {labels.name} in the same folder")
    return labels


def _idx_table(images: Path, labels: Path) -> pa.Table:
    pixels, targets = _read_idx(images), _read_idx(labels)
    if pixels.ndim not in (3, 4) or targets.ndim != 1 or len(pixels) != len(targets):
        raise DataError(f"{images.name} {pixels.shape} and {labels.name} {targets.shape} do not belong together")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    return pa.table({"image": image_column(pixels), "target": pa.array(targets.astype(np.int64))})


def _read_idx_folder(folder: Path) -> dict[str, Rows]:
    result: dict[str, Rows] = {}
    for images in sorted(folder.glob("*images*ubyte*")):
        split = "test" if images.name.startswith(("t10k", "test")) else "train"
        if split in result:
            raise DataError(f"data (={str(folder)!r}) has two sets of {split} images; keep one, packed or unpacked")
        result[split] = _idx_table(images, _labels_beside(images))
    if "train" not in result:
        raise DataError(f"data (={str(folder)!r}) holds no *images*ubyte* files to train on; give the folder of the four IDX files")
    return result


def _tensors(arrays: Iterable[Any] | Mapping[str, Any]) -> Any:
    """A tuple or dict of tensors whose first dimensions agree."""

    def convert(value: Any) -> Tensor:
        try:
            # torch has no read-only tensors: what cannot be written to is copied
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except TypeError as error:
            raise DataError(f"data holds an array of {getattr(value, 'dtype', type(value).__name__)}; arrays must be of numbers") from error
        if tensor.dim() == 0:
            raise DataError("data holds a single number; arrays need rows in their first dimension")
        return tensor

    tree = {name: convert(value) for name, value in arrays.items()} if isinstance(arrays, Mapping) else tuple(map(convert, arrays))
    sizes = [leaf.shape[0] for leaf in leaves(tree)]
    if len(set(sizes)) != 1:
        raise DataError(f"arrays have {', '.join(map(str, sizes))} rows; they must agree")
    if sizes[0] == 0:
        raise DataError("arrays have no rows; give at least one")
    return tree


def num_rows(rows: Rows) -> int | None:
    """How many rows; None where it cannot be known."""
    if isinstance(rows, pa.Table | Blocks):
        return int(rows.num_rows)
    if isinstance(rows, DataLoader):
        return num_rows(rows.dataset)
    if isinstance(rows, IterableDataset | Stream):
        return None
    if isinstance(rows, tuple | Mapping):
        for leaf in leaves(map_tensors(lambda tensor: tensor, rows)):
            return int(leaf.shape[0])
        return len(next(iter(rows.values() if isinstance(rows, Mapping) else rows)))
    return len(rows) if hasattr(rows, "__len__") else None


def fingerprint(rows: Rows) -> str:
    """SHA-256 that tells whether these are the same rows in the same order (a Dataset: its type, length and three samples)."""
    hasher = hashlib.sha256()
    if isinstance(rows, pa.Table):
        hasher.update(str(rows.schema.names).encode())
        hasher.update(row_hashes(rows).data)  # of the values: neither chunks nor dictionaries are seen
        return hasher.hexdigest()
    if isinstance(rows, Blocks | Stream):
        return rows.sha256
    if isinstance(rows, DataLoader):
        rows = rows.dataset
    if isinstance(rows, IterableDataset):
        return hashlib.sha256(type(rows).__qualname__.encode()).hexdigest()
    if isinstance(rows, tuple | Mapping):
        parts: list[Any] = [rows]
    else:
        count = len(rows)
        hasher.update(f"{type(rows).__qualname__} {count}".encode())
        parts = [rows[index] for index in sorted({0, count // 2, count - 1}) if count] if _is_stable(rows) else []
    for tensor in leaves(parts):
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _is_stable(rows: Any) -> bool:
    """Whether a sample can be looked at without moving anything: reading it twice gives the same, and no random number is drawn."""
    before = torch.get_rng_state()
    try:
        first, second = list(leaves(rows[0])), list(leaves(rows[0]))
        drawn = not torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    return not drawn and all(torch.equal(a, b) for a, b in zip(first, second, strict=False))
