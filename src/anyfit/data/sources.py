"""Sources: files, arrays, torch data sets and the digits that scikit-learn ships become rows, by split."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from anyfit.data.hashes import row_hashes
from anyfit.errors import DataError
from anyfit.schema import ColumnType
from anyfit.tree import leaves, map_tensors

__all__ = ["Rows", "Source", "fingerprint", "num_rows"]

# A table goes through schema, statistics and build_dataset; tensors (a tuple or dict whose first dimensions agree), a torch
# Dataset and a DataLoader are what they are.
Rows = Any

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where rows come from, and what is known of their columns.

    `origin`: a path (CSV, TSV, Parquet, IDX file or folder), "digits", a pyarrow table, arrays or tensors as a tuple or dict, a
    torch Dataset or a DataLoader. `group` keeps rows of one value in one split; `split` names a column of train, validation,
    test.
    """

    origin: Any
    target: str | None = None
    group: str | None = None
    split: str | None = None
    ignore: Sequence[str] = ()
    types: Mapping[str, ColumnType] = field(default_factory=dict)

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
            return str(origin)
        return f"{type(origin).__name__} of {num_rows(origin)} rows" if not isinstance(origin, DataLoader) else "DataLoader"

    def read(self) -> dict[str, Rows]:
        """Rows by split: always `train`; more where the origin has them (the four IDX files of a folder)."""
        origin = self.origin
        if isinstance(origin, pa.Table):
            return {"train": self._checked(origin, "table")}
        if isinstance(origin, str | os.PathLike):
            return {split: self._checked(rows, str(origin)) for split, rows in _read_path(origin).items()}
        if isinstance(origin, TensorDataset):
            return {"train": _tensors(origin.tensors)}
        if isinstance(origin, Dataset | DataLoader):
            return {"train": origin}
        if isinstance(origin, tuple | Mapping) and origin:
            return {"train": _tensors(origin)}
        if hasattr(origin, "__getitem__") and hasattr(origin, "__len__") and not isinstance(origin, list | str):
            return {"train": origin}
        raise DataError(
            f"data (a {type(origin).__name__}) is no source; give a path, 'digits', a pyarrow table, a tuple or dict of arrays, "
            "a torch Dataset or a DataLoader"
        )

    def _checked(self, rows: Rows, name: str) -> Rows:
        if not isinstance(rows, pa.Table):
            return rows
        encoded = [entry for entry in rows.schema if pa.types.is_dictionary(entry.type)]
        for entry in encoded:  # a column's values, not how they are stored
            rows = rows.set_column(rows.column_names.index(entry.name), entry.name, rows[entry.name].cast(entry.type.value_type))
        if rows.num_rows == 0:
            raise DataError(f"data (={name!r}) has no rows; give a source with at least one")
        twice = sorted({column for column in rows.column_names if rows.column_names.count(column) > 1})
        if twice:
            raise DataError(f"column {twice[0]!r} stands twice in {name}; rename one of them")
        for what, column in (("target", self.target), ("group", self.group), ("split", self.split), *(("ignore", c) for c in self.ignore)):
            if column is not None and column not in rows.column_names:
                raise DataError(f"{what} (={column!r}) is not a column of {name}; the columns are: {', '.join(rows.column_names)}")
        return rows


def _read_path(path: str | os.PathLike[str]) -> dict[str, Rows]:
    if str(path) == "digits":
        return {"train": _digits()}
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"data (={str(path)!r}) does not exist; give a file, a folder with IDX files, or 'digits'")
    if folder.is_dir():
        return _read_idx_folder(folder)
    name = folder.name.lower()
    if name.endswith(TABLES):
        return {"train": _read_table(folder)}
    if "-ubyte" in name or "idx" in name:
        return {"train": _idx_table(folder, _labels_beside(folder))}
    raise DataError(f"data (={str(path)!r}) is of no known kind; it must end in {', '.join(TABLES)} or be an IDX file or folder")


def _read_table(path: Path) -> pa.Table:
    if path.stat().st_size == 0:
        raise DataError(f"data (={str(path)!r}) is empty; give a file with a header and at least one row")
    try:
        if path.name.lower().endswith(".parquet"):
            return pa.parquet.read_table(path)
        delimiter = "\t" if ".tsv" in path.name.lower() else ","
        table = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(delimiter=delimiter),
            convert_options=pa.csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"data (={str(path)!r}) cannot be read as a table: {error}") from error
    for column in table.schema:
        if pa.types.is_binary(column.type):  # what pyarrow makes of text that is no UTF-8
            raise DataError(
                f"column {column.name!r} of {path} holds text that is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"
            )
    return table


def _digits() -> pa.Table:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.ascontiguousarray(digits.images.astype(np.uint8)[:, None])
    return pa.table({"image": image_column(images), "target": pa.array(digits.target)})


def image_column(pixels: np.ndarray[Any, Any]) -> pa.Array:
    """(N, C, H, W) as a column. (from_numpy_ndarray guesses the shape from strides, which say nothing where a dimension is 1.)"""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(pixels.dtype), pixels.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(pixels).reshape(-1)), int(np.prod(pixels.shape[1:])))
    return pa.ExtensionArray.from_storage(kind, storage)


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
    if isinstance(rows, pa.Table):
        return int(rows.num_rows)
    if isinstance(rows, DataLoader):
        return num_rows(rows.dataset)
    if isinstance(rows, IterableDataset):
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
