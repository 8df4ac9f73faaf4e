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
    "hetseq_classes.py": (r"accuracy 0\.[89]\d* of what MNISTTask learnt", ()),
    "hetseq_bert.py": (r"masked words: loss 3\.\d+ at first, [01]\.\d+ on other texts", ()),
    "cluster.py": (r"(?s)step  10: \d+ rows \+ \d+ rows.*weights differ by at most (?:0e\+00|\de-1\d)", ()),
    "gan.py": (r"(?:[ .:*#]{8}\n){8}", ("40",)),
    "federated_digits.py": (r"federated +0\.9", ()),
    "imdb_cnn_rnn.py": (r"CNN: loss .*accuracy 0\.\d+", ("--steps", "100")),
    "shrink.py": (r"(?s)flash_bytes \d,\d+, ram_bytes 544\n.*int8 +0\.9\d+ +\d,\d+.*\nc +0\.9\d+ +\d,\d+", ()),
    "sparse_trainer.py": (r"float +accuracy 0\.9\d+, 80\.0% zeros\nint8 +accuracy 0\.9\d+, [\d,]+ bytes\ntask +accuracy 0\.9", ()),
    "own_data.py": (r"'share_right': (?:1\.0|0\.9)", ()),
    "own_strategy.py": (r"FedAvg +accuracy 0\.9.*\nEqual +accuracy 0\.[89]", ()),
    "substra_mnist.py": (r"all +accuracy 0\.9", ()),
    # of head and whole the same accuracy to the last digit, and hundreds of times the bytes
    "substra_bert.py": (
        r"23,729 times less\nBert +accuracy (0\.\d+) +1,568 bytes.*\nEverything +accuracy \1 +1,\d{3},\d{3} bytes",
        ("{data}/trec",),
    ),
    "tiny_mnist.py": (r"accuracy 0\.9[7-9]", ("{data}/mnist", "--epochs", "1", "--finish", "1")),
    "heart_disease.py": (r"single-site model at 4 of 4 hospitals", ("{data}/heart-disease/heart_disease_all_sites.csv",)),
}
SLOW = ("cluster.py", "hetseq_bert.py", "substra_bert.py", "tiny_mnist.py")  # tens of seconds each


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(CLAIMS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CLAIMS])
def test_an_example_shows_what_it_claims(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    claim, given = CLAIMS[name]
    needs_data = any("{data}" in argument for argument in given)
    arguments = [argument.format(data=request.getfixturevalue("data_folder")) if needs_data else argument for argument in given]
    command = [sys.executable, "-W", "error", str(FOLDER / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(claim, done.stdout), done.stdout
    assert not list(tmp_path.iterdir()), "an example wrote files that nobody asked for"
