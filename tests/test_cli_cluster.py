"""Ranks as people and machines use them: the command line, torchrun, Slurm, what is shown while they run, and the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed

from anyfit.cli import main
from anyfit.cli.options import of_hetseq, overrides_of, run_folder, shared_folder
from anyfit.cli.progress import Progress
from anyfit.cli.ranks import ranks_line, shown
from anyfit.errors import InputError
from anyfit.report import write_report
from anyfit.report.records import Ranks, read
from anyfit.run import committed
from anyfit.state import State

ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Run = Callable[..., Outcome]


@pytest.fixture
def anyfit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyfit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def adults(tmp_path: Path) -> None:
    """adults.csv: numbers, categories, a missing value and two classes."""
    lines = [f"{20 + i % 50},{'?' if i % 7 == 0 else 'abc'[i % 3]},{'>50K' if i % 50 > 25 else '<=50K'}" for i in range(400)]
    (tmp_path / "adults.csv").write_text("age,job,income\n" + "\n".join(lines) + "\n")


# masks of a sample do not depend on who computes it, so that ranks equal one process
EXACT = ("--seed", 1, "--dtype", "float64", "--set", "exact_dropout=true", "--set", "dropout=0.1")
FIT = ("fit", "tabular", "--data", "adults.csv", "--target", "income", "--test", 0.2, "--steps", 12, "--batch-size", 32, *EXACT)
QUIET = ("--quiet", "--json")


def free_port(first: int, last: int) -> int:
    for port in range(first + os.getpid() % (last - first), last):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


# ------------------------------------------------------------------ runs


def test_two_ranks_give_the_figures_and_weights_of_one(anyfit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as alone:  # one process makes no group, no store, no process
        for place, name in (
            (torch.distributed, "TCPStore"),
            (torch.distributed, "ProcessGroupGloo"),
            (socket, "socket"),
            (subprocess, "Popen"),
        ):
            alone.setattr(place, name, None)
        one = anyfit(*FIT, *QUIET, "--nproc", 1, "--run", "one")
    assert one.code == 0 and one.json["ranks"] == 1
    assert not torch.distributed.is_initialized()

    two = anyfit(*FIT, "--json", "--nproc", 2, "--shares", "5:1", "--set", "log_every=4", "--run", "two")
    assert two.code == 0, two.err
    assert list(two.json) == list(one.json) and two.json["ranks"] == 2
    assert two.json["test"] == {name: pytest.approx(value, abs=1e-10) for name, value in one.json["test"].items()}
    alone, shared = (State.load(committed(tmp_path / name)[-1]).model for name in ("one", "two"))
    assert max(float((alone[name] - value).abs().max()) for name, value in shared.items() if value.is_floating_point()) < 1e-10
    command = json.loads((tmp_path / "two/run.json").read_text())["command"]  # that which repeats the run, not a rank's own
    assert command[:3] == ["anyfit", "fit", "tabular"] and "--nproc" in command
    # one line for each line of the log, with what each rank took of that step
    assert len(re.findall(r"^ +step (?:4|8|12)  2 ranks     shares 27:5 ", two.err, re.MULTILINE)) == 3
    told = [json.loads(line) for line in (tmp_path / "two/timings.jsonl").read_text().splitlines() if '"ranks"' in line]
    assert [[rank["share"] for rank in line["ranks"]] for line in told] == [[27, 5]] * 3
    assert (tmp_path / "two/ranks.png").stat().st_size > 5000 and not (tmp_path / "one/ranks.png").exists()
    assert "<h2>Ranks</h2>" in (tmp_path / "two/report.html").read_text()
    assert "<h2>Ranks</h2>" not in (tmp_path / "one/report.html").read_text()


def start(*command: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


def results_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_ranks_of_torchrun_write_one_run_and_one_speaks(tmp_path: Path) -> None:
    (tmp_path / "runs/tabular-1").mkdir(parents=True)  # is taken; all ranks have to find the same next one
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "--", "anyfit")
    done = start(*torchrun, *FIT, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = results_in(done.stdout)
    assert result["run"] == "runs/tabular-2" and result["ranks"] == 2 and result["steps"] == 12
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tabular-1", "tabular-2"}
    assert done.stderr.count("parameters; rows") == 1 and "step 12  2 ranks" in done.stderr
    record = json.loads((tmp_path / "runs/tabular-2/run.json").read_text())
    assert record["command"] == ["anyfit", *map(str, FIT), "--json"]


@pytest.mark.slow  # two launchers with a rank each
def test_the_slurm_example_shares_a_fit_over_its_nodes(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    # Slurm's srun on two nodes, both of which are this machine: options of its own, then the command
    srun = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun.options; shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_GPUS_ON_NODE=$((node + 1)) "$@" > "node$node.out" 2> "node$node.err" & nodes+=($!)
done
worst=0
for node in "${nodes[@]}"; do wait "$node" || worst=$?; done
exit $worst
"""
    for name, script in (("srun", srun), ("hostname", "#!/bin/sh\necho localhost\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (tools / "anyfit").write_text(f'#!/bin/sh\nexec {sys.executable} -m anyfit "$@"\n')
    (tools / "anyfit").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    job = str(free_port(20000, 30000) - 20000)  # the example takes a port by the job's number
    done = start("bash", ROOT / "examples/slurm.sh", *FIT[1:], "--json", cwd=tmp_path, PATH=path, SLURM_JOB_ID=job, SLURM_JOB_NUM_NODES="2")
    errors = "".join((tmp_path / f"node{node}.err").read_text() for node in range(2))
    assert done.returncode == 0, done.stderr + errors
    told = [results_in((tmp_path / f"node{node}.out").read_text()) for node in range(2)]
    assert [len(lines) for lines in told] == [1, 1]
    (first,), (other,) = sorted(told, key=lambda lines: "brought" in lines[0])
    assert first["ranks"] == 3 and first["steps"] == 12 and first["run"] == f"runs/slurm-{job}"
    assert other["run"] == first["run"] and other["brought"]["to"].startswith("localhost:") and other["brought"]["ranks"] in (1, 2)
    assert errors.count("parameters; rows") == 1 and errors.count("2 machines meet at localhost:") == 2


# ------------------------------------------------------------------ bad input

BAD = {
    "no ranks": (("--nproc", 0), "nproc (=0) must be at least 1"),
    "nowhere to meet": (("--nnodes", 2, "--run", "r"), "nnodes (=2) needs rdzv (--rdzv HOST:PORT)"),
    "no run for many": (("--nnodes", 2, "--rdzv", "localhost:29500"), "--run FOLDER is missing: 2 machines need one that all of them see"),
    "no port": (("--rdzv", "localhost", "--run", "r"), "rdzv (='localhost') must be HOST:PORT"),
    "no such host": (("--rdzv", "no.such.host.invalid:29500", "--run", "r"), "host 'no.such.host.invalid' cannot be found"),
    "unwritable file": (("--rdzv", "file:///proc/nowhere/meet", "--run", "r"), "rdzv (='file:///proc/nowhere/meet') cannot be written"),
    "bad shares": (("--nproc", 2, "--shares", "fair"), "shares (='fair') must be 'measured', 'equal' or relative speeds"),
    "bad backend": (("--nproc", 2, "--backend", "mpi"), "backend (='mpi') must be auto"),
    "no wait": (("--nproc", 2, "--wait", 0), "wait_s (=0.0) must be above 0 seconds"),
    "restarts of nothing": (("--restarts", 2), "--restarts (=2) is for several processes; add --nproc N"),
    "shares of nothing": (("--shares", "5:1", "--nproc", 1), "--shares (=5:1) is for several processes; add --nproc N"),
    "timeout of nothing": (("--rank-timeout", 5), "--rank-timeout (=5.0) is for several processes"),
    "privacy": (("--nproc", 2, "--privacy", "example:epsilon=8,delta=1e-5"), "privacy needs one process"),
    "no such option": (("--optimizer-overrides", "speed=1"), "optimizer_overrides (='speed') is no option of AdamW; it has: lr"),
    "no value": (("--optimizer-overrides", "lr"), "--optimizer-overrides (='lr') must be NAME=VALUE"),
    "no JSON": (("--optimizer-overrides", "lr=1e-3,betas=(0.9,0.98)"), "betas (='(0.9,0.98)') of --optimizer-overrides is not strict JSON"),
    "twice a batch": (
        ("--max-sentences", 8, "--batch-size", 8),
        "--max-sentences (=8) is HetSeq's name of --batch-size (=8); give one of both",
    ),
    "twice tokens": (("--max-tokens", 8, "--set", "max_tokens=9"), "--max-tokens (=8) is HetSeq's name of --set max_tokens=9"),
    "twice updates": (("--update-freq", 2, "--set", "accumulate=2"), "--update-freq (=2) is HetSeq's name of --set accumulate=2"),
    "tokens of images": (("--max-tokens", 8), "max_tokens (=8) needs the samples' lengths"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_written(case: str, anyfit: Run, tmp_path: Path) -> None:
    options, message = BAD[case]
    done = anyfit("fit", "image", "--data", "digits", *options, *QUIET)
    assert message in done.err and done.code == 2
    assert message in done.json["error"]["message"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["adults.csv"]


UNDER_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nproc", 2, "--run", "r"), "--nproc (=2) says what to start, and torchrun has started these processes"),
        (("--restarts", 1, "--run", "r"), "--restarts (=1) says what to start"),
        ((), "--run FOLDER is missing: these ranks were not started by torchrun itself, and cannot agree on one"),
    ],
)
def test_under_torchrun_what_it_does_itself_is_refused(
    options: tuple[object, ...], message: str, anyfit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in UNDER_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    done = anyfit("fit", "image", "--data", "digits", *options, *QUIET)
    assert message in done.err and done.code == 2 and len(results_in(done.out)) == 1
    monkeypatch.setenv("RANK", "1")
    other = anyfit("fit", "image", "--data", "digits", *options, *QUIET)
    assert message in other.err and other.code == 2 and other.out == ""  # one speaks for all
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["adults.csv"]


def test_ranks_of_torchrun_take_the_folder_that_rank_0_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's
    agent = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "7",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_PORT": str(store.port),
    }
    monkeypatch.chdir(tmp_path)
    for name, value in {**UNDER_TORCHRUN, **agent}.items():
        monkeypatch.setenv(name, value)
    first = shared_folder(None, run_folder(None, "image", False))
    first.mkdir(parents=True)  # rank 0 is ahead
    monkeypatch.setenv("RANK", "1")
    assert run_folder(None, "image", False) == Path("runs/image-2")
    assert shared_folder(None, run_folder(None, "image", False)) == first == Path("runs/image-1")
    assert shared_folder(Path("mine"), Path("mine")) == Path("mine")


# ------------------------------------------------------------------ what options mean


def test_overrides_are_json_values() -> None:
    assert overrides_of(None) == {}
    text = 'lr=0.0001,weight_decay=0.01,betas=[0.9,0.98],foreach=null,amsgrad=true,name="a,b"'
    values = {"lr": 0.0001, "weight_decay": 0.01, "betas": [0.9, 0.98], "foreach": None, "amsgrad": True, "name": "a,b"}
    assert overrides_of(text) == values == overrides_of(json.dumps(values))
    with pytest.raises(InputError, match="of --optimizer-overrides is not strict JSON"):
        overrides_of("lr=__import__('os')")


def test_overrides_and_hetseqs_names_reach_the_fit(anyfit: Run, tmp_path: Path) -> None:
    options = ("--max-sentences", 16, "--update-freq", 2, "--optimizer-overrides", "lr=0.25,weight_decay=0.5")
    done = anyfit("fit", "tabular", "--data", "adults.csv", "--target", "income", "--steps", 2, *options, "--run", "r", *QUIET)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "r/run.json").read_text())["plan"]
    assert (plan["batch_size"], plan["accumulate"]) == (16, 2)
    groups = State.load(next((tmp_path / "r/checkpoints").glob("step-*"))).optimizers["main"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5} and {group["initial_lr"] for group in groups} == {0.25}


def test_hetseqs_names_are_names_of_the_same_things() -> None:
    assert of_hetseq(None, 8, max_sentences=None, max_tokens=None, update_freq=None) == (None, 8)
    found = of_hetseq(["lr=1"], None, max_sentences=4, max_tokens=512, update_freq=2)
    assert found == (["lr=1", "max_tokens=512", "accumulate=2"], 4)


# ------------------------------------------------------------------ what is shown


def told(step: int, speeds: list[float], *, members: list[int] | None = None, hosts: int = 1, **more: Any) -> dict[str, Any]:
    """A line about ranks, as a fit tells it: balanced shares of 64 units a rank."""
    total = 64 * len(speeds)
    shares = [round(total * speed / sum(speeds)) for speed in speeds]
    current, equal = max(share / speed for share, speed in zip(shares, speeds, strict=True)), total / len(speeds) / min(speeds)
    ranks = [
        {"rank": rank, "host": f"host{rank % hosts}", "member": (members or range(len(speeds)))[rank], "share": share, "cap": None}
        | {"measured": True, "a": 0.0, "c": 1 / speed, "speed": speed, "seconds": current, "waited": 0.001 * (rank + 1), "units": share}
        for rank, (share, speed) in enumerate(zip(shares, speeds, strict=True))
    ]
    limit = sum(speeds) / len(speeds) / min(speeds)
    line = {"step": step, "seconds": 1.0, "samples_per_s": 900.0, "total": total, "limit": limit, "equal": equal, "current": current}
    return {**line, "best": current, "ranks": ranks, **more}


def test_a_line_tells_of_each_of_a_few_ranks_and_of_the_range_of_many() -> None:
    assert ranks_line(told(50, [900.0, 300.0])) == (
        "     step 50  2 ranks     shares 96:32  speeds 900:300/s  waiting 1:2 ms  2.00x equal shares, 100% of the limit"
    )
    assert ranks_line(told(50, [900.0])) == "     step 50  1 rank      shares 64  speeds 900/s"
    many = ranks_line(told(1000, [100.0 * (1 + rank % 3) for rank in range(9)]))
    assert (
        many == "   step 1000  9 ranks     shares 32 to 96  speeds 100 to 300/s  waiting 1 to 9 ms  2.00x equal shares, 100% of the limit"
    )
    early = told(1, [1.0, 1.0], limit=None, equal=None, current=None)
    for rank in early["ranks"]:
        rank["speed"] = None
    assert ranks_line(early) == "      step 1  2 ranks     shares 64:64  waiting 1:2 ms"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_table_of_ranks_beneath_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with Progress(False) as progress:
        assert not progress.heard and progress.ranks == 1
        progress({"event": "start", "step": 0, "steps": 100, "parameters": 5, "rows": {"train": 9}})
        progress({"event": "ranks", **told(50, [900.0, 300.0])})
        progress({"event": "step", "step": 50, "loss": 0.5})
        progress({"event": "notice", "text": "ranks: 1 lost; 1 go on from step 60"})
        progress({"event": "ranks", **told(100, [900.0])})
        progress({"event": "step", "step": 100, "loss": 0.25})
        assert progress.heard and progress.ranks == 1
    plain = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in screen.getvalue().splitlines())
    lines = [line for line in plain if line]
    assert "note: ranks: 1 lost; 1 go on from step 60" in lines
    last = lines[-3:]  # what stays when it ends
    assert re.fullmatch(r"steps ━+ 100/100 0:00:00 loss 0.2500", last[0])
    assert [line.split() for line in last[1:]] == [
        ["rank", "host", "share", "speed", "waiting"],
        ["0", "host0", "64", "100%", "900/s", "1", "ms"],
    ]


def test_of_many_ranks_the_slowest_and_those_that_wait_are_shown() -> None:
    event = told(1, [100.0 + 10 * rank for rank in range(40)], hosts=4)
    assert [rank["rank"] for rank in shown(event["ranks"])] == [0, 1, 2, 3, 4, 35, 36, 37, 38, 39]
    assert len(shown(event["ranks"][:16])) == 16


def test_who_is_told_nothing_draws_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False) as progress:
        progress({"event": "notice", "text": "this machine joins"})
    assert not progress.heard and capsys.readouterr().err == "note: this machine joins\n"


# ------------------------------------------------------------------ the report


def write_run(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"format": 1, "kind": "fit", "task": {"reference": "image", "class": "Image", "values": {}}})
    )
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_draws_ranks_deaths_and_newcomers(tmp_path: Path) -> None:
    three, two = [900.0, 300.0, 300.0], [900.0, 300.0]
    lines = [told(step, three) for step in (50, 100, 150)]
    lines += [told(step, two, members=[0, 2]) for step in (200, 250)]  # rank 1 died; rank 2 is rank 1 now
    lines += [told(step, three, members=[0, 2, 3]) for step in (300, 350)]
    run = write_run(tmp_path / "run", lines)
    ranks = read(run).ranks
    assert [count for _, count in ranks.counts] == [3, 3, 3, 2, 2, 3, 3]
    assert list(ranks.shares) == ["rank 0", "rank 1", "rank 2", "rank 2 from step 300"]
    assert [at for at, _ in ranks.shares["rank 1"]] == [50, 100, 150]
    assert [at for at, _ in ranks.waited["rank 2"]] == [50, 100, 150, 200, 250, 300, 350]
    page = write_report(run).read_text()
    assert (run / "ranks.png").stat().st_size > 5000
    assert "1.67 times as fast as with equal shares, 100% of what the speeds" in page
    assert "<dt>ranks</dt><dd>3 (2 to 3)</dd>" in page and "50 to 150" in page and "rank 2 from step 300" in page
    (run / "timings.jsonl").write_text("")
    assert "Ranks" not in write_report(run).read_text() and not (run / "ranks.png").exists()


def test_a_resume_takes_back_what_its_ranks_will_do_again() -> None:
    ranks = Ranks()
    for line in [told(50, [9.0, 3.0]), told(100, [9.0, 3.0]), told(150, [9.0, 3.0]), told(100, [9.0, 3.0, 3.0], members=[2, 0, 1])]:
        ranks.take(line)
    ranks.take({"step": 150, "seconds": 1.0, "samples_per_s": 5.0})  # then one process by itself
    assert ranks.counts == [(50, 2), (100, 3), (150, 1)]
    assert [at for at, _ in ranks.shares["rank 0"]] == [50, 100] and list(ranks.shares) == ["rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize("value", [3, "x", None, [None], [{}], [{"rank": 0, "share": "x", "waited": None, "member": "y"}], {"a": 1}, [[1]]])
def test_odd_lines_of_timings_still_give_a_page(value: Any, tmp_path: Path) -> None:
    odd = {"step": 1, "samples_per_s": 2.0, "ranks": value, "equal": value, "current": 0, "limit": "x"}
    assert write_report(write_run(tmp_path / "run", [odd, {**odd, "step": value}, odd])).exists()
    assert not (tmp_path / "run/ranks.png").exists()
