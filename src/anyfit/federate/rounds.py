"""One federation: agree on a schema, then rounds, each a transaction: choose sites, send, fold what comes, go on or stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyfit import data, engine, machine
from anyfit.codec import Codec
from anyfit.data import Batches, Source
from anyfit.errors import DataError, InputError, NonFinite, RunError, StateError
from anyfit.federate.noise import SiteNoise
from anyfit.federate.rules import Rules, agreed, changed_rules, fairness, is_fitted, number_of
from anyfit.federate.transport import ALL, Transport
from anyfit.fitting import OnEvent, scalars
from anyfit.guard import BUFFERS, LOSS, WEIGHTS
from anyfit.metrics import figures
from anyfit.prepare import Prepared, built
from anyfit.privacy import ExamplePrivacy, SitePrivacy
from anyfit.record import compare, last_state, record_of, start_from
from anyfit.run import Folder, Run
from anyfit.schema import Schema
from anyfit.state import Position, State
from anyfit.strategy import Server, Strategy
from anyfit.task import Task
from anyfit.tree import clone
from anyfit.update import Layout, Order, Reply, Total, Update
from anyfit.values import Plan, canonical
from anyfit.worker import STATISTICS, Memories, exchanged, hash_of

__all__ = ["Federation"]

MOST_LOOKED_AT = 100  # sites whose training rows are evaluated at the end where they hold no others
MOST_FINE = 400_000  # rows at all sites, whose changes times rows one limb of fixed point surely holds: each up to 10
ATTEMPTS = 3  # at a round whose quorum is not met, each with other sites where there are more


class Federation:
    """One federation, from its beginning or its last round to its result."""

    def __init__(
        self,
        task: Task,
        transport: Transport,
        strategy: Strategy,
        rules: Rules,
        plan: Plan,
        *,
        privacy: SitePrivacy | ExamplePrivacy | None = None,
        memories: Memories | None = None,
        secret: int = 0,
        folder: Folder | None = None,
        emit: OnEvent = lambda event: None,
        seen: Folder | None = None,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.task, self.transport, self.strategy, self.rules, self.plan = task, transport, strategy, rules, plan
        self.privacy, self.memories, self._secret, self.folder, self._emit = privacy, memories, secret, folder, emit
        self.epsilons: dict[str, float] = {}  # spent at each site, where each example is protected
        self.exhausted: set[str] = set()  # whose budget pays for no further round
        self.device = machine.pick_device(plan.device)
        self.history: list[dict[str, Any]] = []
        self.bytes = {"up": 0, "down": 0}
        self.rows: dict[str, int] = {}  # of the sites that joined
        self.notes: dict[str, list[str]] = {}  # what is odd about them
        self.best: dict[str, Any] | None = None
        self.best_model: dict[str, Tensor] | None = None
        self.bad = 0
        self.noise: SiteNoise | None = None  # where whole sites are protected
        self.stopped: str | None = None
        self.signal: int | None = None
        self.asked = False
        self.test: Batches | None = None
        self.started = self.saved = time.monotonic()
        self.saves = [0, 0]  # the rounds of the last two checkpoints
        self.version = 1
        self.wide = False  # whether changes of weights have been too large for one limb of fixed point
        self.told: set[str] = set()  # tensors that were said to stay at the sites
        self.seen = seen or folder  # where a resume finds what was saved
        self.agree = agree or (lambda flags: flags)  # with whoever else runs this federation
        wants = {"validation": rules.validation is not None or plan.keeps_best, "test": rules.test is not None}
        self.splits = {split for split, wanted in wants.items() if wanted}  # that sites hold rows of beside those to train on

    def emit(self, event: dict[str, Any]) -> None:
        """Tell an event; who listens may answer "stop"."""
        if self._emit(event) == "stop":
            self.asked = True

    # ------------------------------------------------------------ orders

    def _send(
        self, order: Order, to: Sequence[str], quorum: int | None = None, done: Callable[[Order, Reply], None] | None = None
    ) -> Update:
        """The sum of the sites' updates; the order in which they arrive changes no bit of it. A site that fails is an error unless a
        quorum may do without it.
        """
        each = self.strategy.needs == "each" and order.kind == "train"
        total, held, answered = Total(), dict[str, Update](), list[str]()
        failed: dict[str, str] = {}
        self.bytes["down"] += order.size_bytes() * len(to)
        self.transport.send(order, to)
        for given in self.transport.replies(self.rules.deadline_s if order.kind == "train" else None):
            reply = given
            if reply.values.get("budget"):
                self.exhausted.add(reply.site)
                self.emit({"event": "notice", "text": f"site {reply.site} takes no further part: {reply.error}"})
                continue
            if reply.site != ALL and reply.error is None and reply.update is not None and not each:
                try:
                    total.add(reply.update)
                except (InputError, NonFinite) as problem:  # what it sent does not add to what others sent
                    if isinstance(problem, NonFinite) and order.kind == "train" and not self.wide:
                        raise
                    reply = replace(reply, error=str(problem), cause=problem)
            if reply.values.get("narrow") and not self.wide:
                raise NonFinite(str(reply.error))
            if reply.site != ALL and reply.error is not None:
                failed[reply.site] = reply.error
                if order.kind in ("describe", "prepare", "join"):  # its data does not do: nothing has begun yet
                    raise DataError(f"site {reply.site!r}: {reply.error}") from reply.cause
                if quorum is None:
                    raise RunError(f"site {reply.site!r} failed in round {order.round}: {reply.error}") from reply.cause
                continue
            if reply.site != ALL:
                self.bytes["up"] += reply.size
                answered.append(reply.site)
                if done is not None:
                    done(order, reply)
            if reply.update is not None and each:
                if reply.site == ALL:
                    raise InputError(
                        f"{self.strategy.name} needs each site's update, which a sum of several does not tell; use another strategy"
                    )
                held[reply.site] = reply.update
                total.add(Update({BUFFERS: reply.update.groups[BUFFERS]} if BUFFERS in reply.update else {}))
            elif reply.update is not None and reply.site == ALL:
                total.add(reply.update)
        to = [name for name in to if name not in self.exhausted]
        heard = {*answered, *failed}
        silent = [name for name in to if name not in heard]
        self.missing = {**failed, **dict.fromkeys(silent, "no answer in time")}
        if len(answered) < (len(to) if quorum is None else quorum):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.missing.items())[:5])
            raise _NoQuorum(f"{len(answered)} of {len(to)} sites answered in round {order.round}, but {quorum or len(to)} must ({reasons})")
        return self.strategy.combine([held[name] for name in sorted(held)]).joined(total.update()) if held else total.update()

    def _order(self, kind: str, round: int, tensors: Mapping[str, Tensor] | None = None, **values: Any) -> Order:
        return Order(kind, round, self.version, self.plan.seed, tensors or {}, values)

    # ------------------------------------------------------------- begin

    def begin(self, base: Schema | None, test: Source | None, weights: Any, about: Mapping[str, Any], *, resume: bool) -> None:
        """Agree on a schema, fit it by the round of statistics, and build or load the first state."""
        self.state = State()
        before, state = None, None
        if resume and self.seen is not None:
            before, state = self.seen.record(), last_state(self.seen)
        first = (state.position.step if state is not None else 0) + 1
        members = self.transport.members(first)
        if not members:
            raise InputError("sites is empty; give at least one")
        told = self._described(members if base is None else members[:1] if about.get("alike") else members)
        schema = agreed(told) if base is None else base
        brought = {split for values in told.values() for split in values["splits"]}
        self.splits |= {split for split in ("validation", "test") if split in brought}
        if before is not None and state is not None:
            self.schema = Schema.from_json(before["schema"])  # of the sites that were there: what joins later does not change it
        elif base is not None and is_fitted(base):
            self.schema = base
        else:
            self.schema = self._fitted(schema, members)
        machine.seed_all(self.plan.seed)
        self.model = built(self.task, self.schema).to(device=self.device, dtype=getattr(torch, self.plan.dtype))
        started = None if weights is None or state is not None else start_from(self.model, weights, False)
        shared, averaged, frozen = exchanged(self.task, self.model, self.strategy, self.rules.batch_statistics)
        self.layout, self.shared, self.frozen = Layout.of(shared), shared, frozen
        self.buffers, self.averaged = Layout.of(averaged), averaged
        if averaged and isinstance(self.privacy, SitePrivacy):
            raise InputError(
                f"{next(iter(averaged))} would leave each site beside its noisy weights; under site privacy use a layer without batch statistics "
                "(GroupNorm), or batch_statistics='local'"
            )
        home = self.strategy.stays(self.model)
        personal = next((name for name, tensor in self.model.named_parameters() if name in home and tensor.dim() > 1), None)
        if personal is not None and self.task.own_method("constrain"):
            raise InputError(
                f"personal layers ({personal}) stay at each site, where nobody could decide which of their weights become zero; leave personal out, "
                f"or train a task without {type(self.task).__name__}"
            )
        self.strategy.sends(self.layout)
        self.expected = {"frozen": hash_of(frozen), "layout": self.layout.hash() + self.buffers.hash()}
        self.memory: dict[str, Tensor] = {}
        self.state = State(model=clone(dict(self.model.state_dict())), schema=self.schema.to_json(), progress=self._progress())
        self._begin_record(told, about, test, started, before, state)
        self._prepare_privacy(len(members), (before or {}).get("privacy") if state is not None else None)
        if before is not None and canonical(before.get("privacy")) != canonical(self.record.get("privacy")):
            raise StateError(
                f"run was made with privacy={before.get('privacy')}, not {self.record.get('privacy')}; resume with the same privacy, sample "
                "and sites, or start a new run"
            )
        self._prepare_test(test)
        self._join(members, first - 1)
        self._tell_start()

    def _described(self, members: Sequence[str]) -> dict[str, dict[str, Any]]:
        told: dict[str, dict[str, Any]] = {}
        self._send(self._order("describe", 0), members, done=lambda _, reply: told.update({reply.site: dict(reply.values)}))
        return told

    def _fitted(self, agreed: Schema, members: Sequence[str]) -> Schema:
        """Preprocessing and vocabularies from the sum of the sites' statistics."""
        statistics = self._send(self._order("prepare", 0, schema=agreed.to_json()), members)
        schema = agreed if set(statistics.groups) <= {"rows"} else self.task.prepare(agreed, statistics)
        if schema.classes is not None and len(schema.classes) < 2:
            raise DataError(f"target {schema.target!r} has one class only at all sites together; there is nothing to tell apart")
        return schema

    def _join(self, names: Sequence[str], round: int) -> None:
        """Send what stays the same all along, once; each site says what its model exchanges and holds fixed."""
        order = self._order("join", round, self.frozen, schema=self.schema.to_json(), batch_statistics=self.rules.batch_statistics)

        def check(order: Order, reply: Reply) -> None:
            for what, mine in self.expected.items():
                if reply.values.get(what) != mine:
                    words = {"frozen": "other frozen weights", "layout": "other names or shapes to exchange"}[what]
                    raise RunError(f"site {reply.site!r} has {words} than this federation (hash {reply.values.get(what)!r}, not {mine!r})")
            self.rows[reply.site] = int(reply.values["rows"])
            self.notes[reply.site] = list(reply.values.get("notes", ()))

        self._send(order, names, done=check)

    def _prepare_test(self, test: Source | None) -> None:
        if test is None:
            return
        read = test.read()
        rows = read.get("test", read["train"])
        prepared = Prepared(self.task, self.plan, self.device, self.schema, {"test": rows}, {}, self.task.collate)
        self.test = prepared.batches("test")

    def _prepare_privacy(self, sites: int, before: Mapping[str, Any] | None) -> None:
        """How much noise a round gets, and what a resume has spent already."""
        if isinstance(self.privacy, ExamplePrivacy):
            if not self.strategy.trains:
                raise InputError(
                    f"{self.strategy.name} sends sums over rows without noise; privacy of examples needs a strategy that trains"
                )
            self.record["privacy"] = {**self.privacy.to_json(), "unit": self.privacy.unit or "row"}
        elif self.privacy is not None:
            drawn = number_of(self.rules.sample, sites, "sample")
            if before is not None and "drawn" in before:  # sites that joined since change neither the chance nor the divisor
                sites, drawn = int(before["sites"]), int(before["drawn"])
            options = {"rounds": self.rules.rounds, "sites": sites, "drawn": drawn, "secret": self._secret}
            self.noise = SiteNoise(self.privacy, self.strategy, self.layout, **options)
            self.record["privacy"] = self.noise.to_json()
            if "noise" in self.state.progress:
                self.noise.restore(self.state.progress["noise"])

    def _begin_record(
        self,
        told: Mapping[str, Mapping[str, Any]],
        about: Mapping[str, Any],
        test: Source | None,
        started: Any,
        before: dict[str, Any] | None,
        state: State | None,
    ) -> None:
        record = record_of("federate", self.task, self.model, self.plan, self.schema, self.device)
        record["strategy"] = self.strategy.to_json()
        record["rules"] = {name: getattr(self.rules, name) for name in self.rules.__dataclass_fields__}
        record["rounds"] = self.rules.rounds
        record["exchanged"] = self.layout.size
        if started is not None:
            record["weights"] = started
        splits = {name: values["splits"]["train"] | {"source": values["source"]} for name, values in told.items()}
        record["data"] = dict(about["data"]) if about.get("alike") else splits
        record |= {name: about[name] for name in ("partition", "source", "limits", "faults") if name in about}
        if test is not None:
            if "test" in record["data"]:
                raise InputError("a site named 'test' and test rows beside the sites cannot be told apart; rename the site")
            record["data"]["test"] = {"source": test.name}
        if self.seen is not None:
            if before is not None:
                known = {name: value for name, value in record["data"].items() if name in before["data"]}
                changed = compare(self.seen, before, {**record, "data": known, "privacy": before.get("privacy")})
                changed |= changed_rules(f"run (={str(self.seen.path)!r})", before, record)
                if changed:
                    record["forks"] = [*before["forks"], {"step": 0 if state is None else state.position.step, "changed": changed}]
            if state is not None:
                self._restore(state)
            else:
                self.seen.cut(0)
                if self.memories is not None:
                    self.memories.cut(0)
        self.record = record

    def _restore(self, state: State) -> None:
        assert self.seen is not None
        self.state, progress = state, state.progress
        self.saves = [0, 0, *(int(path.stem.rpartition("-")[2]) for path in self.seen.checkpoints())][-2:]
        self.bytes, self.best, self.bad = dict(progress["bytes"]), progress["best"], int(progress["bad"])
        self.epsilons = dict(progress["epsilons"])
        self.memory = dict(state.extras.get("strategy", {}))
        self.history = self.seen.cut(int(progress["metrics_bytes"]))
        engine.load_model(self.model, state.model)
        if self.memories is not None:
            self.memories.cut(state.position.step)
        if self.best is not None and self.plan.keeps_best:
            if self.best["round"] == state.position.step:  # killed between the checkpoint and its second name
                self.best_model = dict(state.model)
                if self.folder is not None:
                    self.folder.mark_best(self.folder.checkpoint_path(state.position.step))
            elif self.seen.best.exists():
                self.best_model = dict(State.load(self.seen.best).model)

    def _tell_start(self) -> None:
        self.record["sites"] = {
            name: {"rows": rows, **({"notes": notes} if (notes := self.notes[name]) else {})} for name, rows in sorted(self.rows.items())
        }
        notices = self._notices()
        if self.folder is not None:
            self.folder.write_record(self.record)
        for notice in notices:
            self.emit({"event": "notice", "text": notice})
        self.emit(
            {
                "event": "start",
                "round": self.state.position.step,
                "rounds": self.rules.rounds,
                "sites": dict(sorted(self.rows.items())),
                "parameters": self.record["parameters"],
                "bytes_each": self._sizes(),
            }
        )

    def _notices(self) -> list[str]:
        found = []
        members = sorted(self.rows)
        count = number_of(self.rules.sample, len(members), "sample")
        cohort = (
            count if self.noise is not None else len(self.strategy.choose(self.state.position.step + 1, members, count, self.plan.seed))
        )
        each = self._sizes()
        found.append(
            f"a round of training moves {cohort * each['down']:,} bytes down and about {cohort * each['up']:,} up: {self.layout.size:,} of "
            f"{self.record['parameters']:,} parameters, {cohort} sites"
        )
        buffers = dict(self.model.named_buffers())
        home = sorted(
            self.strategy.stays(self.model) | {name for name in buffers if name.endswith(STATISTICS) and name not in self.averaged}
        )
        if home:
            self.told |= set(home)
            names = ", ".join(home[:3]) + (f" and {len(home) - 3} more" if len(home) > 3 else "")
            found.append(
                f"{names} stay at each site: the saved model holds their first values, and only figures at the sites use each site's own"
            )
        if self.privacy is not None:
            found.append(
                "numbers of rows, the schema's statistics (means, categories) and figures on test rows are not covered by epsilon and delta"
            )
        batch = self.plan.batch_size
        small = [name for name, rows in self.rows.items() if batch is not None and rows < batch]
        if small:
            names = ", ".join(small[:5]) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
            found.append(f"{len(small)} sites have fewer rows than a batch ({batch}) and train on all of them at once: {names}")
            for name in small:
                self.record["sites"][name].setdefault("notes", []).append("fewer rows than a batch")
        return found

    def _sizes(self) -> dict[str, int]:
        """Bytes that go to one site and come from it in a round of training."""
        number, codec = torch.empty(0, dtype=self.layout.dtype).element_size(), Codec.of(self.rules.compress)
        wide = 8 if not self.strategy.trains else number  # sums that are exact are sent in float64
        sent = {(group, key): math.prod(shape) for group, keys in self.strategy.sends(self.layout).items() for key, shape in keys.items()}
        up = sum(8 if group == LOSS else size * wide for (group, _), size in sent.items())
        up += codec.size(self.layout.size) - self.layout.size * number if codec is not None else 0
        beside = self.strategy.begin(self._server(self.state.position.step + 1, sorted(self.rows)))
        buffers = self.buffers.size * torch.empty(0, dtype=self.buffers.dtype).element_size()
        down = self.layout.size * (2 if self.rules.compress_down else number) + sum(t.numel() * t.element_size() for t in beside.values())
        return {"down": down + buffers, "up": up + buffers}

    def _server(self, round: int, members: Sequence[str]) -> Server:
        weights = self.layout.flat(self.state.model[name] for name in self.layout.shapes).cpu()
        rows = float(sum(self.rows[name] for name in members))
        return Server(weights.double(), self.layout, round, len(members), rows, dict(self.memory))

    def _progress(self) -> dict[str, Any]:
        return {
            "bytes": dict(self.bytes),
            "best": self.best,
            "bad": self.bad,
            **({"noise": self.noise.progress()} if self.noise is not None else {}),
            "epsilons": dict(self.epsilons),
        }

    # ------------------------------------------------------------ rounds

    def loop(self, caught: Sequence[int]) -> None:
        """Rounds; the state of one is saved before the next begins."""
        self._heed_patience()
        while self.state.position.step < self.rules.rounds and self.stopped is None:
            begun, round = time.monotonic(), self.state.position.step + 1
            signal, asked, *self.saves = self.agree([caught[0] if caught else 0, int(self.asked), *self.saves])
            if signal:
                self.stopped, self.signal = "signal", signal
            elif asked:
                self.stopped = "asked"
            elif self.noise is not None and self.noise.used_up:
                self.stopped = "budget"
                budget = self.noise.privacy.epsilon
                self.emit({"event": "notice", "text": f"round {round} would pass the budget (epsilon={budget}); it is not run"})
            else:
                before = self._progress()
                try:
                    self._round(round)
                except _Exhausted as error:
                    self.stopped = "budget"
                    self.emit({"event": "notice", "text": f"round {round} is not run: {error}"})
                    continue
                except BaseException:
                    if self.state.position.step < round:  # as if this round had never begun
                        self._checkpoint(before)
                    raise
                try:
                    better = self._evaluate(round)
                except BaseException:
                    self._checkpoint(self._progress())  # the round itself is done
                    raise
                self._save(round, better, time.monotonic() - begun)
                self._heed_patience()
        self._checkpoint(self._progress())
        _, _, *self.saves = self.agree([0, 0, *self.saves])
        self._forget()
        self.stopped = self.stopped or "finished"
        self.emit({"event": "stop", "round": self.state.position.step, "reason": self.stopped})

    def _heed_patience(self) -> None:
        if self.plan.patience is not None and self.bad >= self.plan.patience:
            self.stopped = "patience"

    def _save(self, round: int, better: bool, seconds: float) -> None:
        if self.folder is not None:
            self.folder.timing({"round": round, "seconds": seconds})
        if better or time.monotonic() - self.saved >= self.plan.checkpoint_every_s:
            self._checkpoint(self._progress(), better)
        self._forget()

    def _checkpoint(self, progress: Mapping[str, Any], better: bool = False) -> None:
        """Save the state, unless it is saved already or another rank does so."""
        round = self.state.position.step
        if self.folder is None or round <= self.saves[1]:
            return
        self.saved = time.monotonic()
        path = self.folder.checkpoint_path(round)
        self.state = replace(self.state, progress={**progress, "metrics_bytes": self.folder.metrics_bytes()})
        self.state.save(path)
        if better:
            self.folder.mark_best(path)
        self.folder.keep()
        self.saves = [self.saves[1], round]
        self.emit({"event": "checkpoint", "round": round, "path": str(path)})

    def _forget(self) -> None:
        """What sites remember is kept as it is now, and as it was at the checkpoints that a resume may start from."""
        if self.memories is not None:
            kept = [self.state.position.step, *(self.saves if self.memories.on_disk else ())]
            if self.best is not None and self.plan.keeps_best:  # its weights belong with what sites kept to themselves then
                kept.append(self.best["round"])
            self.memories.commit(kept)

    def _newcomers(self, round: int) -> Sequence[str]:
        members = self.transport.members(round)
        late = [name for name in members if name not in self.rows]
        if late:
            told = self._described(late)
            self._join(late, round - 1)
            for name in late:
                self.record["data"].setdefault(name, told[name]["splits"]["train"] | {"source": told[name]["source"]})
                self.record["sites"][name] = {"rows": self.rows[name], "notes": [f"joined in round {round}", *self.notes[name]]}
                self.emit({"event": "notice", "text": f"site {name} joins in round {round} with {self.rows[name]} rows"})
            if self.folder is not None:
                self.folder.write_record(self.record)
        return members

    def _round(self, round: int) -> None:
        members, before = self._newcomers(round), dict(self.bytes)
        server = self._server(round, members)
        weights = server.weights.to(self.layout.dtype)
        sent = weights if self.rules.compress_down is None else Codec(self.rules.compress_down).encode(weights, torch.Generator())["values"]
        tensors = {WEIGHTS: sent, **self._buffers(), **self.strategy.begin(server)}
        sites: dict[str, dict[str, Any]] = {}
        losses: dict[str, tuple[float, float]] = {}

        def heard(order: Order, reply: Reply) -> None:
            told = self._told(order, reply)
            if "epsilon" in reply.values:
                self.epsilons[reply.site] = float(reply.values["epsilon"])
            self._name_what_stays(reply.values.get("stays", ()))
            sites[reply.site] = {"rows": self.rows[reply.site], **({"loss": told["loss"]} if told else {})}
            if told:
                losses[reply.site] = (told["count"], told["loss"])
            if self.noise is None:  # who takes part is told to nobody
                self.emit({"event": "reply", "round": round, "site": reply.site, "seconds": reply.seconds, **sites[reply.site]})

        total = self._attempted(round, members, tensors, sites, heard)
        if self.memories is not None:
            self.memories.settle(round, sites)
        weights = self._constrained(server.weights, self.strategy.finish(server, total), round)
        if not bool(torch.isfinite(weights).all()):
            raise NonFinite(f"a weight is not finite after round {round}; lower the learning rate. The last round's state is untouched.")
        self.memory = server.memory
        self._set_weights(weights, round)
        if BUFFERS in total:
            self._set_buffers(total.mean(BUFFERS)[BUFFERS])
        counted = [losses[site] for site in sorted(sites) if site in losses]  # floats add in the order of names, whoever was first
        loss = {"loss": sum(count * mean for count, mean in counted) / sum(count for count, _ in counted)} if counted else {}
        line: dict[str, Any] = {"event": "round", "round": round, **loss, "sites": dict(sorted(sites.items()))}
        line |= {f"bytes_{way}": self.bytes[way] - before[way] for way in self.bytes}
        if self.missing and self.noise is None:
            line["missing"] = sorted(self.missing)
        if self.noise is not None:
            line |= {"sites": {}, "answered": len(sites), "epsilon": self.noise.epsilon, "clip": self.noise.clip}
        elif self.epsilons:
            line["epsilon"] = max(self.epsilons.values())  # of the site that spent most
        self._line(line)

    def _constrained(self, before: Tensor, weights: Tensor, round: int) -> Tensor:
        """The next weights as the task wants them: zeros that stay, zeros that come."""
        if not self.task.own_method("constrain") or not self.strategy.trains:
            return weights

        def place(vector: Tensor) -> None:
            for tensor, part in zip(self.shared.values(), self.layout.views(vector.to(self.layout.dtype)), strict=True):
                tensor.copy_(part)

        with torch.no_grad():
            place(before)
            restore = self.task.constrain(self.model, round / self.rules.rounds)
            if restore is None:
                return weights
            place(weights)
            restore()
            return self.layout.flat(list(self.shared.values())).to(weights.dtype)

    def _attempted(
        self,
        round: int,
        members: Sequence[str],
        tensors: Mapping[str, Tensor],
        sites: dict[str, dict[str, Any]],
        heard: Callable[[Order, Reply], None],
    ) -> Update:
        """The total of a round; one whose quorum is not met is tried again, with other sites where there are more."""
        problem: _NoQuorum | None = None
        for attempt in range(ATTEMPTS):
            self.version = 1 + attempt
            sites.clear()
            seed = data.mix_seed(self.plan.seed, round, attempt, 0x73616D)
            chosen = self._chosen(round, members, seed) if self.noise is None else self.noise.drawn(members, round, attempt)
            quorum = None if self.rules.quorum is None else number_of(self.rules.quorum, len(chosen), "quorum")
            values = self._values(len(chosen) if quorum is None else quorum)
            if self.noise is not None:
                self.noise.spent += 1
                if not chosen:
                    self.missing = {}
                    return self.noise.total(Update())
            try:
                total = self._trained(self._order("train", round, tensors, **values), chosen, quorum, sites, heard)
            except _NoQuorum as error:
                problem = error
                if self.rules.quorum is None or (self.noise is not None and self.noise.used_up):
                    break
                continue
            finally:
                self.version = 1
            if self.noise is not None:
                return self.noise.total(total)
            if self.exhausted and WEIGHTS not in total:
                raise _Exhausted("no site's budget pays for it")
            if not total.count(WEIGHTS) > 0:
                raise RunError(f"round {round} has no row at any site; nothing was learnt")
            return total
        raise RunError(f"{problem}; the state after round {round - 1} is kept, and resume goes on from it") from problem

    def _trained(
        self,
        order: Order,
        chosen: Sequence[str],
        quorum: int | None,
        sites: dict[str, dict[str, Any]],
        heard: Callable[[Order, Reply], None],
    ) -> Update:
        """The sum of one order's answers; where changes are too large for one limb of fixed point, as those of data in units of their
        own can be, the order goes out again in two.
        """
        try:
            return self._send(order, chosen, quorum, heard)
        except NonFinite:
            if self.wide:
                raise
        self.wide = True
        sites.clear()
        return self._send(replace(order, values={**order.values, "wide": True}), chosen, quorum, heard)

    def _chosen(self, round: int, members: Sequence[str], seed: int) -> list[str]:
        members = [name for name in members if name not in self.exhausted]
        if not members and self.exhausted:
            raise _Exhausted("no site's budget pays for it")
        return self.strategy.choose(round, members, number_of(self.rules.sample, len(members), "sample"), seed)

    def _values(self, noise_sites: int) -> dict[str, Any]:
        rules = self.rules
        values: dict[str, Any] = {"rounds": rules.rounds, "epochs": self.plan.epochs, "steps": self.plan.steps}
        values |= {"seconds": rules.seconds} if rules.seconds is not None else {}
        values |= {"keep_optimizer": True} if rules.keep_optimizer else {}
        values |= {"wide": True} if self.wide or sum(self.rows.values()) > MOST_FINE else {}
        return values if self.noise is None else values | self.noise.values(noise_sites)

    def _set_weights(self, weights: Tensor, round: int) -> None:
        model = dict(self.state.model)
        for (name, tensor), part in zip(self.shared.items(), self.layout.views(weights), strict=True):
            model[name] = part.to(tensor.device, tensor.dtype)
        self._tie(model)
        self.state = replace(self.state, model=model, extras={"strategy": dict(self.memory)}, position=Position(round, round, 0))

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that sites average, as one vector."""
        return {BUFFERS: self.buffers.flat(self.state.model[name] for name in self.averaged).cpu()} if self.averaged else {}

    def _set_buffers(self, change: Tensor) -> None:
        """Their plain mean, whatever the strategy: a variance has no momentum."""
        after = self._buffers()[BUFFERS].double() + change
        model = dict(self.state.model)
        for (name, tensor), part in zip(self.averaged.items(), self.buffers.views(after), strict=True):
            model[name] = part.to(tensor.device, tensor.dtype)
        self.state = replace(self.state, model=model)

    def _name_what_stays(self, names: Sequence[str]) -> None:
        """Buffers that change at a site though nobody said where they belong."""
        new = [name for name in names if name not in self.told]
        if new:
            self.told |= set(new)
            text = f"{', '.join(new)} changes in training and stays at each site; let shared() return True for it if it should be averaged"
            self.emit({"event": "notice", "text": text})

    def _tie(self, model: dict[str, Tensor]) -> None:
        """Names that share one tensor in the model share it in the state."""
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            owner = first.setdefault(id(tensor), name)
            if owner in self.shared:
                model[name] = model[owner]

    def summary(self, order: Order, update: Update) -> dict[str, Any]:
        """What is told of one site's update: its loss, or its figures."""
        if order.kind == "evaluate":
            return scalars(self.read(update))
        if order.kind != "train" or not update.count(LOSS) > 0:
            return {}
        return {"count": update.count(LOSS), "loss": float(update.mean(LOSS)[LOSS])}

    def _told(self, order: Order, reply: Reply) -> dict[str, Any]:
        """The summary of a reply, which a rank may have made already."""
        given = reply.values.get("summary")
        return dict(given) if given is not None else self.summary(order, reply.update) if reply.update is not None else {}

    # ---------------------------------------------------------- evaluation

    def _evaluate(self, round: int) -> bool:
        """Figures after a round, where they are due; whether they are the best so far."""
        every = self.plan.evaluate_every or 1
        if round % every and round < self.rules.rounds:
            return False
        if self.test is not None:
            self._line({"event": "evaluate", "round": round, "split": "test", **scalars(self._tested())})
        if "validation" not in self.splits:
            return False
        pooled, sites = self._pooled("validation")
        if not pooled:
            return False
        loss = pooled["loss"]
        if loss is None or not math.isfinite(loss):
            raise NonFinite(
                f"validation loss (={loss}) is not finite after round {round}; lower the learning rate. The last state is untouched."
            )
        settled = round >= self.task.settles() * self.rules.rounds
        better = settled and (self.best is None or loss < self.best["loss"] - self.plan.min_delta)
        self.bad = 0 if better or not settled else self.bad + 1
        if better:
            self.best = {"step": round, "round": round, **scalars(pooled)}
            if self.plan.keeps_best:
                self.best_model = clone(dict(self.state.model))
        self._line({"event": "evaluate", "round": round, "split": "validation", **scalars(pooled), "sites": sites, "best": better})
        return better and self.plan.keeps_best

    def _tested(self) -> dict[str, Any]:
        assert self.test is not None
        engine.load_model(self.model, self.state.model)
        return engine.evaluate(self.task, self.model, self.test)

    def _pooled(self, split: str, at: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures over the rows of all sites, from sums that each site sends, and those of each site; with what sites kept to
        themselves after round `at` (None: the last).
        """
        round = self.state.position.step if at is None else at
        weights = self.layout.flat(self.state.model[name] for name in self.layout.shapes).cpu()
        sites: dict[str, Any] = {}

        def heard(order: Order, reply: Reply) -> None:
            if told := self._told(order, reply):
                sites[reply.site] = told

        members = [name for name in self.transport.members(self.state.position.step) if name in self.rows]
        quorum = None if self.rules.quorum is None else 1
        total = self._send(self._order("evaluate", round, {WEIGHTS: weights, **self._buffers()}, split=split), members, quorum, heard)
        return self.read(total), dict(sorted(sites.items()))

    def read(self, update: Update) -> dict[str, Any]:
        """Figures from sums; none where nothing was evaluated."""
        sums = {name.removeprefix("metric:"): update.sums(name) for name in update.groups}
        return figures(sums, self.task.metrics(self.schema)) if "loss" in sums else {}

    def _line(self, event: dict[str, Any]) -> None:
        self.history.append(event)
        if self.folder is not None:
            self.folder.line(event)
        self.emit(event)

    # ---------------------------------------------------------------- end

    def end(self) -> Run:
        """Final figures, with the best round's weights where a best is kept."""
        at: int | None = None
        if self.best_model is not None and self.best is not None:
            self.state, at = replace(self.state, model=self.best_model), self.best["round"]
        engine.load_model(self.model, self.state.model)
        splits: dict[str, Any] = {}
        sites: dict[str, Any] = {}
        if self.stopped != "signal":
            if self.test is not None:
                splits["test"] = self._tested()
            for split in ("validation", "test"):
                if split in self.splits and split not in splits:
                    splits[split], sites = self._pooled(split, at)
            if not self.splits and self.privacy is None and len(self.rows) <= MOST_LOOKED_AT:
                splits |= self._looked_at(at, sites)
        result = {
            "stopped": self.stopped,
            "signal": self.signal,
            "steps": self.state.position.step,
            "rounds": self.state.position.step,
            "seconds": time.monotonic() - self.started,
            "best": self.best,
            "bytes": dict(self.bytes),
            "sites": sites,
            "fairness": fairness(sites),
            "splits": splits,
        }
        if self.noise is not None:
            result["privacy"] = {"epsilon": self.noise.epsilon, "delta": self.noise.privacy.delta, "steps": self.noise.spent}
        elif isinstance(self.privacy, ExamplePrivacy):
            spent = max(self.epsilons.values(), default=0.0)
            result["privacy"] = {
                "epsilon": spent if math.isfinite(spent) else None,
                "delta": self.privacy.delta,
                "sites": dict(self.epsilons),
            }
        if self.folder is not None and self.stopped != "signal":
            self.folder.finish(result)
        return Run(self.task, self.model, self.state, self.record, self.history, result, None if self.folder is None else self.folder.path)

    def _looked_at(self, at: int | None, sites: dict[str, Any]) -> dict[str, Any]:
        """Figures on the rows that sites train on, where they hold no others. Nobody asked for them, so what fails there fails nothing."""
        try:
            figures, found = self._pooled("train", at)
        except RunError as error:
            self.emit({"event": "notice", "text": f"there are no figures of the training rows: {error}"})
            return {}
        sites |= found
        return {"train": figures}


class _Exhausted(RunError):
    """No budget is left."""


class _NoQuorum(RunError):
    """Too few sites answered."""
