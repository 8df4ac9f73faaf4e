"""A trainer written for Sparse (SpArSeMod) with one changed import: it trains, prunes and quantizes, and then fits a task of anyfit.

    python examples/sparse_trainer.py

Its training loop is its own, the rest is the routine's.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import anyfit
from anyfit.adapt.sparse import Trainer, from_sparse, prune_net, quantize_net, sparsity  # was: from sparsemod.model import Trainer, ...

PARAMETERS = {"learning_rate": 0.01, "learning_step": 4, "learning_gamma": 0.5, "prune_threshold": 0.8, "batch_size": 32}


class Smoothed(Trainer):
    """Their loop, with labels that are not quite certain, and pruned halfway at once."""

    def train_loop(self, model, optimizer, scheduler, name, epochs, threshold):
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        for epoch in range(epochs):
            model.train()
            for inputs, labels in self.dataloader["train"]:
                optimizer.zero_grad()
                criterion(model(inputs), labels).backward()
                optimizer.step()
                scheduler.step()
            if self.pruning and 2 * (epoch + 1) == epochs:
                model = prune_net(model, threshold)  # what is zero stays zero
        return model


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(64, 10),
    )


class Digits(anyfit.Task):
    def build_model(self, schema):
        return network()


def main():
    torch.manual_seed(0)
    digits, order = load_digits(), torch.randperm(1797)
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
    parts = slice(0, 1100), slice(1100, 1400), slice(1400, None)

    trainer = Smoothed(pruning=True, datasets=[TensorDataset(images[part], labels[part]) for part in parts])
    trainer.load_dataloaders(PARAMETERS["batch_size"], default_collate)
    net = trainer.train(network(), PARAMETERS, "digits", epochs=8, reload=False, old_net=None)
    accuracy, net = trainer.evaluate(net, quant_mode=False)
    print(f"float  accuracy {accuracy:.3f}, {sparsity(net):.1%} zeros")
    accuracy, small = quantize_net(trainer, net)  # evaluate(net, quant_mode=True), then evaluate(small, quant_mode=False)
    print(f"int8   accuracy {accuracy:.3f}, {small.program().constant_bytes:,} bytes")

    train, val, test = ({"image": images[part], "target": labels[part]} for part in parts)
    fit = from_sparse(Smoothed, PARAMETERS)  # as anyfit.fit; also prune(..., fit=fit)
    run = fit(Digits(), train, validation=val, test=test, epochs=4)
    print(f"task   accuracy {run.splits['test']['accuracy']:.3f}")


if __name__ == "__main__":
    main()
