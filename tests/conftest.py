"""Expensive fixtures, made once: a small dataset and a model trained on it for a few steps."""

import csv
import signal
import tomllib
from pathlib import Path

import numpy as np
import pytest
from laws import ball, lps, oblique, ras

from volseg.io.volumes import write_volume
from volseg.recipe import parse_recipe
from volseg.volume import Geometry, Volume

TINY = """
name = "tiny"
description = "Bright balls in noise."
intended_use = "Tests."
limits = "Tests only."
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = { lesion = 3 }
[preprocess]
spacing_mm = [2.0, 2.0, 2.0]
body_above = -500.0
[preprocess.normalise]
method = "window"
low = -200
high = 300
[network]
name = "unet3d"
features = [6, 12, 12]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[train]
patch_shape = [16, 16, 16]
batch_size = 2
steps_per_epoch = 15
epochs = 5
learning_rate = 1e-2
ema_decay = 0.8
[train.augment]
spatial_probability = 0.2
[[postprocess]]
step = "remove_small"
min_volume_mm3 = 60
[classify]
column = "grade"
classes = { low = [1, 2], high = [4, 5] }
field_of_view_mm = 32
pixels = 16
low = -200
high = 300
batch_size = 4
epochs = 2
[classify.network]
name = "cnn2d"
features = [4, 8]
"""


def pytest_configure() -> None:
    # A shell that runs the tests in the background ignores SIGINT, which child processes inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_recipe():
    return parse_recipe(tomllib.loads(TINY), where="tiny")


def write_dataset(folder: Path, *, n: int = 8) -> Path:
    """Write `n` noisy boxes of tissue in air, each with a bright ball (mask value 3).

    The grids differ. Returns the path of cases.csv.
    """
    rows = []
    for number in range(n):
        rng = np.random.default_rng(number)
        affine = (ras, lps, oblique)[number % 3]((1.6, 2.0, 2.4))
        geometry = Geometry((30, 26, 22), affine)
        inside = ball(7 + number % 3, geometry)
        array = np.full(geometry.shape, -1000.0)
        array[2:-2, 2:-2, 2:-2] = 20
        array = np.where(inside, 150, array) + rng.normal(0, 10, geometry.shape)
        name, mask = f"scan_{number}.nii.gz", inside.astype(np.uint8) * 3
        for sub, values in (("images", array.astype(np.int16)), ("labels", mask)):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            write_volume(Volume(np.asfortranarray(values), geometry), folder / sub / name)
        split = "val" if number in (n - 3, n - 4) else "test" if number >= n - 2 else "train"
        grade = (1, 5, 3)[number % 3]
        rows.append([f"scan_{number}", f"images/{name}", f"labels/{name}", split, grade])
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["subject", "image", "label", "split", "grade"], *rows])
    return folder / "cases.csv"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Return the folder of a small dataset. Read-only: copy what a test changes."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def model(dataset, tiny_recipe, tmp_path_factory) -> Path:
    """Return the folder of a model that finds the balls, trained by `volseg.train`."""
    import volseg

    out = tmp_path_factory.mktemp("trained") / "model"
    volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu")
    return out
