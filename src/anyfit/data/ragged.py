"""Sequences of different lengths held as flat arrays, and their batches: padded to the longest of each batch, by length if asked.

N sequences, B of one batch, T the longest of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyfit.data.batches import CHUNK_BYTES, CHUNK_STEPS, Indexed, Piece, Share
from anyfit.errors import DataError

if TYPE_CHECKING:
    from anyfit.state import Position
    from anyfit.values import Plan

__all__ = ["LENGTHS", "Ragged", "RaggedBatches", "packed"]

LENGTHS = "lengths"  # the key under which a batch says how many values of each row are real


class Ragged:
    """`values` (all numbers, one row after the other) and `offsets` (N + 1,); `padding` fills up shorter rows."""

    def __init__(self, values: Tensor, offsets: Tensor, padding: int = 0) -> None:
        if offsets.dim() != 1 or len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(values):
            raise DataError(f"offsets (={tuple(offsets.shape)}) must run from 0 to the {len(values)} values")
        self.values, self.offsets, self.padding = values, offsets, padding
        self.lengths = offsets.diff()
        if bool((self.lengths < 0).any()):
            raise DataError("offsets must not fall")

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], padding: int = 0) -> Ragged:
        """From lists of numbers."""
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor([len(row) for row in rows], dtype=torch.int64), 0, out=offsets[1:])
        values = torch.tensor([value for row in rows for value in row], dtype=torch.int32)
        return cls(values, offsets, padding)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, indices: Tensor) -> Tensor:
        """(B, T) int64 of some rows."""
        lengths = self.lengths[indices]
        width = max(1, int(lengths.max())) if len(indices) else 1
        steps = torch.arange(width)
        places = (self.offsets[indices][:, None] + steps).clamp_(max=max(0, len(self.values) - 1))
        if not len(self.values):
            return torch.full((len(indices), width), self.padding)
        return torch.where(steps < lengths[:, None], self.values[places].to(torch.int64), self.padding)


class RaggedBatches(Indexed):
    """A dict of `Ragged` and tensors: one gather for many batches, each cut to its longest row; `lengths` (B,) beside."""

    def __init__(self, columns: Mapping[str, Any], plan: Plan, **options: Any) -> None:
        ragged = next(value for value in columns.values() if isinstance(value, Ragged))
        sizes = {len(value) for value in columns.values()}
        if len(sizes) != 1:
            raise DataError(f"columns of a data set have {', '.join(map(str, sorted(sizes)))} rows; they must agree")
        self.columns = dict(columns)
        super().__init__(len(ragged), plan, lengths=lambda: ragged.lengths, **options)
        self._real_lengths = ragged.lengths  # 0 for an empty row
        longest = sum(int(value.lengths.max()) for value in columns.values() if isinstance(value, Ragged))
        self._chunk_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(1, 8 * longest * self.step_size)))
        self._chunk: tuple[int, int] = (-1, -1)
        self._views: list[list[Any]] = []

    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        if share is not None or self._packs is not None:
            return super().window(position, share)
        chunk = (position.epoch, position.offset // self._chunk_steps)
        if chunk != self._chunk:
            assert self.rows is not None
            first = chunk[1] * self._chunk_steps * self.step_size
            last = min(self.rows, first + self._chunk_steps * self.step_size)
            batches = self._gather(self.order(position.epoch)[first:last], self.batch_size)
            per_step = -(-self.step_size // self.batch_size)
            self._chunk, self._views = chunk, [batches[index : index + per_step] for index in range(0, len(batches), per_step)]
        window = self._views[position.offset % self._chunk_steps]
        return window if self._augment is None else self._augment_all(window, position.epoch, position.offset * self.step_size)

    def _augment_all(self, window: list[Any], epoch: int, start: int) -> list[Any]:
        return [self._augmented(batch, epoch, start + index * self.batch_size) for index, batch in enumerate(window)]

    def _read(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        if not pieces:
            return []
        order = self.order(position.epoch)
        if self._packs is not None:  # each by itself: padding to the longest of all would burst the budget
            return [self.batch_of(order[start:stop]) for start, stop in pieces]
        return self._gather(order[pieces[0][0] : pieces[-1][1]], pieces[0][1] - pieces[0][0])

    def _gather(self, indices: Tensor, size: int) -> list[dict[str, Tensor]]:
        """Batches of `size` of the given rows in their order."""
        if not len(indices):
            return []
        lengths = self._real_lengths[indices]
        whole = {
            name: value.padded(indices) if isinstance(value, Ragged) else value.index_select(0, indices.to(value.device))
            for name, value in self.columns.items()
        }
        whole = self._finish({**whole, LENGTHS: lengths})
        parts = {name: value.split(size) for name, value in whole.items()}
        for name, value in self.columns.items():
            if isinstance(value, Ragged):
                widths = [max(1, int(part.max())) for part in value.lengths[indices].split(size)]  # type: ignore[no-untyped-call]
                parts[name] = [part[:, :width] for part, width in zip(parts[name], widths, strict=True)]
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def batch_of(self, indices: Tensor) -> Any:
        """One batch of some rows, (B,) indices, on the device."""
        return self._gather(indices, len(indices))[0]

    def part(self, index: int, count: int) -> Iterator[Any]:
        for start, stop in self._in_order()[index::count]:
            yield self.batch_of(torch.arange(start, stop))


def packed(rows: Ragged, length: int, separator: int | None = None) -> Ragged:
    """All sequences one after the other, cut into rows of `length`: for language models, where padding is waste.

    `separator` stands between two sequences. The last, shorter row stays.
    """
    if length < 1:
        raise DataError(f"length (={length}) of packed rows must be at least 1")
    values = rows.values
    if separator is not None and len(rows):
        places = torch.arange(len(values)) + torch.repeat_interleave(torch.arange(len(rows)), rows.lengths)
        joined = torch.full((len(values) + len(rows),), separator, dtype=values.dtype)
        joined[places] = values
        values = joined
    offsets = torch.arange(0, len(values) + length, length).clamp_(max=len(values)).unique()  # type: ignore[no-untyped-call]
    return Ragged(values, offsets if len(values) else torch.zeros(1, dtype=torch.int64), rows.padding)
