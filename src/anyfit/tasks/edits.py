"""Edits: what was changed in the shape of a network, as JSON, applied in order to the network that a task builds afresh.

So a changed network can be built anywhere and then be given its weights. An edit carries over the values that it finds, so that one applied
to a network with weights gives the changed network's weights; what its shape becomes never depends on them.

edit      says                                            does
take      lists, tensors: {name: {dim: index of a list}}  keeps, drops or repeats entries of parameters and buffers along dimensions
deeper    layer, kind, width, kernel, relu                an identity layer behind `layer`, with ReLU before or after it or without
kernel    layer, size                                     a convolution's kernel grows by zeros around it
skip      layer                                           f(x) becomes f(x) + scale x, where scale starts at 0
split     layer, rank                                     a convolution becomes a depthwise one (`rank` filters a channel) and a pointwise one
drop      layer                                           nothing in its place
replace   layer, kind                                     another activation or pooling in its place

A list is [[block, counts], ...]: segments that cover the dimension, in blocks of consecutive entries, and how often each block is there
afterwards, a digit (to base 36) for each block: [[1, "1101"]] drops the third of four, [[49, "12"]] repeats the second 49 of 98.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anyfit.errors import InputError

__all__ = ["ACTIVATIONS", "CONVOLUTIONS", "Skip", "apply_edits", "indices_of", "listed", "other_kinds"]

Runs = Sequence[tuple[int, int]]  # (length, how often it is there afterwards)
CONVOLUTIONS: dict[str, type[_ConvNd]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "sigmoid": nn.Sigmoid,
}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Skip(nn.Module):
    """f(x) + scale x; `scale` is learnt and starts at 0, where it is f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        like = next(inner.parameters(), torch.empty(()))
        self.inner, self.scale = inner, nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if out.shape != x.shape:
            raise InputError(
                f"skip over a {type(self.inner).__name__} needs an output of its input's shape, but {tuple(x.shape)} becomes {tuple(out.shape)}"
            )
        return out + self.scale * x


def apply_edits(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The model with the edits made, in their order; it is changed in place, and returned since the outermost module may be another one."""
    for edit in edits:
        given = dict(edit)
        kind = given.pop("edit", None)
        if kind not in _EDITS:
            raise InputError(f"edit (={kind!r}) must be one of {', '.join(_EDITS)}")
        function, needed, more = _EDITS[kind]
        missing, odd = sorted(needed - set(given)), sorted(set(given) - needed - more)
        if missing or odd:
            what = f"lacks {missing[0]}" if missing else f"has {odd[0]} (={given[odd[0]]!r}), which means nothing there"
            raise InputError(f"edit {kind!r} {what}; it has: {', '.join(sorted(needed | more))}")
        model = function(model, **given)
    return model


# Lists of entries


def listed(runs: Runs) -> list[list[Any]]:
    """Runs in their order as a list of an edit."""
    segments: list[list[Any]] = []
    for length, count in runs:
        if not 0 <= count < len(DIGITS):
            raise InputError(f"an entry can be there up to {len(DIGITS) - 1} times, not {count}")
        if segments and segments[-1][0] == length:
            segments[-1][1] += DIGITS[count]
        else:
            segments.append([length, DIGITS[count]])
    return segments


def indices_of(segments: Any, size: int, where: str) -> Tensor:
    """The entries that a list of an edit keeps of `size`, in their order, repeats included."""
    out, start = [], 0
    for segment in segments if isinstance(segments, list | tuple) else [None]:
        if not (isinstance(segment, list | tuple) and len(segment) == 2 and isinstance(segment[0], int) and isinstance(segment[1], str)):
            raise InputError(f"a list for {where} (={segments!r:.60}) must be [[block, counts], ...] as in [[1, '1101']]")
        block, counts = segment
        if block < 1 or not set(counts) <= set(DIGITS):
            raise InputError(f"segment {segment!r:.60} for {where} must have a block of 1 or more and counts of digits or small letters")
        repeats = torch.tensor([int(digit, 36) for digit in counts], dtype=torch.long)
        blocks = torch.arange(start, start + block * len(counts)).reshape(-1, block)
        out.append(blocks.repeat_interleave(repeats, 0).flatten())
        start += block * len(counts)
    if start != size:
        raise InputError(f"a list of {start} entries was given for {where}, which has {size}; edits belong to one network, in their order")
    kept = torch.cat(out)
    if not len(kept):
        raise InputError(f"a list for {where} keeps none of its {size} entries; keep at least one")
    return kept


# Tensors


def _take(model: nn.Module, tensors: Mapping[str, Mapping[str, int]], lists: Sequence[Any]) -> nn.Module:
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside = sorted(name for name in tensors if name.startswith(f"{path}." if path else ""))
            if inside:
                raise InputError(f"{inside[0]} is inside a MultiheadAttention, whose width and heads cannot be edited; leave it out")
    taken: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for name, dims in tensors.items():
        if name not in named:
            raise InputError(f"tensor {name!r} of an edit is not in the network; it has: {_some(named)}")
        tensor, kept = named[name], {}
        for dim, index in dims.items():
            if not str(dim).isdigit() or int(dim) >= tensor.dim():
                raise InputError(f"dim (={dim!r}) of {name} must be below {tensor.dim()}; it is of shape {tuple(tensor.shape)}")
            if not isinstance(index, int) or not 0 <= index < len(lists):
                raise InputError(f"list (={index!r}) for dimension {dim} of {name} must be below {len(lists)}, the number of lists")
            kept[int(dim)] = indices_of(lists[index], tensor.shape[int(dim)], f"dimension {dim} of {name}")
        before = taken.get(id(tensor))
        if before is not None and not (
            before[1].keys() == kept.keys() and all(torch.equal(before[1][dim], entries) for dim, entries in kept.items())
        ):
            raise InputError(f"{name} is tied to another tensor of this edit, which takes other entries; give both the same")
        taken[id(tensor)] = tensor, kept
    changed = {key: _taken(tensor, kept) for key, (tensor, kept) in taken.items()}
    for path, module in model.named_modules():
        own = {name: tensor for name, tensor in (module._parameters | module._buffers).items() if id(tensor) in changed}
        for name, tensor in own.items():
            assert tensor is not None
            _check_groups(module, f"{path}.{name}".lstrip("."), taken[id(tensor)][1].get(0))
            setattr(module, name, changed[id(tensor)])
        if own:
            _follow(path or type(module).__name__, module)
    return model


def _taken(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    out = tensor.detach()
    for dim, entries in kept.items():
        out = out.index_select(dim, entries.to(out.device))
    out = out.clone()
    return nn.Parameter(out, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out


def _check_groups(module: nn.Module, name: str, entries: Tensor | None) -> None:
    """A group of a convolution or a normalisation goes whole."""
    if isinstance(module, _ConvNd) and name.endswith(("weight", "bias")):
        outer = module.in_channels if isinstance(module, _ConvTransposeNd) and name.endswith("weight") else module.out_channels
        groups = module.groups
    elif isinstance(module, nn.GroupNorm):
        outer, groups = module.num_channels, module.num_groups
    else:
        return
    if groups == 1 or entries is None:
        return
    size = outer // groups
    rows = entries.reshape(-1, size) if len(entries) % size == 0 else entries.new_zeros(0, size)
    if not len(rows) or bool((rows[:, 0] % size != 0).any()) or not torch.equal(rows, rows[:, :1] + torch.arange(size)):
        raise InputError(f"{name} has {groups} groups of {size} channels, which can only be taken whole")


def _follow(path: str, module: nn.Module) -> None:
    """Attributes of a module that say its size, after its tensors; refused where they do not agree with each other."""
    shapes = {name: tuple(tensor.shape) for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}
    wrong: str | None = None
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shapes["weight"]
        wrong = _differs(shapes, "bias", (module.out_features,))
    elif isinstance(module, _ConvNd):
        outer, inner = shapes["weight"][:2]
        turned = isinstance(module, _ConvTransposeNd)
        if module.groups == 1:
            module.in_channels, module.out_channels = (outer, inner) if turned else (inner, outer)
        else:
            size = (module.in_channels if turned else module.out_channels) // module.groups
            before = (module.out_channels if turned else module.in_channels) // module.groups
            if inner != before:
                raise InputError(
                    f"{path} has groups, so dimension 1 of its weight ({before}) cannot be edited to {inner}; take whole groups"
                )
            module.groups = outer // size
            module.in_channels, module.out_channels = (outer, inner * module.groups) if turned else (inner * module.groups, outer)
        wrong = _differs(shapes, "bias", (module.out_channels,))
    elif isinstance(module, _NormBase):
        sizes = {shape for shape in shapes.values() if shape}
        (module.num_features,) = max(sizes)
        wrong = None if len(sizes) == 1 else f"{sizes}"
    elif isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        (module.num_channels,) = shapes["weight"]
        module.num_groups = 1 if module.num_groups == 1 else module.num_channels // size
        wrong = _differs(shapes, "bias", shapes["weight"])
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shapes["weight"]
        wrong = _differs(shapes, "bias", shapes["weight"])
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        rows, module.embedding_dim = shapes["weight"]
        if rows != module.num_embeddings and module.padding_idx is not None:
            raise InputError(f"{path} has a row for padding, so its {module.num_embeddings} rows must stay; edit its columns only")
        module.num_embeddings = rows
    elif isinstance(module, nn.RNNBase):
        gates = shapes["weight_hh_l0"][0] // shapes["weight_hh_l0"][1] if not module.proj_size else 0
        if not gates:
            raise InputError(f"{path} has projections (proj_size={module.proj_size}), which cannot be edited")
        module.hidden_size, module.input_size = shapes["weight_hh_l0"][1], shapes["weight_ih_l0"][1]
        ways = 2 if module.bidirectional else 1
        for name, shape in shapes.items():
            into = module.input_size if "_l0" in name else module.hidden_size * ways
            width = {"weight_ih": (into,), "weight_hh": (module.hidden_size,)}.get(name.partition("_l")[0], ())
            if shape != (gates * module.hidden_size, *width):
                wrong = f"{name} {shape}"
    elif isinstance(module, nn.PReLU):
        (module.num_parameters,) = shapes["weight"]
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer in transformers
        module.nx, module.nf = shapes["weight"]  # type: ignore[assignment]
        wrong = _differs(shapes, "bias", (shapes["weight"][1],))
    if wrong is not None:
        raise InputError(f"tensors of {path} do not agree after the edit ({wrong} beside {shapes}); edit all that belong together")


def _differs(shapes: Mapping[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> str | None:
    return f"{name} {shapes[name]}" if shapes.get(name, shape) != shape else None


# Layers


def _deeper(model: nn.Module, layer: str, kind: str, width: int, kernel: int = 3, relu: str | None = None) -> nn.Module:
    found = _layer(model, layer)
    if kind not in ("linear", *CONVOLUTIONS):
        raise InputError(f"kind (={kind!r}) of an edit 'deeper' must be one of linear, {', '.join(CONVOLUTIONS)}")
    if not isinstance(width, int) or width < 1:
        raise InputError(f"width (={width!r}) of an edit 'deeper' must be a whole number of 1 or more")
    if relu not in (None, "before", "after"):
        raise InputError(f"relu (={relu!r}) of an edit 'deeper' must be 'before', 'after' or null")
    if kind != "linear" and (not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0):
        raise InputError(f"kernel (={kernel!r}) of an edit 'deeper' must be an odd number, so that a kernel has a centre")
    like = next(found.parameters(), next(model.parameters(), torch.empty(())))
    new = nn.Linear(width, width) if kind == "linear" else CONVOLUTIONS[kind](width, width, kernel, padding=kernel // 2)  # type: ignore[call-arg,arg-type]
    assert new.bias is not None
    with torch.no_grad():
        nn.init.eye_(new.weight) if kind == "linear" else nn.init.dirac_(new.weight)
        new.bias.zero_()
    new.to(like.device, like.dtype)
    parts = [found, *([nn.ReLU()] if relu == "before" else []), new, *([nn.ReLU()] if relu == "after" else [])]
    return _placed(model, found, nn.Sequential(*parts))


def _kernel(model: nn.Module, layer: str, size: int | Sequence[int]) -> nn.Module:
    conv = _convolution(model, layer, "kernel")
    before = tuple(conv.kernel_size)
    after = (size,) * len(before) if isinstance(size, int) else tuple(size)
    grown = [b - a for a, b in zip(before, after, strict=False)]
    if len(before) != len(after) or min(grown) < 0 or not any(grown) or any(more % 2 for more in grown):
        raise InputError(f"size (={size!r}) for {layer} must be its kernel {before} with an even number more, the same on both sides")
    if isinstance(conv, _ConvTransposeNd) or conv.padding_mode != "zeros":
        raise InputError(
            f"{layer} (a {type(conv).__name__} that pads with {conv.padding_mode}) cannot grow; name a convolution that pads with zeros"
        )
    margins = [margin for more in reversed(grown) for margin in (more // 2, more // 2)]
    weight = nn.functional.pad(conv.weight.detach(), margins)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.kernel_size = after
    if conv.padding != "same":
        given = (0,) * len(before) if isinstance(conv.padding, str) else conv.padding
        conv.padding = tuple(int(old) + more // 2 * step for old, more, step in zip(given, grown, conv.dilation, strict=True))
    return model


def _skip(model: nn.Module, layer: str) -> nn.Module:
    found = _layer(model, layer)
    _same_shape(layer, found, "skip")
    return _placed(model, found, Skip(found))


def _split(model: nn.Module, layer: str, rank: int) -> nn.Module:
    conv = _convolution(model, layer, "split")
    most = min(conv.out_channels, conv.weight[0, 0].numel())
    if conv.groups != 1 or type(conv) not in CONVOLUTIONS.values():
        raise InputError(
            f"{layer} (a {type(conv).__name__} of {conv.groups} groups) cannot be split; name a plain convolution of one group"
        )
    if most == 1 or not isinstance(rank, int) or not 1 <= rank <= most:
        raise InputError(f"rank (={rank!r}) for {layer} must be 1 to {most}, where it is exact")
    kind: Any = type(conv)
    options = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    inside, outside = conv.in_channels, conv.out_channels
    depthwise = kind(
        inside, inside * rank, conv.kernel_size, conv.stride, conv.padding, conv.dilation, inside, False, conv.padding_mode, **options
    )
    pointwise = kind(inside * rank, outside, 1, bias=conv.bias is not None, **options)
    with torch.no_grad():  # of each input channel: W (O, taps) = U S V, of which the first `rank` are kept
        matrices = conv.weight.detach().flatten(2).transpose(0, 1).double()
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        root = values[:, :rank].sqrt()
        depthwise.weight.copy_((right[:, :rank] * root[:, :, None]).reshape(depthwise.weight.shape))
        mixed = left[:, :, :rank] * root[:, None, :]  # (I, O, rank)
        pointwise.weight.copy_(mixed.transpose(0, 1).reshape(pointwise.weight.shape))
        if conv.bias is not None:
            pointwise.bias.copy_(conv.bias)
    for part in (depthwise, pointwise):
        part.requires_grad_(conv.weight.requires_grad)
    return _placed(model, conv, nn.Sequential(depthwise, pointwise))


def _drop(model: nn.Module, layer: str) -> nn.Module:
    found = _layer(model, layer)
    _same_shape(layer, found, "drop")
    return _placed(model, found, nn.Identity())


def other_kinds(module: nn.Module) -> list[str]:
    """What a module can be replaced by: other activations, the other pooling."""
    kind = type(module)
    if kind in ACTIVATIONS.values():
        return [name for name, make in ACTIVATIONS.items() if make is not kind]
    pooling = type(module).__name__
    if pooling.startswith(("MaxPool", "AdaptiveMaxPool")):
        return ["average"] if not getattr(module, "return_indices", False) and getattr(module, "dilation", 1) == 1 else []
    return ["maximum"] if pooling.startswith(("AvgPool", "AdaptiveAvgPool")) else []


def _replace(model: nn.Module, layer: str, kind: str) -> nn.Module:
    found = _layer(model, layer)
    possible = other_kinds(found)
    if kind not in possible:
        raise InputError(
            f"kind (={kind!r}) for {layer} (a {type(found).__name__}) must be {'one of ' + ', '.join(possible) if possible else 'of an activation or a pooling; this layer has no other kind'}"
        )
    if kind in ACTIVATIONS:
        return _placed(model, found, ACTIVATIONS[kind]())
    name = type(found).__name__
    made: Any = getattr(nn, name.replace("Max", "Avg") if kind == "average" else name.replace("Avg", "Max"))
    given: Any = found
    if name.startswith("Adaptive"):
        return _placed(model, found, made(given.output_size))
    return _placed(model, found, made(given.kernel_size, given.stride, given.padding, ceil_mode=given.ceil_mode))


# Where they are


def _layer(model: nn.Module, layer: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        raise InputError(f"layer (={layer!r}) is not in the network; it has: {_some([name for name in modules if name])}")
    found: nn.Module = modules[layer]
    return found


def _convolution(model: nn.Module, layer: str, edit: str) -> _ConvNd:
    found = _layer(model, layer)
    if not isinstance(found, _ConvNd):
        raise InputError(f"layer (={layer!r}) of an edit {edit!r} is a {type(found).__name__}; name a convolution")
    return found


def _same_shape(layer: str, module: nn.Module, edit: str) -> None:
    """Refuse what plainly changes the shape; what hides it is found out when it runs."""
    if isinstance(module, nn.Linear):
        before, after = module.in_features, module.out_features
    elif isinstance(module, _ConvNd):
        before, after = module.in_channels, module.out_channels
        if any(step != 1 for step in module.stride):
            raise InputError(f"layer (={layer!r}) has stride {tuple(module.stride)}, so {edit} would change its output's shape")
    elif isinstance(module, nn.RNNBase | nn.Embedding | nn.MultiheadAttention):
        raise InputError(
            f"layer (={layer!r}) is a {type(module).__name__}, whose output is no tensor of its input's shape; {edit} needs one"
        )
    else:
        return
    if before != after:
        raise InputError(
            f"layer (={layer!r}) makes {after} channels of {before}, so {edit} would change its output's shape; name one that keeps it"
        )


def _placed(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with `new` wherever `old` is."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return new if model is old else model


def _some(names: Any, most: int = 20) -> str:
    given = list(names)
    return ", ".join(given[:most]) + (f", and {len(given) - most} more" if len(given) > most else "")


_EDITS: dict[str, tuple[Callable[..., nn.Module], set[str], set[str]]] = {  # function, what it needs, what it may have
    "take": (_take, {"lists", "tensors"}, set()),
    "deeper": (_deeper, {"layer", "kind", "width"}, {"kernel", "relu"}),
    "kernel": (_kernel, {"layer", "size"}, set()),
    "skip": (_skip, {"layer"}, set()),
    "split": (_split, {"layer", "rank"}, set()),
    "drop": (_drop, {"layer"}, set()),
    "replace": (_replace, {"layer", "kind"}, set()),
}
