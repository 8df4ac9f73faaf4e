"""Four hospitals learn to tell heart disease without showing a patient to each other, and each is better off than with one's model.

python examples/heart_disease.py heart_disease_all_sites.csv [STRATEGY [SEED]]

The file is UCI's heart disease data with a column `site` (cleveland, hungarian, switzerland, va). What differs between hospitals is
large: 36 % to 94 % of their patients are ill, and Switzerland measured no cholesterol. Plain FedAvg drifts with that; SCAFFOLD's
control variates correct it.
"""

import sys

import pyarrow.compute as pc
from pyarrow import csv

import anyfit

path = sys.argv[1]
strategy = sys.argv[2] if len(sys.argv) > 2 else "scaffold"
seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
table = csv.read_csv(path, convert_options=csv.ConvertOptions(null_values=["?"]))
cholesterol = pc.if_else(pc.equal(table["chol"], 0), None, table["chol"])  # 0 stands for "not measured"
ill = pc.if_else(pc.greater(table["num"], 0), "ill", "well")
table = table.drop_columns(["chol", "num"]).append_column("chol", cholesterol).append_column("target", ill)
codes = dict.fromkeys(("sex", "cp", "fbs", "restecg", "exang", "slope", "thal"), "categorical")

hospitals = anyfit.partition(anyfit.Source(table, types=codes), "column:site")
task = anyfit.Tabular(hidden=(16,), lr=5e-3)
run = anyfit.federate(task, hospitals, strategy=strategy, rounds=40, batch_size=32, test=0.3, compare=True, seed=seed)

names = list(hospitals)
print(f"{'accuracy on test rows':<22}" + "".join(f"{name:>13}" for name in ("all", *names)))
for line in run.result["comparison"]:
    print(f"{line['what']:<22}" + "".join(f"{line[name]:>13.3f}" for name in ("all", *names)))
federated, mean = run.result["comparison"][0], run.result["comparison"][-1]
print(f"federated beats the mean single-site model at {sum(federated[name] > mean[name] for name in names)} of {len(names)} hospitals")
