"""python benchmarks/scaling.py [--json]: what up to 1,024 unequal GPUs reach together, simulated; HetSeq's published table beside it.

A step is simulated as: the slowest rank's a + c rows / speed, then what a ring all-reduce takes beyond the backward it hides behind.
a, c, and the link's latency and bandwidth are measured first, on this machine: steps of HetSeq's MNIST network in one process, and
gloo between two processes over loopback. Speeds and overlap are assumed. Shares are those of anyfit.cluster.balance, as in a real run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from contestants import keep_freed_memory
from torch import distributed as dist
from torch import nn
from works import WORKS

from anyfit.cluster.balance import Balancer, Cost, makespan, shares

GENERATIONS = (1.0, 1 / 1.5, 1 / 2, 1 / 4)  # assumed: speeds of four emulated generations, as many GPUs of each
OVERLAP = 0.5  # assumed: the part of an all-reduce that can run while backward does
BACKWARD = 2 / 3  # of a step's computation, the usual reckoning: twice the forward
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROWS, STRONG = 64, 8192  # rows a rank (weak scaling); rows in all (strong)
LINKS = {"10 Gb/s, 50 us": (50e-6, 1.25e9), "100 Gb/s, 5 us": (5e-6, 12.5e9)}  # assumed
JITTER = 0.03  # assumed: standard deviation of a rank's step
BATCHES = (4, 8, 16, 32, 64, 128)
MESSAGES = tuple(1 << power for power in range(10, 25, 2))  # bytes

# HetSeq's README and paper, BERT: nodes of 4 GPUs, steps, seconds a step, days, expansion (speed-up over nodes).
HETSEQ = ((1, 267139, 2.60, 7.19, 1.0), (2, 133570, 2.69, 4.19, 0.86), (4, 66785, 2.794, 2.23, 0.81), (8, 33393, 3.126, 1.21, 0.74))
NODE_ROWS = 128
MIXES = {
    "one node of 8 at 1/2": (1.0,) * 7 + (1 / 2,),
    "half of them at 1/2": (1.0, 1 / 2) * 4,
    "half of them at 1/3": (1.0, 1 / 3) * 4,
    "four generations": GENERATIONS * 2,
}


# ------------------------------------------------------------------ the model


class Link(NamedTuple):
    """What a message costs between two neighbours of the ring."""

    latency_s: float
    bytes_per_s: float


class Prediction(NamedTuple):
    """Seconds of a step, of its slowest rank's computation, and of the exchange that nothing hides; the rows of each rank."""

    step: float
    compute: float
    exchange: float
    units: list[int]


def all_reduce(ranks: int, size_bytes: float, link: Link) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) messages of an n-th of the bytes."""
    return 2 * (ranks - 1) * (size_bytes / ranks / link.bytes_per_s + link.latency_s)


def predicted(
    speeds: Sequence[float],
    total: int,
    cost: Cost,
    *,
    size_bytes: float = 0.0,
    link: Link | None = None,
    overlap: float = 0.0,
    balanced: bool = True,
) -> Prediction:
    """A step of `total` rows over ranks whose row takes cost.c / speed; the fixed cost, the host's, is alike for all."""
    costs = [Cost(cost.a, cost.c / speed) for speed in speeds]
    units = shares(total, costs if balanced else [Cost(0.0, 1.0)] * len(costs))
    compute = makespan(costs, units)
    exchange = all_reduce(len(speeds), size_bytes, link) if link else 0.0
    exposed = exchange - min(overlap * exchange, BACKWARD * compute)
    return Prediction(compute + exposed, compute, exposed, units)


def limit(speeds: Sequence[float]) -> float:
    """The most that balancing gains: the sum of speeds over ranks times the slowest."""
    return sum(speeds) / (len(speeds) * min(speeds))


def mixed(ranks: int) -> list[float]:
    return [GENERATIONS[index % len(GENERATIONS)] for index in range(ranks)]


# ------------------------------------------------------------------ what is measured


def fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """A line through (size, seconds), relative errors alike: what no size takes (at least 0), what one more takes, the worst relative error."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    size = sum(weight * point[0] for weight, point in zip(weights, points, strict=True)) / total
    mean = sum(weight * point[1] for weight, point in zip(weights, points, strict=True)) / total
    spread = sum(weight * (point[0] - size) ** 2 for weight, point in zip(weights, points, strict=True))
    slope = sum(weight * (point[0] - size) * (point[1] - mean) for weight, point in zip(weights, points, strict=True)) / spread
    first = max(0.0, mean - slope * size)
    return first, slope, max(abs(first + slope * size - seconds) / seconds for size, seconds in points)


def step_times(repeats: int = 15) -> tuple[list[tuple[float, float]], int]:
    """(rows, seconds) of steps of the MNIST network, CPU time of one thread, medians, sizes in turn; and its gradients' bytes."""
    work = WORKS["mnist-cnn"]
    torch.manual_seed(0)
    model = work.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randn(max(BATCHES), 1, 28, 28), torch.randint(0, 10, (max(BATCHES),))

    def step(rows: int) -> float:
        begun = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:rows]), y[:rows]).backward()
        optimizer.step()
        return time.process_time() - begun

    taken: dict[int, list[float]] = {rows: [] for rows in BATCHES}
    for repeat in range(repeats + 2):
        for rows in BATCHES:
            seconds = step(rows)
            if repeat >= 2:
                taken[rows].append(seconds)
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return [(rows, statistics.median(seconds)) for rows, seconds in taken.items()], size_bytes


def link_times() -> list[tuple[float, float]]:
    """(bytes, seconds) of gloo all-reduces between two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        command = [sys.executable, __file__, "--link", f"{folder}/meet"]
        other = subprocess.Popen([*command, "1"], env=environment, stdout=subprocess.DEVNULL)
        try:
            found = subprocess.run([*command, "0"], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
            other.wait(timeout=60)
        finally:
            other.kill()
    return [(size, seconds) for size, seconds in json.loads(found.stdout)]


def serve_link(meet: str, rank: int, repeats: int = 50) -> list[tuple[int, float]]:
    """One end of the link: wall time for each size, sizes in turn; the tenth part of repeats is faster (cores are shared with other work)."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    tensors = {size: torch.zeros(size // 4) for size in MESSAGES}
    taken: dict[int, list[float]] = {size: [] for size in MESSAGES}
    for repeat in range(repeats + 3):
        for size, tensor in tensors.items():
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            if repeat >= 3:
                taken[size].append(time.perf_counter() - begun)
    dist.destroy_process_group()
    return [(size, sorted(seconds)[repeats // 10]) for size, seconds in taken.items()]


# ------------------------------------------------------------------ what is simulated


def scaling(cost: Cost, size_bytes: int, link: Link, strong: bool) -> list[dict[str, Any]]:
    """Equal against balanced for each number of ranks."""
    lines = []
    for ranks in RANKS:
        speeds, total = mixed(ranks), STRONG if strong else ROWS * ranks
        equal, best = (
            predicted(speeds, total, cost, size_bytes=size_bytes, link=link, overlap=OVERLAP, balanced=balanced)
            for balanced in (False, True)
        )
        alone = predicted([1.0], total, cost).step  # the fastest GPU by itself, all rows at once
        gain = equal.step / best.step
        lines.append(
            {
                "ranks": ranks,
                "rows": total,
                "equal_ms": equal.step * 1e3,
                "balanced_ms": best.step * 1e3,
                "exchange_ms": best.exchange * 1e3,
                "gain": gain,
                "of_limit": gain / limit(speeds),
                "speedup": alone / best.step,
                "of_sum": alone / best.step / sum(speeds),
            }
        )
    return lines


def dominated(cost: Cost, size_bytes: int, link: Link, strong: bool) -> int | None:
    """The fewest ranks (a multiple of the generations) whose exchange takes longer than their computation; None up to 65,536."""

    def waits(ranks: int) -> bool:
        found = predicted(mixed(ranks), STRONG if strong else ROWS * ranks, cost, size_bytes=size_bytes, link=link, overlap=OVERLAP)
        return found.exchange > found.compute

    low, high = 0, len(GENERATIONS)
    while not waits(high):
        low, high = high, 2 * high
        if high > 65536:
            return None
    while high - low > len(GENERATIONS):
        middle = (low + high) // 2 // len(GENERATIONS) * len(GENERATIONS)
        low, high = (low, middle) if waits(middle) else (middle, high)
    return high


def over_links(cost: Cost, size_bytes: int, measured: Link) -> list[dict[str, Any]]:
    """What the link decides: weak scaling at the most ranks, and from how many ranks on the exchange takes longer than computing."""
    lines = []
    for name, link in {"measured": measured, **{name: Link(*values) for name, values in LINKS.items()}}.items():
        most = scaling(cost, size_bytes, link, strong=False)[-1]
        points = {kind: dominated(cost, size_bytes, link, kind == "strong") for kind in ("weak", "strong")}
        lines.append({"link": name, **{name: most[name] for name in ("gain", "of_limit", "of_sum")}, **points})
    return lines


def at_work(cost: Cost, ranks: int, steps: int = 60) -> dict[str, Any]:
    """The Balancer over ranks that jitter: when it comes to within 3 % of the best shares, what it then gains, what it takes itself."""
    draw, speeds, total = random.Random(0), mixed(ranks), ROWS * ranks
    costs = [Cost(cost.a, cost.c / speed) for speed in speeds]
    balancer, best, own = Balancer(range(ranks)), makespan(costs, shares(total, costs)), []
    even = shares(total, [Cost(0.0, 1.0)] * ranks)
    excess, gains, plans = [], [], 0
    for _ in range(steps):
        noise = [max(0.2, 1 + JITTER * draw.gauss(0, 1)) for _ in range(ranks)]
        begun = time.process_time()
        units = balancer.shares(total)
        own.append(time.process_time() - begun)
        seconds = [(one.a + one.c * count) * factor for one, count, factor in zip(costs, units, noise, strict=True)]
        excess.append(makespan(costs, units) / best)
        gains.append(max((one.a + one.c * count) * factor for one, count, factor in zip(costs, even, noise, strict=True)) / max(seconds))
        begun = time.process_time()
        plans += balancer.observe(units, seconds)
        own[-1] += time.process_time() - begun
    settled = next(step for step in range(steps) if max(excess[step:]) <= 1.03)
    gain = statistics.fmean(gains[settled:])
    return {
        "ranks": ranks,
        "settled_step": settled,
        "plans": plans,
        "excess": excess[-1],
        "gain": gain,
        "of_limit": gain / limit(speeds),
        "own_us": statistics.median(own) * 1e6,
    }


def hetseq() -> dict[str, Any]:
    """The model's two parameters from rows 2 and 3 of HetSeq's table (row 1 is the computation); what it says of row 4."""
    (_, _, compute, _, _), (_, _, two, _, _), (_, _, four, _, _), _ = HETSEQ
    # 1 / 1 B + 2 L = two - compute; 3 / 2 B + 6 L = four - compute, with B the seconds of all bytes and L those of a hop
    hop = ((four - compute) - 1.5 * (two - compute)) / 3
    everything = (two - compute) - 2 * hop
    link = Link(hop, 1 / everything)  # one unit of bytes: all gradients
    lines = []
    for nodes, steps, seconds, published, expansion in HETSEQ:
        model = predicted([1.0] * nodes, NODE_ROWS * nodes, Cost(0.0, compute / NODE_ROWS), size_bytes=1.0, link=link).step
        first = HETSEQ[0][1] * compute
        lines.append(
            {
                "nodes": nodes,
                "s_per_step": seconds,
                "model_s_per_step": model,
                "days": published,
                "days_by_steps": steps * seconds / 86400,
                "model_days": steps * model / 86400,
                "expansion": expansion,
                "expansion_by_steps": first / (steps * seconds) / nodes,
                "model_expansion": first / (steps * model) / nodes,
            }
        )
    nodes, steps = HETSEQ[-1][:2]
    mixes = []
    for name, speeds in MIXES.items():
        cost = Cost(0.0, compute * min(speeds) / NODE_ROWS)  # the slowest node is the one of the table
        equal, best = (
            predicted(speeds, NODE_ROWS * nodes, cost, size_bytes=1.0, link=link, balanced=balanced) for balanced in (False, True)
        )
        mixes.append(
            {
                "mix": name,
                "equal_s": equal.step,
                "balanced_s": best.step,
                "equal_days": steps * equal.step / 86400,
                "balanced_days": steps * best.step / 86400,
                "gain": equal.step / best.step,
                "limit": limit(speeds),
            }
        )
    return {"hop_s": hop, "all_bytes_s": everything, "lines": lines, "mixes": mixes}


# ------------------------------------------------------------------ the report


def table(lines: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """Lines as text; a column is its key, its heading and its format."""
    cells = [
        [heading for _, heading, _ in columns],
        *(["-" if line[key] is None else format(line[key], spec) for key, _, spec in columns] for line in lines),
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


STEPS = (("rows", "rows", "d"), ("ms", "ms", ".2f"), ("line", "a + c rows", ".2f"))
MESSAGE = (("kB", "kB", ",.0f"), ("ms", "ms", ".2f"), ("line", "by the line", ".2f"))
SCALING = (
    ("ranks", "ranks", ",d"),
    ("rows", "rows", ",d"),
    ("equal_ms", "equal ms", ".1f"),
    ("balanced_ms", "balanced ms", ".1f"),
    ("exchange_ms", "exchange ms", ".1f"),
    ("gain", "gain", ".2f"),
    ("of_limit", "of limit", ".2f"),
    ("speedup", "speed-up", ".1f"),
    ("of_sum", "of sum", ".2f"),
)
OVER_LINKS = (
    ("link", "link", ""),
    ("gain", "gain", ".2f"),
    ("of_limit", "of limit", ".2f"),
    ("of_sum", "of sum", ".2f"),
    ("weak", "weak from", ",d"),
    ("strong", "strong from", ",d"),
)
WORK = (
    ("ranks", "ranks", ",d"),
    ("settled_step", "settled at step", "d"),
    ("plans", "plans", "d"),
    ("excess", "over best", ".3f"),
    ("gain", "gain", ".2f"),
    ("of_limit", "of limit", ".2f"),
    ("own_us", "own us/step", ".0f"),
)
PUBLISHED = (
    ("nodes", "nodes", "d"),
    ("s_per_step", "s/step", ".3f"),
    ("model_s_per_step", "simulated", ".3f"),
    ("days", "days", ".2f"),
    ("days_by_steps", "steps x s/step", ".2f"),
    ("model_days", "simulated", ".2f"),
    ("expansion", "expansion", ".2f"),
    ("expansion_by_steps", "by s/step", ".2f"),
    ("model_expansion", "simulated", ".2f"),
)
MIX = (
    ("mix", "8 nodes", ""),
    ("equal_s", "equal s", ".3f"),
    ("balanced_s", "balanced s", ".3f"),
    ("equal_days", "equal days", ".2f"),
    ("balanced_days", "balanced days", ".2f"),
    ("gain", "gain", ".2f"),
    ("limit", "limit", ".2f"),
)


def show(found: dict[str, Any]) -> None:
    """All of it as text."""
    measured, simulated = found["measured"], found["simulated"]
    published = simulated["hetseq"]
    print(f"measured here: a = {measured['a_ms']:.2f} ms a step, c = {measured['c_ms']:.3f} ms a row")
    print(
        table([{"rows": rows, "ms": 1e3 * s, "line": measured["a_ms"] + measured["c_ms"] * rows} for rows, s in measured["steps"]], STEPS)
    )
    print(f"measured here: {measured['latency_us']:.0f} us a hop, {measured['gigabytes_per_s']:.2f} GB/s")
    twice, per_kb = 2e-3 * measured["latency_us"], 1e-3 / measured["gigabytes_per_s"]
    print(table([{"kB": size / 1e3, "ms": 1e3 * s, "line": twice + per_kb * size / 1e3} for size, s in measured["messages"]], MESSAGE))
    print(f"measured here: {measured['gradient_mb']:.2f} MB of gradients")
    print(
        f"assumed: generations at {', '.join(f'{speed:.3g}' for speed in GENERATIONS)}, overlap {OVERLAP:.0%}; limit {simulated['limit']:.2f}"
    )
    for kind, about in (("weak", f"{ROWS} rows a rank"), ("strong", f"{STRONG:,} rows in all")):
        print(f"\nsimulated, {kind} scaling ({about})\n{table(simulated[kind], SCALING)}")
    print(
        f"\nsimulated, other links (assumed): weak scaling at {RANKS[-1]:,} ranks; ranks from which the exchange takes longer than computing"
    )
    print(table(simulated["links"], OVER_LINKS))
    print(
        f"\nsimulated, the balancer at work (jitter {JITTER:.0%}, no exchange; its own time is measured)\n{table(simulated['at_work'], WORK)}"
    )
    print(
        f"\nHetSeq's table; simulated with {published['hop_s'] * 1e3:.1f} ms a hop, {published['all_bytes_s'] * 1e3:.1f} ms for all bytes, from rows 2 and 3"
    )
    print(table(published["lines"], PUBLISHED))
    print(f"\nsimulated with nodes of two or four kinds, the slowest as in the table\n{table(published['mixes'], MIX)}")


def main() -> None:
    """Measure, simulate, print tables or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--link", nargs=2, metavar=("FILE", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.link:
        print(json.dumps(serve_link(arguments.link[0], int(arguments.link[1]))))
        return
    keep_freed_memory()  # as anyfit does; else the largest batches pay for their pages anew at every step
    steps, size_bytes = step_times()
    messages = link_times()
    a, c, step_error = fitted(steps)
    twice, per_byte, link_error = fitted(messages)  # two ranks: two hops, and each byte once
    cost, link = Cost(a, c), Link(twice / 2, 1 / per_byte)
    found = {
        "measured": {
            "a_ms": a * 1e3,
            "c_ms": c * 1e3,
            "step_error": step_error,
            "steps": steps,
            "latency_us": link.latency_s * 1e6,
            "gigabytes_per_s": link.bytes_per_s / 1e9,
            "link_error": link_error,
            "messages": messages,
            "gradient_mb": size_bytes / 1e6,
        },
        "assumed": {"speeds": GENERATIONS, "overlap": OVERLAP, "backward": BACKWARD, "jitter": JITTER, "links": LINKS},
        "simulated": {
            "limit": limit(GENERATIONS),
            "weak": scaling(cost, size_bytes, link, strong=False),
            "strong": scaling(cost, size_bytes, link, strong=True),
            "links": over_links(cost, size_bytes, link),
            "at_work": [at_work(cost, ranks) for ranks in (8, 64, 1024)],
            "hetseq": hetseq(),
        },
    }
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
