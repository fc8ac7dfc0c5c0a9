"""A classifier made by hand whose evidence is known: bright squares, and scans that hold them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from volseg.image_bundle import ImageBundle, save_image_bundle
from volseg.networks import build_images
from volseg.planning.images import ImageFingerprint
from volseg.recipe import ClassifyRecipe

DIM, BRIGHT = 90, 220  # grey values of a square that is no evidence, and of one that is
NOISE = 40  # highest grey value of the background
GAIN = 400.0  # of the network's output per mean brightness above the threshold
NAMES = ("plain", "bright")


def recipe(*, pixels=32, fit="pad", source="image", names=NAMES, kind="classes"):
    """Return a closed recipe: one block, one convolution."""
    return ClassifyRecipe.model_validate(
        {
            "task": "classify",
            "name": "squares",
            "description": "Bright squares.",
            "data": {
                "input": source,
                "target": "square",
                "kind": kind,
                "classes": names,
                "mean": 0,
                "sd": 1,
            },
            "images": {
                "pixels": pixels,
                "channels": 1,
                "fit": fit,
                "normalise": {"method": "scale", "divide_by": 255},
            },
            "network": {"name": "cnn_small", "features": (4,), "convolutions": 1},
            "train": {
                "batch_size": 8,
                "steps_per_epoch": 1,
                "epochs": 1,
                "monitor": "auc",
                "learning_rate": 1e-3,
                "balance": "none",
                "loss": {"name": "cross_entropy"},
            },
        }
    )


def network(settings=None, gain=GAIN):
    """Return a network whose class `bright` gains with each pixel brighter than a dim square."""
    made = build_images(recipe() if settings is None else settings)
    state = {name: torch.zeros_like(tensor) for name, tensor in made.state_dict().items()}
    state["blocks.0.0.weight"][0, 0, 1, 1] = 1.0
    state["blocks.0.1.weight"][:] = 1.0
    state["blocks.0.1.running_var"][:] = 1.0 - 1e-5
    state["blocks.0.1.bias"][0] = -(DIM + 30) / 255
    state["head.weight"][-1, 0] = gain
    made.load_state_dict(state)
    return made.eval()


def save_model(folder, *networks, **settings):
    """Save hand-made networks, one or an ensemble, as a model."""
    stated = recipe(**settings)
    made = networks or (network(stated),)
    fingerprint = ImageFingerprint(
        n_images=2, n_patients=2, n_validation=1, sizes=((32, 32),), channels=1, kind="classes",
        counts=dict.fromkeys(NAMES, 1), mean=0, sd=1, low=0, high=255, white=255,
    )  # fmt: skip
    names = ["classifier", *(f"classifier_{n}" for n in range(1, len(made)))]
    weights = {name: net.state_dict() for name, net in zip(names, made, strict=True)}
    return save_image_bundle(ImageBundle(stated, fingerprint, weights), folder)


def picture(shape=(32, 32), *, corner=(4, 20), edge=8, dim_corner=(20, 4), seed=0):
    """Return (H, W) uint8 with a bright and a dim square on noise, and where the bright one is."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, NOISE, shape).astype(np.uint8)
    inside = np.zeros(shape, bool)
    if dim_corner is not None:
        row, column = dim_corner
        pixels[row : row + edge, column : column + edge] = DIM
    if corner is not None:
        row, column = corner
        inside[row : row + edge, column : column + edge] = True
        pixels[inside] = BRIGHT
    return pixels, inside


def write_pictures(folder, n=3, **where):
    """Write `n` pictures that differ in their noise."""
    folder.mkdir(parents=True)
    for number in range(n):
        Image.fromarray(picture(seed=number, **where)[0]).save(folder / f"p{number}.png")
    return folder


def scan(affine, shape=(30, 34, 5), seed=0):
    """Return a volume (R, A, S of these voxels) with a bright box, and its mask."""
    from volseg.volume import Geometry, Volume

    rng = np.random.default_rng(seed)
    array = rng.integers(0, NOISE, shape).astype(np.uint8)
    inside = np.zeros(shape, np.uint8)
    inside[4:11, 20:28, 1:4] = 1
    array[inside > 0] = BRIGHT
    geometry = Geometry(shape, affine)
    return Volume(array, geometry), Volume(inside, geometry)
