"""Nested containers of tensors (dict, list, tuple, named tuple, dataclass): walk, map, and take apart into JSON and tensors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from anyfit.errors import InputError, StateError

__all__ = ["clone", "first_tensor", "leaves", "map_tensors", "pack", "unpack", "wide"]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same structure with `function` applied to each tensor; anything else passes through."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, Mapping):  # a mapping of its own kind (transformers' BatchEncoding) keeps its kind where it can
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        try:
            return type(tree)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        instance: Any = tree
        mapped = copy.copy(instance)  # not replace(): a field may be set by the class itself
        for field in dataclasses.fields(tree):
            object.__setattr__(mapped, field.name, map_tensors(function, getattr(tree, field.name)))
        return mapped
    return tree


def leaves(tree: Any) -> Iterator[Tensor]:
    """Every tensor in the tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name))


def first_tensor(tree: Any) -> Tensor:
    """The first tensor: its first dimension is the batch's size, its device the batch's device."""
    for leaf in leaves(tree):
        return leaf
    raise InputError(f"batch (a {type(tree).__name__}) holds no tensor; make collate return at least one")


def clone(tree: Any) -> Any:
    """A copy that shares no memory with the original; strides (memory format) are kept."""
    return map_tensors(lambda tensor: tensor.detach().clone(memory_format=torch.preserve_format), tree)


def wide(tensor: Tensor) -> Tensor:
    """In float64, or in float32 where the device has no wider type."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def pack(tree: Any, tensors: MutableMapping[str, Tensor], path: str = "") -> Any:
    """Take a tree apart: tensors go into `tensors` under their path, what is returned is JSON that points to them.

    Lists and tuples stay apart, and so do the whole numbers that optimizers use as keys.
    """
    if isinstance(tree, Tensor):
        while path in tensors:  # {"a.b": x} and {"a": {"b": y}} spell alike
            path += "'"
        tensors[path] = tree.detach()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        items = [[key, pack(value, tensors, f"{path}.{key}" if path else str(key))] for key, value in tree.items()]
        for key, _ in items:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise StateError(f"key (={key!r}) in {path or 'the state'} must be text or a whole number to be saved")
        return {"map": items}
    if isinstance(tree, list | tuple):
        return {
            "tuple" if isinstance(tree, tuple) else "list": [pack(value, tensors, f"{path}.{index}") for index, value in enumerate(tree)]
        }
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise StateError(f"{path} (a {type(tree).__name__}) cannot be saved; keep JSON values and tensors in what is checkpointed")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` took apart."""
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {key: unpack(item, tensors) for key, item in value}
    if kind == "float":
        return float(value)
    items = [unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
