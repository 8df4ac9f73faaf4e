"""Checkpoints of many ranks: each writes a part in the background, and rank 0 makes them one when all parts are there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from anyfit.cluster.group import Group
from anyfit.cluster.meeting import reachable
from anyfit.run import Folder, Writer
from anyfit.state import State

__all__ = ["Shards"]

POLL_S = 0.01


class Shards:
    """What a rank writes of the checkpoints of its run. `written`: the steps of those that are whole."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.written: list[int] = []
        self._writer = Writer()
        self._best: State | None = None  # not yet on disk as such: a rank may be lost before

    def save(self, folder: Folder, state: State, better: bool, *, writes: bool) -> None:
        """Begin to write a part of `state`; `writes`: this rank makes it whole. Where a rank is lost meanwhile, nobody does."""
        self.finish()  # what is being written knows of another best
        group = self.group
        step, rank, size, number = state.position.step, group.rank, group.size, group.generation.number
        path, key = folder.checkpoint_path(step, sharded=True), f"checkpoint/{number}/{step}"
        if better:
            self._best = state

        def write() -> None:
            part = json.dumps(state.save_shard(path, rank, size))
            with reachable():
                make_whole(part)

        def make_whole(part: str) -> None:
            store = group.member.beats
            store.set(f"{key}/{rank}", part)
            if not writes:
                if self._await([f"{key}/whole"], number):
                    self._best = None
                    self.written.append(step)
                return
            parts = [f"{key}/{other}" for other in range(size)]
            if not self._await(parts, number):
                return
            state.commit(path, size, [json.loads(store.get(part)) for part in parts])
            if self._best is not None:
                folder.mark_best(path, self._best)
                self._best = None
            folder.keep()
            self.written.append(step)
            store.set(f"{key}/whole", "1")

        self._writer.start(write)

    def _await(self, keys: list[str], number: int) -> bool:
        """Whether all have told; not where the ranks meet anew meanwhile, or the job is over."""
        member, store = self.group.member, self.group.member.beats
        while member.generation == number and member.dead.isdisjoint(self.group.generation.members):
            if store.check(keys):
                return True
            if store.check(["verdict"]):
                break
            time.sleep(POLL_S)
        return False

    def save_last(self, folder: Callable[[], tuple[Folder, bool]], make: Callable[[], State], better: bool) -> None:
        """Write the last one, again until it is whole."""
        while True:
            place, writes = folder()
            state = make()
            self.save(place, state, better, writes=writes)
            self.finish()
            if any(self.group.every(lambda: state.position.step in self.written)):  # noqa: B023 - called here
                return

    def finish(self) -> None:
        """Wait for what is being written; raises what went wrong there."""
        self._writer.finish()
