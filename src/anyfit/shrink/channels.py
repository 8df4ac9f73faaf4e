"""Which channels of a network depend on which, and a cut through it that leaves it whole.

A channel is a filter, its bias, its normalisation and the columns that read it; both sides of a residual sum; all gates of a recurrent unit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyfit.errors import InputError, TaskError
from anyfit.program.trace import trace
from anyfit.shrink.labels import Labels, Place, Walk
from anyfit.task import Task
from anyfit.tasks.edits import apply_edits, listed
from anyfit.tree import leaves, map_tensors

__all__ = ["Group", "counted", "cut", "difference", "doubled", "groups", "importance", "keep", "random_batch", "trained_by_chance"]

TOLERANCE = 1e-10  # in float64


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are alike: each is made by the same layers and read by the same layers.

    `places` says for each entry along a dimension of a tensor which channel it belongs to; -1: to none of this group.
    """

    name: str  # the layer that makes them, the first where there are several
    size: int
    places: Mapping[Place, Labels]
    makers: tuple[str, ...]  # layers whose outputs they are
    readers: frozenset[Place]  # where a sum runs over them
    exact: bool  # whether a network without them is the one where they are zero; not so where a normalisation runs over them
    sums: tuple[str, ...] = ()  # where the outputs of several makers are added

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters and buffers that lose entries."""
        return tuple(dict.fromkeys(name for name, _ in self.places))

    def outputs(self, layer: str) -> list[Place]:
        """Where the outputs of a layer that makes them are: the dimension of its weight that no sum runs over; of a recurrent layer, its units."""
        own = [place for place in self.places if _layer(place[0]) == layer]
        units = [(name, dim) for name, dim in own if name.endswith("weight_hh_l0") and dim == 1]
        return units or [place for place in own if place not in self.readers][:1]


def groups(task: Task, model: nn.Module, batch: Any) -> list[Group]:
    """The channels that can go, in the order in which layers make them; `batch` is one row without its target."""
    return _found(task, model, batch)[0]


def _found(task: Task, model: nn.Module, batch: Any) -> tuple[list[Group], list[str]]:
    """The groups, and why other channels must stay."""
    walk = Walk(trace(task.predict, model, batch), model)
    walk.run()
    roots = {place: walk.roots(labels) for place, labels in walk.labels.items()}
    made = {root: None for labels in walk.made for root in walk.roots(labels).tolist()}  # in their order
    frozen = {walk.root(label): why for label, why in walk.frozen.items()}
    read, normalised = ({root for labels in found for root in walk.roots(labels).tolist()} for found in (walk.read, walk.normalised))
    readers = {label for labels in walk.read for label in labels.tolist()}
    places: dict[int, dict[Place, None]] = {root: {} for root in made if root not in frozen}
    for place, labels in roots.items():
        for root in np.unique(labels).tolist():
            if root in places:
                places[root][place] = None
    alike: dict[tuple[Place, ...], list[int]] = {}
    for root, touched in places.items():
        if touched and root in read:
            alike.setdefault(tuple(touched), []).append(root)
    first = {int(label): place for place, labels in walk.labels.items() for label in labels}
    makers = {first[label]: None for labels in walk.made for label in labels.tolist() if label in first}
    sums = [(where, set(walk.roots(labels).tolist())) for where, labels in walk.sums]
    out = []
    for its, channels in alike.items():
        number = {root: index for index, root in enumerate(channels)}
        layers = tuple(dict.fromkeys(_layer(place[0]) for place in makers if place in its))
        out.append(
            Group(
                name=layers[0],
                size=len(channels),
                places={place: np.array([number.get(root, -1) for root in roots[place].tolist()], dtype=np.int64) for place in its},
                makers=layers,
                readers=frozenset(place for place in its if readers & set(walk.labels[place].tolist())),
                exact=not normalised & set(channels),
                sums=tuple(dict.fromkeys(where for where, found in sums if found & set(channels))),
            )
        )
    whys = dict.fromkeys(frozen[root] for root in made if root in frozen)
    return out, list(whys)


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def importance(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """(channels,) the L2 norm over all weights of a channel, those that read it too, divided by its root mean square over the group.

    So channels of layers of unlike scale and size compare: the norm over a group's coupled weights is that of DepGraph (Fang et al. 2023), the
    division that of Molchanov et al. (2017), made independent of how many channels a layer has. Statistics do not count.
    """
    squares = torch.zeros(group.size, dtype=torch.float64)
    for (name, dim), channels in group.places.items():
        tensor = weights[name].detach()
        if not tensor.is_floating_point() or name.endswith(("running_mean", "running_var")):
            continue
        each = tensor.double().cpu().square().transpose(0, dim).reshape(tensor.shape[dim], -1).sum(1)
        belongs = torch.from_numpy(channels)
        squares.index_add_(0, belongs[belongs >= 0], each[belongs >= 0])
    return (squares / squares.mean().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()


# Cuts


def cut(
    task: Task,
    model: nn.Module,
    batch: Any,
    amount: float,
    *,
    least: int = 1,
    multiple: int = 1,
    scope: Literal["layer", "global"] = "layer",
    spare: Sequence[str] = (),
) -> dict[str, Any]:
    """The edit after which a share `amount` of all channels is gone: those of least importance in each group, or over all groups.

    Exactly round(amount x channels) of each group go (or of all), unless `least` channels of it, or a `multiple`, must be left. Layers whose
    name begins like one of `spare` stay whole. A group's cut was computed to give what the network gives with its channels at zero.
    """
    if not 0 < amount < 1:
        raise InputError(f"amount (={amount}) must be above 0 and below 1: the share of channels that go")
    if least < 1 or multiple < 1:
        name, value = ("least", least) if least < 1 else ("multiple", multiple)
        raise InputError(f"{name} (={value}) must be at least 1: channels that are left of each layer")
    found = _spared(*_found(task, model, batch), spare)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scores = [importance(group, weights) for group in found]
    if scope == "layer":
        drops = [_rounded(group.size, round(amount * group.size), least, multiple) for group in found]
    else:
        drops = _over_all(found, scores, amount, least, multiple)
    counts = []
    for group, score, drop in zip(found, scores, drops, strict=True):
        kept = np.ones(group.size, dtype=np.int64)
        kept[score.argsort(stable=True)[:drop].numpy()] = 0
        assert int((kept == 0).sum()) == drop
        counts.append(kept)
    return _checked(task, model, batch, found, counts)


def keep(task: Task, model: nn.Module, batch: Any, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The edit after which of each named layer the given output channels are left. Layers that are tied must be given alike."""
    found, whys = _found(task, model, batch)
    counts = [np.ones(group.size, dtype=np.int64) for group in found]
    told: dict[int, tuple[str, set[int]]] = {}  # group -> what was asked first, and what goes
    for layer, indices in kept.items():
        places = [(index, place) for index, group in enumerate(found) if layer in group.makers for place in group.outputs(layer)]
        if not places:
            raise InputError(f"layer (={layer!r}) of kept has no channels that can go; there are: {_names(found, whys)}")
        size = len(found[places[0][0]].places[places[0][1]])
        odd = [index for index in indices if not 0 <= index < size]
        if odd or not indices:
            raise InputError(f"kept[{layer!r}] (={list(indices)!r:.60}) must be one or more of the channels 0 to {size - 1}")
        left = np.isin(np.arange(size), list(indices))
        for number, place in places:
            group, channels = found[number], found[number].places[place]
            goes = set(channels[~left & (channels >= 0)].tolist())
            halves = goes & set(channels[left & (channels >= 0)].tolist())
            if halves:
                together = np.flatnonzero(channels == min(halves)).tolist()
                raise InputError(
                    f"kept[{layer!r}]: channels {together} go together (groups or heads of {group.name}); keep all of them or none"
                )
            others = [name for name in group.makers if name != layer and name not in kept]
            before = told.setdefault(number, (layer, goes))
            if (others and goes and group.sums) or before[1] != goes:
                other, where = others[0] if others else before[0], f" by the sum {group.sums[0]}" if group.sums else ""
                raise InputError(
                    f"kept[{layer!r}] prunes {layer} unevenly: its outputs are tied to those of {other}{where}; give {other} the same channels"
                )
            counts[number][sorted(goes)] = 0
        stays = np.flatnonzero(~left & np.all([found[number].places[place] < 0 for number, place in places], axis=0))
        if len(stays):
            raise InputError(f"kept[{layer!r}] leaves out channel {stays[0]}, which must stay; what depends on it cannot be cut")
    return _checked(task, model, batch, found, counts)


def _spared(found: list[Group], whys: list[str], spare: Sequence[str]) -> list[Group]:
    for name in spare:
        if not any(maker.startswith(name) for group in found for maker in group.makers):
            raise InputError(f"spare (={name!r}) begins no layer that could be cut; there are: {_names(found, whys)}")
    left = [group for group in found if not any(maker.startswith(name) for name in spare for maker in group.makers)]
    if not left:
        why = (
            f"spare (={list(spare)!r}) leaves all layers whole: {_names(found, whys)}"
            if found
            else f"no channel can go: {_names(found, whys)}"
        )
        raise InputError(f"{why}; prune single weights instead (structured=False)")
    return left


def _names(found: Sequence[Group], whys: Sequence[str]) -> str:
    if found:
        return ", ".join(dict.fromkeys(maker for group in found for maker in group.makers))
    return f"all are tied to {'; '.join(whys[:5])}" if whys else "it has no layer of several channels before its last one"


def _rounded(size: int, drop: int, least: int, multiple: int) -> int:
    """How many of a group go."""
    left = max(size - drop, min(least, size))
    if multiple > 1:
        left = max(1, round(left / multiple)) * multiple
        while left < least:
            left += multiple
    return size - min(left, size)


def _over_all(found: Sequence[Group], scores: Sequence[Tensor], amount: float, least: int, multiple: int) -> list[int]:
    """How many of each group go, where the least important of all do."""
    total = sum(group.size for group in found)
    wanted, drops = round(amount * total), [0] * len(found)
    numbers = torch.cat([torch.full((group.size,), index) for index, group in enumerate(found)])
    for index in numbers[torch.cat(list(scores)).argsort(stable=True)].tolist():
        if sum(drops) == wanted:
            break
        if found[index].size - drops[index] > least:
            drops[index] += 1
    if sum(drops) < wanted:
        raise InputError(
            f"amount (={amount}) asks for {wanted} of {total} channels, of which {sum(drops)} can go with least={least}; lower either"
        )
    return [_rounded(group.size, drop, least, multiple) for group, drop in zip(found, drops, strict=True)]


def counted(model: nn.Module, found: Sequence[Group], counts: Sequence[Labels]) -> dict[str, Any]:
    """The edit after which each channel is there as often as `counts` say; copies stand beside each other."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    times: dict[Place, tuple[Labels, Labels]] = {}  # entry -> a number of its channel over all groups, and how often it is there
    offset = 0
    for group, count in zip(found, counts, strict=True):
        if (count != 1).any():
            for place, channels in group.places.items():
                size = tensors[place[0]].shape[place[1]]
                number, often = times.setdefault(place, (np.full(size, -1), np.ones(size, dtype=np.int64)))
                inside = channels >= 0
                number[inside], often[inside] = channels[inside] + offset, count[channels[inside]]
        offset += group.size
    lists: list[Any] = []
    edited: dict[str, dict[str, int]] = {}
    for (name, dim), (number, often) in times.items():
        segments = listed([(len(list(run)), int(count)) for (_, count), run in groupby(zip(number.tolist(), often.tolist(), strict=True))])
        if segments not in lists:
            lists.append(segments)
        edited.setdefault(name, {})[str(dim)] = lists.index(segments)
    return {"edit": "take", "lists": lists, "tensors": edited}


# The check


def _checked(task: Task, model: nn.Module, batch: Any, found: list[Group], counts: list[Labels]) -> dict[str, Any]:
    """The edit, once the cut network was seen to compute what it must."""
    edit = counted(model, found, counts)
    if not edit["tensors"]:
        raise InputError("nothing would be cut; raise amount, or lower least or multiple")
    problem = _problem(task, model, batch, found, counts)
    if problem is None:
        return edit
    alone = [
        group.name
        for index, group in enumerate(found)
        if (counts[index] != 1).any() and _problem(task, model, batch, [group], [counts[index]]) is not None
    ]
    raise TaskError(
        f"the network cannot be cut as asked: {problem}. It holds sizes that do not follow its tensors"
        + (
            f" behind {', '.join(alone)}; compute them from shapes, or leave it whole with spare={alone!r}"
            if alone
            else "; compute them from shapes"
        )
    )


def _problem(task: Task, model: nn.Module, batch: Any, found: Sequence[Group], counts: Sequence[Labels]) -> str | None:
    """What is wrong with a cut, by comparison in float64, with random weights and inputs, to the network with the cut channels at zero.

    A normalisation over fewer channels has another mean, so that there is nothing to compare to: such a cut only has to run.
    """
    same = [group.exact for group in found]
    if not all(same) and any(same):
        alone = _problem(task, model, batch, list(compress(found, same)), list(compress(counts, same)))
        if alone is not None:
            return alone
    dense, inputs = trained_by_chance(model), random_batch(batch)
    try:
        pruned = apply_edits(copy.deepcopy(dense), [counted(model, found, counts)])
        named = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
        for group, count in zip(found, counts, strict=True):
            for (name, dim), channels in group.places.items():
                gone = np.flatnonzero((channels >= 0) & (count[channels] == 0))
                named[name].data.index_fill_(dim, torch.from_numpy(gone).to(named[name].device), 0)
        expected, out = (doubled(task, network, inputs) for network in (dense, pruned))
    except Exception as error:  # noqa: BLE001 - whatever the network's own code makes of a cut that must not be
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    for a, b in zip(expected, out, strict=True):
        if a.shape != b.shape:
            return f"its output would be {tuple(b.shape)}, not {tuple(a.shape)}"
        if all(same) and not difference(a, b) <= TOLERANCE:
            return f"it computes other values (by {difference(a, b):.1e})"
    return None


def difference(first: Tensor, second: Tensor) -> float:
    """The largest, relative to the largest value; infinite where only one is not finite."""
    if not torch.equal(first.isfinite(), second.isfinite()):
        return math.inf
    apart = torch.where(first.isfinite(), first - second, 0.0).abs().max() if first.numel() else first.new_zeros(())
    largest = torch.where(first.isfinite(), first, 0.0).abs().max() if first.numel() else apart
    return float(apart / largest.clamp(min=1e-30)) if float(apart) else 0.0


def trained_by_chance(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy in float64 whose parameters and batch statistics are random, so that no fresh zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    out = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, tensor in [*out.named_parameters(), *out.named_buffers()]:
            chance = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var") or (isinstance(tensor, nn.Parameter) and tensor.dim() == 1):
                tensor.copy_(chance + 0.5)
            elif name.endswith("running_mean"):
                tensor.copy_(chance)
            elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.copy_((chance - 0.5) * 4 / max(1.0, tensor[0].numel() if tensor.dim() else 1.0) ** 0.5)
    return out


def random_batch(batch: Any, rows: int | None = None, seed: int = 1) -> Any:
    """A batch like this one: numbers and pixels are random, whole numbers (words, codes, lengths) are those of the batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        shape = (tensor.shape[0] if rows is None else rows, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor.device)
        if tensor.dtype == torch.uint8:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(tensor.device)
        return tensor[:1].expand(shape).clone() if rows is not None else tensor.clone()

    return map_tensors(draw, batch)


def doubled(task: Task, model: nn.Module, batch: Any, *, training: bool = False) -> list[Tensor]:
    """What a network in float64 predicts."""
    model.train(training)
    with _wide(), _Wide(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(leaves(task.predict(model, batch)))


class _Wide(TorchFunctionMode):
    """What a network makes as float32 while it runs, such as `pixels.float()`, is of float64 too."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        return made.double() if isinstance(made, Tensor) and made.dtype == torch.float32 else made


@contextmanager
def _wide() -> Iterator[None]:
    """Tensors that a network makes while it runs are of float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
