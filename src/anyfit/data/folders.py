"""Folders and zips of images or texts, a folder for each class, and columns that name image files.

`train/cat/1.jpg`, `test/dog/7.png` or `cat/1.jpg`: the first folder may say the split, the next says the class.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from anyfit.data.files import Wider
from anyfit.data.hashes import image_column
from anyfit.errors import DataError

__all__ = ["SPLITS", "Folder", "ImageFiles", "decoded", "open_folder"]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEXTS = (".txt",)
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
SPLITS |= {"test": "test", "testing": "test"}
BATCH_ROWS = 512


@dataclass(frozen=True)
class Folder:
    """The files of a folder or a zip by split, with the class of each."""

    path: Path
    kind: str  # image | text
    files: dict[str, list[tuple[str, str | None]]]  # split -> (name within the folder, class)


def open_folder(path: Path) -> Folder:
    """Look at the names alone; refused where they tell no classes, or two kinds of files."""
    names = sorted(_names(path))
    kinds = {
        "image": [name for name in names if name.lower().endswith(IMAGES)],
        "text": [name for name in names if name.lower().endswith(TEXTS)],
    }
    kind = max(kinds, key=lambda kind: len(kinds[kind]))
    found = [(name, PurePosixPath(name).parts) for name in kinds[kind]]
    if not found:
        raise DataError(
            f"data (={str(path)!r}) holds neither images ({', '.join(IMAGES)}) nor texts (.txt) nor *images*ubyte* files; "
            "give a folder with a folder for each class"
        )
    while len({parts[0] for _, parts in found}) == 1 and all(len(parts) > 2 for _, parts in found) and found[0][1][0].lower() not in SPLITS:
        found = [(name, parts[1:]) for name, parts in found]  # one folder around everything says nothing
    files: dict[str, list[tuple[str, str | None]]] = {}
    splits = all(parts[0].lower() in SPLITS for _, parts in found)
    for name, parts in found:
        split = SPLITS[parts[0].lower()] if splits else "train"
        files.setdefault(split, []).append((name, "/".join(parts[1:-1] if splits else parts[:-1]) or None))
    if "train" not in files:
        raise DataError(f"data (={str(path)!r}) has no folder named train; it has: {', '.join(sorted(files))}")
    for split, items in files.items():
        lacking = [name for name, label in items if label is None]
        if lacking and len(lacking) < len(items):
            raise DataError(f"{lacking[0]} of {split} stands outside the class folders; move it into one")
    return Folder(path, kind, files)


def _names(path: Path) -> list[str]:
    if path.is_dir():
        return [name for file in path.rglob("*") if file.is_file() and _is_visible(name := file.relative_to(path).as_posix())]
    try:
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/") and _is_visible(name)]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"data (={str(path)!r}) cannot be read as a zip: {error}") from error


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


class _Coloured(Exception):
    """An image has colours, unlike those of the batches before it."""


@dataclass
class ImageFiles:
    """One split of a folder as record batches: `image` or `text`, and `target`."""

    folder: Folder
    split: str
    size: tuple[int, int] | None = None
    encoding: str | None = None
    types: dict[str, pa.DataType] = field(default_factory=dict)
    coloured: bool = False

    def identity(self) -> list[Any] | None:
        """Names, sizes and times of all files."""
        path, items = self.folder.path, self.folder.files[self.split]
        if path.is_dir():
            files = [(*item, (path / item[0]).stat()) for item in items]
            about: list[Any] = [[name, label, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, label, stat in files]
        else:
            stat = path.stat()
            about = [[*map(list, items)], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        return [self.folder.kind, str(path.resolve()), about, self.size, self.encoding]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Files in the order of their names."""
        items = self.folder.files[self.split]
        shape: tuple[int, ...] | None = None
        archive = None if self.folder.path.is_dir() else zipfile.ZipFile(self.folder.path)
        try:
            for start in range(0, len(items), BATCH_ROWS):
                part = items[start : start + BATCH_ROWS]
                contents = [(name, _content(self.folder.path, archive, name)) for name, _ in part]
                if self.folder.kind == "text":
                    values: pa.Array = pa.array([_text(name, data, self.encoding) for name, data in contents], pa.string())
                else:
                    try:
                        pixels = decoded(contents, self.size, shape, coloured=self.coloured)
                    except _Coloured:
                        self.coloured = True
                        raise Wider("", pa.null()) from None
                    shape = pixels.shape[1:]
                    values = image_column(pixels)
                columns = {self.folder.kind: values}
                if part[0][1] is not None:
                    columns["target"] = pa.array([label for _, label in part], pa.string())
                yield pa.record_batch(columns)
        finally:
            if archive is not None:
                archive.close()


def _content(path: Path, archive: zipfile.ZipFile | None, name: str) -> bytes:
    try:
        return (path / name).read_bytes() if archive is None else archive.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:  # RuntimeError: it has a password
        raise DataError(f"file (={name!r}) of {path} cannot be read: {error}") from error


def _text(name: str, data: bytes, encoding: str | None) -> str:
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"text {name!r} is not UTF-8; say what it is, e.g. encoding='latin-1'") from error


def decoded(
    contents: Sequence[tuple[str, bytes]],
    size: tuple[int, int] | None = None,
    shape: tuple[int, ...] | None = None,
    *,
    coloured: bool = False,
) -> np.ndarray[Any, Any]:
    """(N, C, H, W) uint8 of encoded images: one channel where all are grey and none is `coloured`, else three. `size` (H, W): scaled and
    cut to it.

    Without `size` all must have one size; `shape` is that of the images before. A broken one is named.
    """
    from PIL import Image, UnidentifiedImageError

    images: list[tuple[str, Any]] = []
    for name, data in contents:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.mode.startswith("I;16"):  # PIL would cut at 255
                    plain = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                else:
                    plain = image.convert("L" if image.mode in ("1", "L", "LA", "La", "I") else "RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"image {name!r} cannot be read: {error}; replace it or leave it out") from error
        images.append((name, _cut(plain, size) if size is not None and (plain.height, plain.width) != size else plain))
    grey = not coloured and all(image.mode == "L" for _, image in images)
    channels = shape[0] if shape is not None else (1 if grey else 3)
    if channels == 1 and not grey:
        raise _Coloured
    first = (images[0][1].height, images[0][1].width) if shape is None else shape[1:]
    for name, picture in images:
        if (picture.height, picture.width) != tuple(first):
            raise DataError(
                f"image {name!r} is {picture.height} x {picture.width}, but those before it are {first[0]} x {first[1]}; "
                "say to which size all are brought: size=(height, width)"
            )
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.asarray(image.convert(mode)).reshape(*first, channels) for _, image in images]
    return np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2))


def _cut(image: Any, size: tuple[int, int]) -> Any:
    """Scaled until it covers `size`, then cut at the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))
