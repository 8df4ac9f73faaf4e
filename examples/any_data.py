"""One task, four sources: a data frame, a database, files by pattern, and rows that come one by one.

python examples/any_data.py
"""

import csv
import random
import sqlite3
import tempfile
from pathlib import Path

import pandas

import anyfit

random.seed(0)
rows = [{"rain": random.gauss(50, 20), "soil": random.choice(["clay", "sand", "loam"]), "id": row} for row in range(2000)]
for row in rows:
    row["crop"] = "good" if row["rain"] + {"clay": -10, "sand": -25, "loam": 10}[row["soil"]] > 42 else "poor"
    if random.random() < 0.05:
        row["rain"] = None  # missing values get the mean and an indicator

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    with sqlite3.connect(folder / "farm.db") as database:
        database.execute("create table harvest (rain real, soil text, id integer, crop text)")
        database.executemany("insert into harvest values (:rain, :soil, :id, :crop)", rows)
    database.close()
    for part in range(2):
        with (folder / f"harvest-{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows[part * 1000 : part * 1000 + 1000])

    sources = {
        "frame": pandas.DataFrame(rows),
        "database": anyfit.Source(f"sqlite:///{folder}/farm.db", query="select * from harvest where rain is null or rain > 0"),
        "files": f"{folder}/harvest-*.csv",
        "stream": anyfit.Stream(lambda: iter(rows), buffer=500),
    }
    for kind, source in sources.items():
        run = anyfit.fit(anyfit.Tabular(), source, target="crop", test=pandas.DataFrame(rows[:500]), steps=150, batch_size=64)
        print(f"{kind:9} accuracy {run.splits['test']['accuracy']:.3f}")
