"""python benchmarks/federation.py [--json] [--quick]: rounds of a federation against loops by hand and Flower's simulation on Ray.

What a further round costs: CPU time of a long run less that of a short one, over the rounds between them, so that start-up is out;
it has a column of its own. One torch thread; contestants in turn, the order turning; a ratio of medians, its low and high over the
repeats. Flower runs in .venv-peers with as many actors as there are cores, its CPU time that of all its processes; it is told to
send nothing anywhere and to stay on this machine's loopback. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import keep_freed_memory
from engine import PEERS, Contestant, set_up_peers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HERE = Path(__file__).resolve().parent
QUIET = {  # neither Flower nor Ray may call home or look for another machine
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback, on Linux too
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE),  # actors import this file
    "PYTHONWARNINGS": "ignore",
}
State = Mapping[str, Tensor]
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Work:
    """What is federated. `steps` None is one epoch, 0 is no training: each site adds 0.01 to every array."""

    model: Callable[[], nn.Module]
    rows: Callable[[int], Rows]
    sites: int
    cohort: int
    steps: int | None
    batch_size: int
    lr: float
    rounds: tuple[int, int]
    quick: tuple[int, int]
    repeats: int
    engines: tuple[str, ...]
    goals: Mapping[str, float]  # the most that our time over the peer's may be
    goal_ms: float | None = None  # the most that a site may take us

    @functools.cache  # noqa: B019 - works live as long as the process
    def site(self, index: int) -> Rows:
        return self.rows(index)


def digits_model() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def digits(site: int) -> Rows:
    """Every other of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[site::2] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels[site::2])


def small_model() -> nn.Module:
    """10,000 parameters."""
    return nn.Sequential(nn.Linear(100, 90), nn.ReLU(), nn.Linear(90, 10))


def small(site: int) -> Rows:
    return torch.zeros(1, 100), torch.tensor([site % 10])


def cifar_model() -> nn.Module:
    """The network with which pfl-research compares simulators (arXiv 2404.06430): two convolutions, a hidden layer, 1.6 M parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(12544, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def cifar(site: int) -> Rows:
    """50 made images of the size of CIFAR's, noise over a pattern for each label."""
    generator = torch.Generator().manual_seed(site)
    labels = torch.randint(0, 10, (50,), generator=generator)
    return torch.randn(50, 3, 32, 32, generator=generator) + 2 * patterns()[labels], labels


@functools.cache
def patterns() -> Tensor:
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(-1))


OURS = ("anyfit", "anyfit unwritten")  # with a run folder; with events and history only
WORKS = {
    "two sites": Work(digits_model, digits, 2, 2, 20, 32, 0.1, (3, 13), (1, 4), 7, (*OURS, "by hand"), {"by hand": 1.2}),
    "no training": Work(small_model, small, 100, 100, 0, 1, 0.0, (2, 22), (1, 6), 5, (*OURS, "by hand", "flower"), {"flower": 0.02}, 0.05),
    "cifar": Work(cifar_model, cifar, 1000, 50, None, 10, 0.1, (1, 3), (1, 2), 3, ("anyfit", "by hand", "flower"), {"by hand": 1.15}),
}


def train(model: nn.Module, rows: Rows, work: Work, optimizer: torch.optim.Optimizer) -> None:
    """A site's turn as a loop by hand has it."""
    x, y = rows
    if work.steps == 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        return
    for batch in torch.randperm(len(x)).split(work.batch_size)[: work.steps]:
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def by_hand(work: Work, rounds: int) -> State:
    """One model for all sites, weights averaged by rows and copied back. Freed memory is kept, as anyfit does."""
    keep_freed_memory()
    model = work.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    live = model.state_dict()
    state = {name: tensor.clone() for name, tensor in live.items()}
    for _ in range(rounds):
        total, count = {name: torch.zeros_like(tensor) for name, tensor in state.items()}, 0
        for site in torch.randperm(work.sites)[: work.cohort].tolist():
            rows = work.site(site)
            for name, tensor in live.items():
                tensor.copy_(state[name])
            train(model, rows, work, optimizer)
            for name, tensor in live.items():
                total[name].add_(tensor, alpha=len(rows[1]))
            count += len(rows[1])
        state = {name: tensor / count for name, tensor in total.items()}
    return state


@functools.cache
def flower_model(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Kept by an actor from message to message."""
    torch.set_num_threads(1)
    model = WORKS[name].model()
    return model, torch.optim.SGD(model.parameters(), lr=WORKS[name].lr)


def flower_client(message: Any, context: Any) -> Any:
    """A site's turn in an actor: numpy alone where nothing is trained."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    name, arrays = message.content["config"]["work"], message.content["arrays"]
    work = WORKS[name]
    rows = work.site(int(context.node_config["partition-id"]))
    if work.steps == 0:
        given = ArrayRecord([array + 0.01 for array in arrays.to_numpy_ndarrays()])
    else:
        model, optimizer = flower_model(name)
        model.load_state_dict(arrays.to_torch_state_dict())
        train(model, rows, work, optimizer)
        given = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": given, "metrics": MetricRecord({"num-examples": len(rows[1])})}), reply_to=message)


def flower(name: str, requests: Iterator[int], answer: Callable[[Callable[[], State]], None]) -> None:
    """Flower's simulation, warm from request to request: its server side reads them."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    work, client, server = WORKS[name], ClientApp(), ServerApp()
    client.train()(flower_client)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        def rounds_of(count: int) -> State:
            state = work.model().state_dict()
            arrays = ArrayRecord([tensor.numpy() for tensor in state.values()]) if work.steps == 0 else ArrayRecord(state)
            strategy = FedAvg(fraction_train=work.cohort / work.sites, fraction_evaluate=0.0, min_available_nodes=work.sites)
            result = strategy.start(grid, arrays, num_rounds=count, train_config=ConfigRecord({"work": name}))
            assert len(result.train_metrics_clientapp) == count, "a round of Flower's came back without replies"
            given = [torch.from_numpy(array) for array in result.arrays.to_numpy_ndarrays()]
            return dict(zip(state, given, strict=True))

        for count in requests:
            answer(lambda count=count: rounds_of(count))

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path may be 107 characters long
        os.environ["FLWR_HOME"] = folder
        init = {"num_cpus": os.cpu_count(), "include_dashboard": False, "_temp_dir": folder}
        run_simulation(server, client, work.sites, backend_config={"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}})


def cpu_seconds(tree: bool) -> float:
    """CPU time of this process, or of it and all that descend from it."""
    if not tree:
        return time.process_time()
    import psutil

    total, this = 0.0, psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            pass
    return total


def proof(work: Work, state: State) -> float:
    """A figure that tells whether the work was done: the loss on two sites' rows, or the mean of what was added to zero."""
    model = work.model()
    model.load_state_dict(dict(state))
    model.eval()
    with torch.no_grad():
        if work.steps == 0:
            return float(torch.cat([tensor.flatten() for tensor in state.values()]).mean())
        x, y = (torch.cat(parts) for parts in zip(work.site(0), work.site(1), strict=True))
        return float(cross_entropy(model(x), y))


def serve(engine: str, name: str) -> None:
    """Answer each number of rounds on stdin with a line of JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever an engine prints must not stand between the answers
    work = WORKS[name]

    def answer(run: Callable[[], State]) -> None:
        torch.manual_seed(0)
        cpu, wall = cpu_seconds(engine == "flower"), time.monotonic()
        state = run()
        cpu, wall = cpu_seconds(engine == "flower") - cpu, time.monotonic() - wall
        answers.write(json.dumps({"cpu": cpu, "wall": wall, "proof": proof(work, state)}) + "\n")
        answers.flush()

    requests = (int(line) for line in sys.stdin)
    if engine == "flower":
        flower(name, requests, answer)
        return
    for rounds in requests:
        answer(lambda rounds=rounds: ENGINES[engine](work, rounds))


def anyfit(work: Work, rounds: int, *, writes: bool = True) -> State:
    """As a user has it: the guard on, events, history, a run folder."""
    from anyfit import FedAvg, Task, Update, federate

    class Same(Task):
        def build_model(self, schema: Any) -> nn.Module:
            return work.model()

        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=work.lr)

    class Adds(FedAvg):
        def local(self, turn: Any) -> Update:
            return turn.update(turn.weights + 0.01 - turn.weights)

    sites = {f"s{index:04}": work.site(index) for index in range(work.sites)}
    plan: dict[str, Any] = {"epochs": 1} if work.steps is None else {"steps": work.steps or 1}
    with tempfile.TemporaryDirectory() as folder:
        run = federate(
            Same(),
            sites,
            strategy=Adds() if work.steps == 0 else FedAvg(),
            rounds=rounds,
            sample=work.cohort,
            batch_size=work.batch_size,
            device="cpu",
            run=f"{folder}/run" if writes else None,
            **plan,
        )
    return run.model.state_dict()


def anyfit_unwritten(work: Work, rounds: int) -> State:
    """The same with nothing written."""
    return anyfit(work, rounds, writes=False)


ENGINES = {"anyfit": anyfit, "anyfit unwritten": anyfit_unwritten, "by hand": by_hand}


def wide_model(width: int) -> nn.Module:
    """1,000 x width parameters and few more: one step on one row takes milliseconds."""
    return nn.Sequential(nn.Linear(2, 1000), nn.ReLU(), nn.Linear(1000, width), nn.ReLU(), nn.Linear(width, 2))


def memory(strategy: str, sites: int, rounds: int, width: int) -> None:
    """Print the peak of a federation, 100 sites a round, and what stood there before any model did; in a process of its own."""
    import anyfit

    torch.set_num_threads(1)

    class Wide(anyfit.Task):
        width: int = 2

        def build_model(self, schema: Any) -> nn.Module:
            return wide_model(self.width)

        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.1)

    rows = {f"s{index:05}": (torch.randn(1, 2), torch.tensor([index % 2])) for index in range(sites)}
    with tempfile.TemporaryDirectory() as folder:
        plan: dict[str, Any] = {"strategy": getattr(anyfit, strategy)(), "rounds": rounds, "steps": 1, "batch_size": 1, "device": "cpu"}
        anyfit.federate(Wide(), dict(list(rows.items())[:2]), run=f"{folder}/small", **plan)  # what is imported on first use
        before = resident("VmRSS")
        anyfit.federate(Wide(width=width), rows, sample=100, run=f"{folder}/run", **plan)
        model = sum(tensor.numel() * tensor.element_size() for tensor in wide_model(width).parameters())
        kept = [path for path in Path(folder, "run").rglob("*") if "checkpoints" not in path.parts and path.stat().st_size >= model]
        print(json.dumps({"before": before, "peak": resident("VmHWM"), "model": model, "memories": len(kept)}))


def resident(name: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def measure_memory(quick: bool) -> list[dict[str, Any]]:
    """FedAvg over few and many sites, and SCAFFOLD, whose sites remember a model each."""
    rows = []
    for strategy, sites, rounds in (("FedAvg", 100, 2), ("FedAvg", 10_000, 2), ("Scaffold", 100, 1)):
        begun = time.monotonic()
        width = 1_000 if quick else 10_000
        command = [sys.executable, "-c", f"import federation; federation.memory({strategy!r}, {sites}, {rounds}, {width})"]
        output = subprocess.run(command, env={**os.environ, **QUIET}, text=True, check=True, stdout=subprocess.PIPE).stdout
        found = json.loads(output.splitlines()[-1])
        found["models"] = (found["peak"] - found["before"]) / found["model"]
        rows.append({"strategy": strategy, "sites": sites, "rounds": rounds, "seconds": time.monotonic() - begun, **found})
        sys.stderr.write(f"memory: {strategy}, {sites} sites\n")
    return rows


class Process(Contestant):
    """A contestant at one work; not `__main__`, so that Flower sends its actors names and no code."""

    def __init__(self, engine: str, name: str) -> None:
        python = str(PEERS / "bin/python") if engine == "flower" else sys.executable
        self.engine, self.complaints = engine, tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        command = [python, "-c", f"import federation; federation.serve({engine!r}, {name!r})"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints}
        self.process = subprocess.Popen(command, env={**os.environ, **QUIET}, text=True, **pipes)


def measure(name: str, engines: tuple[str, ...], quick: bool) -> list[dict[str, Any]]:
    """Per engine what a site of a further round costs, a figure for each repeat, and what comes before the first round."""
    work = WORKS[name]
    few, many = work.quick if quick else work.rounds
    turns = (many - few) * work.cohort
    contestants, rows = {}, {}
    for engine in engines:
        begun = time.monotonic()
        contestants[engine] = Process(engine, name)
        contestants[engine].run(str(few))
        rows[engine] = {"work": name, "engine": engine, "first": time.monotonic() - begun, "cpu_ms": [], "wall_ms": []}
    for repeat in range(1 if quick else work.repeats):
        place = repeat % len(engines)
        for engine in engines[place:] + engines[:place]:
            short, long = (contestants[engine].run(str(rounds)) for rounds in (few, many))
            for clock in ("cpu", "wall"):
                rows[engine][f"{clock}_ms"].append((long[clock] - short[clock]) / turns * 1e3)
            rows[engine]["proof"] = long["proof"]
        sys.stderr.write(f"{name}: repeat {repeat + 1}\n")
    for engine, row in rows.items():
        process = contestants[engine].process
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        row["start"] = row["first"] - few * work.cohort * statistics.median(row["wall_ms"]) / 1e3
        row["all_ms"] = (row["start"] * 1e3 + many * work.cohort * statistics.median(row["wall_ms"])) / (many * work.cohort)
    return list(rows.values())


def compare(ours: dict[str, Any], theirs: dict[str, Any], clock: str = "cpu_ms") -> dict[str, Any]:
    """Our time over theirs: of the medians, and the extremes over repeats."""
    ratios = [a / b for a, b in zip(ours[clock], theirs[clock], strict=True)]
    ratio = statistics.median(ours[clock]) / statistics.median(theirs[clock])
    goal = WORKS[ours["work"]].goals.get(theirs["engine"])
    names = {"work": ours["work"], "ours": ours["engine"], "peer": theirs["engine"]}
    return {**names, "ratio": ratio, "low": min(ratios), "high": max(ratios), "goal": goal, "wall": clock == "wall_ms"}


def main() -> None:
    """Measure, print tables and, where asked, one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="one short repeat, a smaller model for memory; Flower only where it is set up")
    parser.add_argument("--only", choices=[*WORKS, "memory"], action="append", help="one work, or several")
    arguments = parser.parse_args()
    begun, chosen = time.monotonic(), arguments.only or [*WORKS, "memory"]
    if not arguments.quick:
        set_up_peers()
    peers = (PEERS / "bin/flwr").exists()
    rows, ratios = [], []
    for name in (name for name in WORKS if name in chosen):
        found = measure(name, tuple(engine for engine in WORKS[name].engines if engine != "flower" or peers), arguments.quick)
        rows += found
        pairs = [(a, b) for a in found for b in found if a["engine"] in OURS and b["engine"] not in OURS]
        ratios += [compare(a, b) for a, b in pairs] + [compare(a, b, "wall_ms") for a, b in pairs if b["engine"] == "flower"]
    memories = measure_memory(arguments.quick) if "memory" in chosen else []
    print_tables(rows, ratios, memories)
    if not peers:
        print("\nno row for Flower: it is not set up in .venv-peers; run without --quick")
    sys.stderr.write(f"done in {(time.monotonic() - begun) / 60:.1f} minutes, set-up included\n")
    if arguments.json:
        print(json.dumps({"rows": rows, "ratios": ratios, "memory": memories}))


def print_tables(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], memories: list[dict[str, Any]]) -> None:
    """What a site costs in a further round, what comes before the first, both together, and whether the work was done."""
    if rows:
        print(f"{'work':<13}{'engine':<18}{'cpu ms/site':>12}{'low':>10}{'high':>10}{'wall ms':>10}{'start s':>9}{'all ms':>9}{'proof':>9}")
        for row in rows:
            low, middle, high = min(row["cpu_ms"]), statistics.median(row["cpu_ms"]), max(row["cpu_ms"])
            wall, tail = statistics.median(row["wall_ms"]), f"{row['start']:>9.1f}{row['all_ms']:>9.2f}{row['proof']:>9.4f}"
            print(f"{row['work']:<13}{row['engine']:<18}{middle:>12.4f}{low:>10.4f}{high:>10.4f}{wall:>10.4f}{tail}")
        print(f"\n{'work':<13}{'ours':<18}{'over':<16}{'ratio':>8}{'low':>8}{'high':>8}{'goal':>8}")
        for row in ratios:
            peer = f"{row['peer']} (wall)" if row["wall"] else row["peer"]
            print(
                f"{row['work']:<13}{row['ours']:<18}{peer:<16}{row['ratio']:>8.4f}{row['low']:>8.4f}{row['high']:>8.4f}{row['goal'] or '':>8}"
            )
        for name, goal in ((name, work.goal_ms) for name, work in WORKS.items() if work.goal_ms):
            if any(row["work"] == name for row in rows):
                print(f"goal of {name}: {goal} ms a site")
    if memories:
        print(
            f"\n{'strategy':<11}{'sites':>7}{'rounds':>8}{'model MB':>10}{'before MB':>11}{'peak MB':>9}{'models':>8}{'memories':>10}{'seconds':>9}"
        )
        for row in memories:
            model, before, peak = (row[key] / 1e6 for key in ("model", "before", "peak"))
            tail = f"{row['models']:>8.1f}{row['memories']:>10}{row['seconds']:>9.1f}"
            print(f"{row['strategy']:<11}{row['sites']:>7}{row['rounds']:>8}{model:>10.1f}{before:>11.0f}{peak:>9.0f}{tail}")


if __name__ == "__main__":
    main()
