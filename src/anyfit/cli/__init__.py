"""The command line: parse, call, print. Heavy imports stand in the commands, so that help loads neither torch nor numpy.

What a command found goes to stdout (with --json: one JSON object, on the last line), progress and errors to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from anyfit.cli import data as data_commands
from anyfit.cli.options import (
    BatchSize,
    DataPath,
    Device,
    Dtype,
    Epochs,
    Group,
    Ignore,
    Json,
    Quiet,
    Resume,
    RunFolder,
    RunOption,
    Seed,
    Sets,
    SourceFields,
    Split,
    Steps,
    Target,
    TaskName,
    Test,
    Types,
    Validation,
    pairs,
    print_result,
    source_of,
)
from anyfit.cli.progress import Progress, print_table
from anyfit.errors import AnyfitError, InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="anyfit",
    help="Write a learning task once; fit it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_commands.app)


@app.command()
def fit(
    task: TaskName,
    data: DataPath,
    target: Target = None,
    validation: Validation = None,
    test: Test = None,
    group: Group = None,
    split: Split = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    set: Sets = None,
    run: RunOption = None,
    resume: Resume = False,
    weights: Annotated[Path | None, typer.Option("--weights", help="A run or a .safetensors file to start from.")] = None,
    weights_partial: Annotated[bool, typer.Option("--weights-partial", help="Copy what overlaps and list the rest.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the trained weights to a .safetensors file.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a task on data, on this machine."""
    from anyfit.fit import fit as train
    from anyfit.report import write_report
    from anyfit.state import save_weights

    given = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}
    folder = _folder(run, task, resume)
    loaded, plan = _task_and_plan(task, set, given, folder if resume else None)
    rows = source_of(data, target, group=group, split=split, ignore=ignore, types=type, fields=source)
    with Progress(quiet) as progress:
        done = train(
            loaded,
            rows,
            validation=_fraction(validation),
            test=_fraction(test),
            run=folder,
            resume=resume,
            weights=weights,
            weights_partial=weights_partial,
            on_event=progress,
            **plan,
        )
    for item in (done.record.get("weights") or {}).get("left", []):
        typer.echo(f"not copied: {item}", err=True)
    if out is not None and done.stopped != "signal":
        save_weights(out, done.model.state_dict())
    _finish(done, json, {"report": str(write_report(folder)), **({"out": str(out)} if out else {})})


@app.command()
def evaluate(run: RunFolder, data: DataPath, source: SourceFields = None, device: Device = None, json: Json = False) -> None:
    """Figures of a trained run on data with targets."""
    from anyfit.fit import evaluate as measure

    figures = measure(run, source_of(data, None, fields=source), device=device or "auto")
    shown = {name: value for name, value in figures.items() if not isinstance(value, list)}
    print_result(
        {"run": str(run), "data": data, **shown}, json, lambda: print_table(["", "value"], [[name, value] for name, value in shown.items()])
    )


@app.command()
def predict(
    run: RunFolder,
    data: DataPath,
    out: Annotated[Path, typer.Option("--out", help="The CSV file to write: a row for each row of the data.")],
    source: SourceFields = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Predict with a trained run; targets may be absent."""
    from anyfit.cli.predictions import write_predictions

    rows = write_predictions(run, source_of(data, None, fields=source), out, device or "auto")
    print_result({"run": str(run), "out": str(out), "rows": rows}, json, lambda: typer.echo(f"{rows} rows -> {out}"))


@app.command()
def check(
    task: TaskName,
    data: DataPath,
    target: Target = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    set: Sets = None,
    batch_size: BatchSize = None,
    json: Json = False,
) -> None:
    """Prove on one batch that a task fits its data and that its counts are right."""
    from anyfit.check import check as examine

    loaded, plan = _task_and_plan(task, set, {"batch_size": batch_size}, None)
    seen = examine(loaded, source_of(data, target, ignore=ignore, types=type, fields=source), **plan)

    def show() -> None:
        print_table(["", ""], [[name, value] for name, value in seen.items() if name not in ("ok", "problems")])
        for problem in seen["problems"]:
            typer.echo(f"problem: {problem}")
        typer.echo("ok" if seen["ok"] else f"{len(seen['problems'])} problems")

    print_result(seen, json, show)
    if not seen["ok"]:
        raise typer.Exit(1)


@app.command()
def federate(
    task: TaskName,
    site: Annotated[list[str], typer.Option("--site", metavar="[NAME=]FILE", help="A site's data. Repeat it for each site.")],
    rounds: Annotated[int, typer.Option("--rounds", help="How often sites train and their updates are added.")],
    target: Target = None,
    test: Annotated[str | None, typer.Option("--test", help="A file to test on after each round.")] = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Local passes of each round (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Local steps of each round, in place of epochs.")] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    set: Sets = None,
    run: RunOption = None,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one task over sites that keep their rows (in this process)."""
    from anyfit.federate import federate as train
    from anyfit.report import write_report

    given = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}
    folder = _folder(run, task, resume)
    loaded, plan = _task_and_plan(task, set, given, folder if resume else None)
    columns = source_of("", target, ignore=ignore, types=type, fields=source)
    sites = {name: replace(columns, origin=path) for name, path in _sites(site).items()}
    with Progress(quiet) as progress:
        tested = None if test is None else replace(columns, origin=test)
        done = train(loaded, sites, rounds=rounds, test=tested, run=folder, resume=resume, on_event=progress, **plan)
    _finish(done, json, {"report": str(write_report(folder)), "bytes": done.result["bytes"]})


@app.command()
def report(run: RunFolder, json: Json = False) -> None:
    """Write the page and the pictures of a run."""
    from anyfit.report import write_report

    path = write_report(run)
    print_result({"run": str(run), "report": str(path)}, json, lambda: typer.echo(path))


@app.command()
def show(run: RunFolder, json: Json = False) -> None:
    """What a run is and how it went."""
    from anyfit.report import summary

    seen = summary(run)
    print_result(seen, json, lambda: print_table(["", ""], [[name, value] for name, value in seen.items()]))


@app.command()
def tasks(json: Json = False) -> None:
    """The ready tasks and their fields."""
    from anyfit.task import task_values
    from anyfit.tasks import READY

    found: dict[str, dict[str, Any]] = {
        name: {"about": (cls.__doc__ or "").strip(), "fields": task_values(cls()), "plan": _changed(asdict(cls().plan()))}
        for name, cls in READY.items()
    }

    def show_tasks() -> None:
        for name, task in found.items():
            typer.echo(f"{name}: {task['about']}")
            print_table(["field", "default"], [[field, value] for field, value in [*task["fields"].items(), *task["plan"].items()]])

    print_result(found, json, show_tasks)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo's runs go.")] = Path("runs/demo"),
    json: Json = False,
) -> None:
    """The main job on real data: train, kill and resume, federate, evaluate, report."""
    from anyfit.cli.demo import run_demo

    result = run_demo(folder)
    print_result(result, json, lambda: None)
    if not result["exact"]:
        raise typer.Exit(1)


def _changed(plan: dict[str, Any]) -> dict[str, Any]:
    from anyfit.values import Plan

    return {name: value for name, value in plan.items() if value != getattr(Plan(), name)}


def _folder(run: Path | None, task: str, resume: bool) -> Path:
    """The run's folder: as given, or the next free runs/<task>-<n>."""
    if run is not None:
        return run
    if resume:
        raise InputError("--resume needs --run FOLDER: which run is to go on?")
    name = task.rpartition(":")[2].lower()
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


def _task_and_plan(name: str, sets: list[str] | None, given: dict[str, Any], resumed: Path | None) -> tuple[Any, dict[str, Any]]:
    """The task with its fields and the plan's overrides; a resumed run's values stand where none are given."""
    from anyfit.load import load
    from anyfit.run import read_record
    from anyfit.values import Plan

    given_fields = pairs("--set", sets)
    plan = {name: value for name, value in given.items() if value is not None}
    plan |= {field: value for field, value in given_fields.items() if field in Plan.__dataclass_fields__}
    values = {field: value for field, value in given_fields.items() if field not in Plan.__dataclass_fields__}
    if resumed is not None and (resumed / "run.json").exists():
        record = read_record(resumed)
        before = record["plan"]
        if "epochs" in plan or "steps" in plan:
            before = {field: value for field, value in before.items() if field not in ("epochs", "steps")}
        plan = {**before, **plan}
        values = {**record["task"]["values"], **values}
    return load(name, values), plan


def _sites(items: list[str]) -> dict[str, str]:
    sites: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = Path(item).name.split(".")[0], item
        if name in sites:
            raise InputError(f"two sites are named {name!r}; name them: --site NAME=FILE")
        sites[name] = path
    return sites


def _fraction(value: str | None) -> float | str | None:
    """A number is a fraction of the rows, anything else a source."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


def _finish(done: Any, as_json: bool, more: dict[str, Any]) -> None:
    """Print a run's figures; a run that a signal stopped ends with its code."""
    splits = {
        split: {name: value for name, value in figures.items() if not isinstance(value, list)} for split, figures in done.splits.items()
    }
    about = {
        name: done.result.get(name) for name in ("stopped", "steps", "epochs", "rounds", "seconds") if done.result.get(name) is not None
    }
    train = done.result.get("train")
    result = {"run": str(done.path), **about, **({"train": train} if train else {}), **splits, **more}

    def show() -> None:
        names = list(dict.fromkeys(name for figures in splits.values() for name in figures))
        if splits:
            print_table(["split", *names], [[split, *(figures.get(name) for name in names)] for split, figures in splits.items()])
        typer.echo(f"run     {done.path}\nreport  {more['report']}")

    print_result(result, as_json, show)
    if done.stopped == "signal":
        typer.echo(f"stopped by a signal; go on with: --run {done.path} --resume", err=True)
        raise typer.Exit(128 + int(done.result["signal"]))


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 failed while running, 2 bad input, 128+n stopped by signal n."""
    try:
        app()
    except AnyfitError as error:
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}) + "\n")
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
