"""Who belongs together: what the coordinator says to whom comes, stays away, differs, falls silent, dies, joins or is behind."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from ranks import ALIKE, HOST, Dead, Death, Rank, Ranks, alone, apart, learn, until
from test_cluster import FEW, PLAN, Net, close, exactly, joins, points

from anyfit.cluster import Cluster
from anyfit.cluster.launcher import _Launcher
from anyfit.cluster.meeting import INBOX, Coordinator, Generation, Place, address_towards, connect, raised
from anyfit.engine import Trainer
from anyfit.errors import DataError, InputError, NonFinite, RunError, StorageError
from anyfit.record import fingerprint_of
from anyfit.schema import Schema


class Desk:
    """A coordinator that is told by hand, one message after the other."""

    def __init__(self, **options: Any) -> None:
        self.store: Any = torch.distributed.HashStore()
        self.coordinator = Coordinator(self.store, **{"wait_s": 60.0, "timeout_s": 30.0, **options})

    def told(self, kind: str, number: int = -1, **message: Any) -> None:
        self.store.queue_push(INBOX, json.dumps({"kind": kind, "id": number, **message}))
        self.coordinator.tick()

    def comes(self, number: int, node: int = 0, local: int | None = None, fingerprint: Any = ALIKE) -> None:
        local = number if local is None else local
        self.store.set(f"beat/{number}", "0")
        self.told("present", number, place=[node, local], host=f"host{node}", address=HOST, pid=1000 + number)
        if fingerprint is not None:
            self.told("ready", number, fingerprint=fingerprint)

    def meets(self, number: int, serial: int = 0, result: Any = (), boundary: bool = False, calm: bool = False) -> None:
        generation = self.coordinator.number
        self.told("regroup", number, generation=generation, serial=serial, result=list(result), boundary=boundary, calm=calm)

    def generation(self) -> Generation | None:
        """The latest one."""
        if not self.store.check(["latest"]):
            return None
        return Generation.from_json(json.loads(self.store.get(f"generation/{int(self.store.get('latest'))}")))

    def verdict(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("verdict")) if self.store.check(["verdict"]) else None

    def refused(self, number: int) -> str | None:
        return json.loads(self.store.get(f"refused/{number}"))["message"] if self.store.check([f"refused/{number}"]) else None

    def later(self, seconds: float) -> None:
        """Time goes by, without anybody waiting for it."""
        coordinator = self.coordinator
        coordinator.started -= seconds
        coordinator._beaten -= seconds
        for known in coordinator.known.values():
            known.seen -= seconds
        coordinator.tick()


def of(count: int, **options: Any) -> Desk:
    """Ranks of one node that have begun."""
    desk = Desk(ranks=count, **options)
    for number in range(count):
        desk.comes(number)
    assert desk.generation() is not None
    return desk


# ---------------------------------------------------------------------- before it begins


def test_a_generation_begins_when_all_of_all_nodes_are_ready() -> None:
    desk = Desk(nodes=2)
    desk.told("node", node=1, host="host1", ranks=1)
    desk.comes(0, 1, 0)
    desk.told("node", node=0, host="host0", ranks=2)
    desk.comes(1, 0, 1)
    assert desk.generation() is None
    desk.comes(2, 0, 0, fingerprint=None)
    assert desk.generation() is None, "it has not read its data yet"
    desk.told("ready", 2, fingerprint=ALIKE)
    generation = desk.generation()
    assert generation is not None and generation.number == 1 and generation.joined == ()
    assert generation.members == (2, 1, 0), "by node and place there, whoever came first"
    assert generation.places == (Place(0, 0), Place(0, 1), Place(1, 0)) and generation.hosts == ("host0", "host0", "host1")


MISSING = [
    (
        {"nodes": 3},
        [("node", {"node": 0, "host": "alpha", "ranks": 2}), ("node", {"node": 1, "host": "beta", "ranks": 1})],
        "2 of 3 nodes came to the rendezvous within 60 s: node 0 (alpha, 2 ranks), node 1 (beta, 1 ranks); start the same command on the others, or ask for fewer (nnodes)",
    ),
    (
        {"nodes": 1},
        [
            ("node", {"node": 0, "host": "alpha", "ranks": 2}),
            ("present", {"place": [0, 1], "host": "alpha", "address": HOST, "pid": 1}),
        ],
        "rank 0 of node 0 (alpha) did not come within 60 s; look at its messages",
    ),
    (
        {"ranks": 3},
        [("present", {"place": [0, 1], "host": "alpha", "address": HOST, "pid": 1})],
        "1 of 3 ranks came within 60 s: 1 of node 0 (alpha); look at the messages of those that are missing",
    ),
]


@pytest.mark.parametrize(("options", "messages", "words"), MISSING, ids=["nodes", "ranks of a node", "ranks of torchrun"])
def test_who_did_not_come_is_named_with_the_time(options: Any, messages: Any, words: str) -> None:
    desk = Desk(**options)
    desk.store.set("beat/0", "0")
    for kind, message in messages:
        desk.told(kind, 0 if kind == "present" else -1, **message)
    desk.later(20)
    desk.store.set("beat/0", "1")
    desk.coordinator.tick()
    assert desk.verdict() is None
    desk.store.set("beat/0", "2")
    desk.later(41)
    assert desk.verdict() == {"type": "RunError", "message": words}


def test_who_is_refused_differs_and_is_told_in_what() -> None:
    desk = Desk(ranks=3)
    desk.comes(0, fingerprint={"torch version": "2.13.0", "rows": 100, "code": "a" * 100})
    desk.comes(1, fingerprint={"torch version": "2.13.0", "rows": 100, "code": "a" * 100})
    desk.comes(2, fingerprint={"torch version": "2.9.1", "rows": 100, "code": "b" * 100})
    verdict = desk.verdict()
    assert verdict is not None and verdict["type"] == "InputError"
    assert verdict["message"].startswith('code differs between ranks: "aaaa')
    assert '... at rank 0 of node 0 (host0), "bbbb' in verdict["message"]
    assert verdict["message"].endswith("... at rank 2 of node 0 (host0); give all the same") and len(verdict["message"]) < 300


class Longer(Net):
    hidden: int = 3


def prepared(task: Any = None, plan: Any = PLAN, rows: int = 70, sha: str = "x") -> dict[str, Any]:
    return fingerprint_of(task or Net(), plan, Schema(()), {"train": {"rows": rows, "sha256": sha}})


OTHERS = {
    "code of the task": prepared(Longer()),
    "values of the task": prepared(Net(lr=0.2)),
    "plan": prepared(plan=PLAN.updated(seed=4)),
    "data of train": prepared(sha="y"),
    "rows of train": prepared(rows=71),
    "torch version": {**prepared(), "torch version": "2.9.1"},
    "anyfit version": {**prepared(), "anyfit version": "0.0.9"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_code_data_or_versions_are_refused_by_name(what: str) -> None:
    desk = Desk(ranks=2)
    desk.comes(0, fingerprint=json.loads(json.dumps(prepared())))
    desk.comes(1, fingerprint=json.loads(json.dumps(OTHERS[what])))
    verdict = desk.verdict()
    assert verdict is not None and verdict["message"].startswith(f"{what} differs between ranks")


def test_devices_and_worker_processes_may_differ() -> None:
    desk = Desk(ranks=2)
    desk.comes(0, fingerprint=prepared())
    desk.comes(1, fingerprint=prepared(plan=PLAN.updated(device="cpu", workers=2)))
    assert desk.verdict() is None and desk.generation() is not None


def test_a_rank_that_ends_before_training_ends_all() -> None:
    desk = Desk(nodes=1)
    desk.told("node", node=0, host="alpha", ranks=2)
    desk.told("exit", place=[0, 1], pid=77, code=2)
    verdict = desk.verdict()
    assert verdict is not None and verdict["message"] == "rank 1 of node 0 ended before training began (exit code 2); see its own message"
    desk = Desk(ranks=2)
    desk.comes(0, fingerprint=None)
    desk.told("exit", place=[0, 0], pid=1000, code=-9)
    verdict = desk.verdict()
    assert verdict is not None and "rank 0 of node 0 (host0) ended before training began" in verdict["message"]


# ---------------------------------------------------------------------- while it runs


def test_a_new_generation_begins_when_all_who_live_have_asked() -> None:
    desk = of(3)
    desk.meets(0)
    assert desk.generation().number == 1  # type: ignore[union-attr]
    desk.told("exit", place=[0, 1], pid=1001, code=-9)
    assert desk.generation().number == 1  # type: ignore[union-attr]
    desk.meets(2)
    generation = desk.generation()
    assert generation is not None and generation.number == 2 and generation.members == (0, 2)
    desk.told("regroup", 0, generation=1, serial=0, result=[], boundary=False, calm=False)
    assert desk.coordinator.known[0].post is None, "a wish of an older generation says nothing about this one"


def test_those_behind_are_handed_what_they_missed() -> None:
    desk = of(3)
    desk.meets(0, 7, ["seventh"])
    desk.meets(1, 6, ["sixth"])
    desk.meets(2, 7, ["seventh"])
    generation = desk.generation()
    assert generation is not None and generation.ahead == 7 and list(generation.result or ()) == ["seventh"]


def test_one_who_is_done_leaves_what_it_knew() -> None:
    desk = of(2)
    desk.told("done", 0, serial=9, result=["last"])
    desk.meets(1, 8, ["before"])
    generation = desk.generation()
    assert generation is not None and generation.members == (1,) and generation.ahead == 9 and list(generation.result or ()) == ["last"]
    assert not desk.coordinator.over
    desk.told("done", 1, serial=9, result=["last"])
    assert desk.coordinator.over


def test_ranks_further_apart_than_one_exchange_are_told() -> None:
    desk = of(2)
    desk.meets(0, 7, ["seventh"])
    desk.meets(1, 5, ["fifth"])
    verdict = desk.verdict()
    assert verdict is not None and "ranks are further apart than one exchange" in verdict["message"]


def test_patience_grows_where_nobody_was_lost_and_somebody_was_slow() -> None:
    def patience(act: Any) -> float:
        desk = of(3)
        act(desk)
        generation = desk.generation()
        assert generation is not None and generation.number == 2
        return generation.patience_s

    def lost(desk: Desk) -> None:
        desk.told("exit", place=[0, 1], pid=1001, code=-9)
        desk.meets(0)
        desk.meets(2)

    assert patience(lost) == 300.0
    assert patience(lambda desk: [desk.meets(number) for number in range(3)]) == 600.0
    assert patience(lambda desk: [desk.meets(number, calm=number == 1) for number in range(3)]) == 300.0, "memory is no matter of time"


def test_a_rank_without_a_sign_of_life_is_dead_and_buried() -> None:
    desk = of(3, timeout_s=5.0)
    for seconds in range(1, 5):
        for number in (0, 2):
            desk.store.set(f"beat/{number}", str(seconds))
        desk.later(1.0)
        assert not desk.coordinator.known[1].gone
    for number in (0, 2):
        desk.store.set(f"beat/{number}", "6")
    desk.later(2.0)
    assert desk.coordinator.known[1].gone and not desk.coordinator.known[0].gone
    assert json.loads(desk.store.get("dead")) == [1] and desk.store.check(["dead/1"])
    assert desk.store.check(["buried/0/1001"]), "its launcher ends it: it holds connections and files"
    desk.store.set("beat/1", "7")
    desk.later(0.5)
    assert desk.coordinator.known[1].gone, "whatever it does later"


@pytest.mark.parametrize("kind", ["TaskError", "DataError", "StorageError", "NonFinite", "RunError"])
def test_an_error_of_one_is_that_of_all(kind: str) -> None:
    desk = of(2)
    desk.told("failed", 1, type=kind, message="words")
    verdict = desk.verdict()
    assert verdict is not None
    error = raised(verdict)
    assert type(error).__name__ == kind and str(error) == "words"
    desk.told("failed", 0, type="RunError", message="what followed from it")
    assert desk.verdict() == verdict, "the first one counts"
    assert desk.coordinator.over


@pytest.mark.parametrize("kind", ["KeyError", "MissingExtra", "Path", "annotations", "nothing"])
def test_a_verdict_of_no_kind_of_ours_is_a_run_error(kind: str) -> None:
    assert type(raised({"type": kind, "message": "words"})) is RunError


# ---------------------------------------------------------------------- who joins


def test_one_who_joins_waits_for_the_end_of_a_step() -> None:
    desk = of(2)
    desk.comes(2)
    assert desk.generation().number == 1 and desk.store.get("wanted") == b"1"  # type: ignore[union-attr]
    desk.meets(0, 5)
    desk.meets(1, 5)
    generation = desk.generation()
    assert generation is not None and generation.members == (0, 1) and generation.joined == (), (
        "this was a failure, in the middle of a step"
    )
    assert desk.store.get("wanted") == b"2", "it still waits"
    desk.meets(0, 6, ["x"], boundary=True)
    desk.meets(1, 6, ["x"], boundary=True)
    generation = desk.generation()
    assert generation is not None and generation.members == (0, 1, 2) and generation.joined == (2,) and generation.ahead == 6
    assert desk.coordinator.patience_s == 600.0


def test_one_who_joins_is_refused_where_it_differs_and_the_others_go_on() -> None:
    desk = of(2)
    desk.comes(2, fingerprint={"task": "another"})
    assert "task differs between ranks" in str(desk.refused(2))
    desk.told("failed", 2, type="InputError", message="what it said when it was refused")
    assert desk.verdict() is None and not desk.coordinator.waiting


def test_one_who_waits_when_the_job_ends_is_told() -> None:
    desk = of(2)
    desk.comes(2)
    desk.told("done", 0, serial=1, result=[])
    assert desk.refused(2) is None
    desk.told("done", 1, serial=1, result=[])
    desk.coordinator.tick()
    assert desk.refused(2) == "the job has ended"
    desk.comes(3)
    assert desk.refused(3) == "the job has ended", "and who comes later still"


def test_one_who_was_to_join_and_died_meanwhile_is_not_waited_for() -> None:
    desk = of(1)
    desk.comes(1)
    desk.told("exit", place=[0, 1], pid=1001, code=-9)
    desk.meets(0, 3, boundary=True)
    generation = desk.generation()
    assert generation is not None and generation.members == (0,) and generation.joined == ()


def test_nodes_beyond_those_that_were_asked_for_join() -> None:
    desk = Desk(nodes=1)
    desk.told("node", node=0, host="alpha", ranks=1)
    desk.told("node", node=1, host="beta", ranks=1)
    desk.comes(0, 1, 0)
    assert desk.generation() is None
    desk.comes(1, 0, 0)
    generation = desk.generation()
    assert generation is not None and generation.members == (1,) and desk.coordinator.waiting == [0]


# ---------------------------------------------------------------------- ranks in threads


@pytest.mark.parametrize("error", [DataError("row 7 is torn"), NonFinite("loss (=nan)"), KeyError("x"), StorageError("no space")], ids=repr)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_with_its_error(error: Exception, rank: int) -> None:
    """What goes wrong for good is not tried again by the others."""

    def between(here: Rank, step: int) -> None:
        if here.local == rank and step == 5:
            raise error

    found = Ranks(3).run(learn(Net(), points(), PLAN, FEW, between=between), raises=False)
    assert found[rank] is error
    for other in (found[number] for number in range(3) if number != rank):
        assert type(other) is (type(error) if not isinstance(error, KeyError) else RunError), other
        assert str(error) in str(other) and (rank == 0 or f"rank {rank} of node 0 ({socket.gethostname()})" in str(other))


def test_one_who_joins_with_another_task_is_refused_and_changes_nothing() -> None:
    def other(rank: Rank) -> None:
        rank.meet({"task": "another"})

    def between(rank: Rank, step: int) -> None:
        if rank.local == 0 and step == 10:
            stranger = rank.ranks.join(other)
            until(lambda: stranger.error is not None, "its refusal")

    together = Ranks(2)
    one, lines = alone(Net(), points(), PLAN, FEW)
    found = together.run(learn(Net(), points(), PLAN, FEW, between=between), raises=False)
    assert isinstance(found[2], InputError) and "task differs between ranks" in str(found[2])
    for rank in (0, 1):
        assert apart(found[rank], one) < 1e-10 and close(together.all[rank].losses, lines)


def test_one_who_joins_too_late_is_told() -> None:
    together = Ranks(2)
    found = together.run(learn(Net(), points(), PLAN, FEW, between=joins(FEW)), raises=False)
    assert isinstance(found[2], RunError) and "the job has ended" in str(found[2])
    assert isinstance(found[0], Trainer) and isinstance(found[1], Trainer)


@pytest.mark.parametrize("who", ["giver", "joiner", "joiner stops", "other"])
def test_a_death_while_somebody_joins(who: str) -> None:
    """Whoever dies while the state is handed over: the others go on, and are what one process is."""

    def work(rank: Rank) -> Any:
        if rank.local == 0 and who == "giver":
            rank.group.hand_over = gone  # type: ignore[method-assign]
        if rank.local == 2 and who.startswith("joiner"):
            rank.group.take_over = gone if who == "joiner" else rank.stops  # type: ignore[method-assign]
        if rank.local == 1 and who == "other":
            plain = rank.group._form
            rank.group._form = lambda generation: gone() if generation.number > 1 else plain(generation)  # type: ignore[method-assign]
        return train(rank)

    def gone(*_: object) -> None:
        raise Dead

    train = learn(Net(), points(), PLAN, FEW, between=joins(10))
    one, lines = alone(Net(), points(), PLAN, FEW)
    together = Ranks(2, timeout_s=2.0)
    found = together.run(work, raises=False)
    lost = {"giver": 0, "joiner": 2, "joiner stops": 2, "other": 1}[who]
    assert not isinstance(found[lost], Trainer)
    if who == "giver":
        assert isinstance(found[2], RunError) and "join again" in str(found[2])
    for rank in {0, 1} - {lost}:
        assert isinstance(found[rank], Trainer), found[rank]
        assert apart(found[rank], one) < 1e-10 and close(together.all[rank].losses, lines)


def test_a_death_between_two_meetings() -> None:
    """One dies as the others meet after the death of another: they do not wait for its connection."""

    def work(rank: Rank) -> Any:
        plain = rank.group._form

        def form(generation: Generation) -> None:
            if rank.local == 2 and generation.number == 2:
                raise Dead
            plain(generation)

        rank.group._form = form  # type: ignore[method-assign]
        return train(rank)

    train = learn(Net(), points(), PLAN, FEW, deaths=[Death(1, 10, "sums")])
    one, lines = alone(Net(), points(), PLAN, FEW)
    together = Ranks(4)
    found = together.run(work)
    assert found[1] is None and found[2] is None
    for rank in (0, 3):
        assert apart(found[rank], one) < 1e-10 and close(together.all[rank].losses, lines)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_smaller_than_the_ranks_is_shared_by_some_of_them(rows: int) -> None:
    together = exactly(Net(lr=0.05), points(), PLAN.updated(batch_size=rows), ranks=6)
    assert {sum(shares) for shares in together.all[0].shares} == {rows}


# ---------------------------------------------------------------------- the rendezvous


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def launcher(rdzv: str, job: str, **options: Any) -> _Launcher:
    return _Launcher(Cluster(rdzv=rdzv, **{"wait_s": 5.0, "nnodes": 2, **options}), Path("call.json"), lambda event: None, job)


def test_nodes_of_one_job_meet_at_a_port_and_another_job_is_refused() -> None:
    rdzv = f"{HOST}:{free_port()}"
    first, second, other = launcher(rdzv, "one"), launcher(f"tcp://{rdzv}", "one", nproc=3), launcher(rdzv, "two")
    first.meet()
    second.meet()
    with pytest.raises(InputError, match=rf"rdzv \(={rdzv}\): another job .* meets there; give each job a port of its own"):
        other.meet()
    with pytest.raises(InputError, match=rf"rdzv \(={rdzv}\) cannot be opened here: .* another job may hold the port; take another"):
        launcher(rdzv, "three", nnodes=1).meet()
    assert first.coordinator is not None and second.coordinator is None and (first.node, second.node) == (0, 1)


def test_nodes_meet_through_a_shared_file(tmp_path: Path) -> None:
    rdzv = f"file://{tmp_path}/deep/meeting"
    first, second = launcher(rdzv, "one"), launcher(rdzv, "one")
    first.meet()
    second.meet()
    assert (first.node, second.node) == (0, 1)
    first.close()
    assert not (tmp_path / "deep" / "meeting").exists(), "the next job begins anew"
    (tmp_path / "deep" / "meeting").touch()
    with pytest.raises(RunError, match=r"has not opened the job within 0 s; if it was left by another job, delete it"):
        launcher(rdzv, "two", wait_s=0.2).meet()


def test_nobody_at_the_rendezvous_is_told_with_the_time() -> None:
    with pytest.raises(RunError, match=r"nobody answered there for 1 s; start the job on that host, and check its name, its port"):
        connect(HOST, free_port(), serve=False, wait_s=1.0)


@pytest.mark.slow
def test_something_else_at_the_port_is_told() -> None:
    """A server that is no store takes connections and never answers."""
    found: list[BaseException] = []

    def meet(port: int) -> None:
        try:
            launcher(f"{HOST}:{port}", "one", wait_s=1.0).meet()
        except (InputError, RunError) as error:
            found.append(error)

    with socket.create_server((HOST, 0)) as server:
        port = int(server.getsockname()[1])
        thread = threading.Thread(target=meet, args=(port,), daemon=True)
        thread.start()
        thread.join(30)
    assert found and str(port) in str(found[0])


@pytest.mark.parametrize(
    ("rdzv", "words"),
    [
        ("localhost", "must be HOST:PORT"),
        ("localhost:0", "must be HOST:PORT"),
        ("localhost:70000", "must be HOST:PORT"),
        ("tcp://:29500", "must be HOST:PORT"),
        ("no-such-host.invalid:29500", "host 'no-such-host.invalid' cannot be found"),
        ("file:///proc/nowhere/meeting", "cannot be written"),
    ],
)
def test_a_rendezvous_that_is_none_is_refused(rdzv: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        launcher(rdzv, "one").meet()
    assert rdzv in str(caught.value)


def test_shares_must_be_of_all_ranks() -> None:
    with pytest.raises(InputError, match=r"shares \(='5:1'\)"):
        Cluster(nproc=3, shares="5:1")
    assert Cluster(nproc=2, shares="5:1").shares == "5:1"


def test_the_address_towards_this_machine_is_local() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") == "127.0.0.1"
