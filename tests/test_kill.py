"""kill -9 at any moment, then resume: the same weights, to the bit, and the same log."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "kill_worker.py"
CONFIGURATIONS = [(optimizer, channels_last) for optimizer in ("adamw", "sgd") for channels_last in ("no", "yes")]


def start(run: Path, optimizer: str, channels_last: str, when: str) -> int:
    """-> the exit code; -9 where the kill came before the end."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(run), optimizer, channels_last, when], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def outcome(run: Path) -> dict[str, bytes]:
    """What must be equal; the last checkpoint but one was due by the clock, so it may be another."""
    assert not list((run / "checkpoints").glob(".*")), "a killed write left its temporary file"
    last = max((run / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for path in (last, run / "checkpoints" / "best.safetensors", run / "metrics.jsonl")}


def survives(folder: Path, optimizer: str, channels_last: str, moments: list[str]) -> None:
    whole, killed = folder / "whole", folder / "killed"
    assert start(whole, optimizer, channels_last, "none") == 0
    kills = sum(start(killed, optimizer, channels_last, moment) == -9 for moment in moments)
    assert start(killed, optimizer, channels_last, "none") == 0
    assert kills == len(moments), "a kill came too late to be one"
    a, b = outcome(whole), outcome(killed)
    assert a.keys() == b.keys()
    assert all(a[name] == b[name] for name in a), [name for name in a if a[name] != b[name]]


def test_five_kills_leave_no_trace(tmp_path: Path) -> None:
    survives(tmp_path, "adamw", "yes", ["time:0.3", "write:2", "rename:1", "line:3", "time:0.15"])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "channels_last"), CONFIGURATIONS)
def test_kills_at_random_moments_leave_no_trace(tmp_path: Path, optimizer: str, channels_last: str) -> None:
    draw = random.Random(f"{optimizer} {channels_last}")
    moments = [f"time:{draw.uniform(0.02, 0.35):.3f}" for _ in range(3)]
    moments += [f"write:{draw.randint(1, 3)}", f"{draw.choice(['rename:1', 'line'])}".replace("line", f"line:{draw.randint(1, 3)}")]
    draw.shuffle(moments)
    survives(tmp_path, optimizer, channels_last, moments)
