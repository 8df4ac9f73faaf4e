"""How a process comes to be a rank (of our launcher, or of torchrun), and what ranks do together beside steps."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from anyfit import engine
from anyfit.cluster.group import Group
from anyfit.cluster.launcher import ENVIRONMENT, Cluster
from anyfit.cluster.meeting import Coordinator, Member, Place, address_towards, connect
from anyfit.data import Batches
from anyfit.errors import InputError
from anyfit.metrics import Accumulator, Metric
from anyfit.run import under_torchrun
from anyfit.task import Task
from anyfit.values import parse

__all__ = ["Channel", "child", "device_of", "figures_of", "of_torchrun"]

_fits = 0  # of this process under torchrun: each has a meeting of its own


class Channel:
    """What a rank tells its launcher, line by line; each is answered."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._answers = self._socket.makefile("rb")

    def __call__(self, event: Mapping[str, Any]) -> str | None:
        try:
            self._socket.sendall(json.dumps(event).encode() + b"\n")
            return "stop" if self._answers.readline() == b"stop\n" else None
        except OSError:  # the launcher is gone, and this process soon after
            return None


def child() -> tuple[Member, Channel, Cluster]:
    """The rank that a launcher started this process to be, and what was asked of all."""
    told = os.environ.pop(ENVIRONMENT, None)  # what this process starts is no rank
    if told is None:
        raise InputError("`anyfit rank` is what a launcher starts; use `anyfit fit TASK --data ... --nproc N`")
    where = parse(told, ENVIRONMENT)
    timeouts = {"wait_s": where["wait_s"]}
    store, beats = (connect(where["host"], where["port"], serve=False, **timeouts)[0] for _ in range(2))
    member = Member(
        store, beats, Place(*where["place"]), address_towards(where["host"]), timeout_s=where["timeout_s"], parent=where["parent"]
    )
    return member, Channel(where["channel"]), Cluster(shares=where["shares"], backend=where["backend"])


def of_torchrun(timeout_s: float, wait_s: float) -> Member | None:
    """The rank that torchrun (or what sets its variables) started this process to be; None in a plain process."""
    global _fits  # noqa: PLW0603 - so is the process
    environment = os.environ
    if not under_torchrun():
        return None
    host, rank, size = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment["RANK"]), int(environment["WORLD_SIZE"])
    job = f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_fits}"
    _fits += 1
    serves = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    port = int(environment.get("MASTER_PORT", "29500"))
    store, _ = connect(host, port, serve=serves, wait_s=wait_s, job=job)
    beats, _ = connect(host, port, serve=False, wait_s=wait_s, job=job)
    coordinator = Coordinator(beats, ranks=size, wait_s=wait_s, timeout_s=timeout_s) if rank == 0 else None
    place = Place(int(environment.get("GROUP_RANK", "0")), int(environment.get("LOCAL_RANK", str(rank))))
    return Member(store, beats, place, address_towards(host), timeout_s=timeout_s, coordinator=coordinator)


def device_of(device: torch.device, member: Member) -> torch.device:
    """The device of a rank: each of a machine has one of its own, as long as there are any."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", member.place.local % torch.cuda.device_count())
    return device


def figures_of(
    group: Group, task: Task, model: nn.Module, batches: Batches, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """An evaluation in parts where all figures are sums; else rank 0 makes it, and the others wait."""
    metrics = None if batches.schema is None else task.metrics(batches.schema)
    sums = not task.own_method("evaluate") and all(isinstance(metric, Metric) for metric in (metrics or {}).values())
    if not sums or batches.rows is None:
        result: dict[str, Any] = group.first(lambda: engine.evaluate(task, model, batches, autocast()))
        return result

    def part(rank: int, size: int) -> Any:
        return engine.totals(task, model, batches, autocast(), part=(rank, size)).state()

    return Accumulator.merged(metrics, group.trees(part)).values()
