"""python benchmarks/cluster.py [--json] [--quick]: two unequal ranks on this machine against equal shares and torch's DDP; drift, death.

A rank is made slow by a sleep per row, which costs no CPU, on top of what its rows really take; 1:3 is a rank that takes three times as
long for a row. In one run the same two processes take blocks of steps in turn: equal shares, measured shares, DDP. Step times are wall
time at rank 0; ratios are made round by round. The limit is the sum of speeds over ranks times the slowest, speeds as measured in the
blocks of equal shares. Deaths go through `fit(cluster=...)` as users call it: SIGKILL of rank 0 or another at random moments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from anyfit import engine, machine
from anyfit.cluster import Balancer, Cluster, Group, Member
from anyfit.cluster.meeting import Coordinator, Place, connect
from anyfit.data import Share
from anyfit.fit import fit
from anyfit.prepare import built, prepare
from anyfit.schema import Schema
from anyfit.state import Position
from anyfit.tasks.image import Image
from anyfit.values import Plan

KINDS = ("equal", "balanced", "ddp")
PACE_MS = 0.3  # of a row at the fast rank, beside what it really takes
RATIOS = (1, 2, 3, 4)
SETTLE = 40  # steps in which the balancer finds the shares
BLOCK, DROPPED = 10, 2  # steps of a block; the first of them belong to the change of blocks
JITTER = 0.1


class Paced(nn.Module):
    """A network whose rank needs `ms` more for each row; `jitter` is the relative deviation of a batch's time."""

    def __init__(self, network: nn.Module, ms: float = 0.0) -> None:
        super().__init__()
        self.network, self.ms, self.jitter, self.draw = network, ms, 0.0, random.Random(0)

    def forward(self, image: Tensor) -> Tensor:
        if self.training and self.ms > 0:
            time.sleep(len(image) * self.ms / 1000 * max(0.0, 1 + self.jitter * self.draw.gauss(0, 1)))
        logits: Tensor = self.network(image)
        return logits


class Convolutions(Image):
    """anyfit's network for images of the size of MNIST's, an eighth as wide: 0.6 M parameters."""

    channels: int = 4
    hidden: int = 512
    dropout: float = 0.0
    ms: float = 0.0

    def plan(self) -> Plan:
        return Plan(steps=100, batch_size=64, seed=1)

    def build_model(self, schema: Schema) -> nn.Module:
        return Paced(super().build_model(schema), self.ms)


class Perceptron(Convolutions):
    """One hidden layer: 0.4 M parameters."""

    hidden: int = 512

    def build_model(self, schema: Schema) -> nn.Module:
        return Paced(nn.Sequential(nn.Flatten(), nn.Linear(784, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10)), self.ms)


WORKS: dict[str, type[Convolutions]] = {"mlp": Perceptron, "cnn": Convolutions}


def images(rows: int = 8192, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Noise of MNIST's size: the arithmetic is the same."""
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(rows, 1, 28, 28, generator=generator, dtype=dtype),
        "target": torch.randint(0, 10, (rows,), generator=generator),
    }


# ------------------------------------------------------------------ a rank


class Rank:
    """One of two ranks, in a process of its own: it answers lines of JSON."""

    def __init__(self, number: int, port: int) -> None:
        self.number, self.port = number, port
        dist.init_process_group("gloo", store=connect("127.0.0.1", port, serve=False, wait_s=60, job="ddp")[0], rank=number, world_size=2)

    def begin(self, job: str, work: str) -> None:
        """A fit of two ranks as `fit` sets it up, without its records."""
        task, rows = WORKS[work](), images()
        self.prepared = prepare(task, rows, target=None, validation=None, test=None, plan={"batch_size": 256})
        store, beats = (connect("127.0.0.1", self.port, serve=False, wait_s=60, job=job)[0] for _ in range(2))
        member = Member(store, beats, Place(0, self.number), "127.0.0.1", parent=os.getppid())
        member.present()
        self.group = Group(member, torch.device("cpu"))
        self.group.meet({})
        torch.manual_seed(1)
        self.model: Any = built(task, self.prepared.schema)
        self.trainer = engine.make_trainer(task, self.model, self.prepared.plan, 1 << 30, torch.device("cpu"), workers=self.group)
        torch.manual_seed(1)
        self.twin: Any = built(task, self.prepared.schema)  # the same for DDP
        self.ddp = DistributedDataParallel(self.twin)
        self.optimizer = task.build_optimizer(self.twin)
        self.use(256)

    def use(self, batch_size: int) -> None:
        """Rows of a step from now on."""
        self.batches: Any = replace(self.prepared, plan=self.prepared.plan.updated(batch_size=batch_size, drop_last=True)).batches("train")
        self.trainer.position = self.position = Position()
        self.steps: Any = engine.train(self.trainer, self.batches, 1 << 30)
        self.balances = {"equal": Balancer(self.group.generation.members, fixed={}), "balanced": Balancer(self.group.generation.members)}

    def pace(self, ratio: float, row_ms: float) -> None:
        """Make rows of rank 1 take `ratio` times as long as those of rank 0 (below 1: the other way round), which take `row_ms` by themselves."""
        fast = PACE_MS + row_ms
        slowness = (1.0, ratio) if ratio >= 1 else (1 / ratio, 1.0)
        self.model.ms = self.twin.ms = fast * slowness[self.number] - row_ms

    def block(self, kind: str, steps: int) -> list[float]:
        """Seconds of some steps."""
        if kind == "ddp":
            return self.by_ddp(steps)
        self.group.balance = self.balances[kind]
        taken, begun = [], time.perf_counter()
        for _ in range(steps):
            next(self.steps)
            ended = time.perf_counter()
            taken.append(ended - begun)
            self.told.append(self.group.told)
            begun = ended
        return taken

    def by_ddp(self, steps: int) -> list[float]:
        """As torch's tutorial has it: the same rows, halved."""
        taken, begun = [], time.perf_counter()
        for _ in range(steps):
            units = self.batches.units(self.position)
            (batch,) = self.batches.window(self.position, (Share(0, units // 2), Share(units // 2, units))[self.number])
            self.optimizer.zero_grad()
            cross_entropy(self.ddp(batch["image"]), batch["target"]).backward()
            self.optimizer.step()
            step, epoch, offset = self.position
            self.position = (
                Position(step + 1, epoch, offset + 1) if offset + 1 < (self.batches.steps_per_epoch or 0) else Position(step + 1, epoch + 1)
            )
            ended = time.perf_counter()
            taken.append(ended - begun)
            begun = ended
        return taken

    def calibrated(self, ratio: float, step_ms: float) -> float:
        """Set the pace and the rows of a step so that balanced steps take about `step_ms`; what a row really takes."""
        self.told: list[Any] = []
        self.block("equal", 14)
        row_ms = statistics.fmean(1e3 * _pace(self.told[4:], rank) for rank in (0, 1))  # told to all, so alike at both
        self.pace(ratio, row_ms)
        self.use(max(8, round(step_ms * (1 + 1 / ratio) / (PACE_MS + row_ms))))
        return row_ms

    def speed(self, work: str, ratio: float, step_ms: float, rounds: int, job: str) -> dict[str, Any]:
        """Blocks of all kinds in turn."""
        self.begin(job, work)
        row_ms = self.calibrated(ratio, step_ms)
        self.block("balanced", SETTLE)
        self.by_ddp(3)
        taken: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
        heard: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        steps = max(BLOCK, round(BLOCK * 40 / step_ms))
        for turn in range(rounds):
            for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
                self.told, begun = [], time.process_time()
                taken[kind].append(self.block(kind, steps)[DROPPED:])
                cpu[kind].append((time.process_time() - begun) / steps)
                heard[kind] += self.told[DROPPED:]
        own = [max(told.seconds for told in step) for step in heard["balanced"]]
        beyond = [whole - part for whole, part in zip((s for block in taken["balanced"] for s in block), own, strict=True)]
        answer = {
            "rows": self.batches.step_size,
            "row_ms": row_ms,
            "seconds": taken,
            "cpu": {kind: statistics.median(found) for kind, found in cpu.items()},
            "paces": [_pace(heard["equal"], rank) for rank in (0, 1)],
            "shares": self.balances["balanced"].shares(self.batches.step_size),
            "beyond": beyond,
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in self.trainer.trained),
        }
        self.end()
        return answer

    def drift(self, work: str, ratio: float, step_ms: float, swaps: int, job: str) -> dict[str, Any]:
        """After each swap of the speeds: steps until three in a row take less than 1.1 of what they took before, and until the shares say so."""
        self.begin(job, work)
        row_ms = self.calibrated(ratio, step_ms)
        best = statistics.median(self.block("balanced", SETTLE + 15)[SETTLE:])
        total = self.batches.step_size
        back, planned = [], []
        for swap in range(swaps):
            slowness = (ratio, 1.0) if swap % 2 == 0 else (1.0, ratio)
            self.pace(slowness[1] / slowness[0], row_ms)
            slow, wrong = [], []
            for _ in range(50):
                slow.append(self.block("balanced", 1)[0] >= 1.1 * best)
                split = [(share.last - share.first) * each for share, each in zip(self.group.shares, slowness, strict=True)]
                wrong.append(max(split) >= 1.1 * total / sum(1 / each for each in slowness))
            back.append(next((step for step in range(48) if not any(slow[step : step + 3])), 50))
            planned.append(max((step + 1 for step in range(50) if wrong[step]), default=0))
        self.end()
        return {"best": best, "back": back, "planned": planned}

    def jitter(self, work: str, ratio: float, step_ms: float, steps: int, job: str) -> dict[str, Any]:
        """Changes of the shares while all times jitter, after the balancer has settled."""
        self.begin(job, work)
        self.calibrated(ratio, step_ms)
        self.model.draw, self.model.jitter = random.Random(self.number), JITTER
        self.block("balanced", SETTLE)
        changes, before = 0, list(self.group.shares)
        for _ in range(steps):
            self.block("balanced", 1)
            changes, before = changes + (self.group.shares != before), list(self.group.shares)
        self.end()
        return {"changes": changes, "steps": steps}

    def end(self) -> None:
        self.steps.close()
        self.group.detach(self.model)
        self.group.done()
        del self.ddp, self.optimizer


def _pace(told: Sequence[Any], rank: int) -> float:
    """Seconds of a rank's row."""
    return statistics.median(step[rank].seconds / step[rank].units for step in told)


def serve(number: int, port: int) -> None:
    """Answer one line of JSON for each job named on stdin."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    rank = Rank(number, port)
    with machine.steady_memory():
        for line in sys.stdin:
            job = json.loads(line)
            answers.write(json.dumps(getattr(rank, job.pop("what"))(**job)) + "\n")
            answers.flush()
    dist.destroy_process_group()


class Pair:
    """Two ranks in processes of their own, and here the store and the coordinator beside them."""

    def __init__(self) -> None:
        self.store, self.port = connect("127.0.0.1", 0, serve=True, wait_s=60)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.jobs = 0
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), str(self.port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]

    def do(self, what: str, **job: Any) -> dict[str, Any]:
        """The answer of rank 0."""
        self.jobs += 1
        name = f"job{self.jobs}"
        coordinator = Coordinator(connect("127.0.0.1", self.port, serve=False, wait_s=60, job=name)[0], ranks=2)
        over = threading.Event()

        def tick() -> None:
            while not over.wait(0.01):
                coordinator.tick()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"what": what, "job": name, **job}) + "\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        over.set()
        ticking.join()
        if not all(lines):
            self.close()
            raise SystemExit(f"a rank failed at {what} {job}; see its own message")
        answer: dict[str, Any] = json.loads(lines[0])
        return answer

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(timeout=60)


# ------------------------------------------------------------------ what is measured


def speed(pair: Pair, work: str, ratio: float, step_ms: float, rounds: int) -> dict[str, Any]:
    """Medians of step times, and round by round the gain of measured shares over equal ones and over DDP."""
    found = pair.do("speed", work=work, ratio=ratio, step_ms=step_ms, rounds=rounds)
    blocks = {kind: [statistics.median(block) for block in found["seconds"][kind]] for kind in KINDS}
    gains, over_ddp = (sorted(a / b for a, b in zip(blocks[kind], blocks["balanced"], strict=True)) for kind in ("equal", "ddp"))
    extra = statistics.median(a - b for a, b in zip(blocks["balanced"], blocks["ddp"], strict=True))
    fastest = min(found["paces"])
    limit = limit_of([fastest / pace for pace in found["paces"]])
    return {
        "work": work,
        "ranks": f"1:{ratio}",
        "about_ms": step_ms,
        **{kind: 1e3 * statistics.median([s for block in found["seconds"][kind] for s in block]) for kind in KINDS},
        "gain": statistics.median(gains),
        "low": gains[0],
        "high": gains[-1],
        "limit": limit,
        "reached": statistics.median(gains) / limit,
        "over_ddp": statistics.median(over_ddp),
        "over_ddp_low": over_ddp[0],
        "over_ddp_high": over_ddp[-1],
        "extra_ms": 1e3 * extra,
        "beyond_ms": 1e3 * statistics.median(found["beyond"]),
        "cpu_ms": {kind: 1e3 * seconds for kind, seconds in found["cpu"].items()},
        "rows": found["rows"],
        "row_ms": found["row_ms"],
        "paces_ms": [1e3 * pace for pace in found["paces"]],
        "shares": found["shares"],
        "gradient_bytes": found["bytes"],
    }


def limit_of(speeds: Sequence[float]) -> float:
    """The most that balancing gains."""
    return sum(speeds) / (len(speeds) * min(speeds))


def predict(rows: Sequence[dict[str, Any]]) -> bool:
    """Beside each row what benchmarks/scaling.py says of its balanced step and gain, from rows' times and the link; whether it is there."""
    try:
        from scaling import OVERLAP, Link, fitted, link_times, predicted
    except ImportError:
        return False
    from anyfit.cluster.balance import Cost

    twice, per_byte, _ = fitted(link_times())
    for row in rows:
        fastest = min(row["paces_ms"]) / 1e3
        equal, balanced = (
            predicted(
                [1e3 * fastest / pace for pace in row["paces_ms"]],
                row["rows"],
                Cost(0.0, fastest),
                size_bytes=row["gradient_bytes"],
                link=Link(twice / 2, 1 / per_byte),
                overlap=OVERLAP,
                balanced=kind == "balanced",
            ).step
            for kind in ("equal", "balanced")
        )
        row |= {"predicted_ms": 1e3 * balanced, "predicted_gain": equal / balanced}
    return True


def deaths(runs: int, ranks: int, seed: int) -> dict[str, Any]:
    """SIGKILL all ranks but one, one after the other, at random moments of runs; the last weights against those of one process."""
    plan: dict[str, Any] = {"steps": 240, "batch_size": 60, "dtype": "float64", "seed": 1, "log_every": 1}
    rows = images(2048, torch.float64)
    alone = fit(Perceptron(), rows, **plan)
    took: list[dict[str, Any]] = []
    apart, losses, ordinary = 0.0, 0.0, []
    for number in range(runs):
        killer = Killer(random.Random(seed + number), ranks)
        run = fit(Perceptron(ms=1.0), rows, cluster=Cluster(nproc=ranks), on_event=killer.hear, **plan)
        took += killer.took
        ordinary += killer.ordinary
        apart = max(apart, *(float((run.state.model[name] - value).abs().max()) for name, value in alone.state.model.items()))
        pairs = zip(*([line["loss"] for line in one.history if line["event"] == "step"] for one in (run, alone)), strict=True)
        losses = max(losses, *(abs(a - b) for a, b in pairs))
        sys.stderr.write(f"deaths: run {number + 1} of {runs}: {len(killer.took)} killed\n")
    times = {who: sorted(kill["seconds"] for kill in took if who in ("any", kill["who"])) for who in ("any", "rank 0", "another")}
    return {
        "kills": len(took),
        "step_ms": 1e3 * statistics.median(ordinary),
        "seconds": {who: {"kills": len(t), "median": statistics.median(t), "worst": t[-1]} for who, t in times.items() if t},
        "weights_apart": apart,
        "losses_apart": losses,
    }


class Killer:
    """Ends ranks of a fit at random moments, and takes the time until the others have completed a step without it."""

    def __init__(self, draw: random.Random, ranks: int) -> None:
        self.draw, self.ranks = draw, ranks
        self.took: list[dict[str, Any]] = []
        self.ordinary: list[float] = []  # seconds of steps in which nobody died
        self.heard = self.killed = 0.0
        self.victim: str | None = None

    def hear(self, event: dict[str, Any]) -> None:
        """An event of the fit, in the launcher: rank 0 tells of each step."""
        if event["event"] != "ranks":
            return
        now, size = time.perf_counter(), len(event["ranks"])
        if self.victim is None and self.heard:
            self.ordinary.append(now - self.heard)
        if self.victim is not None and size < self.ranks:
            self.took.append({"who": self.victim, "seconds": now - self.killed})
            self.ranks, self.victim, now = size, None, 0.0
        self.heard = now
        if self.victim is None and self.ranks > 1 and event["step"] >= 5:
            self.victim = "nobody yet"
            threading.Timer(0.2 + self.draw.random() * 0.5, self.kill).start()

    def kill(self) -> None:
        """Rank 0, or as often one of the others."""
        alive = children()
        place = 0 if self.draw.random() < 0.5 else self.draw.randrange(1, len(alive))
        self.killed, self.victim = time.perf_counter(), "another" if place else "rank 0"
        os.kill(alive[place], signal.SIGKILL)


def children() -> list[int]:
    """Processes that this one has started and that live, the oldest first."""
    found = [int(name) for listing in Path("/proc/self/task").glob("*/children") for name in listing.read_text().split()]
    return sorted(pid for pid in found if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z")


def alone(rounds: int) -> dict[str, Any]:
    """`fit(nproc=1)` against `fit` without it, each in processes of their own, in turn."""
    found: dict[str, list[dict[str, Any]]] = {"fit": [], "fit(nproc=1)": []}
    for turn in range(rounds):
        for which in sorted(found, reverse=bool(turn % 2)):
            told = subprocess.run(
                [sys.executable, __file__, "--alone", which],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[which].append(json.loads(told.stdout.splitlines()[-1]))
    return {
        which: {
            "start_s": statistics.median(one["start_s"] for one in each),
            "step_us": statistics.median(one["step_us"] for one in each),
            "groups": max(one["groups"] for one in each),
            "sockets": max(one["sockets"] for one in each),
            "threads": max(one["threads"] for one in each),
        }
        for which, each in found.items()
    }


def serve_alone(which: str) -> dict[str, Any]:
    """One fit in this process: CPU seconds until it starts, CPU microseconds of a step, and what a group would leave."""
    torch.set_num_threads(1)
    marks: dict[int, float] = {}

    def note(event: dict[str, Any]) -> None:
        if event["event"] in ("start", "step"):
            marks[event["step"]] = time.process_time()

    more: Any = {"nproc": 1} if which == "fit(nproc=1)" else {}
    fit(Perceptron(), images(), steps=1100, batch_size=32, log_every=100, on_event=note, **more)
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return {
        "start_s": marks[0],
        "step_us": (marks[1100] - marks[100]) / 1000 * 1e6,
        "groups": int(dist.is_initialized()),
        "sockets": sum(link.startswith("socket:") for link in links),
        "threads": threading.active_count() - 1,
    }


# ------------------------------------------------------------------ the report


def main() -> None:
    """Measure, print tables or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one network, five deaths")
    parser.add_argument("--only", choices=("speed", "drift", "death", "alone"), action="append", help="these parts, of all")
    parser.add_argument("--rank", nargs=2, type=int, metavar=("NUMBER", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=("fit", "fit(nproc=1)"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        serve(*arguments.rank)
    elif arguments.alone:
        print(json.dumps(serve_alone(arguments.alone)))
    else:
        found = measure(set(arguments.only or ("speed", "drift", "death", "alone")), quick=arguments.quick)
        print(json.dumps(found)) if arguments.json else show(found)


def measure(parts: set[str], *, quick: bool) -> dict[str, Any]:
    """All figures, and the load of the machine before and after."""
    begun, found = time.monotonic(), {"load": [os.getloadavg()[0]]}
    works, rounds = (["mlp"], 3) if quick else (list(WORKS), 9)
    if parts & {"speed", "drift"}:
        pair = Pair()
        try:
            if "speed" in parts:
                found["speed"] = []
                for work in works:
                    for step_ms, ratio in [*((ms, ratio) for ms in (100, 40) for ratio in RATIOS), (5, 1)]:
                        found["speed"].append(speed(pair, work, ratio, step_ms, rounds))
                        sys.stderr.write(f"{work} 1:{ratio}, {step_ms} ms: done\n")
                found["predicted"] = predict(found["speed"])
            if "drift" in parts:
                found["drift"] = pair.do("drift", work="mlp", ratio=3, step_ms=40, swaps=2 if quick else 8)
                found["jitter"] = {
                    f"1:{ratio}": pair.do("jitter", work="mlp", ratio=ratio, step_ms=40, steps=100 if quick else 400) for ratio in (1, 3)
                }
        finally:
            pair.close()
    if "death" in parts:
        found["death"] = deaths(*((1, 6, 0) if quick else (4, 6, 0)))
    if "alone" in parts:
        found["alone"] = alone(1 if quick else 7)
    found["load"].append(os.getloadavg()[0])
    sys.stderr.write(f"done in {(time.monotonic() - begun) / 60:.1f} minutes\n")
    return found


def show(found: dict[str, Any]) -> None:
    """Tables."""
    print("load: " + " to ".join(f"{load:.1f}" for load in found["load"]))
    if "speed" in found:
        simulated = f"{'predicted':>11}{'gain':>6}" if found["predicted"] else ""
        print(
            f"\n{'work':<6}{'ranks':<7}{'about':>6}{'equal ms':>10}{'balanced':>10}{'ddp':>8}"
            f"{'gain':>8}{'low':>6}{'high':>6}{'limit':>7}{'reached':>9}{'over ddp':>10}{'low':>6}{'high':>6}{'extra ms':>10}{simulated}"
        )
        for row in found["speed"]:
            extra = f"{row['extra_ms']:.2f}" if row["ranks"] == "1:1" else ""
            print(
                f"{row['work']:<6}{row['ranks']:<7}{row['about_ms']:>6}{row['equal']:>10.1f}{row['balanced']:>10.1f}{row['ddp']:>8.1f}"
                f"{row['gain']:>8.2f}{row['low']:>6.2f}{row['high']:>6.2f}{row['limit']:>7.2f}{row['reached']:>9.2f}"
                f"{row['over_ddp']:>10.2f}{row['over_ddp_low']:>6.2f}{row['over_ddp_high']:>6.2f}{extra:>10}"
                + (f"{row['predicted_ms']:>11.1f}{row['predicted_gain']:>6.2f}" if simulated else "")
            )
        print(
            f"\n{'work':<6}{'ranks':<7}{'about':>6}{'rows':>6}{'ms a row':>12}{'shares':>10}{'beyond ms':>11}{'CPU ms: equal':>15}{'balanced':>10}{'ddp':>7}"
        )
        for row in found["speed"]:
            paces, shares, cpu = "/".join(f"{pace:.2f}" for pace in row["paces_ms"]), "/".join(map(str, row["shares"])), row["cpu_ms"]
            print(
                f"{row['work']:<6}{row['ranks']:<7}{row['about_ms']:>6}{row['rows']:>6}{paces:>12}{shares:>10}{row['beyond_ms']:>11.2f}"
                f"{cpu['equal']:>15.2f}{cpu['balanced']:>10.2f}{cpu['ddp']:>7.2f}"
            )
    if "drift" in found:
        back, best = found["drift"]["back"], found["drift"]["best"]
        planned = found["drift"]["planned"]
        print(
            f"\nspeeds of 1:3 swapped {len(back)} times: steps below 1.1 of {1e3 * best:.0f} ms after {', '.join(map(str, back))} of them"
        )
        print(f"shares that promise that after {', '.join(map(str, planned))}")
        for ranks, jitter in found["jitter"].items():
            print(f"{ranks} with {JITTER:.0%} jitter: {jitter['changes']} changes of shares in {jitter['steps']} steps")
    if "death" in found:
        death = found["death"]
        print(f"\n{death['kills']} ranks killed; an ordinary step takes {death['step_ms']:.0f} ms")
        for who, times in death["seconds"].items():
            print(
                f"{who:<8} {times['kills']:>3} kills: next step complete after {times['median']:.2f} s (median), {times['worst']:.2f} s (worst)"
            )
        print(f"weights within {death['weights_apart']:.0e} of one process, losses within {death['losses_apart']:.0e}")
    if "alone" in found:
        print(f"\n{'one process':<14}{'CPU s to start':>16}{'CPU us/step':>13}{'groups':>8}{'sockets':>9}{'threads':>9}")
        for which, one in found["alone"].items():
            print(f"{which:<14}{one['start_s']:>16.2f}{one['step_us']:>13.1f}{one['groups']:>8}{one['sockets']:>9}{one['threads']:>9}")


if __name__ == "__main__":
    main()
