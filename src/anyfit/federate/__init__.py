"""federate: the same task over sites that keep their rows. In process, through the orders and updates that a network would carry.

rounds (what a federation does), by rules and with noise, over transport (what carries it); compare (against pooled rows and single sites, in a simulation)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from anyfit import data, machine
from anyfit.codec import Codec
from anyfit.data import Partition, Source
from anyfit.errors import InputError
from anyfit.federate.compare import check_comparable, compared
from anyfit.federate.rounds import MOST_LOOKED_AT, Federation
from anyfit.federate.rules import Rules
from anyfit.federate.transport import Faults, Local, Ranks, agreed, gathered, leave, ranks_of
from anyfit.fitting import OnEvent, signals
from anyfit.guard import Guard, Limits
from anyfit.prepare import infer
from anyfit.privacy import ExamplePrivacy, SitePrivacy
from anyfit.record import forget_seed, keep_seed, secret_seed
from anyfit.run import Folder, Run, Seen
from anyfit.schema import Schema
from anyfit.strategy import FedAvg, Strategy, strategy_of
from anyfit.task import Task
from anyfit.worker import Memories, Worker

__all__ = ["Faults", "federate"]


def federate(
    task: Task,
    sites: Mapping[str, Any] | Sequence[Any],
    *,
    strategy: Strategy | str | None = None,
    rounds: int,
    target: str | None = None,
    validation: float | None = None,
    test: Any = None,
    sample: float | int | None = None,
    quorum: float | int | None = None,
    deadline_s: float | None = None,
    seconds: float | None = None,
    compress: str | None = None,
    compress_down: str | None = None,
    batch_statistics: str = "refuse",
    keep_optimizer: bool = False,
    privacy: SitePrivacy | ExamplePrivacy | None = None,
    limits: Limits | None = None,
    faults: Faults | None = None,
    schema: Schema | None = None,
    weights: Any = None,
    compare: bool = False,
    run: str | Path | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
    **plan: Any,
) -> Run:
    """Train `task` over sites. A round sends the weights, each site trains on its rows, and their updates become the next weights.

    `sites`: sources by name, files that give their names, or a `Partition`. Local work per round: `epochs` (default 1) or `steps` of
    the plan, or `seconds`. `sample`: how many sites take part in a round (a float is a share), by the plan's seed; `quorum`: how
    many of them must answer, within `deadline_s`; None: all. `validation` and `test` as fractions are taken of each site's rows
    and their figures pooled from sums; `test` may be a source that is evaluated here. `evaluate_every`, `patience` count rounds,
    each of which is saved unless `checkpoint_every_s` says how often.

    `compress`: bf16, fp16, int8 or topk:SHARE for updates; `compress_down`: bf16 or fp16 for weights. `batch_statistics`: refuse,
    aggregate or local. `keep_optimizer`: moments stay at the site between its rounds. `schema`: names and types, or one that is
    fitted already; else the sites' statistics fit it. `weights`: a run or a .safetensors file to start from. `compare`: train on
    the pooled rows and at each site alone too, without privacy or compression. `faults`: what a simulation lets go wrong.
    """
    rules = Rules(
        rounds=rounds,
        sample=sample,
        quorum=quorum,
        deadline_s=deadline_s,
        seconds=seconds,
        compress=compress,
        compress_down=compress_down,
        batch_statistics=batch_statistics,
        keep_optimizer=keep_optimizer,
        validation=validation,
        test=test if isinstance(test, float) else None,
    )
    chosen = strategy_of(strategy) if isinstance(strategy, str) else strategy or FedAvg()
    local = {"epochs": 1} if plan.get("epochs") is None and plan.get("steps") is None else {}
    if seconds is not None and (plan.get("epochs") is not None or plan.get("steps") is not None):
        raise InputError(f"seconds (={seconds}) excludes epochs and steps; give one of them")
    final = task.plan().updated(**{"evaluate_every": None, "checkpoint_every_s": 0.0, **local, **plan})
    if isinstance(privacy, ExamplePrivacy) and (asked := [name for name in ("clip", "bucket") if plan.get(name)]):
        raise InputError(
            f"{asked[0]} (={plan[asked[0]]}) and the privacy of examples exclude each other; each row is clipped by the privacy's clip"
        )
    if compress is not None and not chosen.trains:
        raise InputError(f"compress (={compress!r}) is for changes of weights, and {chosen.name} sends exact sums; leave it out")
    named, about = _named(sites, target, privacy.unit if isinstance(privacy, ExamplePrivacy) else None)
    if compare:
        some = test is not None or validation is not None or final.keeps_best
        check_comparable(chosen, seconds, some or (privacy is None and len(named) <= MOST_LOOKED_AT))
    guard = Guard(limits, Codec.of(compress), privacy if isinstance(privacy, SitePrivacy) else None)
    rank, ranks = ranks_of()
    if ranks > 1 and final.device == "auto" and torch.cuda.is_available():  # each rank its own
        final = final.updated(device=f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}")
    if ranks > 1 and chosen.needs == "each":
        raise InputError(f"{chosen.name} needs each site's update, but ranks tell each other sums only; run it in one process")
    folder = None if run is None or rank else Folder(Path(run), resume=resume)
    try:
        with machine.own_random(), machine.steady_memory():
            known = infer(named.source, about.pop("rows")) if isinstance(named, Partition) else None
            memories = Memories(None if run is None else Path(run) / "sites")
            secret = _secret(privacy, folder, ranks)
            options: dict[str, Any] = {"validation": validation, "test": rules.test, "schema": known, "secret": secret}
            options["privacy"] = privacy if isinstance(privacy, ExamplePrivacy) else None
            worker = Worker(task, final, chosen, named, guard=guard, memories=memories, **options)
            transport: Any = Local(worker, list(named), faults)
            federation = Federation(
                task,
                transport,
                chosen,
                rules,
                final,
                privacy=privacy,
                memories=memories,
                secret=secret,
                folder=folder,
                emit=(None if rank else on_event) or (lambda event: None),
                seen=Seen(Path(run)) if rank and run is not None else None,
                agree=agreed if ranks > 1 else None,
            )
            if ranks > 1:
                federation.transport = Ranks(transport, federation.rows, federation.summary)
            central = None if test is None or rules.test is not None else Source.of(test, target)
            if test is None and isinstance(named, Partition) and "test" in named.others:  # what the data brings is not dealt
                central = replace(named.source, origin=named.others["test"], group=None, split=None)
            about |= {"limits": asdict(guard.limits), "faults": None if faults is None else asdict(faults)}
            federation.begin(known if schema is None else schema, central, weights, about, resume=resume)
            with signals() as caught:
                federation.loop(caught)
            done = federation.end()
            if compare and done.stopped != "signal" and not rank:  # the other ranks have no part in it
                done.result |= compared(federation, worker, done, weights)
                if folder is not None:
                    folder.finish(done.result)
            if folder is not None and privacy is not None and done.stopped in ("finished", "patience", "budget"):
                forget_seed(folder)
            return done
    except BaseException:
        leave()
        raise
    finally:
        if folder is not None:
            folder.close()


def _secret(privacy: SitePrivacy | ExamplePrivacy | None, folder: Folder | None, ranks: int) -> int:
    """What noise is made from: nobody may know it beside the run; all ranks of a simulation have one."""
    if privacy is None:
        return 0
    secret = secret_seed(folder)
    if folder is not None:
        keep_seed(folder, secret)
    return int(gathered({"secret": secret})[0]["secret"]) if ranks > 1 else secret


def _named(sites: Mapping[str, Any] | Sequence[Any], target: str | None, unit: str | None) -> tuple[Mapping[str, Source], dict[str, Any]]:
    """Sources by name, of which the column `unit` is no feature; and what is known of all of them at once."""
    if isinstance(sites, Partition):
        if unit is not None and not sites.separates(unit):
            raise InputError(
                f"unit (={unit!r}) of the privacy has rows of one value at several sites, and what each site tells of it would add up; deal "
                f"them with how='column:...' so that each {unit} is at one site"
            )
        sites = sites.ignoring(unit) if unit is not None else sites
        rows = sites.whole
        about = {"alike": True, "rows": rows, "partition": sites.to_json(), "source": _roles(sites.source)}
        about["data"] = {"all sites": {"source": sites.source.name, "rows": data.num_rows(rows), "sha256": data.fingerprint(rows)}}
        return sites, about
    if isinstance(sites, Mapping):
        named = {str(name): origin for name, origin in sites.items()}
        if len(named) != len(sites):
            raise InputError("two sites have one name; names that differ as text are needed")
    else:
        named = {}
        for index, origin in enumerate(sites):
            name = Path(origin).name.split(".")[0] if isinstance(origin, str | Path) else f"site{index}"
            if name in named:
                raise InputError(f"two sites are named {name!r}; give them names: sites={{'a': ..., 'b': ...}} or --site a=FILE")
            named[name] = origin
    if "" in named:
        raise InputError("a site has an empty name; give it one")
    sources = {name: Source.of(origin, target) for name, origin in sorted(named.items())}
    if unit is not None:
        sources = {name: replace(source, ignore=tuple(dict.fromkeys((*source.ignore, unit)))) for name, source in sources.items()}
    return sources, {"source": _roles(next(iter(sources.values())))} if sources else {}


ROLES = ("target", "group", "split", "ignore", "types", "weight", "missing", "delimiter", "encoding", "table", "query", "size")


def _roles(source: Source) -> dict[str, Any]:
    """What is known of a source's columns, for the record: a resume must read them alike."""
    found = {name: getattr(source, name) for name in ROLES}
    plain = {
        name: dict(value) if name == "types" else list(value) if isinstance(value, tuple | list) else value for name, value in found.items()
    }
    return {name: value for name, value in plain.items() if value}
