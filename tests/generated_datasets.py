"""Small datasets in the layouts of strangers, drawn from a seed, with one fault each or none.

`generate(folder, number)` writes dataset `number`: a layout, and a fault out of `FAULTS` that this
layout can have. A fault says who reads what is wrong, and which words name it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
from laws import ras

from volseg.io.volumes import read_volume, write_volume
from volseg.volume import Geometry, Volume

N_CASES, SHAPE = 4, (12, 12, 12)
LABELS = {"lesion": 1}
Random = random.Random


class Scope(Enum):
    """What holds the fault, which decides who must name it.

    WHOLE: which files belong together: every command refuses the dataset with one sentence.
    CHANNEL: a case lacks a channel: every command that reads this channel refuses the dataset.
    SCAN, MASK: the content of one file: a failed row, or a refusal, of each command that reads it.
    TRAINING: what only training asks of a case: check with the recipe, plan, preprocess and train.
    REQUIREMENT: what only training asks of the dataset as a whole: the same commands refuse it.
    SPLIT: the splits: the same commands refuse the dataset, the others give a warning.
    REMARK: unusual but usable: a warning of every command. MASK_REMARK: of those that read masks.
    TRAINING_REMARK: of those that train or check.
    NONE: there is no fault.
    """

    WHOLE = "whole"
    CHANNEL = "channel"
    SCAN = "scan"
    MASK = "mask"
    TRAINING = "training"
    REQUIREMENT = "requirement of training"
    SPLIT = "split"
    REMARK = "remark"
    MASK_REMARK = "remark on a mask"
    TRAINING_REMARK = "remark for training"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Layout:
    """Patterns of the files of case `n`: channel → scan, and the mask; `kind` of its description.

    Args:
        kind: `names`, `json` or `table`, by what says which files belong together.
    """

    kind: str
    scans: Mapping[str, str]
    mask: str


LAYOUTS = {
    "images and labels": Layout("names", {"image": "images/p{n}.nii.gz"}, "labels/p{n}.nii.gz"),
    "a folder per patient": Layout("names", {"image": "pat{n}/image.nii.gz"}, "pat{n}/mask.nii.gz"),
    "suffixes": Layout("names", {"flair": "p{n}_FLAIR.nii.gz"}, "p{n}_FLAIR_lesions.nii.gz"),
    "bids": Layout(
        "names",
        {"t1w": "sub-0{n}/ses-1/anat/sub-0{n}_ses-1_T1w.nii.gz"},
        "derivatives/manual/sub-0{n}/ses-1/anat/sub-0{n}_ses-1_label-lesion_mask.nii.gz",
    ),
    "brats": Layout(
        "names",
        {"flair": "B{n}/B{n}_flair.nii.gz", "t1": "B{n}/B{n}_t1.nii.gz"},
        "B{n}/B{n}_seg.nii.gz",
    ),
    "numbered channels": Layout(
        "names",
        {"0000": "images/x{n}_0000.nii.gz", "0001": "images/x{n}_0001.nii.gz"},
        "labels/x{n}.nii.gz",
    ),
    "nnunet": Layout(
        "json",
        {"t1": "imagesTr/c{n}_0000.nii.gz", "flair": "imagesTr/c{n}_0001.nii.gz"},
        "labelsTr/c{n}.nii.gz",
    ),
    "nnunet with a list": Layout(
        "json", {"image": "imagesTr/c{n}_0000.nii.gz"}, "labelsTr2/c{n}.nii.gz"
    ),
    "decathlon": Layout("json", {"image": "imagesTr/c{n}.nii.gz"}, "labelsTr/c{n}.nii.gz"),
    "table": Layout("table", {"image": "scans/s{n}.nii.gz"}, "masks/m{n}.nii.gz"),
    "table of channels": Layout(
        "table", {"t1": "scans/s{n}_t1.nii", "flair": "scans/s{n}_fl.nii"}, "masks/m{n}.nii.gz"
    ),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a table is written: `separator`, first line, heads, folder separator and encoding."""

    separator: str = ","
    first_line: str = ""
    heads: Mapping[str, str] = field(default_factory=dict)
    slash: str = "/"
    encoding: str = "utf-8"
    newline: str = "\n"
    tail: str = ""  # of each line


DIALECTS = (
    Dialect(),
    Dialect(separator=";", first_line="sep=;\r\n", slash="\\", newline="\r\n"),  # Windows, Excel
    Dialect(separator="\t", encoding="utf-8-sig"),
    Dialect(heads={"label": "Mask", "patient": "Patient ID", "subject": "Case"}, tail=",,"),
)


@dataclass(slots=True)
class Dataset:
    """The files of a generated dataset.

    Args:
        path: is given to the commands. recipe: whether a recipe is given as well.
        rows: of the table. description: content of dataset.json.
        words: which name the fault. scope, at: of the fault, `at` is the number of its case.
    """

    folder: Path
    path: Path
    layout: Layout
    name: str
    rng: Random
    fault: str = ""
    scope: Scope = Scope.NONE
    words: Sequence[str] = ()
    at: int | None = None
    channel: str = ""  # of the damaged scan
    has_recipe: bool = False
    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    dialect: Dialect = field(default_factory=Dialect)
    description: dict = field(default_factory=dict)

    @property
    def sound_folder(self) -> Path:
        """Copy of the dataset before its fault."""
        return self.folder.with_name(f"{self.folder.name} sound")

    @property
    def sound(self) -> Path:
        """What `path` was before the fault."""
        is_table = self.layout.kind == "table"
        return self.sound_folder / "cases.csv" if is_table else self.sound_folder

    @property
    def channels(self) -> list[str]:
        return list(self.layout.scans)

    def scan(self, n: int, channel: str | None = None) -> Path:
        return self.folder / self.layout.scans[channel or self.channels[0]].format(n=n)

    def mask(self, n: int) -> Path:
        return self.folder / self.layout.mask.format(n=n)

    def draw(self) -> int:
        """Draw the case of the fault."""
        self.at = self.rng.randrange(1, N_CASES + 1)
        return self.at

    def write_table(self, columns: Sequence[str] | None = None) -> None:
        dialect = self.dialect
        heads = [dialect.heads.get(name, name) for name in columns or self.columns]
        cells = [[row.get(name, "") for name in self.columns] for row in self.rows]
        lines = [dialect.separator.join(line) + dialect.tail for line in (heads, *cells)]
        text = dialect.first_line + dialect.newline.join([*lines, ""])
        self.path.write_bytes(text.encode(dialect.encoding))

    def write_description(self) -> None:
        (self.folder / "dataset.json").write_text(json.dumps(self.description))


# ---- datasets without a fault


def write_sound(folder: Path, name: str, rng: Random) -> Dataset:
    """Write a dataset without a fault in a layout."""
    layout = LAYOUTS[name]
    data = Dataset(folder, folder, layout, name, rng)
    numbers = np.random.default_rng(rng.randrange(2**32))
    geometry = Geometry(SHAPE, ras((1.0, 1.5, 2.0)))
    grid = np.indices(SHAPE).reshape(3, -1).T
    for n in range(1, N_CASES + 1):
        ball = (np.linalg.norm(grid - 6, axis=1) < 2 + n / 2).reshape(SHAPE)
        for channel in layout.scans:
            values = (100 * ball + numbers.normal(20, 5, SHAPE)).astype(np.float32)
            _write(values, geometry, data.scan(n, channel))
        _write(ball.astype(np.uint8), geometry, data.mask(n))
    if layout.kind == "table":
        _describe_in_table(data)
    elif layout.kind == "json":
        _describe_in_json(data)
    return data


def _write(values: np.ndarray, geometry: Geometry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(np.asfortranarray(values), geometry), path)


def _describe_in_table(data: Dataset) -> None:
    data.path = data.folder / "cases.csv"
    data.dialect = data.rng.choice(DIALECTS)
    images = {
        "image" if name == "image" else f"image_{name}": pattern
        for name, pattern in data.layout.scans.items()
    }
    data.columns = ["subject", "patient", *images, "label", "split", "grade"]
    for n in range(1, N_CASES + 1):
        files = {column: pattern.format(n=n) for column, pattern in images.items()}
        files |= {"label": data.layout.mask.format(n=n)}
        files = {key: path.replace("/", data.dialect.slash) for key, path in files.items()}
        facts = {"subject": f"case{n}", "patient": f"P{n}", "grade": str(n)}
        data.rows.append({**facts, **files, "split": "val" if n == 2 else "train"})
    data.write_table()


def _describe_in_json(data: Dataset) -> None:
    names = {str(i): name.upper() for i, name in enumerate(data.layout.scans)}
    data.description = {"labels": {"background": 0, **LABELS}, "numTraining": N_CASES}
    if data.name == "nnunet":
        data.description |= {"channel_names": names, "file_ending": ".nii.gz"}
    else:
        data.description |= {
            "modality": {"0": "MR"},
            "labels": {"0": "background", "1": "lesion"},
            "training": [
                {"image": f"./imagesTr/c{n}.nii.gz", "label": f"./{data.layout.mask.format(n=n)}"}
                for n in range(1, N_CASES + 1)
            ],
            "test": [],
        }
    data.write_description()


# ---- faults

Maker = Callable[[Dataset], Sequence[str]]  # makes the fault; returns the words that name it


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault: `needs` tells whether a dataset can have it."""

    name: str
    scope: Scope
    make: Maker
    needs: Callable[[str, Layout], bool]


FAULTS: dict[str, Fault] = {}


def kind(*kinds: str) -> Callable[[str, Layout], bool]:
    return lambda _, layout: layout.kind in kinds


def layouts(*names: str) -> Callable[[str, Layout], bool]:
    return lambda name, _: name in names


def anywhere(name: str, layout: Layout) -> bool:
    return True


def of_channels(name: str, layout: Layout) -> bool:
    return len(layout.scans) > 1


def fault(scope: Scope, needs: Callable[[str, Layout], bool] = anywhere):
    def add(make: Maker) -> Maker:
        name = make.__name__.replace("_", " ")
        FAULTS[name] = Fault(name, scope, make, needs)
        return make

    return add


@fault(Scope.NONE)
def no_fault(data: Dataset) -> Sequence[str]:
    return ()


@fault(Scope.WHOLE)
def the_path_is_misspelt(data: Dataset) -> Sequence[str]:
    data.path = data.path.with_name(data.path.name + "x")
    return (str(data.path), "does not exist")


# -- names of files


@fault(Scope.WHOLE, kind("names", "json"))
def a_mask_without_a_scan(data: Dataset) -> Sequence[str]:
    n = data.draw()
    for channel in data.channels:
        data.scan(n, channel).unlink()
    return (data.mask(n).name,) if data.name != "decathlon" else (data.scan(n).name,)


@fault(Scope.WHOLE, kind("names"))
def a_mask_of_another_name(data: Dataset) -> Sequence[str]:
    mask = data.mask(data.draw())
    other = mask.with_name(mask.name.replace(str(data.at), "77"))
    mask.rename(other)
    if data.name == "a folder per patient":
        (data.folder / "pat77").mkdir()
        other = other.rename(data.folder / "pat77" / mask.name)
    return (other.name,)


@fault(Scope.WHOLE, kind("names"))
def two_scans_of_one_stem(data: Dataset) -> Sequence[str]:
    scan = data.scan(data.draw())
    other = scan.with_name(scan.name.removesuffix(".gz"))
    other.write_bytes(gzip.decompress(scan.read_bytes()))
    return (other.name, scan.name)


@fault(Scope.WHOLE, kind("names"))
def two_masks_of_one_scan(data: Dataset) -> Sequence[str]:
    mask = data.mask(data.draw())
    if data.name == "bids":
        other = (
            data.folder / "derivatives" / "second" / Path(*mask.relative_to(data.folder).parts[2:])
        )
    else:
        other = mask.with_name(mask.name.removesuffix(".gz"))
    other.parent.mkdir(parents=True, exist_ok=True)
    content = mask.read_bytes()
    other.write_bytes(content if other.name == mask.name else gzip.decompress(content))
    return (str(mask), str(other))


@fault(Scope.WHOLE, layouts("images and labels", "suffixes", "decathlon"))
def names_that_differ_in_case_only(data: Dataset) -> Sequence[str]:
    n = data.draw()
    for path in (data.scan(n), data.mask(n)):
        shutil.copy(path, path.with_name(path.name[0].upper() + path.name[1:]))
    if data.layout.kind == "json":
        entry = {"image": f"./imagesTr/C{n}.nii.gz", "label": f"./labelsTr/C{n}.nii.gz"}
        data.description["training"].append(entry)
        data.write_description()
    name = data.scan(n).name
    return (name, name[0].upper() + name[1:])


@fault(Scope.WHOLE, kind("names", "json"))
def a_mask_is_a_broken_link(data: Dataset) -> Sequence[str]:
    mask = data.mask(data.draw())
    mask.unlink()
    mask.symlink_to(data.folder / "moved" / "elsewhere.nii.gz")
    return (mask.name, "does not exist")


@fault(Scope.WHOLE)
def a_folder_in_place_of_a_scan(data: Dataset) -> Sequence[str]:
    scan = data.scan(data.draw())
    scan.unlink()
    scan.mkdir()
    return (scan.name, "is a folder, not a file")


@fault(Scope.WHOLE)
def a_folder_in_place_of_a_mask(data: Dataset) -> Sequence[str]:
    mask = data.mask(data.draw())
    mask.unlink()
    mask.mkdir()
    return (mask.name, "is a folder, not a file")


@fault(Scope.CHANNEL, of_channels)
def a_case_lacks_a_channel(data: Dataset) -> Sequence[str]:
    n, data.channel = data.draw(), data.rng.choice(data.channels)
    scan = data.scan(n, data.channel)
    scan.unlink()
    if data.layout.kind == "table":
        data.rows[n - 1][f"image_{data.channel}"] = ""
        data.write_table()
        return (f"image_{data.channel}", "is empty")
    return (scan.name,) if data.layout.kind == "json" else (f"no channel {data.channel!r}",)


@fault(Scope.WHOLE, layouts("images and labels", "decathlon", "nnunet", "table"))
def no_scan_at_all(data: Dataset) -> Sequence[str]:
    for n, channel in itertools.product(range(1, N_CASES + 1), data.channels):
        data.scan(n, channel).unlink()
    if data.layout.kind == "table":
        return (data.scan(1).name, "does not exist")
    return ("no scans found",) if data.name == "nnunet" else (data.mask(1).name,)


# -- dataset.json


@fault(Scope.WHOLE, kind("json"))
def a_listed_mask_is_missing(data: Dataset) -> Sequence[str]:
    mask = data.mask(data.draw())
    mask.unlink()
    return (mask.name, "does not exist")


@fault(Scope.WHOLE, layouts("nnunet with a list", "decathlon"))
def the_list_names_a_file_that_is_not_there(data: Dataset) -> Sequence[str]:
    key = data.rng.choice(["image", "label"])
    path = "./imagesTr/lost.nii.gz" if key == "image" else "./labelsTr/lost.nii.gz"
    data.description["training"][data.draw() - 1][key] = path
    data.write_description()
    return ("lost",)


@fault(Scope.WHOLE, layouts("nnunet with a list", "decathlon"))
def an_entry_of_the_list_is_no_pair(data: Dataset) -> Sequence[str]:
    data.description["training"][data.draw() - 1] = data.rng.choice([7, {"label": "x"}, ["a", "b"]])
    data.write_description()
    return (f"training[{(data.at or 1) - 1}]",)


@fault(Scope.WHOLE, kind("json"))
def broken_json(data: Dataset) -> Sequence[str]:
    data.write_description()
    path = data.folder / "dataset.json"
    path.write_text(path.read_text()[: data.rng.randrange(1, 60)])
    return (str(path), "is not JSON")


@fault(Scope.WHOLE, kind("json"))
def json_of_another_kind(data: Dataset) -> Sequence[str]:
    (data.folder / "dataset.json").write_text(data.rng.choice(["[]", "3", '"nnunet"', "null"]))
    return ("dataset.json", "is not a JSON object")


@fault(Scope.WHOLE, kind("json"))
def a_label_that_is_no_number(data: Dataset) -> Sequence[str]:
    data.description["labels"] = {"background": 0, "lesion": data.rng.choice(["one", 1.5, None])}
    data.write_description()
    return ("labels", "lesion")


@fault(Scope.WHOLE, kind("json"))
def a_label_value_twice(data: Dataset) -> Sequence[str]:
    data.description["labels"] = {"background": 0, "lesion": 1, "cyst": 1}
    data.write_description()
    return ("labels has 1 twice",)


@fault(Scope.WHOLE, layouts("nnunet"))
def channels_of_the_same_name(data: Dataset) -> Sequence[str]:
    data.description["channel_names"] = {"0": "T1", "1": "T1"}
    data.write_description()
    return ("two channels the same name",)


@fault(Scope.WHOLE, layouts("nnunet"))
def another_file_ending(data: Dataset) -> Sequence[str]:
    data.description["file_ending"] = ".nrrd"
    data.write_description()
    return (".nrrd",)


@fault(Scope.WHOLE, layouts("nnunet"))
def no_dataset_json(data: Dataset) -> Sequence[str]:
    (data.folder / "dataset.json").unlink()
    return ("imagesTr but no dataset.json",)


# -- tables


def in_row(column: str, cell: str | Callable[[Dataset, int], str], *words: str) -> Maker:
    def make(data: Dataset) -> Sequence[str]:
        n = data.draw()
        name = data.columns[2] if column == "image" else column
        data.rows[n - 1][name] = cell if isinstance(cell, str) else cell(data, n)
        data.write_table()
        line = n + 1 + bool(data.dialect.first_line)
        return (f"line {line}", *words)

    return make


def _other(data: Dataset, n: int) -> int:
    """Return another case of the same split as case n, or of another if it has none."""
    return n % N_CASES + 1


for _name, _maker in {
    "a scan that is not there": in_row("image", "scans/lost.nii.gz", "lost.nii.gz", "not exist"),
    "a label that is not there": in_row("label", "masks/lost.nii.gz", "lost.nii.gz", "not exist"),
    "a label that is a folder": in_row("label", "masks", "masks", "is a folder"),
    "a subject that is no file name": in_row("subject", "a/b", "'a/b' is not a valid file name"),
}.items():
    FAULTS[_name] = Fault(_name, Scope.WHOLE, _maker, kind("table"))
for _name, _maker in {
    "an unknown split": in_row("split", "0", "split '0' is unknown"),
    "a word in another language for a split": in_row("split", "Übung", "'Übung' is unknown"),
}.items():
    FAULTS[_name] = Fault(_name, Scope.SPLIT, _maker, kind("table"))


@fault(Scope.WHOLE, kind("table"))
def a_subject_twice(data: Dataset) -> Sequence[str]:
    n = data.draw()
    name = data.rows[_other(data, n) - 1]["subject"]
    data.rows[n - 1]["subject"] = data.rng.choice([name, name.upper()])
    data.write_table()
    return ("used for both", data.rows[n - 1]["subject"] if n > _other(data, n) else name)


@fault(Scope.WHOLE, layouts("table"))
def an_empty_cell_of_a_scan(data: Dataset) -> Sequence[str]:
    return in_row("image", "", "'image' is empty")(data)


@fault(Scope.SPLIT, kind("table"))
def a_patient_in_two_splits(data: Dataset) -> Sequence[str]:
    data.rows[1]["patient"] = data.rows[0]["patient"]
    data.write_table()
    return ("patient 'P1' is in split",)


@fault(Scope.WHOLE, kind("table"))
def a_line_with_too_few_cells(data: Dataset) -> Sequence[str]:
    text = data.path.read_bytes().decode(data.dialect.encoding).rstrip()
    text = text.removesuffix(data.dialect.tail).rpartition(data.dialect.separator)[0]
    data.path.write_bytes((text + data.dialect.newline).encode(data.dialect.encoding))
    return (f"line {N_CASES + 1 + bool(data.dialect.first_line)}", "cells under")


@fault(Scope.WHOLE, kind("table"))
def two_heads_for_one_column(data: Dataset) -> Sequence[str]:
    data.dialect = replace(data.dialect, heads={})
    data.write_table([{"label": "mask", "grade": "seg"}.get(name, name) for name in data.columns])
    return ("'mask' and 'seg' may both be the label",)


@fault(Scope.WHOLE, kind("table"))
def the_same_head_twice(data: Dataset) -> Sequence[str]:
    data.write_table([{"grade": data.columns[2]}.get(name, name) for name in data.columns])
    return (data.columns[2], "twice")


@fault(Scope.WHOLE, kind("table"))
def cells_without_a_head(data: Dataset) -> Sequence[str]:
    data.write_table([{"grade": ""}.get(name, name) for name in data.columns])
    return ("has cells but no name",)


@fault(Scope.WHOLE, kind("table"))
def no_column_of_scans(data: Dataset) -> Sequence[str]:
    data.write_table([name.replace("image", "picture") for name in data.columns])
    return ("has no column 'image'",)


@fault(Scope.WHOLE, kind("table"))
def an_open_quote(data: Dataset) -> Sequence[str]:
    content = data.path.read_bytes().decode(data.dialect.encoding).rstrip()
    data.path.write_bytes((content + '"').encode(data.dialect.encoding))
    data.rows[-1]["grade"] = '"4'
    data.write_table()
    return ("is not valid CSV",)


@fault(Scope.WHOLE, kind("table"))
def an_empty_table(data: Dataset) -> Sequence[str]:
    data.path.write_bytes(b"")
    return (str(data.path), "is empty")


@fault(Scope.WHOLE, kind("table"))
def a_table_without_rows(data: Dataset) -> Sequence[str]:
    data.rows = []
    data.write_table()
    return ("no scans found",)


@fault(Scope.WHOLE, kind("table"))
def a_table_in_utf_16(data: Dataset) -> Sequence[str]:
    data.dialect = replace(data.dialect, encoding="utf-16")
    data.write_table()
    return ("is not UTF-8",)


@fault(Scope.WHOLE, layouts("table"))
def two_columns_of_one_channel(data: Dataset) -> Sequence[str]:
    data.write_table([{"grade": "image_image"}.get(name, name) for name in data.columns])
    return ("'image' and 'image_image' for the same channel",)


# -- the content of a file


def _header_value(path: Path, offset: int, dtype: str, *values: float) -> None:
    """Overwrite values of a NIfTI header in place."""
    content = path.read_bytes()
    is_packed = content[:2] == b"\x1f\x8b"
    raw = bytearray(gzip.decompress(content) if is_packed else content)
    data = np.array(values, dtype).tobytes()
    raw[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)) if is_packed else bytes(raw))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _two_volumes(path: Path) -> None:
    content = path.read_bytes()
    is_packed = content[:2] == b"\x1f\x8b"
    raw = bytearray(gzip.decompress(content) if is_packed else content)
    dim = np.frombuffer(bytes(raw[40:56]), "<i2").copy()
    dim[0], dim[4] = 4, 2
    raw[40:56] = dim.tobytes()
    raw += raw[352:]
    path.write_bytes(gzip.compress(bytes(raw)) if is_packed else bytes(raw))


def _fill(path: Path, value: float) -> None:
    volume = read_volume(path)
    array = np.full(volume.array.shape, value, np.float32, order="F")
    write_volume(volume.with_array(array), path)


def _flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) * 2 // 3):
        content[place] ^= 0x5A
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
    "zeros": lambda path: path.write_bytes(bytes(4000)),
    "a web page": lambda path: path.write_text("<html><body>404</body></html>"),
    "with a NaN affine": lambda path: _header_value(path, 280, "<f4", np.nan),
    "with a singular affine": lambda path: _header_value(path, 280, "<f4", *[0.0] * 8),
    "of two volumes": _two_volumes,
    "longer than its file": lambda path: _header_value(path, 42, "<i2", 12, 12, 200),
    "with a negative size": lambda path: _header_value(path, 42, "<i2", -12),
    "of an unknown type": lambda path: _header_value(path, 70, "<i2", 999),
    "without finite voxels": lambda path: _fill(path, np.nan),
}
PACKED_DAMAGE = {"with flipped bits": _flip_bits}


def _damage(name: str, spoil: Callable[[Path], object]) -> Iterator[Fault]:
    def of_scan(data: Dataset) -> Sequence[str]:
        n, data.channel = data.draw(), data.rng.choice(data.channels)
        spoil(data.scan(n, data.channel))
        return (str(data.scan(n, data.channel)),)

    def of_mask(data: Dataset) -> Sequence[str]:
        spoil(data.mask(data.draw()))
        return (str(data.mask(data.at or 1)),)

    yield Fault(f"a scan {name}", Scope.SCAN, of_scan, anywhere)
    yield Fault(f"a mask {name}", Scope.MASK, of_mask, anywhere)


for _name, _spoil in DAMAGE.items():
    FAULTS |= {damage.name: damage for damage in _damage(_name, _spoil)}
_, _packed = _damage("with flipped bits", _flip_bits)
FAULTS[_packed.name] = _packed


def _rewritten(data: Dataset, change: Callable[[Volume], Volume]) -> Sequence[str]:
    path = data.mask(data.draw())
    write_volume(change(read_volume(path)), path)
    return (str(path),)


@fault(Scope.MASK)
def a_mask_of_fractions(data: Dataset) -> Sequence[str]:
    return _rewritten(data, lambda mask: mask.with_array(mask.array.astype(np.float32) * 0.7))


@fault(Scope.MASK)
def a_mask_with_negative_values(data: Dataset) -> Sequence[str]:
    return _rewritten(data, lambda mask: mask.with_array(-mask.array.astype(np.int16)))


@fault(Scope.MASK)
def a_scan_in_place_of_its_mask(data: Dataset) -> Sequence[str]:
    n = data.draw()
    scan = read_volume(data.scan(n))
    write_volume(scan, data.mask(n))
    return (str(data.mask(n)),)


@fault(Scope.MASK)
def a_mask_on_a_grid_of_another_spacing(data: Dataset) -> Sequence[str]:
    def change(mask: Volume) -> Volume:
        return Volume(mask.array, Geometry(SHAPE, ras((1.3, 1.5, 2.0))))

    return _rewritten(data, change)


@fault(Scope.MASK)
def a_mask_moved_by_half_a_voxel(data: Dataset) -> Sequence[str]:
    def change(mask: Volume) -> Volume:
        affine = mask.geometry.affine.copy()
        affine[:3, 3] += 0.75
        return Volume(mask.array, Geometry(SHAPE, affine))

    return _rewritten(data, change)


@fault(Scope.MASK)
def a_mask_of_fewer_slices_without_an_origin(data: Dataset) -> Sequence[str]:
    def change(mask: Volume) -> Volume:
        array = np.asfortranarray(mask.array[:, :, :9])
        return Volume(array, Geometry(array.shape, np.diag([1.0, 1.5, 2.0, 1.0])))

    return _rewritten(data, change)


# -- what training asks for


@fault(Scope.TRAINING)
def a_label_that_is_not_named(data: Dataset) -> Sequence[str]:
    data.has_recipe = data.layout.kind != "json" or data.has_recipe
    _rewritten(data, lambda mask: mask.with_array(mask.array * np.uint8(5)))
    return ("[5]",)


@fault(Scope.TRAINING, kind("table"))
def a_class_that_is_no_number(data: Dataset) -> Sequence[str]:
    data.has_recipe = True
    data.rows[data.draw() - 1]["grade"] = "IV"
    data.write_table()
    return ("grade", "'IV'", "no number")


@fault(Scope.REQUIREMENT, kind("table"))
def no_column_of_classes(data: Dataset) -> Sequence[str]:
    data.has_recipe = True
    data.write_table([{"grade": "size"}.get(name, name) for name in data.columns])
    return ("no column 'grade'",)


# -- remarks


@fault(Scope.REMARK, kind("table"))
def a_misspelt_head(data: Dataset) -> Sequence[str]:
    column, head = data.rng.choice([("patient", "pateint"), ("split", "splits")])
    data.dialect = replace(data.dialect, heads={column: head})
    data.write_table()
    return ("W_COLUMN", repr(head))


@fault(Scope.REMARK, kind("table"))
def a_training_row_without_a_label(data: Dataset) -> Sequence[str]:
    row = data.rows[data.rng.choice([0, 2, 3])]
    row["label"] = ""
    data.write_table()
    return ("W_NO_LABEL", f"line {data.rows.index(row) + 2 + bool(data.dialect.first_line)}")


@fault(Scope.MASK_REMARK, kind("names"))
def a_scan_without_a_mask(data: Dataset) -> Sequence[str]:
    data.mask(data.draw()).unlink()
    return ("W_NO_LABEL", "1 of 4")


@fault(Scope.MASK_REMARK)
def a_mask_with_reversed_axes(data: Dataset) -> Sequence[str]:
    def change(mask: Volume) -> Volume:
        affine = mask.geometry.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [11, 0, 0]
        affine[:3, 0] *= -1
        return Volume(np.asfortranarray(mask.array[::-1]), Geometry(SHAPE, affine))

    _rewritten(data, change)
    return ("W_AXES",)


@fault(Scope.TRAINING_REMARK)
def an_empty_mask(data: Dataset) -> Sequence[str]:
    _rewritten(data, lambda mask: mask.with_array(np.zeros_like(mask.array)))
    return ("W_EMPTY",)


# ---- the draw


def possible() -> list[tuple[str, str]]:
    """Return every fault with every layout that can have it."""
    return [
        (name, layout)
        for name, row in FAULTS.items()
        for layout in LAYOUTS
        if row.needs(layout, LAYOUTS[layout])
    ]


def drawn(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Draw `number` of the possible pairs; each fault comes once before any comes twice."""
    rng = Random(seed)
    layouts_of: dict[str, list[str]] = {}
    for name, layout in possible():
        layouts_of.setdefault(name, []).append(layout)
    for names in layouts_of.values():
        rng.shuffle(names)
    rounds = itertools.zip_longest(
        *([(name, layout) for layout in names] for name, names in layouts_of.items())
    )
    return [pair for pairs in rounds for pair in pairs if pair is not None][:number]


def generate(folder: Path, name: str, layout: str, seed: int = 0) -> Dataset:
    """Write a dataset with a fault in a layout."""
    data = write_sound(folder, layout, Random(f"{name}, {layout}, {seed}"))
    row = FAULTS[name]
    data.fault, data.scope = name, row.scope
    data.has_recipe = data.rng.random() < 0.5
    shutil.copytree(folder, data.sound_folder)
    data.words = row.make(data)
    return data
