"""fit: a task and data, here or over many ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyfit import machine
from anyfit.cluster import (
    Call,
    Cluster,
    Group,
    Member,
    child,
    device_of,
    job_of,
    launch,
    of_torchrun,
    read_call,
    read_outcome,
    write_call,
    write_outcome,
)
from anyfit.errors import InputError
from anyfit.fitting import Event, Fitting, OnEvent, signals
from anyfit.prepare import Prepared, prepare
from anyfit.privacy import ExamplePrivacy
from anyfit.record import fingerprint_of
from anyfit.run import Folder, Run, Seen, under_torchrun
from anyfit.schema import Schema
from anyfit.task import Task

__all__ = ["Event", "fit", "take_part"]


def fit(
    task: Task,
    data: Any,
    *,
    target: str | None = None,
    validation: Any = None,
    test: Any = None,
    run: str | Path | None = None,
    resume: bool = False,
    weights: Any = None,
    weights_partial: bool = False,
    privacy: ExamplePrivacy | None = None,
    optimizer_overrides: Mapping[str, Any] | None = None,
    nproc: int = 1,
    cluster: Cluster | None = None,
    on_event: OnEvent | None = None,
    **plan: Any,
) -> Run:
    """Train `task` on `data`; nothing is written unless `run` names a folder.

    `validation`, `test`: a fraction of the rows, or a source. `weights`: a run or a .safetensors file to start from.
    `privacy`: differentially private steps, `batch_size` being the expected number of its units. `plan`: any field of `Plan`.
    `optimizer_overrides`: options of all optimizers, in place of the task's or those of the checkpoint. `nproc`: processes of this
    machine that share each step; `cluster` says more, such as how several machines meet. Under torchrun all its ranks share them.
    `on_event` gets each event as JSON values, in this order: step, evaluate, stop, checkpoint; if it returns "stop", training ends
    after that step.
    """
    if cluster is not None and nproc != 1:
        raise InputError(f"nproc (={nproc}) and cluster (={cluster}) exclude each other; give Cluster(nproc={nproc}, ...)")
    several = cluster or Cluster(nproc=nproc)
    if under_torchrun() and not several.plain:
        raise InputError("nproc and cluster say what to start, and torchrun has started these processes; use one of both")
    if several.plain and several != Cluster() and not under_torchrun():
        raise InputError(f"cluster (={several}) is for several processes; give nproc, or leave it out")
    options = {
        "target": target,
        "run": None if run is None else str(run),
        "resume": resume,
        "weights_partial": weights_partial,
        "optimizer_overrides": dict(optimizer_overrides or {}),
        "plan": plan,
    }
    call = Call(task, data, options, validation, test, weights)
    if several.plain:
        return _fit(call, privacy, on_event, of_torchrun(several.timeout_s, several.wait_s), several)
    if privacy is not None:
        raise InputError("privacy needs one process: private steps are not shared; leave nproc and cluster out")
    with tempfile.TemporaryDirectory(prefix="anyfit-") as place:
        path = write_call(Path(place), call)
        folder = launch(path, several, job_of(path), on_event or (lambda event: None))
        return read_outcome(folder, task)


def take_part(path: Path) -> Run:
    """Be one rank of a call of `fit` that a launcher wrote."""
    member, tell, several = child()
    member.folder = path.parent
    try:
        call = read_call(path)
    except Exception as error:
        member.failed(error)
        raise
    return _fit(call, None, tell, member, several, path.parent)


def _fit(
    call: Call,
    privacy: ExamplePrivacy | None,
    on_event: OnEvent | None,
    member: Member | None,
    several: Cluster,
    outcome: Path | None = None,
) -> Run:
    """The fit of this process. `outcome`: a folder for what came of it."""
    options, plan = call.options, call.options["plan"]
    path, resume = None if options["run"] is None else Path(options["run"]), options["resume"]
    folder = None if path is None or member is not None else Folder(path, resume=resume)
    fitting = None
    try:
        if member is not None:
            member.present()
            if privacy is not None:
                raise InputError("privacy needs one process: private steps are not shared; start without torchrun")
        with machine.own_random(), machine.steady_memory():
            unit = None if privacy is None else privacy.unit
            prepared = prepare(
                call.task, call.data, target=options["target"], validation=call.validation, test=call.test, plan=plan, unit=unit
            )
            if privacy is not None:
                prepared = _drawn(prepared, plan)
            group = None
            if member is not None:
                group, prepared = _met(member, prepared, several)
                folder = _shared_folder(group, path, resume)
            machine.seed_all(prepared.plan.seed)
            fitting = Fitting(prepared, folder, on_event or (lambda event: None), resume=resume, privacy=privacy, group=group)
            fitting.overrides = options["optimizer_overrides"]
            fitting.begin(call.weights, options["weights_partial"])
            with signals() as caught:
                fitting.loop(caught)
            done = fitting.end(caught)
            if group is not None:
                if outcome is not None:
                    place = outcome
                    group.settle(lambda: write_outcome(place, done) if group.speaks else None, done.stopped == "signal")
                group.done()
            return done
    except Exception as error:
        if member is not None:
            member.failed(error)
        raise
    finally:
        if fitting is not None:
            folder = fitting.folder
        if folder is not None:
            folder.close()


def _met(member: Member, prepared: Prepared, several: Cluster) -> tuple[Group, Prepared]:
    """The group of this rank, and what it was prepared with: the schema is that of rank 0 to the last digit."""
    device = device_of(prepared.device, member)
    group = Group(member, device, several)
    group.meet(fingerprint_of(prepared.task, prepared.plan, prepared.schema, prepared.sources))
    if group.newcomer:
        group.take_over()
        schema = group.handed[0].schema
    else:
        schema = group.first(prepared.schema.to_json)
    return group, replace(prepared, device=device, schema=Schema.from_json(schema or {}))


def _shared_folder(group: Group, path: Path | None, resume: bool) -> Folder | None:
    """The run's folder: held by rank 0, seen by all others."""
    if path is None:
        return None
    folder: Folder | None = None
    if group.newcomer:
        return Seen(path)

    def opened() -> str:
        nonlocal folder
        if folder is None:
            folder = Folder(path, resume=resume)
            folder.sweep()
        return folder.sign()

    sign = group.first(opened)
    there = group.every(lambda: Seen(path).signed(sign))
    if not all(there):
        blind = [group.generation.hosts[rank] for rank, sees in enumerate(there) if not sees]
        raise InputError(f"run (={str(path)!r}) is not the same folder at {', '.join(blind)}; give a path that all nodes share")
    return folder if folder is not None and group.rank == 0 else Seen(path)


def _drawn(prepared: Prepared, given: Mapping[str, Any]) -> Prepared:
    """Without what a task's plan has by default and private steps cannot do; what the caller asked for is refused later."""
    changes = {"bucket": False, "clip": None}
    changes = {name: value for name, value in changes.items() if name not in given and getattr(prepared.plan, name) != value}
    if not changes:
        return prepared
    notice = f"privacy draws rows by chance and clips each one's gradient, so the task's {' and '.join(changes)} is left out"
    return replace(prepared, plan=prepared.plan.updated(**changes), notices=(*prepared.notices, notice))
