"""Morphs: a trained network becomes another one that starts from what it learnt.

*Exact* ones compute what their parent computes, seen by running both in float64, in evaluation and in training: wider (Net2Wider: copies of
channels, whose readers' weights are divided), deeper (Net2Deeper: identity layers; Chen et al. 2016), kernel, skip, split at full rank.
The others (narrow, drop, replace, split below it) *inherit* what overlaps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from anyfit.errors import InputError, TaskError
from anyfit.program.trace import trace
from anyfit.shrink.channels import Group, counted, difference, doubled, groups, importance, random_batch, trained_by_chance
from anyfit.shrink.opened import open_model, state_of
from anyfit.state import State
from anyfit.task import Task
from anyfit.tasks.edits import CONVOLUTIONS, apply_edits, indices_of, other_kinds
from anyfit.tasks.shrunk import Morphed, Quantized
from anyfit.worker import hash_of

__all__ = [
    "KINDS",
    "Child",
    "grow",
    "morph",
    "morphs",
]

KINDS = ("wider", "deeper", "kernel", "skip", "split", "narrow", "drop", "replace")
TOLERANCE = 1e-12  # relative, in float64
ROWS = 3  # of the batch that parent and child are compared with: batch statistics want several


class Child(NamedTuple):
    """A network made from another one."""

    model: nn.Module
    edits: list[dict[str, Any]]  # what `apply_edits` makes its shape with
    label: str  # "exact" or "inherit"


class _Plan(NamedTuple):
    edits: list[dict[str, Any]]
    exact: bool
    finish: Callable[[nn.Module], None] = lambda model: None  # of weights, after the edits


def morph(
    task: Task, state: Any, edit: str | Mapping[str, Any], layer: str | None = None, *, batch: Any = None, **options: Any
) -> tuple[Task, State]:
    """A child of a trained network: its task, which knows edits and parent, and its state, which shares nothing with the parent's.

    `edit`: one of KINDS with `layer` and options (wider, narrow: width; deeper: kernel, relu, kind; kernel: size; split: rank; replace: kind;
    wider: noise, which tells copies apart, and then it is not exact), or one that `morphs` lists. `batch`: one row without its target, where
    the task knows no example.
    """
    if isinstance(task, Quantized):
        raise TaskError("task is quantized; morph comes before: give the one within (task.task) with the state that it had")
    found = open_model(task, state)
    parent = found.model
    request = {"edit": edit} if isinstance(edit, str) else dict(edit)
    request |= {"layer": layer} if layer is not None else {}
    child = grow(task, parent, found.row() if batch is None else batch, **request, **options)
    before = dict(parent.state_dict())
    morphed = Morphed(task=task, edits=child.edits, label=child.label, parent=hash_of(before))  # type: ignore[arg-type]
    return morphed, state_of(child.model, found)


def grow(task: Task, model: nn.Module, batch: Any, *, edit: str, layer: str, **options: Any) -> Child:
    """A changed copy of a model with weights; `model` stays as it is."""
    if edit not in KINDS:
        raise InputError(f"edit (={edit!r}) must be one of {', '.join(KINDS)}")
    try:
        plan = _PLANS[edit](task, model, batch, layer, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error) and "missing" not in str(error):
            raise
        raise InputError(
            f"edit {edit!r} was given {', '.join(sorted(options)) or 'no options'}: {str(error).partition(') ')[2]}"
        ) from error
    for parent in (trained_by_chance(model), copy.deepcopy(model).double()):
        child = apply_edits(copy.deepcopy(parent), plan.edits)
        plan.finish(child)
        _compare(task, parent, child, batch, plan.exact, f"{edit} of {layer}")
    out = apply_edits(copy.deepcopy(model), plan.edits)  # has the types
    out.load_state_dict(child.state_dict())
    return Child(out, plan.edits, "exact" if plan.exact else "inherit")


def _compare(task: Task, parent: nn.Module, child: nn.Module, batch: Any, exact: bool, what: str) -> None:
    """Refuse a child that does not run, or that computes something else though it must not."""
    many = random_batch(batch, ROWS)
    one, other = (_undropped(copy.deepcopy(model)) for model in (parent, child))
    for training in (False, True):
        mode = "training" if training else "evaluation"
        expected = doubled(task, one, many, training=training)
        try:
            out = doubled(task, other, many, training=training)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TaskError(f"{what} gives a network that does not run in {mode} ({first[:200]}); name another layer") from error
        if [tensor.shape for tensor in expected] != [tensor.shape for tensor in out]:
            raise TaskError(
                f"{what} would change the output's shape from {tuple(expected[0].shape)} to {tuple(out[0].shape)}; name another layer"
            )
        apart = max(difference(a, b) for a, b in zip(expected, out, strict=True))
        if exact and not apart <= TOLERANCE:
            raise TaskError(
                f"{what} does not keep what the network computes in {mode} (it differs by {apart:.1e}): something reads its outputs that the edit "
                "cannot make up for, such as a normalisation over them; name another layer (where it is over a layer's channels, double the width)"
            )


def _undropped(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
    return model


# Kinds


def _wider(task: Task, model: nn.Module, batch: Any, layer: str, width: int, noise: float = 0.0) -> _Plan:
    found, each, size = _channels_of(task, model, batch, layer)
    atoms = sum(group.size for group in found)
    copies, rest = divmod(width - size, each) if isinstance(width, int) else (0, 1)
    if rest or copies < 1:
        raise InputError(f"width (={width!r}) of {layer} must be more than its {size}, in steps of {each}")
    if not 0 <= noise < 1:
        raise InputError(f"noise (={noise}) must be from 0 to below 1, a share of each weight")
    counts, start = [], 0
    for group in found:  # copies go round all channels
        index = np.arange(start, start + group.size)
        counts.append(1 + copies // atoms + (index < copies % atoms).astype(np.int64))
        start += group.size
    edit = counted(model, found, counts)

    def divide(child: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        named = dict(child.named_parameters())
        with torch.no_grad():
            for group, count in zip(found, counts, strict=True):
                for name, dim in sorted(group.readers):
                    channels = group.places[name, dim]
                    taken = indices_of(edit["lists"][edit["tensors"][name][str(dim)]], len(channels), name)
                    often = torch.from_numpy(np.where(channels >= 0, count[channels], 1))[taken]
                    factors = 1.0 / often.double()
                    tensor = named[name].transpose(0, dim)
                    shaped = factors.reshape(-1, *[1] * (tensor.dim() - 1))
                    if noise:
                        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                        shaped = shaped * (1 + noise * drawn * (often > 1).reshape(shaped.shape))
                    tensor.mul_(shaped.to(tensor.device, tensor.dtype))

    return _Plan([edit], not noise, divide)


def _narrow(task: Task, model: nn.Module, batch: Any, layer: str, width: int) -> _Plan:
    found, each, size = _channels_of(task, model, batch, layer)
    goes, rest = divmod(size - width, each) if isinstance(width, int) else (0, 1)
    if rest or goes < 1 or width < 1:
        raise InputError(f"width (={width!r}) of {layer} must be 1 or more and less than its {size}, in steps of {each}")
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    order = torch.cat([importance(group, weights) for group in found]).argsort(stable=True)[:goes].numpy()
    kept = np.ones(sum(group.size for group in found), dtype=np.int64)
    kept[order] = 0
    counts = np.split(kept, np.cumsum([group.size for group in found])[:-1])
    if any(not count.any() for count in counts):
        raise InputError(f"width (={width}) of {layer} leaves nothing of a part that another layer reads; keep more")
    return _Plan([counted(model, found, counts)], False)


def _channels_of(task: Task, model: nn.Module, batch: Any, layer: str) -> tuple[list[Group], int, int]:
    """The groups of a layer's outputs, how many outputs a channel of theirs is, and how many the layer has that can change."""
    every = groups(task, model, batch)
    found = [group for group in every if layer in group.makers]
    if not found:
        makers = list(dict.fromkeys(maker for group in every for maker in group.makers))
        raise InputError(f"layer (={layer!r}) has no channels whose number can change; there are: {', '.join(makers) or 'none'}")
    each = _each(found, layer)
    if len(each) != 1:
        raise InputError(f"layer (={layer!r}) has channels of unlike sizes ({sorted(each)}), so its width cannot be told by a number")
    (one,) = each
    return found, one, one * sum(group.size for group in found)


def _each(found: Sequence[Group], layer: str) -> set[int]:
    """How many outputs of a layer are one channel of its groups (a group of a convolution goes whole)."""
    places = [group.places[place] for group in found for place in group.outputs(layer)]
    return {int(count) for channels in places for count in np.unique(channels[channels >= 0], return_counts=True)[1]}


def _deeper(
    task: Task, model: nn.Module, batch: Any, layer: str, kernel: int = 3, relu: str | None = "as it fits", kind: str | None = None
) -> _Plan:
    module, sites = _named(model, layer), _sites(task, model, batch)
    if layer not in sites:
        raise InputError(f"layer (={layer!r}) gives no tensor when the network predicts; name a layer that does")
    shape, before_relu = sites[layer]
    if kind is None:
        kind = _kind(module, shape)
    if relu == "as it fits":
        relu = "after" if isinstance(module, nn.ReLU) else "before" if before_relu else None
    width = shape[-1] if kind == "linear" else shape[1]
    edit = {"edit": "deeper", "layer": layer, "kind": kind, "width": width, "kernel": kernel, "relu": relu}
    return _Plan([edit], True)


def _sites(task: Task, model: nn.Module, batch: Any) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Of each module that gives a tensor, its shape, and whether only ReLUs read it."""
    last: dict[str, Any] = {}
    for node in trace(task.predict, model, batch).nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            last[str(path).removeprefix("model").strip(".")] = node
    out = {}
    for path, node in last.items():
        if isinstance(node.meta.get("val"), Tensor):
            readers = [str(getattr(user.target, "__name__", user.target)) for user in node.users]
            out[path] = tuple(node.meta["val"].shape), bool(readers) and all(name.startswith(("relu.", "relu_.")) for name in readers)
    return out


def _named(model: nn.Module, layer: str) -> nn.Module:
    modules = dict(model.named_modules())
    if layer not in modules:
        raise InputError(f"layer (={layer!r}) is not in the network; it has: {', '.join(name for name in modules if name)}")
    found: nn.Module = modules[layer]
    return found


def _kind(module: nn.Module, shape: Sequence[int]) -> str:
    if isinstance(module, nn.Linear | nn.LayerNorm) or len(shape) == 2:
        return "linear"
    if len(shape) in (4, 5) or isinstance(module, nn.Conv1d | nn.BatchNorm1d):
        return f"conv{len(shape) - 2}d"
    raise InputError(f"kind must be given for an output of shape {tuple(shape)}: one of linear, {', '.join(CONVOLUTIONS)}")


def _kernel(task: Task, model: nn.Module, batch: Any, layer: str, size: int | Sequence[int] | None = None) -> _Plan:
    found = _named(model, layer)
    if size is None:
        size = [taps + 2 for taps in found.kernel_size] if isinstance(found, _ConvNd) else 3  # any, for the edit to refuse
    return _Plan([{"edit": "kernel", "layer": layer, "size": size if isinstance(size, int) else list(size)}], True)


def _skip(task: Task, model: nn.Module, batch: Any, layer: str) -> _Plan:
    return _Plan([{"edit": "skip", "layer": layer}], True)


def _split(task: Task, model: nn.Module, batch: Any, layer: str, rank: int | None = None) -> _Plan:
    found = _named(model, layer)
    full = min(found.out_channels, math.prod(found.kernel_size)) if isinstance(found, _ConvNd) else 1
    return _Plan([{"edit": "split", "layer": layer, "rank": full if rank is None else rank}], rank is None or rank == full)


def _drop(task: Task, model: nn.Module, batch: Any, layer: str) -> _Plan:
    return _Plan([{"edit": "drop", "layer": layer}], False)


def _replace(task: Task, model: nn.Module, batch: Any, layer: str, kind: str) -> _Plan:
    if kind == "separable":  # the nearest one
        return _Plan([{"edit": "split", "layer": layer, "rank": 1}], False)
    return _Plan([{"edit": "replace", "layer": layer, "kind": kind}], False)


_PLANS: dict[str, Callable[..., _Plan]] = {
    "wider": _wider,
    "deeper": _deeper,
    "kernel": _kernel,
    "skip": _skip,
    "split": _split,
    "narrow": _narrow,
    "drop": _drop,
    "replace": _replace,
}


# All that can be done


def morphs(task: Task, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
    """What `morph` can make of this network, as what to call it with: widths half more and a quarter less, kernels one ring larger."""
    out: list[dict[str, Any]] = []
    every = groups(task, model, batch)
    for layer in dict.fromkeys(group.makers[0] for group in every):
        found = [group for group in every if layer in group.makers]
        each, size = _each(found, layer), sum(group.size for group in found)
        if len(each) != 1:
            continue
        (one,) = each
        more = max(1, size // 2) if all(group.exact for group in found) else size  # two of each keep a normalisation's mean and variance
        out.append({"edit": "wider", "layer": layer, "width": (size + more) * one})
        if size > len(found):
            out.append({"edit": "narrow", "layer": layer, "width": (size - max(1, size // 4)) * one})
    sites = _sites(task, model, batch)
    for layer, module in model.named_modules():
        if layer not in sites or not layer:
            continue
        possible: list[dict[str, Any]] = [{"edit": "replace", "layer": layer, "kind": kind} for kind in other_kinds(module)]
        if isinstance(module, nn.ReLU) or sites[layer][1]:  # elsewhere two linear layers in a row would say no more than one
            possible.append({"edit": "deeper", "layer": layer})
        if type(module) in CONVOLUTIONS.values():
            possible += [{"edit": kind, "layer": layer} for kind in ("kernel", "split")]
            possible.append({"edit": "replace", "layer": layer, "kind": "separable"})
        if type(module) in (nn.Linear, *CONVOLUTIONS.values()):
            possible += [{"edit": kind, "layer": layer} for kind in ("skip", "drop")]
        out += [edit for edit in possible if _possible(task, model, batch, edit)]
    return out


def _possible(task: Task, model: nn.Module, batch: Any, edit: Mapping[str, Any]) -> bool:
    try:
        grow(task, model, batch, **edit)
    except InputError:
        return False
    return True
