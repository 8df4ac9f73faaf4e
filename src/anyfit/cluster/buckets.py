"""Gradients on their way to all ranks: flat buckets, each of which is added as soon as it is full, while backward goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anyfit.errors import TaskError

__all__ = ["Buckets"]

FIRST_BYTES, MOST_BYTES = 1 << 20, 25 << 20  # the first bucket is small, so that sums begin early
GRACE_S, POLL_S = 0.05, 2e-4


@dataclass
class Bucket:
    """Gradients that are added together: one flat tensor, and each parameter's part of it."""

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    missing: set[int] = field(default_factory=set)  # whose gradients the last backward has not given yet
    sent: list[tuple[Tensor | None, int]] = field(default_factory=list)  # what was added, and its version then
    work: Any = None


class Buckets:
    """The sums of a step. `start` begins a sum of one tensor over all ranks, and gives the work that `wait` waits for."""

    def __init__(self, start: Callable[[Tensor], Any], wait: Callable[[Any], None], *, on_device: bool) -> None:
        self._start, self._wait, self._on_device = start, wait, on_device
        self._plans: dict[tuple[int, ...], list[Bucket]] = {}  # by the parameters that a step trains
        self._places: dict[int, Bucket] = {}
        self._armed: list[Bucket] = []  # of the step at hand, in the order that all ranks keep
        self._launched = 0
        self._broken: RuntimeError | None = None
        self._hooks: list[Any] = []

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hear of each gradient as it becomes final, until `forget`."""
        for parameter in parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived))  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Leave the parameters as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.abandon()

    def abandon(self) -> None:
        """Take other tensors from now on: these may be written to when a network comes back."""
        self._plans, self._places, self._armed = {}, {}, []

    def arm(self, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients that come now are final: begin a sum as soon as a bucket is full."""
        self._armed, self._launched, self._broken = self._plan(parameters), 0, None
        for bucket in self._armed:
            bucket.missing, bucket.work = {id(parameter) for parameter in bucket.parameters}, None

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin the sums that are left and wait for all; raises RuntimeError where one fails."""
        if not self._armed:
            self.arm(parameters)
        while self._launched < len(self._armed):
            self._launch()
        self._check()
        if self._broken is not None:
            raise self._broken
        for bucket in self._armed:
            self._wait(bucket.work)

    def give(self, buckets: Sequence[Bucket], used: Mapping[int, bool]) -> None:
        """The sums as gradients; a parameter (by its id) that no rank used has none."""
        for bucket in buckets:
            for view, parameter in zip(bucket.views, bucket.parameters, strict=True):
                parameter.grad = None
                if used[id(parameter)]:
                    parameter.grad = view if view.dtype == parameter.dtype and view.device == parameter.device else view.to(parameter)

    def taken(self) -> list[Bucket]:
        """The buckets of the step at hand, whose sums are complete."""
        buckets, self._armed = self._armed, []
        return buckets

    def stop(self) -> bool:
        """Let go of sums under way; False where one does not end (gloo forgets one whose half has come when its sender dies)."""
        buckets = [bucket for plan in self._plans.values() for bucket in plan if bucket.work is not None]
        waits = time.monotonic() + GRACE_S
        while not (over := all(bucket.work.is_completed() for bucket in buckets)) and time.monotonic() < waits:
            time.sleep(POLL_S)
        for bucket in buckets:
            bucket.work = None
        self._armed, self._broken = [], None
        return over

    def _plan(self, parameters: Sequence[nn.Parameter]) -> list[Bucket]:
        """Parameters in the order in which their gradients come, which is about the reverse of theirs."""
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._plans:
            groups: list[list[nn.Parameter]] = []
            room = 0
            for parameter in reversed(parameters):
                size = parameter.numel() * parameter.element_size()
                kind = (parameter.dtype, parameter.device)
                if not groups or size > room or (groups[-1][0].dtype, groups[-1][0].device) != kind:
                    groups.append([])
                    room = FIRST_BYTES if len(groups) == 1 else MOST_BYTES
                groups[-1].append(parameter)
                room -= size
            self._plans[key] = [self._bucket(group) for group in groups]
        buckets = self._plans[key]
        self._places = {id(parameter): bucket for bucket in buckets for parameter in bucket.parameters}
        return buckets

    def _bucket(self, parameters: list[nn.Parameter]) -> Bucket:
        # sums of half precision are made in float32
        kind = torch.promote_types(parameters[0].dtype, torch.float32)
        device = parameters[0].device if self._on_device else None
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=kind, device=device)
        views = [
            torch.as_strided(part, parameter.shape, parameter.stride()) if _dense(parameter) else part.view(parameter.shape)
            for part, parameter in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)  # type: ignore[no-untyped-call]
        ]
        return Bucket(parameters, flat, views)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._armed or (bucket := self._places.get(id(parameter))) is None:
            return
        bucket.missing.discard(id(parameter))
        while self._launched < len(self._armed) and not self._armed[self._launched].missing:
            self._launch()

    def _launch(self) -> None:
        bucket = self._armed[self._launched]
        self._launched += 1
        bucket.sent = [(parameter.grad, 0 if parameter.grad is None else parameter.grad._version) for parameter in bucket.parameters]
        for view, parameter in zip(bucket.views, bucket.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.is_sparse:
                raise TaskError("a gradient is sparse, and ranks add dense ones; build the embedding with sparse=False")
            else:
                view.copy_(parameter.grad)
        if self._broken is None:
            try:
                bucket.work = self._start(bucket.flat)
            except RuntimeError as error:  # inside of backward: told when it is over
                self._broken = error

    def _check(self) -> None:
        """Nothing may be added to a gradient whose sum has begun."""
        for bucket in self._armed:
            for parameter, (gradient, version) in zip(bucket.parameters, bucket.sent, strict=True):
                if parameter.grad is not gradient or (gradient is not None and gradient._version != version):
                    raise TaskError(
                        f"the gradient of a parameter {tuple(parameter.shape)} changed after its sum over ranks had begun, as where a layer runs "
                        "several times under torch's checkpoint; pass it use_reentrant=False"
                    )
            bucket.sent = []


def _dense(tensor: Tensor) -> bool:
    """Whether its memory has no holes, in whatever order its dimensions lie."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
