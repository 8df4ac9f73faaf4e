"""Substra's first tutorial as one task: a convolutional network learns digits that lie at three organisations.

python examples/substra_mnist.py [FOLDER OF THE IDX FILES]

Without a folder the small digits that come with anyfit are dealt out.
"""

import sys

from torch import nn

import anyfit


class MNIST(anyfit.Task):
    white: float = 255.0
    lr: float = 1e-3

    def build_model(self, schema):
        size = schema["image"].shape[-1]
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, model, batch):
        return model(batch["image"].float() / self.white)


data, task = (sys.argv[1], MNIST()) if len(sys.argv) > 1 else ("digits", MNIST(white=16.0))
organisations = anyfit.partition(data, "iid", 3)
run = anyfit.federate(task, organisations, rounds=5, steps=30, batch_size=32, test=0.1)
for name, figures in run.result["sites"].items():
    print(f"{name}  accuracy {figures['accuracy']:.3f} on {figures['rows']} test rows")
print(f"all     accuracy {run.splits['test']['accuracy']:.3f}")
