"""A prepared case round-trips; damaged or untrusted files raise a one-line error."""

import json
import os

import numpy as np
import pytest

from volseg.errors import VolsegError
from volseg.io.prepared import (
    CASE_FILE,
    IGNORED,
    PreparedCase,
    is_prepared,
    read_prepared_case,
    write_prepared_case,
)
from volseg.training.samples import Sampling, sample_batch

RECORD = {"key": "k", "split": "train", "patient": "p", "class": None, "shape": [4, 3, 2]}


@pytest.fixture
def folder(tmp_path):
    mask = np.zeros((4, 3, 2), np.uint8)
    mask[1, 1, 1] = 1
    image = mask[None].astype(np.float32)
    case = PreparedCase("a", image, mask, {1: np.argwhere(mask)}, image, RECORD)
    (tmp_path / "a").mkdir()
    write_prepared_case(tmp_path / "a", case)
    return tmp_path


def change(folder, **values):
    content = json.loads((folder / "a" / CASE_FILE).read_text()) | values
    content = {key: value for key, value in content.items() if value != "removed"}
    (folder / "a" / CASE_FILE).write_text(json.dumps(content))


def test_a_case_round_trips(folder):
    case = read_prepared_case(folder, "a")
    assert isinstance(case.image, np.memmap) and isinstance(case.mask, np.memmap)
    assert (case.image[0] == case.mask).all() and (case.slices[0] == case.mask).all()
    assert case.foreground[1].tolist() == [[1, 1, 1]]
    assert {key: case.record[key] for key in RECORD} == RECORD
    assert is_prepared(folder, "a", "k") and not is_prepared(folder, "a", "another")


@pytest.mark.parametrize("key", ["key", "split", "patient", "class"])
@pytest.mark.parametrize("value", ["removed", 3, ["a"]])
def test_a_record_without_the_fields_for_training_is_refused(key, value, folder):
    change(folder, **{key: value})
    with pytest.raises(VolsegError, match="lacks a valid key, split, patient or class") as refusal:
        read_prepared_case(folder, "a")
    assert refusal.value.code == "E_PREPARED"


@pytest.mark.parametrize(
    "name", ["image.npy", "mask.npy", "slices.npy", "foreground_1.npy", CASE_FILE]
)
@pytest.mark.parametrize("kind", ["pipe", "archive"])
def test_pipes_and_archives_are_refused(name, kind, folder):
    path = folder / "a" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    with pytest.raises(VolsegError) as refusal:
        read_prepared_case(folder, "a")
    assert refusal.value.code == "E_PREPARED"


def test_the_record_is_synced_after_the_arrays(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    mask = np.zeros((4, 3, 2), np.uint8)
    case = PreparedCase("a", mask[None], mask, {1: np.argwhere(mask)}, None, RECORD)
    write_prepared_case(tmp_path, case)
    assert synced == ["image.npy", "mask.npy", "foreground_1.npy", CASE_FILE]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mask", np.zeros((3, 3), np.uint8)),
        ("mask", np.zeros((4, 3, 3), np.uint8)),
        ("mask", np.zeros((4, 3, 2), np.float32)),
        ("mask", np.zeros((4, 3, 2), np.int64)),
        ("image", np.zeros((4, 3, 2), np.float32)),
        ("image", np.zeros((1, 4, 3, 2), np.float64)),
        ("image", np.zeros((1, 4, 3, 2), np.complex64)),
        ("image", np.zeros((0, 4, 3, 2), np.float32)),
        ("image", np.full((1, 4, 3, 2), None)),
        ("foreground_1", np.zeros((5, 2), np.int16)),
        ("foreground_1", np.zeros((5, 3))),
        ("foreground_1", np.full((5, 3), 4, np.int16)),
        ("foreground_1", np.array(0)),
        ("foreground_3", np.zeros((5, 3), np.int16)),
        ("foreground_one", np.zeros((5, 3), np.int16)),
        ("slices", np.zeros((3, 2, 8), np.float32)),
        ("slices", np.full((3, 2, 8, 8), np.nan, np.float32)),
        ("slices", np.full((3, 2, 8, 8), None)),
    ],
)
def test_an_array_of_a_wrong_shape_or_type_is_refused(name, array, folder):
    np.save(folder / "a" / f"{name}.npy", array)
    with pytest.raises(VolsegError, match="not a prepared case") as refusal:
        read_prepared_case(folder, "a")
    assert refusal.value.code == "E_PREPARED" and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mask", 9, "holds class 9 of 1"),
        ("mask", 2, "holds class 2 of 1"),
        ("image", np.nan, "not finite"),
    ],
)
def test_an_invalid_voxel_is_refused_when_it_is_read(name, value, words, folder):
    case = read_prepared_case(folder, "a")
    case.check()
    array = np.load(folder / "a" / f"{name}.npy")
    array[..., 3, 2, 1] = value
    if name == "mask":
        array[0, 0, 0] = IGNORED  # valid in any mask
    np.save(folder / "a" / f"{name}.npy", array)
    case = read_prepared_case(folder, "a")
    case.check_classes(case.mask[:3])
    with pytest.raises(VolsegError, match=words) as refusal:
        case.check()
    assert refusal.value.code == "E_PREPARED" and str(folder / "a") in str(refusal.value)
    if name == "image":
        return  # sampling does not check intensities; the loss does
    with pytest.raises(VolsegError, match=words):
        sampling = Sampling(patch_shape=(4, 3, 2), n=1, foreground_fraction=0.0, seed=0)
        sample_batch([case], sampling)
