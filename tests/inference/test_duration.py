import time

import pytest

from volseg.inference.duration import Work, seconds_per_tile
from volseg.inference.stream import Tiling

SHAPES = [(100, 100, 60), (64, 64, 32)]


def work(seconds_per_tile=0.1, on_gpu=False, **settings):
    defaults = {"patch_shape": (32, 32, 16), "overlap": 0.5, "tta_axes": (0, 1, 2)}
    tiling = Tiling(**(defaults | settings))
    return Work(tiling=tiling, shapes=SHAPES, seconds_per_tile=seconds_per_tile, on_gpu=on_gpu)


def test_time_counts_all_tiles_and_copies_and_an_option_takes_the_time_of_a_run_with_it():
    full = work()
    n_tiles = sum(full.tiling.count(shape) for shape in SHAPES)
    assert full.seconds == pytest.approx(0.1 * 8 * n_tiles)
    assert dict(full.options()) == pytest.approx(
        {
            "--no-tta": work(tta_axes=()).seconds,
            "--overlap 0": work(overlap=0.0).seconds,
            "--no-tta --overlap 0": work(tta_axes=(), overlap=0.0).seconds,
        }
    )
    assert list(work(tta_axes=(), overlap=0.0).options()) == []
    assert [name for name, _ in work(overlap=0.0).options()] == ["--no-tta"]


def test_without_a_gpu_and_over_ten_minutes_the_cheapest_option_comes_first():
    n = work().n_tiles
    tiles = f"at most {n} tiles × 8 mirrored copies in 2 scans, about "
    assert work(600 / n / 8).announcement().startswith(f"time: {tiles}10 min; --no-tta about ")
    long = work(601 / n / 8).announcement()
    assert long.startswith("time: --no-tta --overlap 0 takes about ")
    assert long.endswith(f"as requested: {tiles}10 min")
    assert work(601 / n / 8, on_gpu=True).announcement().startswith(f"time: {tiles}")
    # no option is cheaper
    assert work(100.0, tta_axes=(), overlap=0.0).announcement().startswith("time: at most ")


class Slow:
    """A backend whose first batch takes longer, because it compiles."""

    def __init__(self, first, others):
        self.waits, self.batches = [first, others, others], []

    def logits(self, batch):
        self.batches.append(batch.shape)
        time.sleep(self.waits.pop(0))
        return batch


def test_the_time_per_tile_excludes_the_set_up_of_the_first_batch():
    backend = Slow(0.3, 0.04)
    assert seconds_per_tile(backend, (2, 1, 8, 8, 4)) == pytest.approx(0.02, abs=0.01)
    assert backend.batches == [(2, 1, 8, 8, 4)] * 2
