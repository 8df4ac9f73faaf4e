"""anyfit federate: one task over sites that keep their rows, or over sites that one data set is dealt to."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyfit.cli.live import Rounds
from anyfit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Group,
    Ignore,
    Json,
    Quiet,
    Resume,
    RunOption,
    Seed,
    Sets,
    SourceFields,
    Split,
    Steps,
    Target,
    TaskName,
    Types,
    Weights,
    finish,
    fraction_or_name,
    interruptible,
    pairs,
    privacy_of,
    recorded,
    run_folder,
    source_of,
    task_and_plan,
)
from anyfit.cli.progress import print_table, spell
from anyfit.errors import InputError

if TYPE_CHECKING:
    from anyfit.data import Source

__all__ = ["federate"]

MOST_SITES = 20  # lines of the table at the end; the report has more
MOST_COLUMNS = 10  # of a comparison


def federate(
    task: TaskName,
    site: Annotated[list[str] | None, typer.Option("--site", metavar="[NAME=]FILE", help="A site's data. Repeat it for each site.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="In place of --site: data that is dealt to sites.")] = None,
    partition: Annotated[
        str | None,
        typer.Option("--partition", metavar="HOW", help="How --data is dealt: iid, dirichlet:0.3, shards:2, quantity:0.5, column:NAME."),
    ] = None,
    num_sites: Annotated[int | None, typer.Option("--num-sites", help="To how many sites --data is dealt.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", metavar="NAME[:FIELD=VALUE,...]", help="fedavg, fedprox:mu=0.1, scaffold, ... (default: fedavg)."),
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="How often sites train and their updates are added.")] = None,
    sample: Annotated[str | None, typer.Option("--sample", help="Sites that take part in a round: a number, or a share like 0.1.")] = None,
    quorum: Annotated[
        str | None, typer.Option("--quorum", help="Of those, how many must answer: a number or a share (default: all).")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Seconds after which a round does not wait for more answers.")
    ] = None,
    target: Target = None,
    validation: Annotated[float | None, typer.Option("--validation", help="A fraction of each site's rows to validate on.")] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="A file to test on after each round, or a fraction of each site's rows.")
    ] = None,
    group: Group = None,
    split: Split = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Local passes of each round (default: 1).")] = None,
    steps: Steps = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Local work of each round by time, in place of epochs.")] = None,
    batch_size: BatchSize = None,
    keep_optimizer: Annotated[bool | None, typer.Option("--keep-optimizer", help="Moments stay at a site between rounds.")] = None,
    batch_statistics: Annotated[
        str | None, typer.Option("--batch-statistics", help="Of BatchNorm: refuse, aggregate or local (default: refuse).")
    ] = None,
    compress: Annotated[str | None, typer.Option("--compress", help="Updates travel as bf16, fp16, int8 or topk:SHARE.")] = None,
    compress_down: Annotated[str | None, typer.Option("--compress-down", help="Weights travel to sites as bf16 or fp16.")] = None,
    privacy: Annotated[
        str | None,
        typer.Option(
            "--privacy",
            metavar="KIND:FIELD=VALUE,...",
            help="site:clip=1,epsilon=8,delta=1e-5, or example:... for each row, or each value of a column (unit=patient).",
        ),
    ] = None,
    min_rows: Annotated[int | None, typer.Option("--min-rows", help="A site with fewer rows lets no update out.")] = None,
    min_cells: Annotated[
        int | None, typer.Option("--min-cells", help="Rows that must stand behind each count of a site's statistics.")
    ] = None,
    max_norm: Annotated[float | None, typer.Option("--max-norm", help="Refuse a change of weights of a larger norm.")] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="Simulated: the chance that a site does not answer.")] = None,
    straggle: Annotated[float | None, typer.Option("--straggle", help="Simulated: the chance that a site takes --delay longer.")] = None,
    delay: Annotated[float | None, typer.Option("--delay", help="Simulated: seconds that stragglers take longer.")] = None,
    join: Annotated[list[str] | None, typer.Option("--join", metavar="SITE=ROUND", help="Simulated: a site that comes later.")] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    set: Sets = None,
    weights: Weights = None,
    compare: Annotated[bool, typer.Option("--compare", help="Train on the pooled rows and at each site alone too.")] = False,
    run: RunOption = None,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one task over sites that keep their rows (simulated here; under torchrun, dealt out over its ranks)."""
    from anyfit.federate import Faults
    from anyfit.federate import federate as train
    from anyfit.guard import Limits
    from anyfit.report import write_report
    from anyfit.values import coerce

    folder = run_folder(run, task, resume)
    before = recorded(folder) if resume else {}
    if rounds is None and not before:
        raise InputError("--rounds is missing; say how often sites train, e.g. --rounds 20")
    local = {"epochs": epochs, "steps": steps}
    loaded, plan = task_and_plan(task, set, {**local, "batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}, before)
    given: dict[str, Any] = {
        "rounds": rounds,
        "sample": None if sample is None else coerce("--sample", sample, int | float),
        "quorum": None if quorum is None else coerce("--quorum", quorum, int | float),
        "deadline_s": deadline,
        "seconds": seconds,
        "compress": compress,
        "compress_down": compress_down,
        "batch_statistics": batch_statistics,
        "keep_optimizer": keep_optimizer,
        "validation": validation,
        "test": fraction_or_name(test),
    }
    rules = {**before.get("rules", {}), **{name: value for name, value in given.items() if value is not None}}
    _choose_work(rules, plan, seconds is not None, any(value is not None for value in local.values()))
    columns = source_of("", target, group=group, split=split, ignore=ignore, types=type, fields=source, before=before.get("source"))
    sites = _sites(columns, site, data, partition, num_sites, int(plan.get("seed", 0)), before.get("partition", {}))
    limits = _updated(before.get("limits"), {"rows": min_rows, "cells": min_cells, "norm": max_norm})
    joins = {name: coerce(f"--join {name}", at, int) for name, at in pairs("--join", join).items()}
    wrong = {"dropout": dropout, "straggle": straggle, "delay_s": delay, "joins": joins or None}
    faults = _updated(before.get("faults"), wrong)
    tested = rules.pop("test", None)
    progress = Rounds(quiet or os.environ.get("RANK", "0") != "0")
    with interruptible(folder, json, lambda: progress.complete, "--resume --compare" if compare else "--resume"), progress:
        done = train(
            loaded,
            sites,
            strategy=_strategy(strategy, before.get("strategy")),
            test=replace(columns, origin=tested, group=None, split=None) if isinstance(tested, str) else tested,
            privacy=privacy_of(privacy, ("site", "example"), before.get("privacy")),
            limits=Limits(**limits) if limits else None,
            faults=Faults(**{"seed": int(plan.get("seed", 0)), **faults}) if faults else None,
            weights=weights,
            compare=compare,
            run=folder,
            resume=resume,
            on_event=progress,
            **rules,
            **plan,
        )
    if done.path is None:  # a rank of torchrun that keeps no record
        return
    told: dict[str, Any] = {
        name: done.result[name] for name in ("fairness", "bytes", "privacy", "compared", "comparison") if name in done.result
    }
    figures = done.result["sites"]
    found = {name: about | _figures(figures.get(name)) for name, about in done.record["sites"].items()}
    more = {"report": str(write_report(folder)), "sites": found, **told}
    finish(done, json, more, lambda: _show(found, done.result))


def _choose_work(rules: dict[str, Any], plan: dict[str, Any], by_time: bool, by_count: bool) -> None:
    """What a resume changes pushes out what the run did before: local work goes by time or by count."""
    if by_count and not by_time:
        rules.pop("seconds", None)
    if rules.get("seconds") is not None and not by_count:
        for name in ("epochs", "steps"):
            plan.pop(name, None)


def _sites(
    columns: Source, files: list[str] | None, data: str | None, how: str | None, number: int | None, seed: int, before: dict[str, Any]
) -> Any:
    """Sources by name, or one source dealt to sites; of a resumed run it is known how."""
    from anyfit.data import partition

    if (files is None) == (data is None):
        raise InputError("give the sites' data: --site FILE for each of them, or --data FILE with --partition")
    how = how or before.get("how")
    if files is not None:
        if how is not None or number is not None:
            raise InputError("--partition and --num-sites deal out --data; with --site each site has data of its own")
        return {name: replace(columns, origin=path) for name, path in _named(files).items()}
    if how is None:
        raise InputError("--partition is missing; say how --data is dealt, e.g. --partition dirichlet:0.3 --num-sites 10")
    if number is None and not how.startswith("column"):
        number = before.get("sites")
    return partition(replace(columns, origin=data), how, number, seed=seed)


def _named(items: list[str]) -> dict[str, str]:
    sites: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = Path(item).name.split(".")[0], item
        if name in sites:
            raise InputError(f"two sites are named {name!r}; name them: --site NAME=FILE")
        sites[name] = path
    return sites


def _strategy(text: str | None, before: dict[str, Any] | None) -> Any:
    """As given, or as the resumed run had it."""
    from anyfit.strategy import strategy_of

    if text is not None or before is None:
        return text
    fields = ",".join(f"{name}={_spelled(value)}" for name, value in before["values"].items())
    return strategy_of(f"{before['name']}:{fields}")


def _spelled(value: Any) -> str:
    return ";".join(map(str, value)) if isinstance(value, list) else str(value)


def _updated(before: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """What is given, and what the resumed run had where nothing is."""
    return {**(before or {}), **{name: value for name, value in given.items() if value is not None}}


def _figures(told: dict[str, Any] | None) -> dict[str, Any]:
    """Without tables, and without the number of rows looked at: a site's rows are those that it trains on."""
    return {name: value for name, value in (told or {}).items() if name != "rows" and not isinstance(value, list)}


def _show(sites: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    """Each site's figures, how far they lie apart, and how other ways of training do."""
    shown = dict(list(sites.items())[:MOST_SITES])
    names = [name for name in dict.fromkeys(name for figures in sites.values() for name in figures) if name != "notes"]
    notes = [[", ".join(figures.get("notes", []))] for figures in shown.values()]
    noted = any(note[0] for note in notes)
    rows = [[name, *(figures.get(key) for key in names)] for name, figures in shown.items()]
    typer.echo("")
    print_table(
        ["site", *names, *(["notes"] if noted else [])], [[*row, *(note if noted else [])] for row, note in zip(rows, notes, strict=True)]
    )
    if len(sites) > MOST_SITES:
        typer.echo(f"... and {len(sites) - MOST_SITES} more")
    if result["fairness"]:
        keys = ("mean", "lowest", "highest", "deviation", "worst_site")
        typer.echo("")
        print_table(
            ["over sites", *(key.replace("_", " ") for key in keys)],
            [[name, *(spread[key] for key in keys)] for name, spread in result["fairness"].items()],
        )
    if "comparison" in result:
        columns = [name for name in result["comparison"][0] if name != "what"]
        columns = columns if len(columns) <= MOST_COLUMNS else columns[:1]  # the others are in the report
        typer.echo("")
        print_table(
            [f"{result['compared']['figure']} ({result['compared']['split']})", *columns],
            [[line["what"], *(line.get(name) for name in columns)] for line in result["comparison"]],
        )
    if "privacy" in result:
        typer.echo(f"\nepsilon {spell(result['privacy']['epsilon'])} at delta {result['privacy']['delta']}")
    typer.echo("")
