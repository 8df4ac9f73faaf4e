"""The C export as a user has it: files, names, labels, memory and flash as compiled, what a prediction comes to, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyfit.errors import InputError, RunError
from anyfit.program.operations import Array, Input, Operation, Program
from anyfit.shrink import c, compiled

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")
COMPILERS = [command for command in ("gcc", "clang") if shutil.which(command)]


# ------------------------------------------------------------------ networks


def filters(random: np.random.Generator, *shape: int, power_of_two: bool = False) -> dict[str, Array]:
    terms = int(np.prod(shape[1:]))
    constants = {
        "weight": random.integers(-127, 128, shape).astype(np.int8),
        "bias": random.integers(-4000, 4000, shape[0]).astype(np.int32),
        "shift": np.full(shape[0], 7 + terms.bit_length() // 2 + (0 if power_of_two else 31), np.int8),
    }
    if not power_of_two:
        constants["multiplier"] = random.integers(2**30, 2**31 - 1, shape[0]).astype(np.int32)
    return constants


def residual(
    seed: int = 0, *, power_of_two: bool = False, outputs: int = 5, task: Any = "classes", labels: Sequence[str] | None = None
) -> Program:
    """Pixels, a residual block, a pool and a head: each way to share memory is in it."""
    random = np.random.default_rng(seed)
    scale = {"multiplier": np.array([1, 1] if power_of_two else [2**30, 2**30 + 77], np.int32)}

    def conv(name: str, given: str, into: int, out: int, kernel: int, side: int, stride: int = 1, groups: int = 1) -> Operation:
        padding = (kernel // 2,) * 4
        options = {"stride": (stride,) * 2, "padding": padding, "dilation": (1, 1), "groups": groups, "low": 0, "high": 127}
        constants = filters(random, out, into // groups, kernel, kernel, power_of_two=power_of_two)
        return Operation("conv", name, (given,), name, (out, side, side), options, constants)

    one = {"multiplier": np.array([1]), "offset": np.array([0])}
    table = {"table": random.integers(-128, 128, 256).astype(np.int8)}
    operations = (
        Operation("quantize", "image", ("x",), "q", (3, 8, 8), {"shift": 1, "low": 0, "high": 127}, one),
        conv("stem", "q", 3, 4, 3, 8),
        conv("deep", "stem", 4, 4, 3, 8, groups=4),
        conv("wide", "deep", 4, 4, 1, 8),
        Operation("add", "sum", ("stem", "wide"), "sum", (4, 8, 8), {"shift": 1 if power_of_two else 31, "low": 0, "high": 127}, scale),
        Operation("table", "bend", ("sum",), "bend", (4, 8, 8), {}, table),
        Operation("maximum", "pool", ("bend",), "pool", (4, 4, 4), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}),
        Operation("reshape", "flat", ("pool",), "flat", (64,)),
        Operation("linear", "head", ("flat",), "logits", (outputs,), {}, filters(random, outputs, 64, power_of_two=power_of_two)),
    )
    scales = {each.output: 0.05 for each in operations}
    names = None if labels is None else tuple(labels)
    return Program((Input("x", "uint8", (3, 8, 8)),), operations, "logits", scales, 0.001, names, task, power_of_two)


def pixels(program: Program, rows: int = 40) -> Array:
    return np.random.default_rng(5).integers(0, 256, (rows, *program.inputs[0].shape)).astype(np.uint8)


def write(program: Program, folder: Path, name: str = "net") -> Path:
    for file, text in c.emit(program, name, c.plan(program)).items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def shell(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(word) for word in words], capture_output=True, check=False, **options)


# ------------------------------------------------------------------ results


@needs_compiler
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_residual_network_is_exact_in_the_memory_that_was_planned(power_of_two: bool, tmp_path: Path) -> None:
    program = residual(power_of_two=power_of_two)
    binary = compiled.build(write(program, tmp_path), "net", tmp_path, sanitize=True)
    x = pixels(program)
    ran, expected = compiled.run(binary, x, 5), program.run({"x": x})
    assert np.array_equal(ran.logits, expected.logits) and np.array_equal(ran.answers, expected.answers)
    assert len(set(expected.answers.tolist())) > 2 and len(np.unique(expected.logits)) > 20
    assert ran.microseconds > 0
    text = (tmp_path / "net.c").read_text(encoding="utf-8")
    assert ("multiplier_" in text.split("model = {")[1].split("};")[0]) is not power_of_two
    assert ("int64_t" in text) is not power_of_two


@needs_compiler
@pytest.mark.parametrize(("task", "outputs"), [("classes", 4), ("binary", 1), ("numbers", 1), ("numbers", 3)])
@pytest.mark.parametrize("decided_by", ["sums", "values", "another shape"])
def test_a_prediction_comes_to_what_the_task_asks_for(task: str, outputs: int, decided_by: str, tmp_path: Path) -> None:
    program = residual(outputs=outputs, task=task)
    if decided_by != "sums":
        more = Operation("clamp", "last", ("logits",), "last", (outputs,), {"low": -50, "high": 50})
        if decided_by == "another shape":
            more = Operation("reshape", "last", ("logits",), "last", (outputs, 1))
        program = replace(program, operations=(*program.operations, more), result="last", scales={**program.scales, "last": 0.05})
    binary = compiled.build(write(program, tmp_path), "net", tmp_path, flags=("-O0",))
    x = pixels(program)
    ran, expected = compiled.run(binary, x, outputs), program.run({"x": x})
    assert (expected.accumulators is not None) == (decided_by == "sums")
    assert np.array_equal(ran.logits, expected.logits) and np.array_equal(ran.answers, expected.answers)
    assert len(set(expected.answers.tolist())) > 1 or (task, outputs) == ("numbers", 3)


@needs_compiler
def test_inputs_lie_one_after_the_other(tmp_path: Path) -> None:
    one = {"multiplier": np.array([3, 5]), "offset": np.array([-(2**20), 77])}
    floats = {"gain": np.array([1.5], np.float32), "shift_by": np.array([-3.25], np.float32)}
    for dtype, constants, options in (("int32", one, {"shift": 3}), ("float32", floats, {})):
        first = Operation("quantize", "a", ("x",), "a", (2, 3), options, constants)
        second = Operation("quantize", "b", ("y",), "b", (2, 3), options, constants)
        join = Operation("concat", "c", ("b", "a"), "c", (2, 6), {"axis": 1}, {"multiplier": np.array([1, 1]), "shift": np.array([0, 1])})
        inputs = (Input("x", dtype, (2, 3)), Input("y", dtype, (2, 3)))
        program = Program(inputs, (first, second, join), "c", dict.fromkeys("abc", 1.0), 1.0)
        random = np.random.default_rng(0)
        x, y = (random.normal(0, 30, (9, 2, 3)).astype(dtype) for _ in range(2))
        binary = compiled.build(write(program, tmp_path), "net", tmp_path, sanitize=True)
        ran = compiled.run(binary, np.concatenate([x, y], 1), 12)
        assert np.array_equal(ran.logits, program.run({"x": x, "y": y}).logits)


# ------------------------------------------------------------------ bytes


@needs_compiler
@pytest.mark.parametrize("power_of_two", [False, True])
def test_bytes_of_the_object_are_those_of_the_plan(power_of_two: bool, tmp_path: Path) -> None:
    program = residual(power_of_two=power_of_two)
    arena = c.plan(program)
    measured = compiled.measure(write(program, tmp_path), "net")
    stored = [
        array.nbytes
        for operation in program.operations
        for array in operation.constants.values()
        if operation.kind in ("conv", "linear", "table")
    ]
    assert measured.flash == c.flash_bytes(program) == -(-sum(stored) // 4) * 4
    assert measured.ram == arena.bytes == 4 * 64 * 3  # beside a sum and its first term, one more of that size
    assert 0 < measured.text < 5000 and (measured.stack is None or 0 < measured.stack < 1000)
    if shutil.which("size"):
        lines = shell("size", "-A", _object(tmp_path)).stdout.decode().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(".")}
        assert measured.flash == sum(size for name, size in sizes.items() if name.startswith((".rodata", ".data")))
        assert measured.ram == sizes[".bss"] and measured.text == sum(size for name, size in sizes.items() if name.startswith(".text"))


def _object(folder: Path) -> Path:
    done = shell(compiled.compiler() or "cc", "-std=c99", "-Os", "-c", folder / "net.c", "-o", folder / "net.o")
    assert done.returncode == 0, done.stderr
    return folder / "net.o"


@needs_compiler
def test_curves_and_tables_that_are_equal_are_stored_once(tmp_path: Path) -> None:
    table = {"table": np.arange(-128, 128).astype(np.int8)[::-1].copy()}
    first = Operation("embedding", "e", ("x",), "e", (3, 2), {}, {"table": table["table"].reshape(128, 2)})
    second = Operation("table", "t", ("e",), "t", (3, 2), {}, table)
    third = Operation("table", "u", ("t",), "u", (3, 2), {}, table)
    program = Program((Input("x", "uint8", (3,)),), (first, second, third), "u", dict.fromkeys("etu", 1.0), 1.0)
    assert compiled.measure(write(program, tmp_path), "net").flash == c.flash_bytes(program) == 256


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("command", COMPILERS)
def test_all_files_compile_without_a_warning(command: str, tmp_path: Path) -> None:
    for task, outputs, labels in (
        ("classes", 5, "abcde"),
        ("classes", 5, None),
        ("binary", 1, "ab"),
        ("numbers", 1, None),
        ("numbers", 2, None),
    ):
        write(residual(outputs=outputs, task=task, labels=labels), tmp_path)
        done = shell(command, *compiled.STRICT, "-O1", tmp_path / "net.c", tmp_path / "main.c", "-o", tmp_path / "net")
        assert done.returncode == 0, done.stderr.decode()


@needs_compiler
def test_the_header_serves_cpp(tmp_path: Path) -> None:
    command = next((each for each in ("g++", "clang++") if shutil.which(each)), None)
    if command is None:
        pytest.skip("no C++ compiler")
    folder = write(residual(), tmp_path)
    user = folder / "user.cpp"
    user.write_text(
        '#include "net.h"\n#include "net.h"\nint main() { int8_t l[NET_OUTPUTS]; net_input()[0] = 1; return net_predict(l) > 9; }\n'
    )
    done = shell(command, "-Wall", "-Wextra", "-Werror", user, _object(folder), "-o", folder / "user")
    assert done.returncode == 0, done.stderr.decode()
    assert shell(folder / "user").returncode == 0


EVIL = (
    '"); system("x',
    "a\\",
    "??/",
    "??=",
    "line\nbreak\ttab\r",
    "%s%n",
    "*/ int x; /*",
    "größe 数",
    "\x07\x1b[0m",
    "\\x41",
    "12" * 2,
    "",
    "é" * 3000,
)


@needs_compiler
def test_labels_are_printed_as_they_are_whatever_they_hold(tmp_path: Path) -> None:
    program = residual(outputs=len(EVIL), labels=EVIL)
    head = program.operations[-1]
    named = tuple(replace(each, name=f"*/ {EVIL[0]} \n ??/ {each.name}") for each in program.operations[:-1])
    zero = {**head.constants, "weight": np.zeros_like(head.constants["weight"])}
    for chosen in range(len(EVIL)):
        bias = np.where(np.arange(len(EVIL)) == chosen, 1000, -1000).astype(np.int32)
        forced = replace(program, operations=(*named, replace(head, constants={**zero, "bias": bias})))
        write(forced, tmp_path)
        if chosen == 0:
            done = shell(
                compiled.compiler() or "cc", *compiled.STRICT, "-trigraphs", "-O0", "-c", tmp_path / "main.c", "-o", tmp_path / "main.o"
            )
            assert done.returncode == 0, done.stderr.decode()
        flags = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O0")
        done = shell(compiled.compiler() or "cc", *flags, tmp_path / "net.c", tmp_path / "main.o", "-o", tmp_path / "net")
        assert done.returncode == 0, done.stderr.decode()
        told = shell(tmp_path / "net", input=pixels(program, 1).tobytes()).stdout
        expected = EVIL[chosen].encode() if len(EVIL[chosen]) < 1000 else ("é" * 500 + "…").encode()
        assert told.startswith(expected + b" "), told
        assert told[len(expected) :].count(b" ") == len(EVIL) and told.endswith(b"\n")


@needs_compiler
def test_the_example_reads_rows_and_tells_of_one_that_is_cut(tmp_path: Path) -> None:
    program = residual(labels=("ant", "bee", "cow", "dog", "eel"))
    write(program, tmp_path)
    assert shell(compiled.compiler() or "cc", "-std=c99", tmp_path / "net.c", tmp_path / "main.c", "-o", tmp_path / "net").returncode == 0
    x = pixels(program, 7)
    expected = program.run({"x": x})
    done = shell(tmp_path / "net", input=x.tobytes())
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and [line[0] for line in lines] == [program.labels[answer] for answer in expected.answers]  # type: ignore[index]
    assert np.allclose([[float(word) for word in line[1:]] for line in lines], expected.logits * 0.05, atol=1e-4)
    done = shell(tmp_path / "net", input=x.tobytes()[:-1])
    assert done.returncode == 1 and b"the last row has 191 values, not 192" in done.stderr and len(done.stdout.splitlines()) == 6


def test_files_are_the_same_each_time_and_hold_nothing_of_the_machine() -> None:
    files = c.emit(residual(), "net", c.plan(residual()))
    assert files == c.emit(residual(), "net", c.plan(residual())) and sorted(files) == ["main.c", "net.c", "net.h"]
    assert all(
        text.isascii() and not re.search(r"malloc|math\.h|double|[^a-z]float", text) for name, text in files.items() if name == "net.c"
    )
    assert all(len(line) <= 140 for text in files.values() for line in text.splitlines())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "name",
    ["", "9net", "a-b", "a b", "net.c", "../net", "größe", "_net", "a" * 64, "net\n", "int", "while", "_Bool", "main", "stdint", "bool"],
)
def test_a_name_that_c_cannot_take_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"name (={name!r})")):
        c.emit(residual(), name, c.plan(residual()))


@needs_compiler
def test_names_that_kernels_also_have_do_no_harm(tmp_path: Path) -> None:
    for name in ("linear", "arena", "model", "Int", "x", "a" * 63):
        write(residual(), tmp_path, name)
        assert compiled.measure(tmp_path, name).ram == 768


def test_constants_that_are_not_finite_are_refused() -> None:
    constants = {"gain": np.array([np.inf], np.float32), "shift_by": np.array([0], np.float32)}
    first = Operation("quantize", "a", ("x",), "a", (2,), {}, constants)
    program = Program((Input("x", "float32", (2,)),), (first,), "a", {"a": 1.0}, 1.0)
    with pytest.raises(InputError, match="inf; its numbers must be finite"):
        c.emit(program, "net", c.plan(program))


def test_a_missing_compiler_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(residual(), tmp_path)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.compiler() is None
    with pytest.raises(InputError, match=r"there is no C compiler; install a C compiler \(cc, gcc or clang\), or set CC"):
        compiled.measure(tmp_path, "net")
    monkeypatch.setenv("CC", "no-such-cc -O2")
    with pytest.raises(InputError, match=r"the C compiler \(='no-such-cc -O2'\) is not there"):
        compiled.build(tmp_path, "net", tmp_path)
    with pytest.raises(InputError, match="no-such-arm-gcc"):
        compiled.measure(tmp_path, "net", command="no-such-arm-gcc")


@needs_compiler
def test_cc_may_hold_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(residual(), tmp_path)
    monkeypatch.setenv("CC", f"{shutil.which(os.environ.get('CC', 'cc'))} -DNDEBUG")
    assert compiled.measure(tmp_path, "net").compiler.endswith("cc -DNDEBUG")


@needs_compiler
def test_errors_hold_the_compilers_words_and_those_of_what_failed(tmp_path: Path) -> None:
    write(residual(), tmp_path)
    source = (tmp_path / "net.c").read_text(encoding="utf-8")
    (tmp_path / "net.c").write_text(source.replace("return answer;", "return anser;"), encoding="utf-8")
    for work in (lambda: compiled.measure(tmp_path, "net"), lambda: compiled.build(tmp_path, "net", tmp_path)):
        with pytest.raises(RunError, match=r"(?s)cannot compile net\.c.*anser"):
            work()
    with pytest.raises(InputError, match=r"other\.c is not there"):
        compiled.measure(tmp_path, "other")
    # an arena that is too small by one byte is found by the sanitizers, so they would find one in a kernel
    (tmp_path / "net.c").write_text(
        source.replace("int8_t bytes[768];", "int8_t bytes[767];").replace("raw[768]", "raw[767]"), encoding="utf-8"
    )
    binary = compiled.build(tmp_path, "net", tmp_path, sanitize=True)
    with pytest.raises(RunError, match=r"(?s)net_rows failed.*overflow"):
        compiled.run(binary, pixels(residual()), 5)


@needs_compiler
def test_of_objects_that_are_no_elf_no_bytes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(residual(), tmp_path)
    fake = tmp_path / "fakecc"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf MACH > "$2"\n')
    fake.chmod(0o755)
    assert compiled.measure(tmp_path, "net", command=str(fake)) is None


# ------------------------------------------------------------------ microcontrollers

ARM, QEMU = "arm-none-eabi-gcc", "qemu-system-arm"
BARE = """
#include <stdint.h>
#include "net.h"

extern const uint8_t rows[];
extern const int32_t row_count;

static int host(int operation, const void *argument)  /* semihosting: the emulator does it */
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void tell(int32_t value)
{
    char text[12];
    for (int i = 0; i < 8; i++) {
        text[i] = "0123456789abcdef"[((uint32_t)value >> (28 - 4 * i)) & 15];
    }
    text[8] = ' ';
    text[9] = 0;
    host(4, text);
}

void start(void)
{
    for (int32_t row = 0; row < row_count; row++) {
        int8_t logits[NET_OUTPUTS];
        for (int32_t i = 0; i < NET_INPUT_SIZE; i++) {
            net_input()[i] = rows[row * NET_INPUT_SIZE + i];
        }
        tell(net_predict(logits));
        for (int i = 0; i < NET_OUTPUTS; i++) {
            tell(logits[i]);
        }
    }
    host(0x18, (const void *)0x20026);
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[2] = {(const void *)0x20010000, (const void *)start};
"""
MEMORY = """
SECTIONS {
    . = 0; .text : { KEEP(*(.vectors)) *(.text* .rodata*) }
    . = 0x20000000; .bss : { *(.bss*) }
    /DISCARD/ : { *(.ARM.*) }
}
"""


@pytest.mark.skipif(not shutil.which(ARM), reason=f"no {ARM}")
@pytest.mark.parametrize(("core", "board"), [("cortex-m0plus", "mps2-an385"), ("cortex-m4", "mps2-an386")])
def test_a_microcontroller_computes_the_same(core: str, board: str, tmp_path: Path) -> None:
    program = residual()
    flags = (f"-mcpu={core}", "-mthumb", "-Os")
    write(program, tmp_path)
    measured = compiled.measure(tmp_path, "net", command=ARM, flags=flags)
    assert measured.flash == c.flash_bytes(program) and measured.ram == c.plan(program).bytes
    assert 0 < measured.text < 3000 and measured.stack is not None and 0 < measured.stack < 600
    if not shutil.which(QEMU):
        pytest.skip(f"no {QEMU}")
    x = pixels(program, 6)
    (tmp_path / "rows.c").write_text(
        f"#include <stdint.h>\nconst uint8_t rows[] = {{{', '.join(map(str, x.ravel()))}}};\nconst int32_t row_count = {len(x)};\n"
    )
    (tmp_path / "bare.c").write_text(BARE)
    (tmp_path / "memory.ld").write_text(MEMORY)
    sources = [tmp_path / each for each in ("bare.c", "net.c", "rows.c")]
    line = (ARM, *flags, "-std=gnu99", "-ffreestanding", "-nostartfiles", "-nostdlib", "-T", tmp_path / "memory.ld", f"-I{tmp_path}")
    done = shell(*line, *sources, "-lgcc", "-o", tmp_path / "net.elf")
    assert done.returncode == 0, done.stderr.decode()
    shown = ("-display", "none", "-monitor", "none", "-serial", "none", "-semihosting-config", "enable=on,target=native")
    done = shell(QEMU, "-M", board, *shown, "-kernel", tmp_path / "net.elf", timeout=60)
    told = np.array([int(word, 16) for word in (done.stdout + done.stderr).split()], dtype=np.uint32).view(np.int32).reshape(len(x), 6)
    expected = program.run({"x": x})
    assert np.array_equal(told[:, 0], expected.answers) and np.array_equal(told[:, 1:], expected.logits)
