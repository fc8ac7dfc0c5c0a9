"""Training batches: cut in a thread while the previous step runs, augmented on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from volseg.io.prepared import PreparedCase
from volseg.preprocessing.resample import send
from volseg.recipe import Recipe
from volseg.recipe.section import closed
from volseg.training.augment import augment, enlarged_shape
from volseg.training.samples import Sampling, sample_batch

Cut = list[tuple[np.ndarray, np.ndarray]]


class Batches:
    """The batches of a run; each depends only on the seed, the step and the total batch size.

    A step has `batch_size` × ranks × accumulated patches, of which each rank makes its own part.
    `waited` counts the seconds that steps waited for their patches. As a context manager, it ends
    its thread on exit.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._cases, self._recipe = cases, recipe
        self._seed, self._device = seed, device
        parts = recipe.train.accumulate
        n = recipe.batch_size * ranks * parts
        self._sampling = Sampling(
            patch_shape=recipe.patch_shape,
            n=n,
            foreground_fraction=closed(recipe.train.foreground_fraction),
            seed=seed,
            cut_shape=enlarged_shape(recipe.patch_shape, recipe.train.augment),
        )
        # Dealt like cards: patches centred on labels come first, and every part needs some of them.
        self._parts = [list(range(part * ranks + rank, n, parts * ranks)) for part in range(parts)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Cut]] = {}
        self.waited = 0.0

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def at(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return one pair per accumulated part, on the device.

        A pair is images (N, C, *patch) float32 and masks (N, *patch) uint8.
        """
        started = time.monotonic()
        cut = self._ahead.pop(step, None) or self._thread.submit(self._cut, step)
        patches = cut.result()
        self.waited += time.monotonic() - started
        self._ahead = {step + 1: self._thread.submit(self._cut, step + 1)}
        return [
            augment(
                send(torch.from_numpy(images), self._device),
                send(torch.from_numpy(masks), self._device),
                self._recipe.train.augment,
                patch_shape=self._recipe.patch_shape,
                spacing_mm=self._recipe.spacing_mm,
                seeds=[(self._seed, step, index) for index in part],
            )
            for part, (images, masks) in zip(self._parts, patches, strict=True)
        ]

    def _cut(self, step: int) -> Cut:
        return [
            sample_batch(self._cases, self._sampling, step=step, only=part) for part in self._parts
        ]
