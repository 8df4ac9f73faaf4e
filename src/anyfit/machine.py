"""The machine at hand: its device and precision, the random numbers that a step draws from, and the memory that steps leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from anyfit.errors import InputError
from anyfit.values import Plan

__all__ = ["autocast", "own_random", "pick_device", "random_state", "seed_all", "set_random_state", "steady_memory", "wait_for"]


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda[:i] or mps; refused where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device (={name!r}) must be auto, cpu, cuda, cuda:<number> or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device (={name!r}) is not there: this torch sees {torch.cuda.device_count()} CUDA devices; use device='auto' or 'cpu'"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device (='mps') is not there; use device='auto' or 'cpu'")
    return device


def autocast(plan: Plan, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A plan's precision as a context."""
    if plan.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[plan.precision])


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed torch, Python and numpy. With a `device`, torch's generators of the CPU and of that alone: a hundred times faster where
    torch knows CUDA.
    """
    if device is None:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index].manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def wait_for(device: torch.device) -> None:
    """Until a device has computed what it was given; what other streams send meanwhile may still be on its way."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def random_state(device: torch.device) -> dict[str, Any]:
    """All generators that a step may draw from."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, place, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],  # data sets and transforms of users draw from these two
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go back to what `random_state` gave."""
    if not state:
        return
    torch.set_rng_state(state["cpu"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def own_random() -> Iterator[None]:
    """The caller's generators are as they were afterwards."""
    state = random_state(torch.device("cpu"))
    try:
        yield
    finally:
        set_random_state(state, torch.device("cpu"))


@contextlib.contextmanager
def steady_memory() -> Iterator[None]:
    """Keep freed memory while training on a CPU.

    glibc hands large freed blocks back to the kernel and takes them anew, page by page, at every step: about a tenth of the time of a
    small convolutional network, now and then (mallopt(3); the trimming depends on what happens to lie at the end of the heap).
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # another C library
        yield
        return
    trim_threshold, mmap_threshold = -1, -3
    library.mallopt(mmap_threshold, 32 << 20)  # the most that every glibc takes; a refusal would freeze it where it stands
    library.mallopt(trim_threshold, (1 << 31) - 1)
    try:
        yield
    finally:  # to where glibc's own adjustment ends at most, and give back what is free
        library.mallopt(trim_threshold, 64 << 20)
        library.malloc_trim(0)
