"""What commands share: their options, what these name (a source, a task, a folder), and how a result is printed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyfit.cli.progress import print_table
from anyfit.errors import InputError
from anyfit.run import under_torchrun

if TYPE_CHECKING:
    from anyfit.cluster import Cluster
    from anyfit.data import Source

__all__ = [
    "Backend",
    "BatchSize",
    "DataPath",
    "Device",
    "Dtype",
    "Epochs",
    "Group",
    "Ignore",
    "Json",
    "MaxSentences",
    "MaxTokens",
    "Nnodes",
    "Nproc",
    "OptimizerOverrides",
    "Quiet",
    "RankTimeout",
    "Rdzv",
    "Restarts",
    "Resume",
    "RunFolder",
    "RunOption",
    "Seed",
    "Sets",
    "Shares",
    "SourceFields",
    "Split",
    "Steps",
    "Target",
    "TaskName",
    "Test",
    "Types",
    "UpdateFreq",
    "Validation",
    "Wait",
    "Weights",
    "brought",
    "cluster_of",
    "finish",
    "fraction_or_name",
    "interruptible",
    "of_hetseq",
    "overrides_of",
    "pairs",
    "print_result",
    "privacy_of",
    "recorded",
    "run_folder",
    "shared_folder",
    "source_of",
    "task_and_plan",
]

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A ready task (see `anyfit tasks`), file.py:Class or module:Class.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
DataPath = Annotated[
    str,
    typer.Option(
        "--data",
        help="A file, pattern, folder or zip, a URL of one or of a database, or 'digits' (comes with anyfit).",
    ),
]
Target = Annotated[str | None, typer.Option("--target", help="The column to learn; several: a,b (default: 'target' where there is one).")]
Test = Annotated[str | None, typer.Option("--test", help="A file to test on at the end, or a fraction of the rows.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A file to validate on, or a fraction of the rows.")]
Group = Annotated[str | None, typer.Option("--group", help="Keep rows with one value of this column in one split.")]
Split = Annotated[str | None, typer.Option("--split", help="A column that says train, validation or test.")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="A column to leave out. Can be repeated.")]
Types = Annotated[list[str] | None, typer.Option("--type", metavar="COLUMN=TYPE", help="Force a column's type. Can be repeated.")]
SourceFields = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="FIELD=VALUE",
        help="More on the data: weight, missing, delimiter, encoding, table, query, size. Can be repeated.",
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the task or of the plan. Can be repeated.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data (default: the task's).")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps, in place of epochs.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows of a batch (default: the task's).")]
Seed = Annotated[int | None, typer.Option("--seed", help="One seed gives one result (default: 0).")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda[:i] or mps (default: auto).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float64 or bfloat16 (default: float32).")]
Weights = Annotated[Path | None, typer.Option("--weights", help="A run or a .safetensors file to start from.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Folder for the run (default: runs/<task>-<n>).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

Nproc = Annotated[int | None, typer.Option("--nproc", help="Processes of this machine that share each step (default: 1).")]
Nnodes = Annotated[int | None, typer.Option("--nnodes", help="Machines that share each step; each runs this command (default: 1).")]
Rdzv = Annotated[
    str | None,
    typer.Option(
        "--rdzv",
        metavar="HOST:PORT",
        help="Where machines meet: the first one and a free port of it (also tcp://HOST:PORT), or file:///PATH that all share.",
    ),
]
Wait = Annotated[float | None, typer.Option("--wait", metavar="SECONDS", help="How long to wait for all machines (default: 300).")]
RankTimeout = Annotated[
    float | None,
    typer.Option("--rank-timeout", metavar="SECONDS", help="Without a sign of life for so long, a process counts as dead (default: 30)."),
]
Restarts = Annotated[
    int | None, typer.Option("--restarts", help="How many processes of this machine are started anew after they died (default: 0).")
]
Shares = Annotated[
    str | None,
    typer.Option("--shares", help="Parts of each step: measured (by speed), equal, or fixed ones such as 5:1 (default: measured)."),
]
Backend = Annotated[
    str | None, typer.Option("--backend", help="What adds gradients: auto, gloo, or nccl (experimental, on GPUs; default: auto).")
]
OptimizerOverrides = Annotated[
    str | None,
    typer.Option("--optimizer-overrides", metavar="NAME=VALUE,...", help="Options of the optimizers in place of the task's or the run's."),
]
# HetSeq's names of the same things
UpdateFreq = Annotated[int | None, typer.Option("--update-freq", hidden=True, help="HetSeq's name of `--set accumulate=`.")]
MaxSentences = Annotated[int | None, typer.Option("--max-sentences", hidden=True, help="HetSeq's name of `--batch-size`.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", hidden=True, help="HetSeq's name of `--set max_tokens=`.")]


def pairs(option: str, items: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE items of an option that can be repeated."""
    result = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InputError(f"{option} (={item!r}) must be NAME=VALUE")
        result[name] = value
    return result


def source_of(
    data: str,
    target: str | None,
    *,
    group: str | None = None,
    split: str | None = None,
    ignore: list[str] | None = None,
    types: list[str] | None = None,
    fields: list[str] | None = None,
    before: Mapping[str, Any] | None = None,
) -> Source:
    """The source that the options describe; what a resumed run says of its columns (`before`) stands where they are silent."""
    from anyfit.data import Source
    from anyfit.values import coerce

    allowed = ("weight", "missing", "delimiter", "encoding", "table", "query", "size")
    more = pairs("--source", fields)
    unknown = sorted(set(more) - set(allowed))
    if unknown:
        raise InputError(f"--source (={unknown[0]!r}) is no field of the data; there are: {', '.join(allowed)}")
    hints = typing.get_type_hints(Source)
    hints["missing"] = tuple[str, ...]
    checked = {name: coerce(name, value, hints[name]) for name, value in more.items()}
    if checked.get("delimiter") in ("\\t", "tab"):
        checked["delimiter"] = "\t"
    several = None if target is None else tuple(target.split(","))
    wanted = several[0] if several is not None and len(several) == 1 else several
    given = {"target": wanted, "group": group, "split": split, "ignore": tuple(ignore or ()), "types": pairs("--type", types), **checked}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in (before or {}).items()}
    return Source(data, **{**kept, **{name: value for name, value in given.items() if value not in (None, (), {})}})


def print_result(value: dict[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """For people, or as one JSON object on the last line of stdout."""
    if as_json:
        sys.stdout.write(json.dumps(value, allow_nan=False, default=str) + "\n")
    else:
        show()


@contextmanager
def interruptible(folder: Path, as_json: bool, complete: Callable[[], bool], again: str = "--resume") -> Iterator[None]:
    """Ctrl-C while nothing notes it for later (a second one, or figures at the end): say what is kept, and end with its code."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / "run.json").exists() and os.environ.get("RANK", "0") == "0":
            print_result({"run": str(folder), "stopped": "signal"}, as_json, lambda: None)
            kept = "all rounds are complete, what comes after them is missing" if complete() else "what was saved last is kept"
            typer.echo(f"stopped by a signal; {kept}; go on with: --run {folder} {again}", err=True)
        raise typer.Exit(130) from None


def run_folder(run: Path | None, task: str, resume: bool) -> Path:
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


def shared_folder(run: Path | None, folder: Path) -> Path:
    """The folder that was asked for; under torchrun, where none was, the free one that rank 0 found."""
    if run is not None or not under_torchrun():
        return folder
    from anyfit.cluster.meeting import connect

    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise InputError("--run FOLDER is missing: these ranks were not started by torchrun itself, and cannot agree on one")
    job = f"{environment['TORCHELASTIC_RUN_ID']}/{environment['TORCHELASTIC_RESTART_COUNT']}/folder"
    store, _ = connect(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), serve=False, wait_s=60.0, job=job)
    if environment["RANK"] == "0":
        store.set("run", str(folder))
    try:
        return Path(store.get("run").decode())
    except RuntimeError as error:
        raise InputError("--run FOLDER is missing, and rank 0 has not told within 60 s which one it takes; give one") from error


def cluster_of(given: Mapping[str, Any], run: Path | None) -> Cluster:
    """The ranks that the options describe: fields of Cluster, None where an option was not given."""
    from anyfit.cluster import Cluster

    options = {"wait_s": "--wait", "timeout_s": "--rank-timeout", **{name: f"--{name}" for name in ("shares", "backend", "restarts")}}
    asked = {name: value for name, value in given.items() if value is not None}
    cluster = Cluster(**asked)
    if under_torchrun():
        starts = next((name for name in ("nproc", "nnodes", "rdzv", "restarts") if name in asked), None)
        if starts is not None:
            raise InputError(f"--{starts} (={asked[starts]}) says what to start, and torchrun has started these processes; use one of both")
    elif cluster.plain:
        idle = next((name for name in options if name in asked), None)
        if idle is not None:
            raise InputError(f"{options[idle]} (={asked[idle]}) is for several processes; add --nproc N, or leave it out")
    elif cluster.nnodes > 1 and run is None:
        raise InputError(f"--run FOLDER is missing: {cluster.nnodes} machines need one that all of them see")
    return cluster


def overrides_of(text: str | None) -> dict[str, Any]:
    """NAME=VALUE,... with JSON values, or one JSON object."""
    from anyfit.values import parse

    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        return dict(parse(text, f"--optimizer-overrides (={text!r})"))
    items = pairs("--optimizer-overrides", re.split(r",(?=[^,=\[\]]+=)", text))  # betas=[0.9,0.98] has a comma of its own
    return {name: parse(value, f"{name} (={value!r}) of --optimizer-overrides") for name, value in items.items()}


def of_hetseq(
    sets: list[str] | None, batch_size: int | None, *, max_sentences: int | None, max_tokens: int | None, update_freq: int | None
) -> tuple[list[str] | None, int | None]:
    """--set and --batch-size, with what HetSeq's names for them ask."""
    if max_sentences is not None and batch_size is not None:
        raise InputError(f"--max-sentences (={max_sentences}) is HetSeq's name of --batch-size (={batch_size}); give one of both")
    named = pairs("--set", sets)
    for option, field, value in (("--max-tokens", "max_tokens", max_tokens), ("--update-freq", "accumulate", update_freq)):
        if value is not None:
            if field in named:
                raise InputError(f"{option} (={value}) is HetSeq's name of --set {field}={named[field]}; give one of both")
            sets = [*(sets or []), f"{field}={value}"]
    return sets, batch_size if max_sentences is None else max_sentences


def recorded(folder: Path) -> dict[str, Any]:
    """What the run that is to go on says of itself; nothing where it has not begun."""
    from anyfit.run import read_record

    return read_record(folder) if (folder / "run.json").exists() else {}


def task_and_plan(name: str, sets: list[str] | None, given: dict[str, Any], record: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The task with its fields and the plan's overrides; a resumed run's values (`record`) stand where none are given."""
    from anyfit.load import load
    from anyfit.values import Plan

    given_fields = pairs("--set", sets)
    plan = {name: value for name, value in given.items() if value is not None}
    plan |= {field: value for field, value in given_fields.items() if field in Plan.__dataclass_fields__}
    values = {field: value for field, value in given_fields.items() if field not in Plan.__dataclass_fields__}
    if record:
        before = record["plan"]
        if "epochs" in plan or "steps" in plan:
            before = {field: value for field, value in before.items() if field not in ("epochs", "steps")}
        plan = {**before, **plan}
        values = {**record["task"]["values"], **values}
    return load(name, values), plan


def fraction_or_name(value: str | None) -> float | str | None:
    """A number is a fraction of the rows, anything else a source."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


def privacy_of(text: str | None, kinds: tuple[str, ...], before: dict[str, Any] | None) -> Any:
    """KIND:FIELD=VALUE,... as the privacy of sites or of examples; that of a resumed run where none is given."""
    from anyfit.privacy import ExamplePrivacy, SitePrivacy
    from anyfit.values import coerce

    classes: dict[str, Any] = {"site": SitePrivacy, "example": ExamplePrivacy}
    if text is None and not before:
        return None
    if text is None:
        assert before is not None
        cls = SitePrivacy if "quantile" in before else ExamplePrivacy
        kept = {name: value for name, value in before.items() if name in cls.__dataclass_fields__}
        return cls(**{**kept, **({"unit": None} if kept.get("unit") == "row" else {})})
    kind, _, rest = text.partition(":")
    if kind not in kinds:
        raise InputError(
            f"--privacy (={text!r}) must begin with {' or '.join(f'{name}:' for name in kinds)}, e.g. {kinds[0]}:epsilon=8,delta=1e-5"
        )
    cls = classes[kind]
    hints = typing.get_type_hints(cls)
    given = pairs("--privacy", [item for item in rest.split(",") if item])
    unknown = next((name for name in given if name not in hints), None)
    if unknown is not None:
        raise InputError(f"--privacy (={text!r}): {unknown!r} is no field of it; there are: {', '.join(hints)}")
    if "delta" not in given:
        raise InputError(f"--privacy (={text!r}) lacks delta: well below one over the number of those protected, e.g. {text},delta=1e-5")
    return cls(**{name: coerce(f"{name} of --privacy", value, hints[name]) for name, value in given.items()})


def finish(done: Any, as_json: bool, more: dict[str, Any], show_more: Callable[[], object] = lambda: None) -> None:
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
        show_more()
        typer.echo(f"run     {done.path}\nreport  {more['report']}")

    print_result(result, as_json, show)
    if done.stopped == "signal":
        typer.echo(f"stopped by a signal; go on with: --run {done.path} --resume", err=True)
        raise typer.Exit(128 + int(done.result["signal"] or signal.SIGTERM))


def brought(done: Any, ranks: int, place: str, as_json: bool) -> None:
    """What a machine says whose ranks took part in a run that is told of elsewhere."""
    host = place.removeprefix("tcp://")
    if not under_torchrun():
        result = {"run": str(done.path), "stopped": done.stopped, "steps": done.result["steps"], "brought": {"ranks": ranks, "to": host}}
        many = "1 rank" if ranks == 1 else f"{ranks} ranks"
        print_result(
            result, as_json, lambda: typer.echo(f"brought {many} to {host}; the run is {done.path}, and its figures are told there")
        )
    if done.stopped == "signal":
        raise typer.Exit(128 + int(done.result["signal"] or signal.SIGTERM))
