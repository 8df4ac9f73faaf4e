"""Classes written for HetSeq, as they stand: its Task, Dataset, optimizer and scheduler become a task and its rows by one line.

    python examples/hetseq_classes.py [FOLDER WITH MNIST/processed/]

What HetSeq's tutorial imports from HetSeq (Task, _Optimizer, PolynomialDecayScheduler) stands first. Without a folder the bundled
digits are written into one.
"""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import anyfit
from anyfit.adapt.hetseq import from_hetseq


class Task:
    def __init__(self, args):
        self.args, self.datasets, self.dataset_to_epoch_iter = args, {}, {}

    def build_model(self, args):
        raise NotImplementedError

    def load_dataset(self, split, **kwargs):
        raise NotImplementedError

    def train_step(self, sample, model, optimizer, ignore_grad=False):
        model.train()
        loss = model(*sample)
        if ignore_grad:
            loss *= 0
        size = len(sample[0][0])  # HetSeq's mistake: the channels of an image. This step is not asked; rows are counted
        optimizer.backward(loss)
        return loss, size, {"nsentences": size, "loss": loss.data, "ntokens": 0, "sample_size": size}


class _Optimizer:
    def __init__(self, args):
        self.args = args

    @property
    def optimizer(self):
        return self._optimizer

    def get_lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, closure=None):
        self.optimizer.step(closure)


class _Adam(_Optimizer):
    def __init__(self, args, params):
        super().__init__(args)
        self._optimizer = torch.optim.AdamW(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {
            "lr": self.args.lr[0],
            "betas": ast.literal_eval(self.args.adam_betas),
            "eps": self.args.adam_eps,
            "weight_decay": self.args.weight_decay,
        }


class PolynomialDecayScheduler:
    def __init__(self, args, optimizer):
        self.args, self.optimizer, self.lr, self.warmup_factor = args, optimizer, args.lr[0], 1.0

    def step(self, epoch, val_loss=None):
        self.lr = self.args.lr[min(epoch, len(self.args.lr) - 1)]
        self.optimizer.set_lr(self.warmup_factor * self.lr)

    def step_update(self, num_updates):
        warmup, total, end = self.args.warmup_updates, self.args.total_num_update, self.args.end_learning_rate
        if warmup > 0 and num_updates <= warmup:
            self.warmup_factor = num_updates / warmup
            lr = self.warmup_factor * self.lr
        elif num_updates >= total:
            lr = end
        else:
            lr = (self.lr - end) * (1 - (num_updates - warmup) / (total - warmup)) ** self.args.power + end
        self.optimizer.set_lr(lr)
        return self.optimizer.get_lr()


class MNISTTask(Task):
    @classmethod
    def setup_task(cls, args, **kwargs):
        return cls(args)

    def build_model(self, args):
        return MNISTNet(args.size)

    def load_dataset(self, split, **kwargs):
        files = [file for file in (Path(self.args.data) / "MNIST/processed").iterdir() if split in file.name]
        assert len(files) == 1, f"no suitable file in split {split}"
        self.datasets[split] = MNISTDataset(files[0])


class MNISTDataset(torch.utils.data.Dataset):
    def __init__(self, path):
        with np.load(path) as held:  # HetSeq's own reads a pickle here
            self.image, self.label = torch.from_numpy(held["image"]), torch.from_numpy(held["label"])

    def __getitem__(self, index):
        return (self.image[index].float()[None] / 255 - 0.1307) / 0.3081, int(self.label[index])

    def __len__(self):
        return len(self.image)

    def ordered_indices(self):
        return np.arange(len(self))

    def num_tokens(self, index):
        return 1

    def collater(self, samples):
        return default_collate(samples) if samples else None

    def set_epoch(self, epoch):
        pass


class MNISTNet(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, 1), nn.Conv2d(32, 64, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(64 * ((size - 4) // 2) ** 2, 128), nn.Linear(128, 10)

    def forward(self, x, target, eval=False):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.relu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        output = F.log_softmax(self.fc2(self.dropout2(x)), dim=1)
        return F.nll_loss(output, target), output  # HetSeq's tutorial gives the loss alone, of which no accuracy can be told


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("--data", required=True)
    made.add_argument("--size", type=int, default=28)
    made.add_argument("--max-sentences", "--batch-size", type=int)
    made.add_argument("--max-epoch", type=int)
    made.add_argument("--update-freq", type=int, nargs="+", default=[1])
    made.add_argument("--clip-norm", type=float, default=25)
    made.add_argument("--lr", type=float, nargs="+", default=[0.25])
    made.add_argument("--adam-betas", default="(0.9, 0.999)")
    made.add_argument("--adam-eps", type=float, default=1e-8)
    made.add_argument("--weight-decay", type=float, default=0.0)
    made.add_argument("--warmup-updates", type=int, default=0)
    made.add_argument("--end-learning-rate", type=float, default=0.0)
    made.add_argument("--power", type=float, default=1.0)
    made.add_argument("--total-num-update", type=int, default=1_000_000)
    return made


def write_digits(folder):
    digits, place = load_digits(), Path(folder) / "MNIST/processed"
    place.mkdir(parents=True)
    images, labels = (digits.images * 15).astype(np.uint8), digits.target
    tested = np.arange(len(images)) % 6 == 0
    np.savez(place / "training.npz", image=images[~tested], label=labels[~tested])
    np.savez(place / "test.npz", image=images[tested], label=labels[tested])


def main(folder, *options):
    args = parser().parse_args(["--data", str(folder), "--max-sentences", "64", "--max-epoch", "4", *options])
    task, rows = from_hetseq(MNISTTask, args, optimizer=_Adam, scheduler=PolynomialDecayScheduler)
    run = anyfit.fit(task, rows, test=task.rows("test"), on_event=print)
    print(f"accuracy {run.splits['test']['accuracy']:.3f} of what {run.record['task']['values']['task'].rpartition(':')[2]} learnt")


if __name__ == "__main__":
    options = ("--lr", "0.002", "--warmup-updates", "20", "--total-num-update", "3000")
    if len(sys.argv) > 1:
        main(sys.argv[1], *options)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_digits(temporary)
            main(temporary, "--size", "8", *options)
