"""The demo: the main job on the real digits that scikit-learn ships, in minutes on two cores."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from anyfit.cli.progress import print_table
from anyfit.data import Source
from anyfit.errors import InputError, RunError
from anyfit.federate import federate
from anyfit.load import load
from anyfit.report import write_report
from anyfit.run import Run
from anyfit.shrink.pipeline import shrink
from anyfit.trained import evaluate

__all__ = ["run_demo"]

SHARES = {"site-a": 0.05, "site-b": 0.15, "site-c": 0.30, "site-d": 0.50}  # of the training rows
TEST = 0.2
SEED = 1


def run_demo(folder: Path) -> dict[str, Any]:
    """Train, kill and resume, federate, evaluate, report, shrink; prints a table and returns it."""
    if folder.exists() and any(folder.iterdir()) and not (folder / ".demo").exists():
        raise InputError(f"folder (={str(folder)!r}) holds something else; give an empty one with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".demo").touch()
    rows: list[list[Any]] = []

    def stage(text: str) -> None:
        sys.stderr.write(f"{text} ...\n")

    stage("1/5 train a small network on 1,797 handwritten digits")
    whole, seconds = _timed(lambda: _train(folder / "whole"))
    rows.append(["trained here", whole["test"]["accuracy"], seconds, 0])

    stage("2/5 train it again, kill it twice with SIGKILL, resume")
    begun = time.monotonic()
    kills = _train_and_kill(folder / "killed", times=2)
    resumed = _train(folder / "killed", "--resume")
    exact = _same(folder / "whole", folder / "killed")
    rows.append([f"killed {kills} times, resumed", resumed["test"]["accuracy"], time.monotonic() - begun, 0])

    stage("3/5 train the same task over four unequal sites that keep their rows")
    sites, test = _sites(folder)
    run, seconds = _timed(
        lambda: federate(load("image"), sites, rounds=15, epochs=2, batch_size=32, seed=SEED, test=test, run=folder / "federated")
    )
    moved = run.result["bytes"]["up"] + run.result["bytes"]["down"]
    rows.append([f"federated over {len(sites)} sites", run.splits["test"]["accuracy"], seconds, moved])

    stage("4/5 evaluate what was saved, and write the report")
    again, seconds = _timed(lambda: evaluate(folder / "federated", test))
    rows.append(["federated, read back from disk", again["accuracy"], seconds, 0])
    write_report(folder / "federated")
    report = write_report(folder / "whole")

    stage("5/5 shrink the federated network over the same sites, to int8 and C")
    small, seconds = _timed(lambda: _shrink(run, sites, test, folder / "shrunk"))
    rows.append([small["what"], small["accuracy"], seconds, small.pop("bytes_moved")])

    if not exact:
        sys.stderr.write("the resumed run differs from the uninterrupted one: this is a defect\n")
    print_table(["what", "accuracy", "seconds", "bytes moved"], rows)
    facts = [["resumed weights and log equal the uninterrupted ones, bit for bit", "yes" if exact else "NO"]]
    facts += [[f"C: {small['flash_bytes']:,} bytes of constants, {small['ram_bytes']:,} of memory", small["checked"]]]
    print_table(["", ""], [*facts, ["report", str(report)], ["report of the small network", small["report"]]])
    names = ("what", "accuracy", "seconds", "bytes_moved")
    return {"rows": [dict(zip(names, row, strict=True)) for row in rows], "exact": exact, "report": str(report), "shrunk": small}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.monotonic()
    return work(), time.monotonic() - begun


def _command(run: Path, *more: str) -> list[str]:
    options = [
        "--data",
        "digits",
        "--test",
        str(TEST),
        "--epochs",
        "30",
        "--batch-size",
        "32",
        "--seed",
        str(SEED),
        "--run",
        str(run),
        "--json",
        "--quiet",
    ]
    # a checkpoint every 0.2 s, so that a kill falls between epochs as well
    return [sys.executable, "-m", "anyfit", "fit", "image", *options, "--set", "checkpoint_every_s=0.2", *more]


def _train(run: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(_command(run, *more), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"training failed with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _train_and_kill(run: Path, times: int) -> int:
    """Start training and kill it once new checkpoints are there; how often that came before its end."""
    kills = 0
    for attempt in range(times):
        seen = set(run.glob("checkpoints/step-*"))
        process = subprocess.Popen(_command(run, *(["--resume"] if attempt else [])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not set(run.glob("checkpoints/step-*")) - seen:
            time.sleep(0.02)
        time.sleep(0.15)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    return kills


def _same(a: Path, b: Path) -> bool:
    """Whether the last checkpoint and the log are equal to the bit."""
    last = [max((run / "checkpoints").glob("step-*")) for run in (a, b)]
    logs = [(run / "metrics.jsonl").read_bytes() for run in (a, b)]
    return last[0].name == last[1].name and last[0].read_bytes() == last[1].read_bytes() and logs[0] == logs[1]


def _sites(folder: Path) -> tuple[dict[str, Source], Source]:
    """The training rows of the first run, dealt out unevenly, and its test rows."""
    from anyfit.data import read_splits

    parts = read_splits(Source("digits"), None, TEST, wants_validation=False)
    train: pa.Table = parts["train"]
    order = np.random.default_rng(SEED).permutation(train.num_rows)
    bounds = np.cumsum([0, *(round(share * train.num_rows) for share in SHARES.values())])
    bounds[-1] = train.num_rows
    sites = {
        name: Source(train.take(pa.array(np.sort(order[start:stop]))))
        for name, start, stop in zip(SHARES, bounds, bounds[1:], strict=False)
    }
    return sites, Source(parts["test"])


def _shrink(run: Run, sites: Mapping[str, Source], test: Source, folder: Path) -> dict[str, Any]:
    """Half the channels and int8, trained and calibrated at the sites; exported to C and, where there is a compiler, run over the test rows."""
    moved = 0

    def count(event: Mapping[str, Any]) -> None:
        nonlocal moved
        moved += sum(event.get(name) or 0 for name in ("bytes_up", "bytes_down") if event["event"] == "round")

    options: dict[str, Any] = {"structured": 0.5, "quantize": "int8", "finetune": 2, "batch_size": 32, "export": ("c",), "name": "digits"}
    done = shrink(run.task, run, sites, test=test, fit=partial(federate, rounds=4), seed=SEED, run=folder, on_event=count, **options)
    last = done.stages[-1]
    ran = last.about.get("equal")
    int8 = next(stage for stage in done.stages if stage.name == "int8")
    return {
        "what": "shrunk over the same sites" + (", as compiled C" if ran else ", simulated int8"),
        "accuracy": (last if ran else int8).value("accuracy"),
        "bytes_moved": moved,
        "flash_bytes": last.value("weights_bytes"),
        "ram_bytes": last.value("ram_bytes"),
        "checked": f"equal to the integers in {ran['rows']} rows" if ran else last.about["note"],
        "report": str(folder / "report.html"),
    }
