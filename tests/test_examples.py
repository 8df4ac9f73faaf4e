"""Each example runs as its docstring says, and shows what it claims."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
CLAIMS = {
    "any_data.py": (r"(?:\w+ +accuracy 0\.9\d+\n){4}", ()),
    "old_code.py": (r"lightning +accuracy 0\.9\d+\nsklearn +accuracy 0\.9", ()),
    "bert.py": (r"frozen, pre-trained +0\.\d+\nfrozen, random +0\.\d+\nunfrozen, pre-trained +(?:0\.[89]|1\.0)", ("--quick",)),
    "quickstart.py": (r"accuracy 0\.9[5-9]", ()),
    "hetseq_mnist.py": (r"accuracy 0\.[89]", ()),
    "gan.py": (r"(?:[ .:*#]{8}\n){8}", ("40",)),
    "federated_digits.py": (r"federated +0\.9", ()),
    "imdb_cnn_rnn.py": (r"CNN: loss .*accuracy 0\.\d+", ("--steps", "100")),
    "own_data.py": (r"'share_right': (?:1\.0|0\.9)", ()),
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_an_example_shows_what_it_claims(name: str, tmp_path: Path) -> None:
    claim, arguments = CLAIMS[name]
    command = [sys.executable, "-W", "error", str(FOLDER / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(claim, done.stdout), done.stdout
    assert not list(tmp_path.iterdir()), "an example wrote files that nobody asked for"
