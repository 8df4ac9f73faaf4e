"""A network for a microcontroller that reads handwritten digits: 1,566 weights in int8, 2,016 bytes of memory, above 99 % on MNIST.

python examples/tiny_mnist.py FOLDER_OF_THE_IDX_FILES [--epochs 80] [--finish 8] [--seed 0] [--run RUN]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyfit
from anyfit.schedule import cosine


def block(into: int, out: int, stride: int = 1) -> list[nn.Module]:
    """Each channel by itself, then all channels at each pixel: a ninth of the weights of a full 3x3 convolution."""
    return [
        nn.Conv2d(into, into, 3, stride, padding=1, groups=into, bias=False),
        nn.BatchNorm2d(into),  # no ReLU here: what it cut off, the next layer would lack
        nn.Conv2d(into, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    ]


class TinyNet(nn.Module):
    """Pixels to ten logits. What limits it is memory: no two neighbouring activations may exceed 2 KB together, the image included.

    So the first convolution takes stride 2 and no padding (784 bytes of image + 7 x 12 x 12), most layers work on 16 x 6 x 6, and the last
    3x3 pixels are weighed by a learned kernel per channel rather than averaged. Normalisation is folded into the convolutions for export.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 7, 5, stride=2, bias=False), nn.BatchNorm2d(7), nn.ReLU()),  # 7 x 12 x 12
            *block(7, 7),
            *block(7, 16, stride=2),  # 16 x 6 x 6
            *block(16, 16),
            *block(16, 16),
            nn.MaxPool2d(2),  # 16 x 3 x 3
            *(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.Flatten()),  # 16
            nn.Linear(16, num_classes),
        )

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image.float() / 255)
        return logits


class TinyDigits(anyfit.Task):
    """Batch: `image` uint8 (B, 1, 28, 28), `target` (B,). `strength` scales how far training images are moved, turned, scaled and sheared.

    So small a network is under-trained rather than over-fitted: a high rate and many epochs give what more weights would.
    """

    strength: float = 1.0
    lr: float = 0.06
    weight_decay: float = 0.01

    def plan(self) -> anyfit.Plan:
        return anyfit.Plan(epochs=80, batch_size=256, channels_last=True)

    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        return TinyNet(schema.num_classes)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return anyfit.adamw(model, lr=self.lr, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return cosine(optimizer, total_steps, warmup=0.2)

    def augment(self, batch: Any, uniform: Any) -> Any:
        """Each image under an affine map of its own; outside of an image is black."""
        turn, wider, higher, shear, right, down = (self.strength * (2 * uniform(6) - 1)).unbind(1)
        angle, across, along = 0.2 * turn, 1 + 0.12 * wider, 1 + 0.12 * higher  # radians; shifts below are 0.14 x 14 = 2 pixels
        cos, sin = angle.cos(), angle.sin()
        rows = [across * cos, 0.2 * shear - sin, 0.14 * right, sin, along * cos, 0.14 * down]
        image_B1HW = batch["image"].float()
        grid_BHW2 = F.affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), list(image_B1HW.shape), align_corners=False)
        moved_B1HW = F.grid_sample(image_B1HW, grid_BHW2, align_corners=False)
        return {**batch, "image": moved_B1HW.round().to(torch.uint8)}


def train(data: Any, *, epochs: int = 80, finish: int = 8, seed: int = 0, run: Path | None = None, **options: Any) -> anyfit.Run:
    """One cycle of the rate on much moved images, then a few epochs at a low rate on images as they will be met."""
    first = anyfit.fit(TinyDigits(), data, epochs=epochs, seed=seed, run=run and run / "long", **options)
    mild = TinyDigits(strength=0.4, lr=0.004)
    return anyfit.fit(mild, data, weights=first, epochs=finish, seed=seed + 1000, run=run and run / "finish", **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="a folder with the four files of MNIST")
    parser.add_argument("--epochs", type=int, default=80, help="of the long part")
    parser.add_argument("--finish", type=int, default=8, help="epochs of the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a new folder for both runs")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads gain nothing with so small a model
    trained = train(given.data, epochs=given.epochs, finish=given.finish, seed=given.seed, run=given.run)
    print(f"accuracy {trained.splits['test']['accuracy']:.4f}")
