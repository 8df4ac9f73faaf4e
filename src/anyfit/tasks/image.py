"""Image classification: the two-convolution network of HetSeq's MNIST example, for any size and channels.

Its Dropout2d on a flat tensor is a plain Dropout here, and its loss takes logits. B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from anyfit import data
from anyfit.errors import DataError
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Task, adamw
from anyfit.values import Plan

__all__ = ["ConvNet", "Image", "StagedNet", "Standardize"]


class Standardize(nn.Module):
    """Pixels (uint8 or float) to floats of mean 0 and deviation 1 per channel; its numbers come from the schema, not from training."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1.0 / torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) * self.scale  # type: ignore[operator]


class ConvNet(nn.Module):
    """conv 3x3 - conv 3x3 - max pool 2 - hidden - classes, with dropout; a second pooling where the image is large."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, mean: tuple[float, ...], std: tuple[float, ...], task: Image) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 6:
            raise DataError(f"images of {height} x {width} pixels are too small for this network, which needs 6 x 6")
        self.standardize = Standardize(mean, std)
        self.conv1 = nn.Conv2d(channels, task.channels, 3)
        self.conv2 = nn.Conv2d(task.channels, 2 * task.channels, 3)
        height, width = (height - 4) // 2, (width - 4) // 2
        self.dropout1, self.dropout2 = nn.Dropout(task.dropout), nn.Dropout(2 * task.dropout)
        self.hidden = nn.Linear(2 * task.channels * height * width, task.hidden)
        self.output = nn.Linear(task.hidden, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv1(self.standardize(image)))
        x = torch.relu(self.conv2(x))
        x = self.dropout1(torch.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(torch.relu(self.hidden(x)))
        logits: Tensor = self.output(x)
        return logits


def _shifted(image_BCHW: Tensor, most: int, chance_B2: Tensor) -> Tensor:
    """Each image moved by up to `most` pixels in both directions; its border goes on."""
    rows, _, height, width = image_BCHW.shape
    device = image_BCHW.device
    moves_B2 = (chance_B2 * (2 * most + 1)).long() - most
    down_BH = (moves_B2[:, :1] + torch.arange(height, device=device)).clamp_(0, height - 1)
    right_BW = (moves_B2[:, 1:] + torch.arange(width, device=device)).clamp_(0, width - 1)
    moved = image_BCHW[torch.arange(rows, device=device)[:, None, None], :, down_BH[:, :, None], right_BW[:, None, :]]
    return moved.permute(0, 3, 1, 2)


class StagedNet(nn.Module):
    """Colour images: a convolution, then stages of two with twice the channels; each stage is pooled and normalised by groups.

    (No batch statistics: sites and unequal workers could not share them.)
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, mean: tuple[float, ...], std: tuple[float, ...], task: Image) -> None:
        super().__init__()
        width, height, breadth = shape

        def convolution(into: int, out: int) -> list[nn.Module]:
            return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.GroupNorm(math.gcd(8, out), out), nn.ReLU()]

        channels = task.channels
        layers: list[nn.Module] = [Standardize(mean, std), *convolution(width, channels), nn.MaxPool2d(2)]
        height, breadth = height // 2, breadth // 2
        while min(height, breadth) >= 8:
            wider = min(2 * channels, 8 * task.channels)
            layers += [*convolution(channels, wider), *convolution(wider, wider), nn.MaxPool2d(2)]
            channels, height, breadth = wider, height // 2, breadth // 2
        layers += [nn.Flatten(), nn.Dropout(task.dropout), nn.Linear(channels * height * breadth, num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits


class Image(Task):
    """Classify images (uint8 or float, C x H x W). `hidden` units are those of small or grey images. Batch: `image` (B, C, H, W), `target` (B,).

    Training images are shifted by up to `shift` pixels and, with `flip`, mirrored at random; None: colour images are, by an
    eighth of their width. (A mirrored digit is another digit.)
    """

    channels: int = 32
    hidden: int = 128
    dropout: float = 0.25
    shift: int | None = None
    flip: bool | None = None
    balance: bool = False
    lr: float = 1e-3
    weight_decay: float = 0.01

    def plan(self) -> Plan:
        return Plan(steps=3000, batch_size=64)

    def augment(self, batch: Any, uniform: data.Uniform) -> Any:
        image_BCHW: Tensor = batch["image"]
        colour = image_BCHW.shape[1] == 3
        shift = (image_BCHW.shape[3] // 8 if colour else 0) if self.shift is None else self.shift
        if colour if self.flip is None else self.flip:
            image_BCHW = torch.where((uniform() < 0.5)[:, None, None, None], image_BCHW.flip(3), image_BCHW)
        return {**batch, "image": _shifted(image_BCHW, shift, uniform(2)) if shift else image_BCHW}

    def build_model(self, schema: Schema) -> nn.Module:
        images = schema.of_type("image")
        if len(images) != 1:
            names = ", ".join(f"{column.name} ({column.type})" for column in schema.columns)
            raise DataError(f"task image needs one image column (C x H x W), but the data has: {names}")
        column = images[0]
        mean = column.mean if isinstance(column.mean, tuple) else (0.0,) * column.shape[0]
        std = column.std if isinstance(column.std, tuple) else (1.0,) * column.shape[0]
        network = StagedNet if column.shape[0] == 3 and min(column.shape[1:]) >= 16 else ConvNet
        return network(column.shape, schema.num_classes, mean, std, self)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return adamw(model, lr=self.lr, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.05)
