"""Two balls as lesions in a noisy scan, for the pictures of the pages."""

import numpy as np
from laws import ball, centre_mm, grid_around


def noisy(shape, seed=0, low=-100, high=100):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def two_balls(affine, margin=6):
    geometry = grid_around(24, affine, margin)
    centre = centre_mm(geometry)
    ids = ball(8, geometry, centre - [10, 3, 0]) * 1 + ball(4, geometry, centre + [12, 4, 5]) * 2
    return geometry, ids.astype(np.uint16), (centre - [10, 3, 0], centre + [12, 4, 5])


def centroid_mm(preview, number):
    return preview.ids.geometry.to_world_mm(np.argwhere(preview.ids.array == number)).mean(axis=0)
