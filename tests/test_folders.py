"""Folders and zips of images or texts: classes and splits by their names, broken files named, one size and one kind."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from anyfit import Source
from anyfit.data import infer_schema, pixels_of, read_splits
from anyfit.data.folders import decoded, open_folder
from anyfit.errors import DataError


def png(value: int = 0, size: tuple[int, int] = (4, 5), mode: str = "L") -> bytes:
    """A picture of one value; `size` is (height, width)."""
    file = io.BytesIO()
    Image.new(mode, size[::-1], value if mode in ("L", "I;16", "P") else (value,) * len(mode)).save(file, "PNG")
    return file.getvalue()


def laid_out(place: Path, contents: dict[str, bytes | str]) -> Path:
    """The files as a folder, or as a zip where the place is named so."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return place
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


HIDDEN: dict[str, bytes | str] = {
    ".DS_Store": b"x",
    "cats/._1.png": b"\x00\x05",
    ".ipynb_checkpoints/1-checkpoint.png": png(),
    "__MACOSX/cats/._1.png": b"\x00",
    "notes.md": "no image",
}


@pytest.mark.parametrize("place", ["data", "data.zip", "DATA.ZIP"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cats/1.png", "dogs/2.png"], {"train": ["cats", "dogs"]}),
        (["all/cats/1.png", "all/dogs/2.png"], {"train": ["cats", "dogs"]}),
        (["all/more/cats/1.png", "all/more/dogs/2.PNG"], {"train": ["cats", "dogs"]}),
        (["train/cats/1.png", "train/dogs/2.png", "test/cats/3.png"], {"train": ["cats", "dogs"], "test": ["cats"]}),
        (
            ["x/Training/cats/1.png", "x/val/cats/2.png", "x/testing/dogs/3.png"],
            {"train": ["cats"], "validation": ["cats"], "test": ["dogs"]},
        ),
        (["big/cats/1.png", "small/cats/2.png", "small/dogs/3.png"], {"train": ["big/cats", "small/cats", "small/dogs"]}),
        (["bus/1.png", "car/2.png", "train/3.png"], {"train": ["bus", "car", "train"]}),
        (["train/cats/1.png"], {"train": ["cats"]}),
        (["1.png", "2.png"], {"train": None}),
        (["train/1.png", "test/2.png"], {"train": None, "test": None}),
    ],
    ids=range(10),
)
def test_folders_say_splits_and_classes(place: str, names: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    """Hidden files are no images, wherever they stand."""
    contents = {name: png(int(Path(name).stem)) for name in names}
    parts = Source(laid_out(tmp_path / place, contents | HIDDEN)).read()
    assert set(parts) == set(expected)
    for split, labels in expected.items():
        assert (parts[split]["target"].to_pylist() if labels else None) == labels
        assert ("target" in parts[split].column_names) == bool(labels)
    values = [int(value) for part in parts.values() for value in pixels_of(part["image"])[:, 0, 0, 0]]
    assert sorted(values) == list(range(1, len(names) + 1))


def test_a_folder_of_texts_gives_text_and_class(tmp_path: Path) -> None:
    contents: dict[str, bytes | str] = {"train/pos/1.txt": "goed\nzo", "train/neg/2.txt": "﻿slecht", "test/pos/3.txt": ""}
    parts = Source(laid_out(tmp_path / "t", contents)).read()
    assert parts["train"].to_pydict() == {"text": ["slecht", "goed\nzo"], "target": ["neg", "pos"]}
    assert parts["test"].to_pydict() == {"text": [""], "target": ["pos"]}, "an empty text is a text"
    laid_out(tmp_path / "t", {"train/pos/1.txt": "één".encode("latin-1")})
    with pytest.raises(DataError, match=re.escape("text 'train/pos/1.txt' is not UTF-8; say what it is, e.g. encoding='latin-1'")):
        Source(tmp_path / "t").read()
    assert Source(tmp_path / "t", encoding="latin-1").read()["train"]["text"][1].as_py() == "één"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "holds neither images (.jpg"),
        ({".hidden.png": png()}, "holds neither images"),
        ({"a.docx": "x"}, "give a folder with a folder for each class"),
        ({"test/a/1.png": png(), "val/a/2.png": png()}, "has no folder named train; it has: test, validation"),
        ({"1.png": png(), "cats/2.png": png()}, "1.png of train stands outside the class folders"),
        ({"a/1.png": png(), "a/2.png": b"\x89PNG broken"}, "image 'a/2.png' cannot be read"),
        ({"a/1.png": png(), "a/2.png": png()[:-20]}, "image 'a/2.png' cannot be read"),
        ({"a/1.png": png(), "a/2.png": b""}, "image 'a/2.png' cannot be read"),
        ({"a/1.png": png(), "a/2.png": png(size=(9, 9))}, "image 'a/2.png' is 9 x 9, but those before it are 4 x 5; say to which size"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("place", ["data", "data.zip"])
def test_what_is_wrong_in_a_folder_is_named(place: str, contents: dict[str, bytes | str], message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=re.escape(message)):
        Source(laid_out(tmp_path / place, contents)).read()


def test_a_zip_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    place = laid_out(tmp_path / "t.zip", {"a/1.png": png(), "a/2.png": png(1)})
    whole = place.read_bytes()
    place.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"t\.zip'\) cannot be read as a zip"):
        Source(place).read()
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(5000))
    packed = bytearray(place.read_bytes())
    packed[40:44] = b"\xff\xff\xff\xff"
    place.write_bytes(packed)
    with pytest.raises(DataError, match=r"(file \(='a/1\.png'\) of .*t\.zip|image 'a/1.png') cannot be read"):
        Source(place).read()
    locked = bytearray(whole)
    for start in (whole.find(b"PK\x03\x04") + 6, whole.find(b"PK\x01\x02") + 8):
        locked[start] |= 1
    place.write_bytes(locked)
    with pytest.raises(DataError, match=r"file \(='a/1\.png'\) of .*t\.zip cannot be read: .*password"):
        Source(place).read()


def test_images_of_different_sizes_are_brought_to_one(tmp_path: Path) -> None:
    contents: dict[str, bytes | str] = {f"a/{index}.png": png(50, size) for index, size in enumerate([(4, 5), (40, 10), (3, 3), (1, 9)])}
    pixels = pixels_of(Source(laid_out(tmp_path / "t", contents), size=(6, 7)).read()["train"]["image"])
    assert pixels.shape == (4, 1, 6, 7) and set(pixels.ravel().tolist()) == {50}
    picture = Image.new("L", (16, 4))
    picture.paste(200, (2, 0, 14, 4))
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert set(decoded([("x", file.getvalue())], (2, 2)).ravel().tolist()) == {200}, "cut at the centre, not squeezed"


@pytest.mark.parametrize("many", [2, 600])
def test_one_coloured_image_makes_all_coloured_wherever_it_stands(many: int, tmp_path: Path) -> None:
    contents: dict[str, bytes | str] = {f"a/{index:03}.png": png(7) for index in range(many)}
    contents["b/1.png"] = png(9, mode="RGB")
    pixels = pixels_of(Source(laid_out(tmp_path / "t.zip", contents)).read()["train"]["image"])
    assert pixels.shape == (many + 1, 3, 4, 5) and set(pixels[:-1].ravel().tolist()) == {7} and set(pixels[-1].ravel().tolist()) == {9}


@pytest.mark.parametrize(
    ("mode", "value", "expected", "channels"),
    [("L", 7, 7, 1), ("1", 1, 255, 1), ("LA", 7, 7, 1), ("RGB", 7, 7, 3), ("RGBA", 7, 7, 3), ("I;16", 7 << 8, 7, 1)],
)
def test_every_mode_becomes_grey_or_coloured(mode: str, value: int, expected: int, channels: int) -> None:
    """16 bits lose the lower ones; nothing is cut at white."""
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), value, dtype=np.uint16)).save(file, "PNG")
    else:
        Image.new(mode, (5, 4), (value, 255) if mode == "LA" else (value,) * len(mode) if mode.startswith("RGB") else value).save(
            file, "PNG"
        )
    pixels = decoded([("x", file.getvalue())])
    assert pixels.shape == (1, channels, 4, 5) and set(pixels.ravel().tolist()) == {expected}


def test_a_cache_of_a_folder_follows_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfit.data import blocks

    monkeypatch.setattr(blocks, "HOLD_BYTES", 10)
    monkeypatch.setenv("ANYFIT_CACHE", str(tmp_path / "cache"))
    folder = laid_out(tmp_path / "t", {"x/a/1.png": png(1), "x/b/2.png": png(2)})

    def rows() -> list[tuple[int, str]]:
        table = pa.concat_tables(list(Source(folder).read()["train"]))
        return list(zip(pixels_of(table["image"])[:, 0, 0, 0].tolist(), table["target"].to_pylist(), strict=True))

    assert rows() == [(1, "a"), (2, "b")] == rows()
    stat = (folder / "x/a/1.png").stat()
    laid_out(folder, {"x/a/1.png": png(3)})
    os.utime(folder / "x/a/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows() == [(3, "a"), (2, "b")]
    laid_out(folder, {"y/b/4.png": png(4)})
    assert rows() == [(3, "x/a"), (2, "x/b"), (4, "y/b")], "another file can change what the others' folders say"


# A table that names images


def test_a_column_of_file_names_is_read_beside_its_table(tmp_path: Path) -> None:
    laid_out(
        tmp_path, {"pictures/1.png": png(1), "pictures/2.png": png(2, (8, 8)), "t.csv": "file,label\npictures/1.png,a\npictures/2.png,b\n"}
    )
    source = Source(tmp_path / "t.csv", target="label", types={"file": "image"}, size=(4, 4))
    table = source.read()["train"]
    assert pixels_of(table["file"])[:, 0, 0, 0].tolist() == [1, 2] and pixels_of(table["file"]).shape == (2, 1, 4, 4)
    schema = infer_schema(table, "label", types=source.types)
    assert schema["file"].type == "image" and schema["file"].shape == (1, 4, 4)
    assert len(read_splits(source, 0.5, None, wants_validation=False)) == 2
    for text, message in (
        ("file,label\npictures/1.png,a\npictures/9.png,b\n", "pictures/9.png' in row 2, which does not exist"),
        ("file,label\npictures/1.png,a\n,b\n", "names the image None in row 2"),
        ("file,label\nt.csv,a\npictures/1.png,b\n", "t.csv' cannot be read"),
    ):
        laid_out(tmp_path, {"t.csv": text})
        with pytest.raises(DataError, match=re.escape(message)):
            source.read()


def test_opening_a_folder_decodes_nothing(tmp_path: Path) -> None:
    folder = open_folder(laid_out(tmp_path / "t", {"a/1.png": b"no image", "b/2.png": b""}))
    assert folder.kind == "image" and folder.files == {"train": [("a/1.png", "a"), ("b/2.png", "b")]}
