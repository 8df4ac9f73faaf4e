"""The ranks that compute a step together: who takes which samples, one sum of gradients, and going on when one of them is lost.

A step's gradients are summed in buckets that overlap with backward; one exchange after them (the tail) tells every rank the counts,
losses, times and wishes of all. Whoever completed the tail takes the optimizer step, and knows that all others can take it too.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from anyfit.cluster.balance import Balancer, memory_cap
from anyfit.cluster.buckets import Buckets
from anyfit.cluster.launcher import Cluster
from anyfit.cluster.meeting import Generation, Member, address_towards
from anyfit.cluster.statistics import leave, synchronise
from anyfit.data import Share
from anyfit.engine import Local
from anyfit.errors import InputError, Lost, RunError, TaskError
from anyfit.machine import wait_for
from anyfit.state import Position, State
from anyfit.tree import pack, unpack

__all__ = ["Group"]

dist: Any = torch.distributed  # of whose groups its annotations say little

HEADER = ("count", "loss", "seconds", "units", "wait", "flags", "cap", "step", "turn", "parameters")
FLAGS = {"stop": 1, "leave": 2, "join": 4, "save": 8, "names": 16, "asked": 32}
FORM_S = 10.0
LOOK = timedelta(milliseconds=50)  # how long a wait lasts before it looks whether somebody is gone
POLL_S = 2e-4
ALIKE = 1e-5  # relative difference of weights that rounding on unlike devices may bring about
MESSAGE_TAG = 7


@dataclass
class Told:
    """What the tail of a step said of one rank."""

    count: float
    loss: float
    seconds: float
    units: int
    wait: float
    flags: int
    cap: int


@dataclass
class Group:
    """The engine's Workers over ranks."""

    member: Member
    device: torch.device
    cluster: Cluster = field(default_factory=Cluster)
    alone: bool = field(default=False, init=False)
    newcomer: bool = field(default=False, init=False)  # has no state yet
    phantom: bool = field(default=False, init=False)  # this batch is another's: it takes part and counts nothing
    synced: int = field(default=0, init=False)  # layers with batch statistics
    handed: tuple[State, dict[str, Any]] = field(init=False)  # to a newcomer
    told: list[Told] = field(default_factory=list, init=False)
    shares: list[Share] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.balance = Balancer([self.member.number])
        self.by_rows = True  # whether a step's units are rows
        self.least = 0  # units that each rank has of every step that has enough
        self._failed: int | None = None  # rows at once that did not fit
        self.serial = 0  # steps, and exchanges between steps, that are done
        self._inside = False  # of a step
        self._turn = (0, 0)  # the step at hand, and how often it has applied
        self.rank, self.size = 0, 1
        self.cap: int | None = None  # rows at once that this rank's memory holds
        self.rows = 0  # at most at once, of the step at hand
        self._peaks: list[tuple[int, int]] = []
        self._last: Sequence[bytes] = ()  # what was heard in the last exchange: some may need it from this rank
        self.backend = ("nccl" if self.device.type == "cuda" else "gloo") if self.cluster.backend == "auto" else self.cluster.backend
        if self.backend == "nccl" and self.device.type != "cuda":
            raise InputError(f"backend (='nccl') adds on GPUs, and this rank computes on {self.device}; take backend='gloo' for all")
        self._group: Any = None  # what is small, in the host's memory
        self._sums: Any = None  # gradients
        self._side: Any = None  # batch statistics, in the middle of a step
        self.buckets = Buckets(self._add, self._wait, on_device=self.backend == "nccl")
        self._greeted = 0
        self._wishes: set[str] = set()
        self._tellers: list[Any] = []  # the members of `told`
        self._hosts: dict[Any, str] = {}  # and where they are
        self._names: list[str] = []
        self._began = self._waited = 0.0

    # ------------------------------------------------------------------ who belongs together

    def meet(self, fingerprint: Mapping[str, Any]) -> None:
        """Wait for the others, and form the first group, or join one that is under way."""
        generation = self.member.ready({**fingerprint, "backend": self.backend})
        self.newcomer = self.member.newcomer = self.member.number in generation.joined
        self.serial = generation.ahead
        shares = self.cluster.shares
        speeds = [float(part) for part in shares.split(":")] if shares not in ("measured", "equal") else []
        if speeds and len(speeds) != len(generation.members) and not self.newcomer:
            raise InputError(f"shares (={shares!r}) names {len(speeds)} speeds for {len(generation.members)} ranks; give one for each")
        fixed: dict[int | str, float] | None = None if shares == "measured" else dict(zip(generation.members, speeds, strict=False))
        self.balance = Balancer(generation.members, fixed=fixed)
        self._form(generation)

    def _form(self, generation: Generation) -> None:
        self.generation = generation
        self.rank, self.size = generation.members.index(self.member.number), len(generation.members)
        self._shut()
        if self.size == 1 or not self._all_here():
            return
        try:
            self._group = self._gloo("group")
            self._sums = self._group if self.backend == "gloo" else self._nccl("sums")
        except RuntimeError:  # somebody was lost meanwhile: the first collective finds out
            self._shut()

    def _gloo(self, name: str) -> Any:
        """Connections to all others, by the memory of the host."""
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=min(FORM_S, self.generation.patience_s))  # all are there: to connect takes no time
        options._threads = 2
        options._devices = [self._device()]
        group = dist.ProcessGroupGloo(self._place(name), self.rank, self.size, options)
        group._set_default_timeout(timedelta(seconds=self.generation.patience_s))
        return group

    def _device(self) -> Any:
        """The network that this rank is reached by: the one that the user names, else the one towards the others."""
        if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
            return dist.ProcessGroupGloo.create_device(interface=interface)
        address = self.member.address
        others = [other for other in self.generation.addresses if not other.startswith("127.")]
        if address.startswith("127.") and others:  # the name of the first host means itself there (/etc/hosts)
            address = address_towards(others[0])
        return dist.ProcessGroupGloo.create_device(hostname=address)

    def _all_here(self) -> bool:
        """Wait until all have come to connect: to connect to one that is gone would take long. Whether all have."""
        store, key = self.member.store, f"group/{self.generation.number}/here"
        store.set(f"{key}/{self.rank}", "1")
        while not store.check([f"{key}/{rank}" for rank in range(self.size)]):
            if not self.member.dead.isdisjoint(self.generation.members) or self.member.broken >= self.generation.number:
                return False
            time.sleep(0.002)
        return True

    def _place(self, name: str) -> Any:
        return dist.PrefixStore(f"group/{self.generation.number}/{name}", self.member.store)

    def _nccl(self, name: str) -> Any:
        """Sums on GPUs. Experimental: written by the book, not yet shown on any."""
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # a lost rank is to be told here, not to end the process
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self.generation.patience_s)
        torch.cuda.set_device(self.device)
        return dist.ProcessGroupNCCL(self._place(name), self.rank, self.size, options)

    def _shut(self) -> None:
        """Let go of the connections: whoever waits for this rank hears of it."""
        if not self.buckets.stop():
            self._abandon()
        for group in (self._sums, self._side) if self.backend == "nccl" else ():
            if group is not None:
                with suppress(RuntimeError):
                    group.abort()  # its kernels would wait for ever
        self._group = self._sums = self._side = None

    def _abandon(self) -> None:
        """Leave connections that sit in a call which only its own timeout ends: to close them would wait for it, at the end of the process too."""
        for group in (self._group, self._sums, self._side):
            if group is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self.buckets.abandon()

    def _recover(self, *, boundary: bool = False, calm: bool = False) -> Sequence[str] | None:
        """Meet the others again. The result of the last exchange of a step, where another had completed it and this rank had not."""
        self._shut()
        self._inside = False
        generation = self.member.regroup(self.serial, self._told_last(), boundary=boundary, calm=calm)
        self._form(generation)
        return generation.result if generation.ahead > self.serial else None

    def regroup(self) -> bool:
        """Meet again between two steps; whether somebody joined, who needs the state."""
        self._recover(boundary=True)
        return bool(self.generation.joined)

    def done(self) -> None:
        """End this rank's part."""
        self._shut()
        self.member.done(self.serial, self._told_last())

    def _told_last(self) -> list[str]:
        return [base64.b64encode(part).decode() for part in self._last]

    def _greet(self) -> None:
        """After each meeting: what each rank can hold, and one view of everyone's speed."""
        while self._greeted != self.generation.number:
            generation = self.generation
            self.balance.capped, self.balance.least = self.by_rows, max(self.least, int(self.synced > 0))
            mine = {"cap": self.cap, "balance": self.balance.to_json() if self.rank == 0 else None, "names": self._names}
            try:
                heard = self.gather(mine)
            except Lost:
                continue
            if self.generation is generation:
                self.balance = Balancer.from_json(heard[0]["balance"])
                self.balance.members(list(generation.members))
                for number, item in zip(generation.members, heard, strict=True):
                    if item["cap"] is not None:
                        self.balance.cap(number, item["cap"])
                self._names = heard[0]["names"]
                self._greeted = generation.number
                self.member.newcomer = False  # one of them from now on

    def short_of_memory(self) -> None:
        """So many rows at once were too many here: from now on half of them, in more passes; the same step is tried again."""
        if self.rows <= 1:
            raise RunError("one row alone does not fit into this rank's memory; use a smaller model, or leave this device out")
        self._failed = min(self.rows, self._failed or self.rows)
        self.cap = max(1, self.rows // 2)
        if self._recover(calm=True) is not None:
            raise RunError(
                "a step was completed by others while this rank ran out of memory in it; resume goes on from the last checkpoint"
            )

    # ------------------------------------------------------------------ exchanges

    def exchange(self, payload: bytes) -> list[bytes]:
        """What every rank has to say, of one length; numbered, so that all know of it or all try again (Lost)."""
        inside = self._inside
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        heard = [torch.empty_like(mine) for _ in range(self.size)]
        if self.size == 1:
            parts = [payload]
        else:
            try:
                if self._group is None:
                    raise RuntimeError("not connected")
                self._wait(self._group.allgather([heard], [mine]))
                parts = [part.numpy().tobytes() for part in heard]
            except RuntimeError as error:
                result = self._recover()
                if result is None:
                    raise Lost(f"a rank was lost; the same step is tried again ({_line(error)})") from error
                parts = [base64.b64decode(part) for part in result]
                self._inside = inside  # the step goes on
        if not inside:
            self.serial += 1
        self._last = parts
        return parts

    def gather(self, value: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every rank has to say, as JSON."""
        text = json.dumps(pack(value, {}), allow_nan=False).encode()  # numbers that are none have a spelling there
        length = len(text)
        if self.size > 1:
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self._collective(lambda: self._group.allgather([lengths], [torch.tensor([len(text)])]))
            length = max(int(item) for item in lengths)
        return [unpack(json.loads(part), {}) for part in self.exchange(text.ljust(length))]

    def _add(self, flat: Tensor) -> Any:
        if self._sums is None:
            raise RuntimeError("not connected")
        return self._sums.allreduce([flat])

    def _wait(self, work: Any) -> None:
        """Until a collective is over; not for those who will never answer."""
        try:
            while True:
                if self.member.broken >= self.generation.number or not self.member.dead.isdisjoint(self.generation.members):
                    self._abandon()
                    raise RuntimeError("a rank is gone, or gives no sign of life")
                if self.backend == "nccl":  # whose wait does not wait
                    if work.is_completed():
                        work.wait()
                        return
                    time.sleep(POLL_S)
                    continue
                try:
                    work.wait(LOOK)  # which leaves the work as it is when the time is over
                    return
                except RuntimeError:
                    if work.is_completed():
                        raise
        finally:
            # the traceback of an error would keep its connections open, and ranks that are no neighbours of the lost one would wait for this one
            del work

    def _wait_apart(self, work: Any) -> None:
        """The same for what goes from one rank to another, of which gloo tells only those who wait that it is over."""
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        while thread.is_alive():
            if not self.member.dead.isdisjoint(self.generation.members):
                self._abandon()
                raise RuntimeError("a rank is gone, or gives no sign of life")
            thread.join(0.05)
        if errors:
            raise errors[0]

    def _collective(self, start: Callable[[], Any]) -> None:
        """A collective before an exchange: where it fails, nobody has completed that exchange."""
        try:
            if self._group is None:
                raise RuntimeError("not connected")
            self._wait(start())
        except RuntimeError as error:
            self._recover()
            raise Lost(f"a rank was lost; the same step is tried again ({_line(error)})") from error

    def agree(self, flag: bool) -> bool:
        """Whether any rank raises the flag."""
        return any(self.every(lambda: flag))

    def first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes (JSON), for all; made anew only where another became rank 0."""
        made: list[Any] = []
        while True:
            if self.rank == 0 and not made:
                made.append(make())
            with suppress(Lost):
                return self.gather({"value": made[0] if self.rank == 0 else None})[0]["value"]

    def every(self, make: Callable[[], Any]) -> list[Any]:
        """What each rank makes (JSON), for all."""
        value = make()
        while True:
            with suppress(Lost):
                return [item["value"] for item in self.gather({"value": value})]

    def settle(self, act: Callable[[], object], leaving: bool = False) -> None:
        """Do what only some ranks do; who takes the place of one that is lost before all know does it again."""
        while True:
            act()
            if leaving:  # others may be in the middle of a step
                return
            with suppress(Lost):
                self.gather({})
                return

    def trees(self, make: Callable[[int, int], Any]) -> list[Any]:
        """Trees of tensors that each rank makes, given its number and how many there are; made anew where that changes."""
        made: tuple[tuple[int, int], Any] | None = None
        while True:
            if made is None or made[0] != (self.rank, self.size):
                made = (self.rank, self.size), make(self.rank, self.size)
            tensors: dict[str, Tensor] = {}
            parts = pack(made[1], tensors)
            told = {
                name: [_kind(tensor), list(tensor.shape), base64.b64encode(_memory(tensor)).decode()] for name, tensor in tensors.items()
            }
            with suppress(Lost):
                return [_tree(item) for item in self.gather({"parts": parts, "tensors": told})]

    # ------------------------------------------------------------------ a step

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take part in the steps of a model: watch its gradients, share its batch statistics."""
        self.synced = synchronise(model, self)
        self.buckets.watch(parameters)

    def gathered(self, vector: Tensor) -> Tensor:
        """(ranks, numbers) of all ranks' vectors, in the middle of a step."""
        if self.size == 1:
            return vector[None]
        mine = vector.detach() if self.backend == "nccl" else vector.detach().cpu()
        heard = [torch.empty_like(mine) for _ in range(self.size)]

        def start() -> Any:
            if self._side is None:  # all come here at the same point of the same step
                self._side = self._gloo("side") if self.backend == "gloo" else self._nccl("side")
            return self._side.allgather([heard], [mine])

        self._collective(start)
        return torch.stack(heard).to(vector.device)

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        leave(model)
        self.buckets.forget()

    def share(self, position: Position, units: int) -> Share:
        """The part of a step's `units` that this rank takes."""
        self._greet()
        self.shares, first = [], 0
        for number, part in zip(self.generation.members, self.balance.shares(units), strict=True):
            self.shares.append(Share(first, first + part, self.balance.cap_of(number)))
            first += part
        self._inside, self._turn = True, (position.step, 0)
        self._began = time.perf_counter()
        return self.shares[self.rank]

    def next_share(self, units: int) -> Share:
        """What this rank is likely to take of a step to come, for those who read ahead."""
        parts = self.balance.shares(units)
        first = sum(parts[: self.rank])
        return Share(first, first + parts[self.rank], self.balance.cap_of(self.member.number))

    def stepped(self) -> None:
        """The step at hand is done."""
        self._inside = False
        self.serial += 1

    def last(self, parameters: Sequence[nn.Parameter]) -> None:
        """The next backward is the last of this step: sums may begin while it runs."""
        if self.size > 1:
            self.buckets.arm(parameters)

    def reduce(self, parameters: Sequence[nn.Parameter], local: Local) -> Local:
        """Add gradients, counts, losses over all ranks. A parameter that no rank used has no gradient afterwards."""
        self._turn = (self._turn[0], self._turn[1] + 1)
        wait_for(self.device)
        ended = time.perf_counter()
        used = [parameter.grad is not None for parameter in parameters]
        if self.size > 1:
            try:
                self.buckets.finish(parameters)
            except RuntimeError as error:
                self._recover()
                raise Lost(f"a rank was lost; the same step is tried again ({_line(error)})") from error
        buckets = self.buckets.taken()
        total, anywhere = self._tail(local, used, ended - self._began)
        self.buckets.give(buckets, {id(parameter): use for parameter, use in zip(parameters, anywhere, strict=True)})
        self._learn_memory()
        self._waited = time.perf_counter() - ended
        self._began = time.perf_counter()
        return total

    def _learn_memory(self) -> None:
        """How many rows at once a GPU will hold, from the peaks of steps of different sizes."""
        if self.device.type != "cuda":
            return
        self._peaks = [*self._peaks[-49:], (self.rows, torch.cuda.max_memory_allocated(self.device))]
        torch.cuda.reset_peak_memory_stats(self.device)
        found = memory_cap(self._peaks, torch.cuda.mem_get_info(self.device)[1])
        if found is not None and self._failed is not None:
            found = min(found, self._failed // 2)
        if found is not None and (self.cap is None or abs(found - self.cap) > self.cap // 10):
            self.cap = max(1, found)

    def _tail(self, local: Local, used: Sequence[bool], seconds: float) -> tuple[Local, list[bool]]:
        """One exchange of what is small; after it the step is certain."""
        unknown = sorted(set(local.logs) - set(self._names))
        wishes = self._wishes | ({"stop"} if self.member.stop else set())
        wishes |= {"join"} if self.member.wanted == self.generation.number else set()
        flags = sum(FLAGS[wish] for wish in wishes | ({"names"} if unknown else set()))
        units = self.shares[self.rank].last - self.shares[self.rank].first
        logs = [number for name in self._names for number in local.logs.get(name, (0.0, 0.0))]
        place = (*self._turn, len(used))
        numbers = [local.count, local.loss, seconds, units, self._waited, flags, self.cap or 0, *place, *logs]
        bits = sum(1 << index for index, use in enumerate(used) if use).to_bytes(-(-len(used) // 8), "little")
        parts = self.exchange(struct.pack(f"<{len(numbers)}d", *numbers) + bits)
        rows = [struct.unpack_from(f"<{len(numbers)}d", part) for part in parts]
        if apart := {row[7:10] for row in rows} - {place}:
            step, turn, _ = min(apart)
            raise TaskError(
                f"train_step called apply() for the {self._turn[1]}. time of step {self._turn[0]} at one rank, and for the {turn:.0f}. time of step "
                f"{step:.0f} at another, or for other parameters; call trainer.apply() equally at all ranks, whatever their part of the step is"
            )
        self.told = [Told(row[0], row[1], row[2], int(row[3]), row[4], int(row[5]), int(row[6])) for row in rows]
        self._tellers = list(self.balance.seats)
        hosts = dict(zip(self.generation.members, self.generation.hosts, strict=True))
        self._hosts = {number: hosts.get(number) or self._hosts.get(number, "") for number in self._tellers}
        self._wishes.clear()
        anyone = 0
        for part in parts:
            anyone |= int.from_bytes(part[8 * len(numbers) :], "little")
        for number, told in zip(self._tellers, self.told, strict=True):
            if told.cap and told.cap != self.balance.cap_of(number):
                self.balance.cap(number, told.cap)
        self.balance.observe([told.units for told in self.told], [told.seconds for told in self.told])
        names = {
            name: (sum(row[place] for row in rows), sum(row[place + 1] for row in rows))
            for name, place in zip(self._names, range(len(HEADER), len(numbers), 2), strict=True)
        }
        if any(told.flags & FLAGS["names"] for told in self.told):
            heard = self.gather({"logs": {name: list(local.logs[name]) for name in unknown}})
            fresh = sorted({name for item in heard for name in item["logs"]})
            names |= {name: _added([item["logs"][name] for item in heard if name in item["logs"]]) for name in fresh}
            self._names = [*self._names, *fresh]
        total = Local(sum(told.count for told in self.told), sum(told.loss for told in self.told), {n: v for n, v in names.items() if v[1]})
        return total, [bool(anyone >> index & 1) for index in range(len(used))]

    def wish(self, name: str) -> None:
        """Tell all others with the next step: stop, leave, save."""
        self._wishes.add(name)

    def wished(self, name: str) -> list[int]:
        """The members that wished it with the last step."""
        return [number for number, told in zip(self._tellers, self.told, strict=True) if told.flags & FLAGS[name]]

    # ------------------------------------------------------------------ state

    def same(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> tuple[bool, bool]:
        """Whether all ranks have the same weights, and the same buffers, to the bit; raises where weights are further apart than rounding
        explains.
        """
        if self.size == 1:
            return True, True
        norms = [float(weight.detach().double().norm()).hex() for weight in parameters]
        marks = [sum(map(_bits, tensors)) % (1 << 63) for tensors in (parameters, buffers)]
        heard = self.every(lambda: {"marks": marks, "norms": norms})
        for rank, other in enumerate(heard[1:], 1):
            for weight, *pair in zip(parameters, heard[0]["norms"], other["norms"], strict=True):
                if not _apart(*pair) < _alike(weight):
                    raise _gone_apart(f"of rank {rank} ({self.generation.hosts[rank]})", _apart(*pair))
        weights, others = (len({item["marks"][place] for item in heard}) == 1 for place in (0, 1))
        return weights, others

    def align(self, tensors: Sequence[Tensor], *, weights: bool = False) -> None:
        """Give all ranks the tensors of rank 0. Weights may differ from theirs by rounding only."""
        while self.size > 1:
            with suppress(Lost), torch.no_grad():
                for tensor in tensors:
                    flat = tensor.detach().cpu().contiguous().reshape(-1).clone()
                    self._collective(lambda flat=flat: self._group.broadcast([flat]))  # type: ignore[misc]
                    theirs = flat.reshape(tensor.shape)
                    if weights and tensor.numel():
                        mine = tensor.detach().cpu()
                        far = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
                        if not far < _alike(tensor):
                            raise _gone_apart("of this rank", far)
                    tensor.copy_(theirs)
                self.gather({})
                return

    def report(self) -> dict[str, Any]:
        """Speed, share and waiting of each rank in the last step, and how near that is to what these ranks can reach."""
        known = self.balance.report()
        told = dict(zip(self._tellers, self.told, strict=True))
        ranks = [
            {"rank": rank, "host": self._hosts[about["member"]], **about}
            | {"seconds": told[about["member"]].seconds, "waited": told[about["member"]].wait, "units": told[about["member"]].units}
            for rank, about in enumerate(known["members"])
            if about["member"] in told
        ]
        return {**{name: value for name, value in known.items() if name != "members"}, "ranks": ranks}

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first of its machine."""
        node = self.member.place.node
        return self.generation.members[[place.node for place in self.generation.places].index(node)] == self.member.number

    def hand_over(self, state: State, more: Mapping[str, Any]) -> None:
        """From rank 0: all that those who joined need."""
        if self._group is None:  # somebody was lost as they met: the next exchange finds out
            return
        tensors: dict[str, Tensor] = {}
        parts = pack({name: getattr(state, name) for name in PARTS}, tensors)
        kinds = [[name, _kind(tensor), list(tensor.shape)] for name, tensor in tensors.items()]
        text = json.dumps({"parts": parts, "position": list(state.position), "tensors": kinds, "more": more}, allow_nan=False).encode()
        for number in self.generation.joined:
            rank = self.generation.members.index(number)
            with suppress(RuntimeError):  # the joiner is gone: the next exchange finds out
                for payload in (torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors.values()):
                    self._wait_apart(self._group.send([payload.detach().cpu().contiguous().reshape(-1)], rank, MESSAGE_TAG))

    def take_over(self) -> None:
        """Of a rank that joined: the state of the others, between two steps, as `handed`."""
        try:
            length = torch.zeros(1, dtype=torch.int64)
            self._wait_apart(self._group.recv([length], 0, MESSAGE_TAG))
            text = torch.empty(int(length), dtype=torch.uint8)
            self._wait_apart(self._group.recv([text], 0, MESSAGE_TAG))
            told = json.loads(text.numpy().tobytes())
            tensors = {}
            for name, kind, shape in told["tensors"]:
                tensor = torch.empty(shape, dtype=getattr(torch, kind))
                flat = tensor.reshape(-1)
                self._wait_apart(self._group.recv([flat], 0, MESSAGE_TAG))
                tensors[name] = tensor
        except (RuntimeError, AttributeError) as error:
            raise RunError(f"the rank that was handing over its state is gone ({_line(error)}); join again") from error
        self.handed = State(**unpack(told["parts"], tensors), position=Position(*told["position"])), told["more"]


PARTS = tuple(part.name for part in fields(State) if part.name != "position")


def _alike(weight: Tensor) -> float:
    """How far apart rounding on unlike devices may bring weights between two looks."""
    return max(ALIKE, 4 * torch.finfo(weight.dtype).eps)


def _gone_apart(whose: str, far: float) -> RunError:
    return RunError(
        f"the weights {whose} are not those of rank 0 (they differ by {far:.1e}); weights may change only by the optimizer, from trainer.apply(): "
        "look for code that changes them elsewhere or draws differently by rank"
    )


def _apart(one: str, other: str) -> float:
    """The relative difference of two numbers (hexadecimal); two that are no numbers are alike."""
    if one == other:
        return 0.0
    a, b = float.fromhex(one), float.fromhex(other)
    return abs(a - b) / max(abs(a), abs(b))


def _bits(tensor: Tensor) -> int:
    """A sum over the memory's words, which any flipped bit changes."""
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))
    return int(words.sum(dtype=torch.int64))


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _memory(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _tree(told: Mapping[str, Any]) -> Any:
    """What another rank packed."""
    tensors = {}
    for name, (kind, shape, memory) in told["tensors"].items():
        flat = torch.frombuffer(bytearray(base64.b64decode(memory)), dtype=getattr(torch, kind)) if memory else torch.empty(0)
        tensors[name] = flat.to(getattr(torch, kind)).reshape(shape)
    return unpack(told["parts"], tensors)


def _added(items: Sequence[Sequence[float]]) -> tuple[float, float]:
    return sum(item[0] for item in items), sum(item[1] for item in items)


def _line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
