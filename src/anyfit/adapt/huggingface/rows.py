"""Data sets of dicts and collators as the engine takes them: whole batches by index, token columns read once where that can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from anyfit.data import Ragged
from anyfit.errors import DataError
from anyfit.tree import map_tensors

__all__ = ["Collate", "Collated", "TokenRows", "collated", "read_once", "rows_of"]

Collate = Callable[[list[Any]], Any]
RENAMED = {"label", "label_ids"}  # collators call them labels


def rows_of(dataset: Any, collator: Collate, wanted: frozenset[str] | None) -> Any:
    """A data set as the engine takes it; columns that are not `wanted` (None: all are) are left out."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return _Stream(dataset)
    columns = getattr(dataset, "column_names", None)
    if wanted is not None and isinstance(columns, list):
        unused = [name for name in columns if name not in wanted | RENAMED]
        if len(unused) == len(columns):
            raise DataError(
                f"columns (={', '.join(columns)}) hold nothing that the model's forward takes ({', '.join(sorted(wanted))}); "
                "tokenize the data set first, or pass remove_unused_columns=False"
            )
        dataset = dataset.remove_columns(unused)
    return read_once(Collated(dataset, collator, wanted))


def collated(samples: Any, collator: Collate, wanted: frozenset[str] | None) -> Any:
    """Samples -> a plain dict of what the model takes. What is a batch already stays one."""
    if isinstance(samples, Mapping):
        return samples
    if wanted is not None:
        kept = wanted | RENAMED
        samples = [{k: v for k, v in sample.items() if k in kept} if isinstance(sample, Mapping) else sample for sample in samples]
    batch = collator(samples)
    if not isinstance(batch, Mapping):
        raise DataError(f"data_collator gave a {type(batch).__name__}; it must give a dict of tensors")
    return {name: value for name, value in batch.items() if wanted is None or name in wanted}


class Collated(Dataset[Any]):
    """A data set of dicts that fetches whole batches by its collator."""

    order: Callable[[int], Sequence[int]] | None = None
    lengths: Any = None  # (N,) where they are known

    def __init__(self, dataset: Any, collator: Collate, wanted: frozenset[str] | None) -> None:
        self.dataset, self.collator, self.wanted = dataset, collator, wanted

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            samples = list(self.dataset.__getitems__(indices))
        else:
            samples = [self.dataset[index] for index in indices]
        return collated(samples, self.collator, self.wanted)

    def __getitem__(self, index: int) -> Any:
        return map_tensors(lambda tensor: tensor[0], self.__getitems__([index]))

    def as_they_stand(self, epoch: int) -> range:
        """An order for every epoch: none."""
        return range(len(self))


class TokenRows(Collated):
    """Token columns in flat arrays: what the collator gives, without dicts of lists."""

    def __init__(self, rows: Collated, tokens: dict[str, Ragged], numbers: dict[str, Tensor]) -> None:
        super().__init__(rows.dataset, rows.collator, rows.wanted)
        columns: dict[str, Ragged | Tensor] = {**tokens, **numbers}
        self.columns = {name: column for name, column in columns.items() if rows.wanted is None or name in rows.wanted}
        self.lengths = tokens["input_ids"].lengths

    def __getitems__(self, indices: list[int]) -> Any:
        places = torch.tensor(indices)
        return {name: rows.padded(places) if isinstance(rows, Ragged) else rows[places] for name, rows in self.columns.items()}


class _Stream(IterableDataset[Any]):
    """Samples that come one by one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


def read_once(rows: Collated) -> Collated:
    """The same rows read once, where columns and collator are plain; the collator's own batches of a few rows decide."""
    dataset: Any = rows.dataset
    collator: Any = rows.collator
    plain = type(collator).__name__ == "DataCollatorWithPadding" and type(collator).__module__.startswith("transformers.")
    if not plain or collator.padding not in (True, "longest") or collator.pad_to_multiple_of is not None:
        return rows
    if not hasattr(dataset, "with_format") or dataset.format["type"] not in (None, "torch", "numpy") or not len(dataset):
        return rows
    found = _columns(dataset.with_format("arrow")[:], collator.tokenizer)
    if found is None:
        return rows
    fast = TokenRows(rows, *found)
    tried = sorted({0, len(fast) - 1, int(fast.lengths.argmin()), int(fast.lengths.argmax())})
    mine, given = fast.__getitems__(tried), rows.__getitems__(tried)
    same = set(mine) == set(given) and all(mine[name].dtype == given[name].dtype and mine[name].equal(given[name]) for name in mine)
    return fast if same else rows


def _columns(table: pa.Table, tokenizer: Any) -> tuple[dict[str, Ragged], dict[str, Tensor]] | None:
    """Token columns and columns of one number; None where there are others, or values are missing."""
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    tokens: dict[str, Ragged] = {}
    numbers: dict[str, Tensor] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        whole = pa.types.is_integer(kind)
        if column.null_count:
            return None
        if pa.types.is_list(kind) and fills.get(name) is not None:
            flat, sizes = column.combine_chunks().flatten(), np.diff(column.combine_chunks().offsets.to_numpy())
            if flat.null_count or not pa.types.is_integer(flat.type):
                return None
            offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))))
            tokens[name] = Ragged(torch.from_numpy(flat.to_numpy().copy()), offsets, fills[name])
        elif whole or pa.types.is_floating(kind):
            numbers["labels" if name in RENAMED else name] = torch.from_numpy(column.to_numpy().astype(np.int64 if whole else np.float32))
        else:
            return None
    ids = tokens.get("input_ids")
    if ids is None or not all(rows.offsets.equal(ids.offsets) for rows in tokens.values()):
        return None
    if "attention_mask" in tokenizer.model_input_names and "attention_mask" not in tokens:  # the collator adds one
        tokens["attention_mask"] = Ragged(torch.ones_like(ids.values), ids.offsets)
    return tokens, numbers
