"""Updating only the rows of a table of word vectors that training can touch. The mathematics is that of the whole table.

A row that no training text names has no gradient and no moments, ever: AdamW only decays it. So the optimizer is given the rows in
use as a parameter of their own, and the others are decayed beside. Whoever looks at model or optimizers sees the whole table:
`leave` puts everything back, `enter` takes the rows out again. V rows of D numbers, U of them in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from anyfit.errors import DataError, TaskError

__all__ = ["UsedRows", "used_rows"]

WORTH = 0.9  # share of rows in use up to which it pays
SMALLEST = 1 << 16  # numbers in a table below which it does not
HOOKS = (  # where torch keeps them
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_post_accumulate_grad_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)


class UsedRows:
    """One table: `swap(old, new)` is told when the parameter that trains changes."""

    def __init__(self, table: nn.Embedding, used: Tensor, optimizer: Optimizer, swap: Callable[[nn.Parameter, nn.Parameter], None]) -> None:
        self.table, self.optimizer, self._swap = table, optimizer, swap
        self.rows = used.nonzero().squeeze(1)
        self.others = (~used).nonzero().squeeze(1)
        self.places = torch.full((len(used),), -1)
        self.places[self.rows] = torch.arange(len(self.rows))
        self.small = nn.Parameter(table.weight.detach()[self.rows].clone())
        self.rest = table.weight.detach()[self.others]
        self.inside = False
        padding = table.padding_idx
        self._padding = None if padding is None or not bool(used[padding]) else int(self.places[padding])
        self._group = next(group for group in optimizer.param_groups if any(p is table.weight for p in group["params"]))
        self._decays = isinstance(optimizer, AdamW)

    def _forward(self, ids: Tensor) -> Tensor:
        try:  # index_select, as an index would take a negative id for one from the end
            places = self.places.index_select(0, ids.flatten()).view(ids.shape)
            return nn.functional.embedding(places, self.small, self._padding)
        except IndexError as error:
            rows = len(self.places)
            odd = next(i for i in ids.flatten().tolist() if not 0 <= i < rows or self.places[i] < 0)
            if not 0 <= odd < rows:
                raise DataError(f"id {odd} is outside of the {rows} rows of the table that it is looked up in") from error
            raise DataError(
                f"id {odd} is looked up in training, but no training text holds it, so its row is not trained; "
                "train all rows (used_rows=False), or name the id in the model's lookups()"
            ) from error

    def enter(self) -> None:
        """Train the rows in use alone."""
        if self.inside:
            return
        with torch.no_grad():
            torch.index_select(self.table.weight.detach(), 0, self.rows, out=self.small.detach())
            if self._decays:  # even by nothing, for a schedule may change that
                torch.index_select(self.table.weight.detach(), 0, self.others, out=self.rest)
        self._move(self.table.weight, self.small, lambda whole: whole[self.rows])
        self.table.forward = self._forward  # type: ignore[method-assign,assignment]
        self._hook = self.optimizer.register_step_pre_hook(self._decay)
        self.inside = True

    def leave(self) -> None:
        """Put the rows, their moments and the decayed others back."""
        if not self.inside:
            return
        with torch.no_grad():
            self.table.weight.index_copy_(0, self.rows, self.small.detach())
            if self._decays:
                self.table.weight.index_copy_(0, self.others, self.rest)
        self._move(self.small, self.table.weight, self._whole)
        del self.table.forward
        self._hook.remove()
        self.inside = False

    def _whole(self, part: Tensor) -> Tensor:
        return part.new_zeros(self.table.weight.shape).index_copy_(0, self.rows, part)

    def _move(self, old: Any, new: Any, convert: Callable[[Tensor], Tensor]) -> None:
        """Hand group, state and gradient of one parameter to the other."""
        self._group["params"] = [new if parameter is old else parameter for parameter in self._group["params"]]
        states = dict(self.optimizer.state)  # refilled in its order, which a checkpoint keeps
        self.optimizer.state.clear()
        for parameter, state in states.items():
            if parameter is old:
                state = {k: convert(v) if isinstance(v, Tensor) and v.shape == old.shape else v for k, v in state.items()}  # noqa: PLW2901
            self.optimizer.state[new if parameter is old else parameter] = state
        old.grad = None
        self._swap(old, new)

    def _decay(self, optimizer: Optimizer, *_: Any) -> None:
        """Decay the rows that the optimizer does not see. A step that fp16 skips for its infinities decays nothing either."""
        skipped = getattr(optimizer, "found_inf", None)
        if self._decays and self._group["weight_decay"] and not (skipped is not None and bool(skipped)):
            self.rest.mul_(1.0 - self._group["lr"] * self._group["weight_decay"])

    def stepped(self) -> None:
        """Refuse a gradient that went past the rows in use; called before each step of the optimizer."""
        if self.table.weight.grad is not None:
            raise TaskError(
                "the loss reads the whole table of word vectors beside looking words up in it, so all rows must train; pass used_rows=False"
            )


def used_rows(
    model: nn.Module, columns: Mapping[str, Any], optimizers: Mapping[str, Optimizer], swap: Callable[[nn.Parameter, nn.Parameter], None]
) -> list[UsedRows]:
    """For each table that the model's `lookups()` names, where too few rows are in use and the mathematics stays the same.

    `lookups()`: a column of the batch -> the table that it indexes, and ids that are looked up though no text holds them.
    `columns`: the training data as flat sequences (`values`, `padding`).
    """
    lookups = getattr(model, "lookups", None)
    if lookups is None:
        return []
    result: list[UsedRows] = []
    names = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, (table, extra) in lookups().items():
        weight, column = table.weight, columns.get(name)
        if column is None or not hasattr(column, "padding") or not _plain(table) or sum(p is weight for p in names) != 1:
            continue
        owners = [optimizer for optimizer in optimizers.values() if any(p is weight for g in optimizer.param_groups for p in g["params"])]
        if len(owners) != 1 or not _same(owners[0], weight) or _heard(owners[0]):
            continue
        used = torch.bincount(column.values, minlength=len(weight)) > 0
        used[torch.tensor([column.padding, *extra])] = True
        if len(used) != len(weight) or float(used.double().mean()) > WORTH or weight.numel() < SMALLEST:
            continue
        state = owners[0].state.get(weight, {})
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape]
        if all(not bool(value[~used].any()) for value in moments):
            result.append(UsedRows(table, used, owners[0], swap))
    return result


def _plain(table: nn.Embedding) -> bool:
    return (
        type(table) is nn.Embedding
        and table.weight.requires_grad
        and table.weight.device.type == "cpu"
        and not table.sparse
        and table.max_norm is None
        and not table.scale_grad_by_freq
        and "forward" not in vars(table)
        and not any(_heard(thing) for thing in (table, table.weight))
    )


def _heard(thing: object) -> bool:
    """Whether hooks hang at a module, a parameter or an optimizer: they would see other parameters."""
    return any(getattr(thing, name, None) for name in HOOKS)


def _same(optimizer: Optimizer, weight: nn.Parameter) -> bool:
    """Whether a row without gradient and moments stays as it is, or is decayed by a factor alone."""
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    return type(optimizer) is AdamW or (type(optimizer) in (Adam, SGD) and not group["weight_decay"])
