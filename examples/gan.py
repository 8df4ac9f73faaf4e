"""Two optimizers and an inner loop of one's own: a small GAN on the digits, resumable like any other fit.

python examples/gan.py [STEPS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyfit


class Pair(nn.Module):
    def __init__(self, noise: int) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(noise, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))


class GAN(anyfit.Task):
    noise: int = 16
    lr: float = 1e-3

    def plan(self) -> anyfit.Plan:
        return anyfit.Plan(steps=200, batch_size=64)

    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        return Pair(self.noise)

    def build_optimizer(self, model: nn.Module) -> dict[str, Any]:
        return {
            "generator": anyfit.adamw(model.generator, lr=self.lr, betas=(0.5, 0.999)),
            "discriminator": anyfit.adamw(model.discriminator, lr=self.lr, betas=(0.5, 0.999)),
        }

    def train_step(self, trainer: anyfit.Trainer, window: Sequence[Any]) -> None:
        model = trainer.model
        for batch in window:
            real = batch["image"].flatten(1).float() / 16
            noise = torch.randn(len(real), self.noise, device=real.device)
            fake = model.generator(noise)
            trainer.backward(self._judge(model, real, 1.0, fake.detach(), 0.0))
            trainer.apply("discriminator")
            trainer.backward(self._judge(model, fake, 1.0))
            trainer.apply("generator")

    def _judge(self, model: nn.Module, *pairs: Any) -> anyfit.Step:
        """The discriminator's loss on images that should be taken for real (1) or made (0)."""
        losses: list[Tensor] = []
        for images, truth in zip(pairs[::2], pairs[1::2], strict=True):
            logits = model.discriminator(images)
            losses.append(F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth)))
        return anyfit.Step(torch.stack(losses).mean(), len(pairs[0]))


if __name__ == "__main__":
    run = anyfit.fit(GAN(), "digits", steps=int(sys.argv[1]) if len(sys.argv) > 1 else 200, on_event=print)
    sample = run.model.generator(torch.randn(1, 16)).reshape(8, 8)
    print("\n".join("".join(" .:*#"[min(4, int(pixel * 5))] for pixel in row) for row in sample.tolist()))
