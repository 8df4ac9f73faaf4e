"""A strategy of one's own: the half at the site, and the half where updates are added.

python examples/own_strategy.py
"""

from dataclasses import dataclass

from torch import nn

import anyfit


class Digits(anyfit.Task):
    lr: float = 0.01

    def build_model(self, schema):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, schema.num_classes))

    def forward(self, model, batch):
        return model(batch["image"].float() / 16)


@dataclass(frozen=True, kw_only=True)
class Equal(anyfit.FedAvg):
    """Every site counts the same, however many rows it has, and the steps of the whole become smaller."""

    decay: float = 0.05

    def local(self, turn):
        return turn.update(turn.train(), count=1.0)

    def finish(self, server, total):
        step = self.lr / (1 + self.decay * (server.round - 1))
        return server.weights + step * total.mean("weights")["weights"]


sites = anyfit.partition("digits", "quantity:0.5", 6)
for strategy in (anyfit.FedAvg(), Equal()):
    run = anyfit.federate(Digits(), sites, strategy=strategy, rounds=10, steps=8, batch_size=16, test=0.2)
    spread = run.result["fairness"]["accuracy"]
    print(f"{strategy.name:<8} accuracy {run.splits['test']['accuracy']:.3f}, lowest at a site {spread['lowest']:.3f}")
