"""What carries orders and replies: in this process, and over the ranks of torchrun. Neither strategies nor rounds know which."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.distributed as dist

from anyfit.errors import InputError, NonFinite, RunError
from anyfit.update import FINE, LARGEST, Group, Order, Reply, Total, Update, largest_of
from anyfit.worker import Worker

__all__ = ["Faults", "Local", "Ranks", "Transport", "agreed", "gathered", "leave", "ranks_of"]

ALL = ""  # in place of a site's name: a reply that is the sum of many


class Transport(Protocol):
    """Three verbs. A reply whose site is "" is the sum of several, whose own replies then carry no update."""

    def members(self, round: int) -> Sequence[str]:
        """The sites that are there in a round, sorted."""

    def send(self, order: Order, to: Sequence[str]) -> None:
        """Give an order to some of them."""

    def replies(self, timeout_s: float | None) -> Iterator[Reply]:
        """Their answers as they come; those that take longer never do."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a simulation lets go wrong, by `seed`: sites that do not answer with the chance `dropout`, sites that take `delay_s`
    longer (by name, or all with the chance `straggle`), sites that come later (`joins`: name -> round).
    """

    dropout: float = 0.0
    straggle: float = 0.0
    delay_s: float | Mapping[str, float] = 0.0
    joins: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dropout", "straggle"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} (={getattr(self, name)}) of Faults must be a chance from 0 to 1")
        by_name = isinstance(self.delay_s, Mapping)
        delays = list(self.delay_s.values()) if isinstance(self.delay_s, Mapping) else [self.delay_s]
        if not all(0.0 <= seconds < math.inf for seconds in delays):
            raise InputError(f"delay_s (={self.delay_s}) of Faults must be seconds from 0 up")
        if self.straggle > 0 and (by_name or self.delay_s == 0):
            raise InputError(
                f"straggle (={self.straggle}) of Faults needs delay_s (--delay) above 0, one number for all sites, not {self.delay_s}; "
                "give both or leave straggle out"
            )
        if not by_name and self.delay_s != 0 and self.straggle == 0:
            raise InputError(
                f"delay_s (={self.delay_s}) of Faults needs straggle (--straggle), the chance that a site takes that much longer; give "
                "both, or seconds by name: delay_s={'a': 5.0}"
            )

    def drops(self, site: str, order: Order) -> bool:
        """Whether a site stays silent."""
        return self.dropout > 0 and self._chance(site, order, 1) < self.dropout

    def delay(self, site: str, order: Order) -> float:
        """Seconds that a site takes longer."""
        if isinstance(self.delay_s, Mapping):
            return float(self.delay_s.get(site, 0.0))
        return float(self.delay_s) if self._chance(site, order, 2) < self.straggle else 0.0

    def _chance(self, site: str, order: Order, what: int) -> float:
        return random.Random(f"{self.seed} {order.round} {order.version} {what} {site}").random()


class Local:
    """All sites in this process, one after the other."""

    def __init__(self, worker: Worker, names: Sequence[str], faults: Faults | None = None) -> None:
        self.worker, self.faults = worker, faults
        self.names = sorted(names)
        self._order: Order | None = None
        self._to: Sequence[str] = ()
        named = {} if faults is None else {"joins": faults.joins, "delay_s": faults.delay_s}
        for what, mapping in named.items():
            unknown = sorted(set(mapping) - set(names)) if isinstance(mapping, Mapping) else []
            if unknown:
                raise InputError(f"{what} of Faults names {unknown[0]!r}, which is no site; there are: {', '.join(self.names[:20])}")

    def members(self, round: int) -> Sequence[str]:
        if self.faults is None or not self.faults.joins:
            return self.names
        return [name for name in self.names if self.faults.joins.get(name, 0) <= round]

    def send(self, order: Order, to: Sequence[str]) -> None:
        self._order, self._to = order, to

    def replies(self, timeout_s: float | None) -> Iterator[Reply]:
        order, self._order = self._order, None
        if order is None:
            raise RunError("replies were asked for before an order was sent")
        for place, name in enumerate(self._to, 1):
            if place < len(self._to):
                self.worker.read_ahead(self._to[place])
            faults = self.faults if order.kind in ("train", "evaluate") else None
            if faults is not None and faults.drops(name, order):
                continue
            delay = 0.0 if faults is None else faults.delay(name, order)
            if timeout_s is not None and delay > timeout_s:  # it would not be heard, so it need not be computed
                continue
            reply = self.worker.answer(name, order)
            seconds = reply.seconds + delay
            if timeout_s is None or seconds <= timeout_s:
                yield replace(reply, seconds=seconds) if delay else reply


class Ranks:
    """The sites dealt out over the ranks of a process group, once, the largest first to the least loaded: what is remembered of a
    site, and its rows, stay where they are. Each rank folds the replies of its sites; one all-reduce adds the sums, so every rank has
    the total. No process serves the others.
    """

    def __init__(self, local: Local, rows: Mapping[str, int], summary: Callable[[Order, Update], dict[str, Any]]) -> None:
        self.local, self.rows, self.summary = local, rows, summary  # of one site's update, for all ranks to hear
        self.rank = dist.get_rank()
        self._homes: dict[str, int] = {}
        self._loads = [0] * dist.get_world_size()
        self._order: Order | None = None

    def members(self, round: int) -> Sequence[str]:
        return self.local.members(round)

    def send(self, order: Order, to: Sequence[str]) -> None:
        if order.kind == "train":  # until then sizes are not known, and nothing is remembered
            self._deal([name for name in self.rows if name not in self._homes], self._homes, self._loads)
        homes = dict(self._homes)
        self._deal([name for name in to if name not in homes], homes, list(self._loads))
        self._order = order
        self.local.send(order, [name for name in sorted(to, key=lambda name: (-self.rows.get(name, 1), name)) if homes[name] == self.rank])

    def _deal(self, names: Sequence[str], homes: dict[str, int], loads: list[int]) -> None:
        for name in sorted(names, key=lambda name: (-self.rows.get(name, 1), name)):
            homes[name] = min(range(len(loads)), key=loads.__getitem__)
            loads[homes[name]] += self.rows.get(name, 1)

    def replies(self, timeout_s: float | None) -> Iterator[Reply]:
        assert self._order is not None
        folded, told = Total(), []
        for reply in self.local.replies(timeout_s):
            error, values = reply.error, dict(reply.values)
            if reply.update is not None:
                try:
                    values["summary"] = self.summary(self._order, reply.update)
                    folded.add(reply.update)
                except Exception as problem:  # noqa: BLE001 - the other ranks wait: they must hear of it
                    error = str(problem)
                    values |= {"narrow": True} if isinstance(problem, NonFinite) else {}
            told.append({"site": reply.site, "error": error, "seconds": reply.seconds, "values": values, "size": reply.size})
        total = folded.update()
        plan = [
            [name, key, list(group.exponents), list(value.shape), int(largest_of(value))]
            for name, group in total.groups.items()
            for key, value in group.sums.items()
        ]
        counts = {name: str(group.count) for name, group in total.groups.items()}
        heard = gathered({"told": told, "plan": plan, "counts": counts})
        for part in heard:
            for item in part["told"]:
                update = Update() if item["error"] is None else None
                yield Reply(item["site"], update, item["error"], item["seconds"], item["values"], item["size"])
        if any(part["counts"] for part in heard):
            yield Reply(ALL, _reduced(total, heard))


def gathered(value: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank has to say, as JSON."""
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with _others():
        dist.all_gather(sizes, torch.tensor([mine.numel()]))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - mine.numel())))
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def agreed(flags: list[int]) -> list[int]:
    """The largest that any rank gives for each: one that stops stops all."""
    numbers = torch.tensor(flags)
    with _others():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers]


@contextmanager
def _others() -> Iterator[None]:
    """Say what it means when a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another rank failed or is gone (see its own message); the state of the last saved round is kept, and resume goes on: {error}"
        ) from error


def _reduced(total: Update, heard: Sequence[Mapping[str, Any]]) -> Update:
    """The sum over all ranks by one all-reduce of one int64 vector; a rank without a name has zeros there."""
    slots: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    counts: dict[str, Fraction] = {}
    bounds: dict[tuple[str, str], int] = {}
    for part in heard:
        for name, key, exponents, shape, largest in part["plan"]:
            slot = (tuple(exponents), tuple(shape))
            if slots.setdefault((name, key), slot) != slot:
                raise InputError(f"{key} of {name} has another shape or unit at another rank; all sites must run the same task")
            bounds[name, key] = bounds.get((name, key), 0) + largest
            if bounds[name, key] >= LARGEST:
                raise NonFinite(f"the total of {key} passes what fixed point can hold; clip the updates or lower the learning rate")
        for name, count in part["counts"].items():
            counts[name] = counts.get(name, Fraction(0)) + Fraction(count)
    names = sorted(slots)
    flat = [
        total.groups[name].sums[key].reshape(-1)
        if name in total.groups and key in total.groups[name].sums
        else torch.zeros(torch.Size(slots[name, key][1]).numel(), dtype=torch.int64)
        for name, key in names
    ]
    if flat:
        vector = torch.cat(flat)
        with _others():
            dist.all_reduce(vector)
        flat = list(vector.split([part.numel() for part in flat]))  # type: ignore[no-untyped-call]
    sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in counts}
    units = {name: slots[name, key][0] for name, key in names}
    for (name, key), limbs in zip(names, flat, strict=True):
        sums[name][key] = limbs.view(slots[name, key][1])
    return Update({name: Group(sums[name], counts[name], units.get(name, FINE), True) for name in counts})


_joined = False


def ranks_of(timeout_s: float = 1800.0) -> tuple[int, int]:
    """(rank, number of ranks): those of torchrun, whose process group is joined here; (0, 1) alone. A rank that does not answer for
    `timeout_s` seconds counts as gone.
    """
    global _joined  # noqa: PLW0603 - as is the process group
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        _joined = True
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Let go of a process group that was joined here, so that the other ranks do not wait."""
    global _joined  # noqa: PLW0603
    if _joined and dist.is_initialized():
        dist.destroy_process_group()
    _joined = False
