"""A CSV that is larger than memory should be: peak memory and time of describing and fitting it.

.venv/bin/python benchmarks/large.py            # 5 GB; --gigabytes 1 for less, --json for figures
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BLOCK_ROWS = 200_000
COLUMNS = 12
WORDS = np.array(["north", "south", "east", "west", "centre"])


def write(path: Path, size: int) -> int:
    """Random numbers, categories and missing cells until the file has its size; returns the rows."""
    generator, rows = np.random.default_rng(0), 0
    with path.open("w") as file:
        file.write(",".join([*(f"x{index}" for index in range(COLUMNS)), "place", "y"]) + "\n")
        blocks = []
        for _ in range(8):  # told apart by a counter in the first column below
            numbers = np.char.mod("%.5f", generator.normal(size=(BLOCK_ROWS, COLUMNS)))
            numbers[generator.random(numbers.shape) < 0.02] = ""
            label = (generator.random(BLOCK_ROWS) < 0.3).astype(int).astype(str)
            cells = np.column_stack([numbers, WORDS[generator.integers(0, 5, BLOCK_ROWS)], label])
            blocks.append("\n".join(map(",".join, cells.tolist())) + "\n")
        while file.tell() < size:
            file.write(blocks[(rows // BLOCK_ROWS) % len(blocks)])
            rows += BLOCK_ROWS
    return rows


def peak(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and the largest resident set in bytes of a command."""
    begun, largest = time.monotonic(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            largest = max(largest, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        except (FileNotFoundError, TypeError):
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - begun, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="where twice the size is free (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name) / "large.csv"
        rows = write(place, int(options.gigabytes * 1e9))
        environment = {**os.environ, "ANYFIT_CACHE": name, "OMP_NUM_THREADS": "1"}
        fit = ["-m", "anyfit", "fit", "tabular", "--data", str(place), "--target", "y", "--steps", "300", "--batch-size", "1024"]
        lines = []
        for label in ("fit, file read for the first time", "fit, from the cache"):
            seconds, largest = peak([sys.executable, *fit, "--run", f"{name}/{len(lines)}", "-q", "--json"], environment)
            lines.append({"what": label, "seconds": round(seconds, 1), "peak_rss_mb": round(largest / 1e6)})
        if options.json:
            print(json.dumps({"gigabytes": place.stat().st_size / 1e9, "rows": rows, "lines": lines}))
            return
        print(f"{place.stat().st_size / 1e9:.1f} GB of CSV, {rows:,} rows, {COLUMNS + 2} columns; 300 steps of 1024 rows")
        for line in lines:
            print(f"  {line['what']:36}{line['seconds']:8.1f} s   peak resident {line['peak_rss_mb']:6,} MB")


if __name__ == "__main__":
    main()
