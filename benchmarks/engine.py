"""python benchmarks/engine.py [--json] [--quick]: the engine against plain loops, Hugging Face's Trainer and Lightning, in one run.

CPU time of training steps after a warm-up, one torch thread, engines in turn within each round; a ratio per round (our speed
over the peer's), reported as median, low and high. Peers live in .venv-peers, made on first use from benchmarks/peers.txt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from works import WORKS

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
OURS = ("anyfit", "anyfit unwritten", "anyfit bf16")  # with a run folder; with events and history only; with bf16 and channels last
PEER_ENGINES = ("raw loop", "best raw loop", "huggingface", "lightning")


class Contestant:
    """An engine in a process of its own, imports and data warm."""

    def __init__(self, engine: str) -> None:
        python = str(PEERS / "bin/python") if engine in ("huggingface", "lightning") else sys.executable
        self.engine = engine
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process; a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            [python, str(HERE / "contestants.py"), engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
        )

    def run(self, work: str) -> dict[str, float]:
        """Microseconds per step and the last logged loss."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.complaints.seek(0)
            raise SystemExit(f"{self.engine} failed at {work}:\n{self.complaints.read()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


def set_up_peers() -> None:
    """Make the peers' environment once; torch first, so that nothing pulls another build."""
    ready = PEERS / ".ready"
    pins = (HERE / "peers.txt").read_text()
    if ready.exists() and ready.read_text() == pins:
        return
    sys.stderr.write("setting up .venv-peers (once, some minutes)\n")
    venv.create(PEERS, with_pip=True)
    pip = [str(PEERS / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, pins.splitlines()[0]], check=True)
    subprocess.run([*pip, "-r", str(HERE / "peers.txt")], check=True)
    ready.write_text(pins)


def has_bf16() -> bool:
    """Whether this processor computes in bf16 by itself."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(contestants: dict[str, Contestant], work: str, engines: tuple[str, ...], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Answers by engine, a list with one for each round; the order turns from round to round."""
    answers: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for round in range(rounds):
        turned = engines[round % len(engines) :] + engines[: round % len(engines)]
        for engine in turned:
            answers[engine].append(contestants[engine].run(work))
        sys.stderr.write(f"{work}: round {round + 1} of {rounds}\n")
    return answers


def compare(work: str, ours: list[dict[str, float]], peer: str, theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Our speed over the peer's, per round."""
    ratios = sorted(b["us"] / a["us"] for a, b in zip(ours, theirs, strict=True))
    extra = statistics.median(a["us"] - b["us"] for a, b in zip(ours, theirs, strict=True))
    return {"work": work, "peer": peer, "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "extra_us": extra}


def main() -> None:
    """Measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="two rounds of each")
    arguments = parser.parse_args()
    begun = time.monotonic()
    set_up_peers()
    bf16 = has_bf16()
    contestants = {engine: Contestant(engine) for engine in (*OURS, *PEER_ENGINES)}
    rows: list[dict[str, Any]] = []
    lines: list[tuple[str, str, float, float]] = []
    for work, about in WORKS.items():
        ours = ("anyfit", *(["anyfit bf16"] if bf16 else [])) if work == "mnist-cnn" else ("anyfit", "anyfit unwritten")
        answers = measure(contestants, work, (*ours, *PEER_ENGINES), 2 if arguments.quick else about.rounds)
        for engine, given in answers.items():
            lines.append((work, engine, statistics.median(a["us"] for a in given), statistics.median(a["loss"] for a in given)))
        rows += [compare(work, answers["anyfit"], peer, answers[peer]) for peer in PEER_ENGINES]
        if "anyfit bf16" in answers:
            rows.append(compare(f"{work} bf16", answers["anyfit bf16"], "raw loop", answers["raw loop"]))
    for contestant in contestants.values():
        assert contestant.process.stdin is not None
        contestant.process.stdin.close()
    sys.stderr.write(f"done in {(time.monotonic() - begun) / 60:.1f} minutes, set-up included\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"rows": rows}) + "\n")
        return
    print(f"{'work':<16}{'engine':<18}{'us/step':>10}{'loss':>9}")
    for work, engine, us, loss in lines:
        print(f"{work:<16}{engine:<18}{us:>10.1f}{loss:>9.4f}")
    print(f"\n{'work':<16}{'peer':<16}{'ratio':>7}{'low':>7}{'high':>7}{'extra us':>10}")
    for row in rows:
        print(f"{row['work']:<16}{row['peer']:<16}{row['ratio']:>7.2f}{row['low']:>7.2f}{row['high']:>7.2f}{row['extra_us']:>10.1f}")
    if not bf16:
        print("\nno row for bf16: this processor has neither avx512_bf16 nor amx_bf16")


if __name__ == "__main__":
    main()
