"""Code that exists already: a Lightning module fitted as it stands, and any task behind scikit-learn's fit and predict.

python examples/old_code.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from torch import nn

import anyfit


class LitDigits(nn.Module):  # with Lightning installed: lightning.LightningModule, and not a line more
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.layers(images)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
run = anyfit.fit(anyfit.from_lightning(LitDigits()), (images, labels), test=0.2, epochs=15, batch_size=32)
print(f"lightning  accuracy {run.splits['test']['val_accuracy']:.3f}")

scores = cross_val_score(anyfit.Estimator(anyfit.Tabular(), kind="classifier", epochs=20), digits.data, digits.target, cv=3)
print(f"sklearn    accuracy {scores.mean():.3f}")
