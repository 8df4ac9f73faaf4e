"""Ranks as processes that are killed, stopped, cut off and joined by others: what is learnt and what is written is that of one process."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from elastic_task import OPTIONS, Digits
from ranks import LONG_S, until
from test_cluster import EXACT
from test_cluster_fit import same_folder, unlike
from test_meeting import free_port

from anyfit.cluster import Cluster
from anyfit.errors import RunError
from anyfit.fit import fit
from anyfit.run import Run, committed
from anyfit.state import State

STEPS = 60  # nearly two epochs
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, without a death."""
    return fit(Digits(), run=tmp_path_factory.mktemp("alone") / "run", steps=STEPS, **OPTIONS)


def ranks_of(parent: int) -> dict[int, int]:
    """The ranks that a launcher started: process by number there."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = path.joinpath("stat").read_text().rsplit(")", 1)[1].split()
            if int(status[1]) == parent and status[0] != "Z" and b"\0rank\0" in path.joinpath("cmdline").read_bytes():
                named = dict(part.partition(b"=")[::2] for part in path.joinpath("environ").read_bytes().split(b"\0"))
                found[int(named[b"LOCAL_RANK"])] = int(path.name)
    return found


def running(pid: int) -> bool:
    """Whether some thread of a process is there, and no zombie."""
    with suppress(OSError):
        return any(path.read_text().rsplit(")", 1)[1].split()[0] != "Z" for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return False


class Acts:
    """What is done to the ranks of this process as it is told of steps."""

    def __init__(self, acts: Sequence[tuple[int, int, int]]) -> None:
        self.acts, self.events = list(acts), list[dict[str, Any]]()  # (step, rank, signal)

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        while self.acts and event["event"] == "step" and event["step"] >= self.acts[0][0]:
            _, rank, number = self.acts.pop(0)
            there = ranks_of(os.getpid())
            if rank in there:
                os.kill(there[rank], number)

    @property
    def notices(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "notice"]


def same(ours: Run, theirs: Run) -> None:
    assert max(float((ours.state.model[name] - theirs.state.model[name]).abs().max()) for name in theirs.state.model) < EXACT
    assert not unlike(ours.history, theirs.history)
    assert ours.path is not None and theirs.path is not None
    same_folder(ours.path, theirs.path)


def test_a_fit_whose_ranks_are_killed_and_stopped_is_that_of_one_process(alone: Run, tmp_path: Path) -> None:
    """Rank 0, who writes, is killed; another is stopped; the third one ends it: weights, log, figures and checkpoints are the same."""
    acts = Acts([(12, 0, signal.SIGKILL), (32, 2, signal.SIGSTOP)])
    cluster = Cluster(nproc=3, shares="2:1:1", timeout_s=4.0)
    run = fit(Digits(pace_ms=0.2), run=tmp_path / "run", cluster=cluster, on_event=acts, steps=STEPS, **OPTIONS)
    same(run, alone)
    assert not acts.acts and [notice.partition(";")[0] for notice in acts.notices if notice.startswith("ranks:")] == ["ranks: 1 lost"] * 2
    assert not ranks_of(os.getpid()), "the one that was stopped is gone too"
    shares = [[rank["share"] for rank in event["ranks"]] for event in acts.events if event["event"] == "ranks"]
    assert shares[0] == [24, 12, 12] and shares[-1] == [48]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ranks_killed_at_random_moments_are_replaced(seed: int, alone: Run, tmp_path: Path) -> None:
    """Five deaths, most of them with newcomers under way."""
    draw = random.Random(seed)
    acts = Acts([])
    over = threading.Event()

    def kills() -> None:
        for _ in range(5):
            if over.wait(1 + 4 * draw.random()):
                return
            there = ranks_of(os.getpid())
            if len(there) > 1:
                os.kill(there[draw.choice(sorted(there))], signal.SIGKILL)

    killer = threading.Thread(target=kills)

    def on_event(event: dict[str, Any]) -> None:
        acts(event)
        if event["event"] == "step" and not killer.ident:
            killer.start()

    cluster = Cluster(nproc=3, timeout_s=4.0, restarts=5)
    try:
        run = fit(Digits(pace_ms=10), run=tmp_path / "run", cluster=cluster, on_event=on_event, steps=STEPS, **OPTIONS)
    finally:
        over.set()
        killer.join()
    same(run, alone)
    assert sum("lost" in notice for notice in acts.notices) >= 3
    assert sum("joined" in notice for notice in acts.notices) >= 1
    assert not ranks_of(os.getpid())


# ---------------------------------------------------------------------- launchers that tests may kill


class Launcher:
    """A launcher in a process of its own, its events as they come."""

    def __init__(self, folder: Path, pace_ms: float, cluster: dict[str, Any], prefix: Sequence[str] = (), **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        call = folder / f"call-{len(list(folder.iterdir()))}.json"
        call.write_text(json.dumps({"pace_ms": pace_ms, "cluster": cluster, "options": {"steps": STEPS, **options}}))
        self.errors = call.with_suffix(".err").open("w+")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "elastic_task.py"), str(call)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.events: list[dict[str, Any]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def step(self) -> int:
        """The last one that it told of."""
        return max((int(event["step"]) for event in self.events if event["event"] == "step"), default=0)

    def reaches(self, step: int) -> None:
        """Wait until it tells of a step."""
        until(lambda: self.step() >= step or self.process.poll() is not None, f"step {step} of {self.said()}")
        assert self.step() >= step, self.said()

    def ends(self) -> int:
        """Wait for its end; its exit code."""
        code = self.process.wait(LONG_S)
        self.reader.join(LONG_S)
        return code

    def said(self) -> str:
        """What it wrote to stderr."""
        return Path(self.errors.name).read_text()

    def ranks(self) -> dict[int, int]:
        return ranks_of(self.process.pid)

    def close(self) -> None:
        for pid in (*self.ranks().values(), self.process.pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.ends()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start launchers, which are gone afterwards."""
    started: list[Launcher] = []

    def start(*given: Any, **options: Any) -> Launcher:
        started.append(Launcher(tmp_path / "calls", *given, **options))
        return started[-1]

    yield start
    for launcher in started:
        launcher.close()


def goes_on(run: Path, alone: Run, **options: Any) -> None:
    """Resume; what comes of it is what was never stopped."""
    resumed = fit(Digits(), run=run, resume=True, steps=STEPS, **OPTIONS, **options)
    same(resumed, alone)


@pytest.mark.slow
def test_ranks_die_with_their_launcher_and_one_process_goes_on(launch: Callable[..., Launcher], alone: Run, tmp_path: Path) -> None:
    """SIGKILL of the launcher leaves no process; the last checkpoint, of two ranks, is gone on from by one."""
    launcher = launch(2.0, {"nproc": 2}, run=str(tmp_path / "run"), checkpoint_every_s=0.2)
    launcher.reaches(24)
    there = launcher.ranks()
    assert len(there) == 2
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: not any(running(pid) for pid in there.values()), "the end of all ranks")
    last = committed(tmp_path / "run")[-1]
    assert last.suffix == ".json" and 0 < State.load(last).position.step < STEPS
    goes_on(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 3)])
def test_a_job_that_is_killed_as_a_whole_goes_on_with_other_ranks(
    before: int, after: int, launch: Callable[..., Launcher], alone: Run, tmp_path: Path
) -> None:
    for step in (10, 30):
        launcher = launch(2.0, {"nproc": before}, run=str(tmp_path / "run"), checkpoint_every_s=0.1, resume=step > 10)
        launcher.reaches(step)
        for pid in (*launcher.ranks().values(), launcher.process.pid):
            os.kill(pid, signal.SIGKILL)
        launcher.ends()
    goes_on(tmp_path / "run", alone, cluster=Cluster(nproc=after))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_ends_all_at_one_step(number: int, launch: Callable[..., Launcher], alone: Run, tmp_path: Path) -> None:
    launcher = launch(2.0, {"nproc": 3}, run=str(tmp_path / "run"))
    launcher.reaches(16)
    there = launcher.ranks()
    launcher.process.send_signal(number)
    assert launcher.ends() == 0, "from Python, fit returns what was learnt so far"
    assert launcher.events[-1] == {"event": "done", "stopped": "signal", "ranks": 3}
    assert not any(running(pid) for pid in there.values())
    stop = next(event for event in launcher.events if event["event"] == "stop")
    assert stop["reason"] == "signal" and State.load(committed(tmp_path / "run")[-1]).position.step == stop["step"] < STEPS
    assert not (tmp_path / "run" / "result.json").exists()
    goes_on(tmp_path / "run", alone)


@pytest.mark.slow
def test_the_command_ends_with_the_signals_code_and_a_second_one_ends_it_at_once(tmp_path: Path) -> None:
    """Exit code 128 + the signal's number."""
    command = [sys.executable, "-m", "anyfit", "fit", f"{HERE / 'elastic_task.py'}:Digits", "--data", "digits", "--nproc", "2"]
    options = ["--set", "pace_ms=2", "--set", "steps=400", "--set", "log_every=2", "--run", str(tmp_path / "run")]
    for signals in (1, 2):
        process = subprocess.Popen([*command, *options, *(["--resume"] if signals == 2 else [])], stdout=subprocess.PIPE, text=True)
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(ranks_of(process.pid)) == 2, "its first line")  # noqa: B023
        time.sleep(1)
        there = ranks_of(process.pid)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        process.communicate(timeout=LONG_S)
        assert process.returncode == 130
        until(lambda: not any(running(pid) for pid in there.values()), "the end of its ranks")  # noqa: B023


# ---------------------------------------------------------------------- several machines


@pytest.mark.slow
def test_two_nodes_of_unlike_sizes_and_a_third_that_comes_later(launch: Callable[..., Launcher], alone: Run, tmp_path: Path) -> None:
    """They meet through a shared file; the node without the store is killed as a whole; a late one joins."""
    cluster = {"nnodes": 2, "rdzv": f"file://{tmp_path}/meeting", "timeout_s": 4.0}
    first = launch(30.0, {**cluster, "nproc": 1}, run=str(tmp_path / "run"))
    until((tmp_path / "meeting").exists, "the first node")
    second = launch(30.0, {**cluster, "nproc": 2}, run=str(tmp_path / "run"))
    first.reaches(8)
    assert len(first.ranks()) == 1 and len(second.ranks()) == 2
    third = launch(30.0, {**cluster, "nproc": 1}, run=str(tmp_path / "run"))
    until(lambda: any("1 joined; 4 go on" in event.get("text", "") for event in first.events), f"the third node; {third.said()}")
    for pid in (*second.ranks().values(), second.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert first.ends() == 0, first.said()
    assert third.ends() == 0, third.said()
    assert first.events[-1]["stopped"] == third.events[-1]["stopped"] == "finished" and first.events[-1]["ranks"] == 2
    notices = [
        event["text"].partition(";")[0] for event in first.events if event["event"] == "notice" and event["text"].startswith("ranks:")
    ]
    assert notices[0] == "ranks: 1 joined" and sum(int(notice.split()[1]) for notice in notices[1:]) == 2
    state = State.load(committed(tmp_path / "run")[-1])
    assert max(float((state.model[name] - alone.state.model[name]).abs().max()) for name in state.model) < EXACT
    assert alone.path is not None
    same_folder(tmp_path / "run", alone.path)
    assert not (tmp_path / "meeting").exists()


@pytest.mark.slow
def test_where_the_store_is_gone_the_others_end_with_a_word(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    cluster = {"nnodes": 2, "rdzv": f"127.0.0.1:{free_port()}", "timeout_s": 2.0}
    first = launch(4.0, {**cluster, "nproc": 1}, run=str(tmp_path / "run"), checkpoint_every_s=0.2)
    until(first.ranks, "the first node")
    second = launch(4.0, {**cluster, "nproc": 1}, run=str(tmp_path / "run"), checkpoint_every_s=0.2)
    first.reaches(8)
    there = second.ranks()
    for pid in (*first.ranks().values(), first.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert second.ends() == 1
    assert "cannot be reached any more" in second.said() and "resume goes on" in second.said(), second.said()
    assert not any(running(pid) for pid in there.values())
    assert committed(tmp_path / "run")


def run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[tuple[str, str], tuple[str, str], Callable[[], None]]]:
    """Two network namespaces and a cable between them: (name, address) of each, and what cuts the cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"anyfit{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            try:
                run_ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        run_ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            run_ip("-n", name, "addr", "add", f"10.99.7.{number}/24", "dev", "cable")
            run_ip("-n", name, "link", "set", "lo", "up")
            run_ip("-n", name, "link", "set", "cable", "up")
        yield (names[0], "10.99.7.1"), (names[1], "10.99.7.2"), lambda: run_ip("-n", names[1], "link", "set", "cable", "down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_of_two_hosts_that_are_cut_off_the_one_with_the_store_goes_on(launch: Callable[..., Launcher], alone: Run, tmp_path: Path) -> None:
    """Different numbers of ranks; the cable is cut in the middle. No packet says so: only silence does."""
    with two_hosts() as (first_host, second_host, cut):
        cluster = {"nnodes": 2, "rdzv": f"{first_host[1]}:29511", "timeout_s": 3.0}
        options = {"run": str(tmp_path / "run")}
        first = launch(4.0, {**cluster, "nproc": 2}, ["ip", "netns", "exec", first_host[0]], **options)
        second = launch(4.0, {**cluster, "nproc": 1}, ["ip", "netns", "exec", second_host[0]], **options)
        first.reaches(16)
        there = second.ranks()
        cut()
        assert first.ends() == 0, first.said()
        assert second.ends() == 1
        assert "cannot be reached any more" in second.said(), second.said()
        assert not any(running(pid) for pid in there.values())
    assert any("ranks: 1 lost; 2 go on" in event.get("text", "") for event in first.events)
    assert alone.path is not None
    same_folder(tmp_path / "run", alone.path)


@pytest.mark.slow
def test_a_second_job_on_the_port_of_the_first_is_refused(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    rdzv = f"127.0.0.1:{free_port()}"
    first = launch(4.0, {"nproc": 1, "nnodes": 2, "rdzv": rdzv, "wait_s": 20.0})
    until(first.ranks, "the first job")
    other = launch(4.0, {"nproc": 1, "nnodes": 2, "rdzv": rdzv}, seed=6)
    assert other.ends() == 1 and "another job" in other.said() and "give each job a port of its own" in other.said()
    assert first.ends() == 1 and "1 of 2 nodes came to the rendezvous within 20 s" in first.said(), first.said()


@pytest.mark.slow
def test_no_error_is_lost_on_its_way_from_a_rank(tmp_path: Path) -> None:
    """A task that cannot be built at its ranks: the caller gets the error that they had."""
    with pytest.raises(RunError, match="KeyError: 'nothing'"):
        fit(Broken(), cluster=Cluster(nproc=2), steps=2, **OPTIONS)


class Broken(Digits):
    def build_optimizer(self, model: Any) -> Any:
        raise KeyError("nothing")
