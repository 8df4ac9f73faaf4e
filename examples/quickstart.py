import torch
from torch import nn

import anyfit


class Digits(anyfit.Task):
    hidden: int = 64
    lr: float = 3e-3

    def build_model(self, schema):
        return nn.Sequential(nn.Linear(64, self.hidden), nn.ReLU(), nn.Linear(self.hidden, schema.num_classes))

    def forward(self, model, batch):
        return model(batch["image"].flatten(1).float() / 16)


run = anyfit.fit(Digits(hidden=128), "digits", test=0.2, epochs=20, seed=1)
print(f"accuracy {run.splits['test']['accuracy']:.3f}")
print(torch.softmax(anyfit.predict(run, "digits"), 1).argmax(1)[:10])
