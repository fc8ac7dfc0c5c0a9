from __future__ import annotations

import tracemalloc

import numpy as np

from volseg.measurement.saturation import intensity_warnings
from volseg.volume import Geometry, Volume


def test_intensity_warnings():
    geometry = Geometry((16, 17, 12), np.diag([0.75, 0.75, 2.5, 1]))
    noise = np.random.default_rng(0).integers(-1000, 1500, geometry.shape).astype(np.int16)
    ramp = np.arange(noise.size, dtype=np.uint16).reshape(geometry.shape)
    assert intensity_warnings(Volume(noise, geometry)) == ()
    assert intensity_warnings(Volume(ramp, geometry)) == ()
    assert [w.code for w in intensity_warnings(Volume(ramp.clip(0, 3000), geometry))] == ["W_CLIP"]


def test_intensity_warnings_take_less_memory_than_the_scan():
    shape = (256, 256, 300)
    scan = Volume(np.zeros(shape, np.int16, order="F"), Geometry(shape, np.eye(4)))
    tracemalloc.start()
    assert [warning.code for warning in intensity_warnings(scan)] == ["W_CLIP"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < scan.array.size / 3
