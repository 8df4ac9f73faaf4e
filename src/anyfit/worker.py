"""A site's turn: an order comes in, an update goes out through the guard. The rows stay here, and so does what the site remembers.

One worker serves one site at a pod, and thousands in a simulation: it has one model, which each turn sets to the order's weights.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anyfit import data, engine, machine
from anyfit.data import Batches, Partition, Rows, Source
from anyfit.engine import Losses, Stepped, Trainer, train
from anyfit.errors import AnyfitError, BudgetSpent, DataError, InputError, TaskError
from anyfit.guard import BUFFERS, LOSS, WEIGHTS, Guard, Shapes
from anyfit.metrics import DEFAULTS
from anyfit.prepare import Prepared, built, infer, statistics
from anyfit.privacy import ExamplePrivacy, noise_for
from anyfit.private import PrivateSteps, Spending, sampling_rate, units_of
from anyfit.schema import Schema
from anyfit.state import Position, State
from anyfit.strategy import Strategy
from anyfit.task import Task
from anyfit.tree import clone, leaves
from anyfit.update import FINE, GRADIENTS, WIDE, Layout, Order, Reply, Update
from anyfit.values import Plan

__all__ = ["Memories", "Turn", "Worker", "exchanged", "local_steps", "plan_for"]

HELD_BYTES = 4 << 30  # of sites' rows and batches that stay in memory between their turns
Correct = Callable[[list[Tensor], list[int]], None]


class Memories:
    """What stays at each site between its turns: a file for each site and round, or in RAM where no folder is given.

    A round's memory counts once the round is committed: after a kill the older one is still there. On disk, what goes with the last
    but one checkpoint stays too.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, dict[int, Any]] = {}
        self._touched: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
            name, round, _ = path.name.rsplit(".", 2)
            self._held.setdefault(unquote(name), {})[int(round)] = None
        self._touched = {site for site, versions in self._held.items() if len(versions) > 1}

    @property
    def on_disk(self) -> bool:
        """Whether they outlive the process."""
        return self._folder is not None

    def _path(self, site: str, round: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{quote(site, safe='')}.{round:07d}.safetensors"

    def read(self, site: str, round: int) -> dict[str, Any]:
        """As it was before `round`."""
        known = [at for at in self._held[site] if at < round] if site in self._held else None
        if not known:
            return {}
        if self._folder is None:
            found: dict[str, Any] = clone(self._held[site][max(known)])
            return found
        return dict(State.load(self._path(site, max(known))).extras["memory"])

    def write(self, site: str, round: int, memory: Mapping[str, Any]) -> None:
        """After a turn of `round`."""
        if self._folder is None:
            self._held.setdefault(site, {})[round] = clone(dict(memory))
        else:
            State(extras={"memory": dict(memory)}).save(self._path(site, round))
            self._held.setdefault(site, {})[round] = None
        self._touched.add(site)

    def settle(self, round: int, counted: Collection[str]) -> None:
        """What sites whose answer did not count learnt in `round` goes; what it cost their privacy stays."""
        for site in [site for site in self._touched if site not in counted and round in self._held[site]]:
            spent = self.read(site, round + 1).get("spent")
            self._forget(site, round)
            if spent is not None:
                self.write(site, round, {**self.read(site, round), "spent": spent})

    def commit(self, rounds: Collection[int]) -> None:
        """Keep what it was after each of `rounds`, the last one included; nobody goes back to others."""
        for site in self._touched:
            versions = self._held[site]
            kept = {max((at for at in versions if at <= round), default=-1) for round in rounds}
            for at in [at for at in versions if at not in kept]:
                self._forget(site, at)
        self._touched = {site for site in self._touched if len(self._held[site]) > 1}

    def cut(self, round: int) -> None:
        """What came after `round` never happened."""
        for path in self._folder.glob(".*.part") if self._folder is not None else ():  # of a write that was killed
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(".*.tmp") if self._folder is not None else ():
            path.unlink(missing_ok=True)
        for site, versions in self._held.items():
            for at in [at for at in versions if at > round]:
                self._forget(site, at)

    def _forget(self, site: str, round: int) -> None:
        del self._held[site][round]
        if self._folder is not None:
            self._path(site, round).unlink(missing_ok=True)


@dataclass
class Site:
    """One party's rows by split, and the batches made of them."""

    name: str
    parts: dict[str, Rows]
    rows: int  # to train on
    batches: dict[str, Batches] = field(default_factory=dict)
    size: int = 0
    private: Spending | None = None  # where each example is protected


class Worker:
    """Serves orders for some sites with one resident model. `options` (JSON) are those of the federation."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        strategy: Strategy,
        sites: Mapping[str, Source],
        *,
        guard: Guard | None = None,
        memories: Memories | None = None,
        validation: Any = None,
        test: Any = None,
        privacy: ExamplePrivacy | None = None,
        secret: int = 0,
        schema: Schema | None = None,
    ) -> None:
        if privacy is not None:  # each row is clipped, and each is looked at alone
            plan = plan.updated(bucket=False, clip=None)
        self.task, self.plan, self.strategy, self.sources = task, plan, strategy, sites
        self.guard, self.memories, self.privacy = guard or Guard(), memories or Memories(None), privacy
        self.device = machine.pick_device(plan.device)
        self._validation, self._test, self._secret, self._known_schema = validation, test, secret, schema
        self._held: OrderedDict[str, Site] = OrderedDict()
        self._held_bytes = 0
        self._reader, self._coming = ThreadPoolExecutor(1), dict[str, Future[Site]]()
        self._handlers: dict[str, Callable[[str, Order], tuple[Update | None, int, dict[str, Any]]]] = {
            "describe": self._describe,
            "prepare": self._prepare,
            "join": self._join,
            "train": self._train,
            "evaluate": self._evaluate,
        }
        self._seeds: dict[str, int] = {}
        self._order: tuple[Order, Tensor] | None = None
        self._joined = False
        self._classes: dict[str, dict[str, int]] | None = None
        self._heaviest: dict[str, float] = {}

    # ------------------------------------------------------------------ rows

    def site(self, name: str) -> Site:
        """A site's rows; those of sites that were not asked for long go first when memory runs short."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        site = self._held[name] = self._coming.pop(name).result() if name in self._coming else self._read(name)
        self._held_bytes += site.size
        while self._held_bytes > HELD_BYTES and len(self._held) > 1:
            _, gone = self._held.popitem(last=False)
            self._held_bytes -= gone.size
        return site

    def _read(self, name: str) -> Site:
        wants = self.plan.keeps_best and self._validation is None
        parts = _split(self.sources[name], self._validation, self._test, wants)
        rows = data.num_rows(parts["train"])
        if not rows:
            raise DataError(f"site {name!r} has no rows")
        return Site(name, parts, rows, size=2 * sum(_bytes(part) for part in parts.values()))

    def read_ahead(self, name: str) -> None:
        """Begin to read the rows of the site whose turn comes next, beside the turn that is now."""
        if name not in self._held and name not in self._coming:
            self._coming[name] = self._reader.submit(self._read, name)

    def _batches(self, site: Site, split: str) -> Batches:
        if split not in site.batches:
            plan = self.plan.updated(seed=self._seed(site.name), device=str(self.device))
            plan = plan_for(plan, site.rows)
            prepared = Prepared(self.task, plan, self.device, self.schema, site.parts, {}, self.task.collate)
            site.batches[split] = prepared.batches(split)
        return site.batches[split]

    def _seed(self, site: str) -> int:
        """Of one site: sites must neither shuffle nor drop out alike."""
        if site not in self._seeds:
            self._seeds[site] = data.mix_seed(self.plan.seed, int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "big"))
        return self._seeds[site]

    def weights(self, order: Order) -> Tensor:
        """(P,) an order's weights on the device; one order serves many sites."""
        if self._order is None or self._order[0] is not order:
            self._order = (order, order.tensors[WEIGHTS].to(self.device, self.layout.dtype))
        return self._order[1]

    def private(self, site: Site, values: Mapping[str, Any], memory: Mapping[str, Any]) -> Spending | None:
        """How the examples of a site are protected, and what that costs it. Noise that was calibrated once stays: what was spent with
        it cannot be counted at another price.
        """
        if self.privacy is None or site.private is not None:
            return site.private
        units = None if self.privacy.unit is None else units_of(site.parts["train"], self.privacy.unit)
        count = site.rows if units is None else int(units.max()) + 1
        rate = sampling_rate(None if self.plan.batch_size is None else min(self.plan.batch_size, count), count)
        noise = memory.get("noise", self.privacy.noise_multiplier)
        if noise is None:
            assert self.privacy.epsilon is not None
            steps = int(values["rounds"]) * local_steps(values, max(1, round(1 / rate)))
            noise = noise_for(self.privacy.epsilon, self.privacy.delta, steps, rate)
        secret = self._secret_of(site.name)
        private = PrivateSteps(clip=self.privacy.clip, noise_multiplier=noise, sampling_rate=rate, seed=secret, units=units)
        site.private = Spending(self.privacy, private, count)
        return site.private

    def _secret_of(self, site: str) -> int:
        return (self._secret << 64) | self._seed(site)

    # ---------------------------------------------------------------- orders

    def answer(self, name: str, order: Order) -> Reply:
        """Do what the order says for one site; a failure becomes a reply that says why."""
        begun = time.monotonic()
        try:
            update, size, values = self._handlers[order.kind](name, order)
            return Reply(name, update, seconds=time.monotonic() - begun, values=values, size=size)
        except AnyfitError as error:
            values = {"budget": True} if isinstance(error, BudgetSpent) else {}
            return Reply(name, error=str(error), seconds=time.monotonic() - begun, values=values, cause=error)
        except Exception as error:  # noqa: BLE001 - code of a task or strategy: what fails at one site is that site's failure
            return Reply(name, error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - begun, cause=error)

    def _release(
        self, name: str, order: Order, update: Update, rows: int, shapes: Shapes | None, memory: Any, **known: Any
    ) -> tuple[Update, int]:
        return self.guard.release(order, update, rows=rows, shapes=shapes, seed=self._secret_of(name), memory=memory, **known)

    def _describe(self, name: str, order: Order) -> tuple[None, int, dict[str, Any]]:
        """Names and types of the site's columns; its rows by split, and their hash, by which a resume knows them."""
        site = self.site(name)
        schema = infer(self.sources[name], site.parts["train"]) if self._known_schema is None else self._known_schema
        absent = [column.name for column in schema.columns if _all_missing(site.parts["train"], column.name)]
        about = {split: {"rows": data.num_rows(rows), "sha256": data.fingerprint(rows)} for split, rows in site.parts.items()}
        loose = not isinstance(site.parts["train"], pa.Table | data.Blocks | tuple | Mapping)
        return None, 0, {"schema": schema.to_json(), "absent": absent, "loose": loose, "source": self.sources[name].name, "splits": about}

    def _prepare(self, name: str, order: Order) -> tuple[Update, int, dict[str, Any]]:
        """The additive statistics of this site's rows under the schema that all sites agreed on."""
        site = self.site(name)
        total = statistics(self.task, site.parts["train"], Schema.from_json(order.values["schema"]))
        update = Update.of("rows", {}, float(site.rows), WIDE) if total is None else total
        return *self._release(name, order, update, site.rows, None, {}), {}

    def _join(self, name: str, order: Order) -> tuple[None, int, dict[str, Any]]:
        """Take the fitted schema and the frozen tensors; say what this site's model exchanges and holds fixed, as hashes."""
        if not self._joined:
            self.schema = Schema.from_json(order.values["schema"])
            machine.seed_all(self.plan.seed)
            self.model = built(self.task, self.schema).to(device=self.device, dtype=getattr(torch, self.plan.dtype))
            shared, averaged, frozen = exchanged(self.task, self.model, self.strategy, str(order.values["batch_statistics"]))
            self.layout, self.shared = Layout.of(shared), list(shared.values())
            self.buffers, self.averaged = Layout.of(averaged), list(averaged.values())
            self.shapes = {**self.strategy.sends(self.layout), **({BUFFERS: {BUFFERS: (self.buffers.size,)}} if averaged else {})}
            with torch.no_grad():
                for key, tensor in frozen.items():
                    if key in order.tensors and order.tensors[key].shape == tensor.shape:
                        tensor.copy_(order.tensors[key])
            named = dict([*self.model.named_parameters(), *self.model.named_buffers()])
            own = {key: tensor for key, tensor in named.items() if key not in shared and key not in frozen and key not in averaged}
            self.placed = self.strategy.stays(self.model) | {key for key in own if key.endswith(STATISTICS)}
            self.own, self.first = own, {key: tensor.detach().clone() for key, tensor in own.items()}
            self._hashes = {"frozen": hash_of(frozen), "layout": self.layout.hash() + self.buffers.hash()}
            self._joined = True
        sources, splits = self.sources, self._validation is not None or self._test is not None or self.plan.keeps_best
        whole = isinstance(sources, Partition) and not splits
        rows = sources.rows_of(name) if whole else self.site(name).rows  # type: ignore[attr-defined]
        for split in () if whole else [split for split in self.site(name).parts if split != "train"]:
            self._batches(self.site(name), split)  # what does not fit in rows that are held back is heard of before anything is trained
        notes = {"notes": ["one class only"]} if self._one_class(name) else {}
        return None, 0, {**self._hashes, "rows": rows, **notes}

    def _one_class(self, name: str) -> bool:
        """Whether all rows of a site are of one class."""
        if self.schema.classes is None or len(self.schema.targets) != 1:
            return False
        if isinstance(self.sources, Partition):
            if self._classes is None:
                self._classes = self.sources.counts() if self.sources.labels is not None else {}
            return sum(rows > 0 for rows in self._classes.get(name, {}).values()) == 1
        rows, target = self.site(name).parts["train"], self.schema.targets[0]
        if isinstance(rows, pa.Table):
            return target in rows.column_names and not self.schema[target].multiple and len(pc.unique(rows[target])) == 1
        labels = rows.get(target) if isinstance(rows, Mapping) else rows[-1] if isinstance(rows, tuple) else None
        return isinstance(labels, Tensor) and bool((labels == labels.flatten()[0]).all())

    def _train(self, name: str, order: Order) -> tuple[Update, int, dict[str, Any]]:
        memory = self.memories.read(name, order.round)
        turn = Turn(self, name, order, memory)
        update = self.strategy.local(turn)
        if self.averaged and turn.steps:
            moved = self.buffers.flat(self.averaged) - order.tensors[BUFFERS].to(self.device, self.buffers.dtype)
            update = update.joined(Update.of(BUFFERS, {BUFFERS: moved}, turn.rows, GRADIENTS, scale=turn.rows))
        released, size = self._release(name, order, update, turn.true_rows, self.shapes, memory, most=turn.most_rows)
        if memory:
            self.memories.write(name, order.round, memory)
        return released, size, turn.values()

    def _evaluate(self, name: str, order: Order) -> tuple[Update, int, dict[str, Any]]:
        site, split = self.site(name), str(order.values["split"])
        if split not in site.parts:
            return Update(), 0, {}
        self.place(order, self.memories.read(name, order.round + 1))
        rows = data.num_rows(site.parts[split]) or 0
        total = Update()
        sums = engine.totals(self.task, self.model, self._batches(site, split), machine.autocast(self.plan, self.device)).sums()
        for metric, parts in sums.items():
            total = total.joined(Update.of(f"metric:{metric}", parts, float(rows), WIDE))
        named = self.task.metrics(self.schema)
        return *self._release(name, order, total, rows, None, {}, metrics=("loss", *(DEFAULTS if named is None else named))), {}

    def heaviest(self, site: Site) -> float:
        """The most that one row of a site can count for, from its own table: its weight, its class's, and how many targets it has."""
        if self._heaviest.get(site.name) is None:
            targets = [self.schema[name] for name in self.schema.targets]
            entries = len(self.schema.classes or ()) if self.schema.multilabel else len(targets)
            most = max(1.0, *(max(column.weights or (1.0,)) for column in targets), 1.0) * max(1, entries)
            rows, weight = site.parts["train"], self.schema.weight
            if weight is not None and isinstance(rows, pa.Table) and weight in rows.column_names:
                most *= max(1.0, float(pc.max(rows[weight]).as_py() or 1.0))
            self._heaviest[site.name] = most
        return self._heaviest[site.name]

    def place(self, order: Order, memory: Mapping[str, Any]) -> None:
        """Set the model to an order's weights, and what a site keeps to itself to what it was there."""
        with torch.no_grad():
            torch._foreach_copy_(self.shared, self.layout.views(self.weights(order)))
            if self.averaged:
                torch._foreach_copy_(self.averaged, self.buffers.views(order.tensors[BUFFERS].to(self.device, self.buffers.dtype)))
            if self.own:
                kept = memory.get("own", {})
                for key, tensor in self.own.items():
                    tensor.copy_(kept.get(key, self.first[key]))


class Turn:
    """One order at one site: what the site's half of a strategy may use.

    `weights` (P,) are the order's, `tensors` what `begin` sent beside them, `shared` the live tensors of the model that the vector
    stands for, `start` the same as they came, `memory` a dict that stays at this site.
    """

    def __init__(self, worker: Worker, name: str, order: Order, memory: dict[str, Any]) -> None:
        self._worker, self.name, self.order, self.memory = worker, name, order, memory
        self.tensors, self.layout, self.shared, self.task = order.tensors, worker.layout, worker.shared, worker.task
        self.weights = worker.weights(order)
        self.steps, self.loss = 0, None
        self.momentum = 0.0
        self._per_row = 1.0
        self._stays: list[str] = []
        self.epsilon: float | None = None  # spent at this site, where each example is protected
        self._placed = False

    steps: int  # that `train` took
    loss: float | None  # their mean
    trainer: Trainer  # of `train`

    @property
    def true_rows(self) -> int:
        """Rows to train on, from the site's own table."""
        return self._worker.site(self.name).rows

    @property
    def most_rows(self) -> float:
        """The most that they can count for."""
        return self.true_rows * self._worker.heaviest(self._worker.site(self.name))

    @property
    def rows(self) -> float:
        """What this site's update counts for: its rows, each by its weight, and without those that have no label. Known once it has
        trained; before, all rows.
        """
        return self.true_rows * self._per_row

    @property
    def start(self) -> list[Tensor]:
        """The order's weights in the shapes of `shared`."""
        return self.layout.views(self.weights)

    @property
    def model(self) -> nn.Module:
        """The model at the order's weights."""
        if not self._placed:
            self._worker.place(self.order, self.memory)
            self._placed = True
        return self._worker.model

    @property
    def batches(self) -> Batches:
        """The site's training rows."""
        worker = self._worker
        return worker._batches(worker.site(self.name), "train")

    def train(self, correct: Correct | None = None) -> Tensor:
        """The local work that the order asks for, from its weights; the change (P,). `correct(gradients, places)` may alter the
        gradients of each step in place; `places` are their indices in `shared`.
        """
        worker, order, values = self._worker, self.order, self.order.values
        batches, seconds = self.batches, values.get("seconds")
        site_seed = data.mix_seed(worker._seed(self.name), order.round)
        machine.seed_all(site_seed, worker.device)
        private = worker.private(worker.site(self.name), values, self.memory)
        per_epoch = batches.steps_per_epoch if private is None else private.steps.steps_per_epoch
        steps = None if seconds is not None else local_steps(values, per_epoch)
        if private is not None:
            self._spend(private, steps)
        total = int(values["rounds"]) * (steps or 1)
        model = self.model
        options: dict[str, Any] = {} if private is None else {"private": replace(private.steps, seed=self._secret(private))}
        trainer = self.trainer = engine.make_trainer(worker.task, model, worker.plan, total, worker.device, **options)
        trainer.total = None  # how far the whole is, the server knows
        self._position(trainer, per_epoch or 1, steps)
        if correct is not None:
            places = {id(tensor): place for place, tensor in enumerate(self.shared)}
            trainer.correct = _correction(trainer, places, correct)
        if values.get("keep_optimizer") and "optimizers" in self.memory:
            for key, optimizer in trainer.optimizers.items():
                optimizer.load_state_dict(clone(self.memory["optimizers"][key]))
        losses, until = Losses(), float("inf") if seconds is None else time.monotonic() + float(seconds)
        start = trainer.position.step
        for event in train(trainer, batches, start + steps if steps is not None else 1 << 62):
            losses.events.append(event)
            if time.monotonic() >= until:
                break
        self.steps = trainer.position.step - start
        if private is None:
            self._per_row = self._count_per_row(losses.events, batches)
        read = losses.read()
        self.loss = None if read is None or not self._per_row else read[0]
        groups = next(iter(trainer.optimizers.values())).param_groups
        self.momentum = float(groups[0].get("momentum", 0.0))
        if values.get("keep_optimizer"):
            self.memory["optimizers"] = {key: clone(optimizer.state_dict()) for key, optimizer in trainer.optimizers.items()}
        self._keep_own()
        return self.layout.flat(self.shared).sub_(self.weights)

    def _secret(self, private: Spending) -> int:
        """Noise that hides other weights is other noise, also where a run was forked at this step."""
        seen = hashlib.sha256(self.weights.detach().cpu().contiguous().view(torch.uint8).numpy().data).digest()
        return (private.steps.seed << 128) | int.from_bytes(seen[:16], "big")

    def _count_per_row(self, events: Sequence[Stepped], batches: Batches) -> float:
        """The losses' denominators over the rows that they were of; a task that counts more than its rows (tokens) counts rows."""
        size = getattr(batches, "step_size", None)
        if size is None or batches.rows is None:
            return 1.0
        counts = sum(float(event.count) for event in events)
        seen = sum(min(batches.rows, (event.offset + 1) * size) - event.offset * size for event in events)
        return min(float(counts / max(seen, 1)), self._worker.heaviest(self._worker.site(self.name)))

    def _spend(self, private: Spending, steps: int | None) -> None:
        """Count the steps of this turn before they are taken; refuse what would pass the budget."""
        if steps is None:
            raise InputError("privacy of examples counts steps; give local work by epochs or steps, not seconds")
        spent = int(self.memory.get("spent", 0)) + steps
        if private.allowed is not None and spent > private.allowed:
            raise BudgetSpent(
                f"{steps} more steps would pass the budget of this site (epsilon={private.asked.epsilon}, which {private.allowed} steps use up)"
            )
        self.memory |= {"spent": spent, "noise": private.steps.noise_multiplier}
        self.epsilon = private.epsilon(spent)

    def _position(self, trainer: Trainer, per_epoch: int, steps: int | None) -> None:
        """Where this turn stands in the whole federation: the order of rows and the learning rate go on from there."""
        before = self.order.round - 1
        done = before * (per_epoch if steps is None else steps)  # by time, each round begins an epoch: else most rows never had a turn
        trainer.position = Position(done, done // per_epoch, done % per_epoch)
        looked = before // (self._worker.plan.evaluate_every or 1)
        for schedule in trainer.schedules.values():
            if isinstance(schedule.scheduler, ReduceLROnPlateau):
                raise TaskError("a rate that follows the validation loss (plateau) has none to follow at a site; use another schedule")
            passed = {"step": done, "epoch": done // per_epoch, "evaluation": looked}
            schedule.skip(before if steps is None else passed[schedule.every])
        if steps is None:  # nobody knows how many steps there will be: rounds are what the rate goes by
            trainer.schedules = {}

    def _keep_own(self) -> None:
        """What the site keeps to itself, where it has changed."""
        changed = {key: tensor for key, tensor in self._worker.own.items() if not torch.equal(tensor, self._worker.first[key])}
        self._stays = sorted(set(changed) - self._worker.placed)
        if changed:
            self.memory["own"] = {key: tensor.detach().cpu().clone() for key, tensor in changed.items()}

    def update(self, change: Tensor, count: float | None = None) -> Update:
        """An update of the change (P,), counted by the site's rows, with the loss of this turn."""
        count = self.rows if count is None else count
        update = Update.of(WEIGHTS, {WEIGHTS: change}, count, GRADIENTS if self.order.values.get("wide") else FINE, scale=count)
        if self.loss is None or not count or self._worker.privacy is not None or self._worker.guard.privacy is not None:
            return update  # a loss is not covered by any noise
        return update.joined(Update.of(LOSS, {LOSS: torch.tensor(self.loss * count, dtype=torch.float64)}, count, WIDE))

    def values(self) -> dict[str, Any]:
        """What is told of this turn beside the update."""
        stays = {"stays": self._stays} if self._stays else {}
        return stays if self.epsilon is None else {**stays, "epsilon": self.epsilon}


def _correction(trainer: Trainer, places: Mapping[int, int], correct: Correct) -> Callable[[Sequence[Tensor], float], None]:
    """The engine's hook for a strategy's: gradients by their place in the vector."""
    parameters = [(parameter, places[id(parameter)]) for parameter in trainer.model.parameters() if id(parameter) in places]

    def hook(gradients: Sequence[Tensor], lr: float) -> None:
        owners = {id(parameter.grad): place for parameter, place in parameters if parameter.grad is not None}
        found = [(gradient, owners[id(gradient)]) for gradient in gradients if id(gradient) in owners]
        if found:
            correct([gradient for gradient, _ in found], [place for _, place in found])

    return hook


def plan_for(plan: Plan, rows: int | None) -> Plan:
    """A site smaller than a batch trains on all its rows at once."""
    small = plan.batch_size is not None and rows is not None and plan.batch_size > rows
    return plan.updated(batch_size=None) if small else plan


def local_steps(values: Mapping[str, Any], per_epoch: int | None) -> int:
    """Optimizer steps of one round at a site: so many, or so many epochs over its rows."""
    if values.get("steps") is not None:
        return int(values["steps"])
    if per_epoch is None:
        raise InputError("epochs cannot be counted on a stream without length; pass steps=...")
    return int(values.get("epochs") or 1) * per_epoch


STATISTICS = ("running_mean", "running_var")


def exchanged(
    task: Task, model: nn.Module, strategy: Strategy, batch_statistics: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """-> the parameters that a strategy works on, the buffers that are averaged beside them whatever the strategy, and the parameters
    that nobody changes. What is in none of the three stays at each site.
    """
    home, parameters, buffers = strategy.stays(model), dict(model.named_parameters()), dict(model.named_buffers())
    averaged = {name: tensor for name, tensor in buffers.items() if name not in home and task.shared(name, tensor)}
    statistics = {n: tensor for n, tensor in buffers.items() if n.endswith(STATISTICS) and n not in home and n not in averaged}
    if statistics and batch_statistics == "refuse":
        raise TaskError(
            f"the model keeps batch statistics ({next(iter(statistics))}), which sites exchange only if told to; pass "
            "batch_statistics='aggregate' or 'local' (they stay at each site), or use a layer without (GroupNorm, LayerNorm)"
        )
    averaged |= statistics if batch_statistics == "aggregate" else {}
    shared: dict[str, Tensor] = {name: tensor for name, tensor in parameters.items() if name not in home and task.shared(name, tensor)}
    if not shared:
        raise TaskError(f"shared() of {type(task).__name__} leaves nothing to exchange; let at least one parameter through")
    odd = next((name for name, tensor in (*shared.items(), *averaged.items()) if not tensor.is_floating_point()), None)
    if odd is not None:
        raise InputError(f"shared() of {type(task).__name__} lets {odd} through, which has no mean; keep it at the site")
    frozen: dict[str, Tensor] = {
        name: tensor for name, tensor in parameters.items() if name not in shared and name not in home and not tensor.requires_grad
    }
    return shared, averaged, frozen


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _split(source: Source, validation: Any, test: Any, wants: bool) -> dict[str, Rows]:
    """Every site splits by the same rule; one that has too few rows for a part goes without it."""
    parts = data.read_splits(source, None, None, wants_validation=False)
    for name, given in (("test", test), ("validation", 0.1 if wants and "validation" not in parts else validation)):
        if given is not None and (data.num_rows(parts["train"]) or 0) > 1:
            parts["train"], parts[name] = data.take_fraction(parts["train"], float(given), group=source.group, salt=name)
    return parts


def _bytes(rows: Rows) -> int:
    if isinstance(rows, pa.Table):
        return int(rows.nbytes)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(rows)) if isinstance(rows, tuple | Mapping) else 0


def _all_missing(rows: Rows, column: str) -> bool:
    return isinstance(rows, pa.Table) and column in rows.column_names and rows[column].null_count == rows.num_rows
