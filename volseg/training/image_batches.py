"""Training batches of images: drawn, augmented and mixed, each from its seed and step alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from volseg.io.prepared_images import ImageSet
from volseg.networks.image_network import PLANES_NDIM, SCANS_NDIM
from volseg.preprocessing.resample import send
from volseg.recipe.classification import ClassifyRecipe
from volseg.recipe.section import closed
from volseg.training.image_augment import augment_images, mix_up
from volseg.training.objective import ReadyBatches


class ImageBatches(ReadyBatches):
    """The batches of a run, by step.

    Every image is drawn once per pass over the data; with `balance = "sampling"` each class is
    drawn equally often instead. `waited` counts the seconds that steps waited for their images.

    Args:
        targets: (N, outputs) float32.
        taught: (N, outputs) float32 of a teacher, which follow the targets of each image.
    """

    def __init__(
        self,
        images: ImageSet,
        targets: np.ndarray,
        recipe: ClassifyRecipe,
        *,
        seed: int,
        device: torch.device,
        taught: np.ndarray | None = None,
    ) -> None:
        self._images, self._targets, self._train = images, targets, recipe.train
        self._rows = targets if taught is None else np.concatenate([targets, taught], axis=1)
        self._seed, self._device = seed, device
        self._mask_pixel_mm = recipe.mask_pixel_mm
        self._is_balanced = recipe.train.balance == "sampling"
        self._size = min(closed(recipe.train.batch_size), len(images))

    def at(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return one pair per accumulated part, on the device.

        A pair is images (n, C, H, W) or scans (n, S, features + 1), float32, and targets
        (n, outputs) float32, or (n, 2 × outputs) with those of a teacher.
        """
        started = time.monotonic()
        parts = self._train.accumulate
        pairs = [self._pair(step * parts + part) for part in range(parts)]
        self.waited += time.monotonic() - started
        return pairs

    def _pair(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self.indices(number)
        images = send(
            torch.from_numpy(np.stack([self._images.pixels[n] for n in indices])), self._device
        )
        targets = send(torch.from_numpy(self._rows[indices]), self._device)
        seeds = [(self._seed, number, index) for index in range(len(indices))]
        if images.ndim == SCANS_NDIM:
            return images, targets
        images = self._augmented(images, seeds)
        images, targets = mix_up(images, targets, self._train.augment.mixup, (self._seed, number))
        if images.ndim == PLANES_NDIM:
            return images, targets
        return images.contiguous(memory_format=torch.channels_last), targets

    def _augmented(self, images: torch.Tensor, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Augment each image, or each plane of each lesion, on its own."""
        if images.ndim < PLANES_NDIM:
            return augment_images(images, self._train.augment, seeds)
        planes = images.shape[1]
        of_planes = [(*seed, plane) for seed in seeds for plane in range(planes)]
        augmented = augment_images(
            images.flatten(0, 1), self._train.augment, of_planes, mask_pixel_mm=self._mask_pixel_mm
        )
        return augmented.unflatten(0, images.shape[:2])

    def indices(self, number: int) -> np.ndarray:
        """Return which images are in a batch."""
        if self._is_balanced:
            rng = np.random.default_rng([self._seed, number, 3])
            return rng.choice(len(self._images), self._size, p=self._chances())
        return drawn_indices(len(self._images), self._size, number, self._seed)

    def _chances(self) -> np.ndarray:
        """Return the probability of each image, so that all classes are equally likely."""
        counts = self._targets.sum(axis=0)
        chances = self._targets @ (1 / np.maximum(counts, 1))
        return chances / chances.sum()


def drawn_indices(n: int, size: int, number: int, seed: int) -> np.ndarray:
    """Return which of n images are in a batch: each is drawn once per pass, in a new order."""
    places = range(number * size, (number + 1) * size)
    passes = {place // n for place in places}
    orders = {k: np.random.default_rng([seed, k, 4]).permutation(n) for k in passes}
    return np.array([orders[place // n][place % n] for place in places])


def class_weights(targets: np.ndarray) -> list[float]:
    """Return a weight per class, inverse to its frequency, of mean 1 over the images."""
    counts: Sequence[float] = np.maximum(targets.sum(axis=0), 1)
    return [float(len(targets) / len(counts) / count) for count in counts]
