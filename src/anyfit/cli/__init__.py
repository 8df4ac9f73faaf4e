"""The command line: parse, call, print. Heavy imports stand in the commands, so that help loads neither torch nor numpy.

What a command found goes to stdout (with --json: one JSON object, on the last line), progress and errors to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from anyfit.cli import data as data_commands
from anyfit.cli import federated, shrunk
from anyfit.cli.options import (
    Backend,
    BatchSize,
    DataPath,
    Device,
    Dtype,
    Epochs,
    Group,
    Ignore,
    Json,
    MaxSentences,
    MaxTokens,
    Nnodes,
    Nproc,
    OptimizerOverrides,
    Quiet,
    RankTimeout,
    Rdzv,
    Restarts,
    Resume,
    RunFolder,
    RunOption,
    Seed,
    Sets,
    Shares,
    SourceFields,
    Split,
    Steps,
    Target,
    TaskName,
    Test,
    Types,
    UpdateFreq,
    Validation,
    Wait,
    Weights,
    brought,
    cluster_of,
    finish,
    fraction_or_name,
    interruptible,
    of_hetseq,
    overrides_of,
    print_result,
    privacy_of,
    recorded,
    run_folder,
    shared_folder,
    source_of,
    task_and_plan,
)
from anyfit.cli.progress import Progress, print_table
from anyfit.errors import AnyfitError

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
    weights: Weights = None,
    weights_partial: Annotated[bool, typer.Option("--weights-partial", help="Copy what overlaps and list the rest.")] = False,
    privacy: Annotated[
        str | None,
        typer.Option(
            "--privacy",
            metavar="example:FIELD=VALUE,...",
            help="Differentially private steps: example:epsilon=8,delta=1e-5[,clip=1][,unit=COLUMN].",
        ),
    ] = None,
    optimizer_overrides: OptimizerOverrides = None,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    rdzv: Rdzv = None,
    wait: Wait = None,
    rank_timeout: RankTimeout = None,
    restarts: Restarts = None,
    shares: Shares = None,
    backend: Backend = None,
    update_freq: UpdateFreq = None,
    max_sentences: MaxSentences = None,
    max_tokens: MaxTokens = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the trained weights to a .safetensors file.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a task on data, on this machine or on several that share each step."""
    from anyfit.fit import fit as train
    from anyfit.report import write_report
    from anyfit.state import save_weights

    launched = {"nproc": nproc, "nnodes": nnodes, "rdzv": rdzv, "wait_s": wait, "timeout_s": rank_timeout, "restarts": restarts}
    cluster = cluster_of({**launched, "shares": shares, "backend": backend}, run)
    overrides = overrides_of(optimizer_overrides)
    set, batch_size = of_hetseq(set, batch_size, max_sentences=max_sentences, max_tokens=max_tokens, update_freq=update_freq)
    given = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}
    folder = shared_folder(run, run_folder(run, task, resume))
    before = recorded(folder) if resume else {}
    loaded, plan = task_and_plan(task, set, given, before)
    rows = source_of(data, target, group=group, split=split, ignore=ignore, types=type, fields=source)
    if cluster.nnodes > 1 and not quiet:
        typer.echo(
            f"{cluster.nnodes} machines meet at {cluster.rdzv}; this one waits up to {cluster.wait_s:.0f} s for the others", err=True
        )
    with interruptible(folder, json, lambda: False), Progress(quiet) as progress:
        done = train(
            loaded,
            rows,
            validation=fraction_or_name(validation),
            test=fraction_or_name(test),
            run=folder,
            resume=resume,
            weights=weights,
            weights_partial=weights_partial,
            privacy=privacy_of(privacy, ("example",), before.get("privacy")),
            optimizer_overrides=overrides,
            cluster=cluster,
            on_event=progress,
            **plan,
        )
    if not progress.heard:
        brought(done, cluster.nproc, str(cluster.rdzv), json)
        return
    for item in (done.record.get("weights") or {}).get("left", []):
        typer.echo(f"not copied: {item}", err=True)
    if out is not None and done.stopped != "signal":
        save_weights(out, done.model.state_dict())
    finish(
        done,
        json,
        {"ranks": done.result.get("ranks", progress.ranks), "report": str(write_report(folder)), **({"out": str(out)} if out else {})},
    )


@app.command()
def evaluate(run: RunFolder, data: DataPath, source: SourceFields = None, device: Device = None, json: Json = False) -> None:
    """Figures of a trained run on data with targets."""
    from anyfit.trained import evaluate as measure

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

    loaded, plan = task_and_plan(task, set, {"batch_size": batch_size}, {})
    seen = examine(loaded, source_of(data, target, ignore=ignore, types=type, fields=source), **plan)

    def show() -> None:
        print_table(["", ""], [[name, value] for name, value in seen.items() if name not in ("ok", "problems")])
        for problem in seen["problems"]:
            typer.echo(f"problem: {problem}")
        typer.echo("ok" if seen["ok"] else f"{len(seen['problems'])} problems")

    print_result(seen, json, show)
    if not seen["ok"]:
        raise typer.Exit(1)


app.command()(federated.federate)
app.command()(shrunk.shrink)


@app.command(hidden=True)
def rank(call: Annotated[Path, typer.Argument(metavar="CALL", help="The file of a call, which a launcher wrote.")]) -> None:
    """Be one rank of a fit; what a launcher starts."""
    from anyfit.fit import take_part

    try:
        done = take_part(call)
    except AnyfitError as error:  # its launcher tells
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(0 if done.stopped != "signal" else 128 + int(done.result["signal"] or 15))


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
    """The main job on real data: train, kill and resume, federate, evaluate, report, shrink."""
    from anyfit.cli.demo import run_demo

    result = run_demo(folder)
    print_result(result, json, lambda: None)
    if not result["exact"]:
        raise typer.Exit(1)


def _changed(plan: dict[str, Any]) -> dict[str, Any]:
    from anyfit.values import Plan

    return {name: value for name, value in plan.items() if value != getattr(Plan(), name)}


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 failed while running, 2 bad input, 128+n stopped by signal n."""
    try:
        app()
    except AnyfitError as error:
        if "--json" in sys.argv and os.environ.get("RANK", "0") == "0":  # of several under torchrun one speaks for all
            sys.stdout.write(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}) + "\n")
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
