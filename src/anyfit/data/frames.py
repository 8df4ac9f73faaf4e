"""Tables of other libraries: pandas, polars and whatever exports Arrow, and Hugging Face `datasets`, in memory or saved."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from anyfit.data.folders import SPLITS, decoded
from anyfit.data.hashes import image_column
from anyfit.errors import DataError, MissingExtra

__all__ = ["is_saved", "saved", "tables_of"]


def tables_of(origin: Any) -> Mapping[str, pa.Table] | None:
    """Tables by split of a data frame or a Hugging Face data set; None for anything else. Nothing is imported for the question."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(origin, datasets.DatasetDict):
        named = {SPLITS.get(str(name).lower()): part for name, part in origin.items()}
        named.pop(None, None)  # imdb's `unsupervised` has no labels: it is no split
        if "train" not in named:
            raise DataError(f"the DatasetDict has no split named train; it has: {', '.join(map(str, origin))}")
        return {str(split): _arrow_of(part) for split, part in named.items()}
    if datasets is not None and isinstance(origin, datasets.Dataset):
        return {"train": _arrow_of(origin)}
    pandas = sys.modules.get("pandas")
    try:
        if pandas is not None and isinstance(origin, pandas.DataFrame):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # pyarrow's ways with pandas, of which nobody here can mend any
                return {"train": pa.Table.from_pandas(origin, preserve_index=False)}
        if hasattr(origin, "__arrow_c_stream__"):
            return {"train": pa.table(origin)}
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"data (a {type(origin).__name__}) cannot become a table: {error}") from error
    return None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made this folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()


def saved(folder: Path) -> Mapping[str, pa.Table]:
    """The tables of a data set that `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hf") from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"data (={str(folder)!r}) cannot be read as a saved data set: {error}") from error
    tables = tables_of(loaded)
    assert tables is not None
    return tables


def _arrow_of(dataset: Any) -> pa.Table:
    """The rows in their order, labels by name and images as pixels."""
    table = dataset.with_format("arrow")[:]
    if not isinstance(table, pa.Table):
        table = pa.table(table)
    for name, feature in dataset.features.items():
        kind, place = type(feature).__name__, table.column_names.index(name)
        if kind == "ClassLabel":
            table = table.set_column(place, name, _named(table[name].combine_chunks(), feature.names))
        elif kind in ("List", "LargeList", "Sequence") and type(feature.feature).__name__ == "ClassLabel":
            lists = table[name].cast(pa.list_(pa.int64())).combine_chunks()
            words = pa.ListArray.from_arrays(lists.offsets, _named(lists.values, feature.feature.names), mask=lists.is_null())
            table = table.set_column(place, name, words)
        elif kind == "Image":
            files = [(f"{name} {row}", _bytes_of(value, name, row)) for row, value in enumerate(table[name].to_pylist())]
            table = table.set_column(place, name, image_column(decoded(files)))
    return table.replace_schema_metadata(None)


def _bytes_of(value: Mapping[str, Any] | None, name: str, row: int) -> bytes:
    if value is None:
        raise DataError(f"image {name!r} is missing in row {row + 1}; drop that row")
    try:
        return bytes(value["bytes"]) if value.get("bytes") is not None else Path(value["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"image {name!r} of row {row + 1} ({value['path']}) cannot be read: {error.strerror or error}") from error


def _named(codes: pa.Array, names: list[str]) -> pa.Array:
    """The names of labels; -1 is none."""
    return pa.array(names, pa.string()).take(pc.if_else(pc.less(codes, 0), None, codes))
