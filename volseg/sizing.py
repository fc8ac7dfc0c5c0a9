"""Size of a network and its patches: depth, strides, kernels, features, patch and batch.

They follow from the size of the scans and a budget, with rules similar to nnU-Net's planner
(Isensee et al., Nature Methods 18:203, 2021): patches have the proportions of the scans in mm, axes
are halved until they are 4 voxels long, coarse axes later and with flat kernels until then. Besides
memory, a time budget limits the number of operations, which is what matters on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from volseg.errors import VolsegError
from volseg.words import format_sizes

Triple = tuple[int, int, int]

SMALLEST_EDGE = 4  # voxels along an axis at the coarsest level
LEAST_LEVELS, MOST_LEVELS = 3, 6
MOST_FEATURES = 320
ANISOTROPIC = 2.0  # axes this many times coarser than the finest are not halved or convolved
LARGEST_PATCH = 256**3  # voxels, before scan size and budget limit it
WIDTHS = (32, 24, 16, 12, 8)  # features of the finest level to try, best first
# Voxels. The patch shrinks to the first size, then the network gets narrower; if even the narrowest
# does not fit, the patch shrinks to the next size.
PATCHES = (64**3, 48**3, 32**3, 24**3, 16**3, 8**3)
BATCHES = (2, 24)  # minimum and maximum number of patches per step
BATCH_FRACTION = 0.05  # of all training voxels: larger batches would repeat the same scans
STEPS = 2500  # a time budget should allow this many
LEAST_STEPS = 200  # with fewer, a network hardly learns: such a plan is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits of training: `memory` in bytes, `flops` of the run (None: no time budget)."""

    memory: int
    flops: float | None = None
    half: bool = False  # activations take two bytes, as on a GPU
    is_stated: bool = False  # by the user: a plan that exceeds it is refused
    is_least: bool = False  # choose the smallest size that can learn, not the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A U-Net (`unet3d`) and its batches; strides and kernels as in a recipe, finest level first.

    Args:
        depths: number of outputs in the loss: 1, plus one for each level with deep supervision.
        residual, dropout: whether its blocks have residual connections and dropout.
    """

    features: tuple[int, ...]
    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    patch_shape: Triple
    batch_size: int
    depths: int = 1
    residual: bool = False
    dropout: bool = False

    def training_bytes(self, channels: int, outputs: int, *, half: bool = False) -> int:
        """Estimate the memory of one training step: activations, gradients, weights, optimiser."""
        saved = 0
        for level, (width, voxels) in enumerate(zip(self.features, self._voxels, strict=True)):
            # Each layer keeps the outputs of convolution and of norm + activation; the decoder
            # also keeps the concatenated tensor.
            blocks = 1 if level == len(self.features) - 1 else 2
            # Shortcut and sum of a residual block; the dropout masks of two layers.
            extra = 2 * self.residual + 2 * self.dropout
            saved += width * voxels * ((4 if blocks == 1 else 4 + 6) + extra * blocks)
        finest = self._voxels[0]
        gradients = 2 * self.features[0] * finest  # of the finest level
        loss = 6 * self.depths * outputs * finest + channels * finest
        activations = (2 if half else 4) * (saved + gradients) + 4 * loss
        return self.batch_size * activations + 5 * 4 * self.n_weights(channels, outputs)

    def step_flops(self, channels: int, outputs: int) -> float:
        """Count the operations of a step: 3 × the forward pass, 2 per multiply-add."""
        total = sum(
            n_in * n_out * math.prod(kernel) * voxels
            for n_in, n_out, kernel, voxels in self._layers(channels, outputs)
        )
        return 3.0 * 2.0 * self.batch_size * total

    def n_weights(self, channels: int, outputs: int) -> int:
        """Count the weights of the convolutions; those of the norms are negligible."""
        return sum(
            n_in * n_out * math.prod(kernel)
            for n_in, n_out, kernel, _ in self._layers(channels, outputs)
        )

    @property
    def _voxels(self) -> list[int]:
        """Voxels of a patch at each level."""
        voxels, shape = [], list(self.patch_shape)
        for stride in self.strides:
            shape = [n // step for n, step in zip(shape, stride, strict=True)]
            voxels.append(math.prod(shape))
        return voxels

    def _layers(self, channels: int, outputs: int) -> Iterator[tuple[int, int, Sequence[int], int]]:
        """Yield (channels in, channels out, kernel, voxels) of each convolution."""
        n_in, voxels = channels, self._voxels
        for level, width in enumerate(self.features):
            yield n_in, width, self.kernels[level], voxels[level]
            yield width, width, self.kernels[level], voxels[level]
            n_in = width
        for level in range(len(self.features) - 2, -1, -1):
            width = self.features[level]
            # A transposed convolution touches each finer voxel once per pair of channels.
            yield self.features[level + 1], width, (1, 1, 1), voxels[level]
            kernel = self.kernels[level + 1]  # DynUNet's decoder has the kernels of the level below
            yield 2 * width, width, kernel, voxels[level]
            yield width, width, kernel, voxels[level]
        yield self.features[0], outputs, (1, 1, 1), voxels[0]


def topology(
    patch_shape: Triple, spacing_mm: Sequence[float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Return strides and kernels per level for patches of about this shape.

    An axis is halved while it keeps `SMALLEST_EDGE` voxels and is not much coarser than the others.
    Kernels extend along an axis from the first level at which it is not much coarser.
    """
    size, mm = list(patch_shape), [float(value) for value in spacing_mm]
    strides: list[Triple] = [(1, 1, 1)]
    kernels = [_kernel(mm, (1, 1, 1))]
    while len(strides) < MOST_LEVELS and (stride := _stride(size, mm)) != (1, 1, 1):
        size = [n // step for n, step in zip(size, stride, strict=True)]
        mm = [value * step for value, step in zip(mm, stride, strict=True)]
        strides.append(stride)
        kernels.append(_kernel(mm, kernels[-1]))
    return _deep_enough(strides, kernels)


def _stride(size: Sequence[int], mm: Sequence[float]) -> Triple:
    """Return the stride of the next level: 2 along the axes to halve, 1 along the others."""
    axes = list(zip(size, mm, strict=True))
    finest = min((value for n, value in axes if n >= 2 * SMALLEST_EDGE), default=0.0)
    limit = ANISOTROPIC * finest
    r, a, s = (2 if n >= 2 * SMALLEST_EDGE and value < limit else 1 for n, value in axes)
    return r, a, s


@dataclass(frozen=True, slots=True, kw_only=True)
class Scans:
    """What a network is trained on.

    Args:
        shape: median shape of the training scans on the prepared grid.
        channels, outputs: number of channels in and out of the network.
    """

    shape: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    n_cases: int
    channels: int
    outputs: int


def choose_size(
    scans: Scans,
    budget: Budget,
    *,
    patch_shape: Triple | None = None,
    batch_size: int | None = None,
    smallest_patch: Triple = (1, 1, 1),
) -> Size:
    """Choose the best size that fits the budget.

    The patch starts as large as the scans and shrinks to the first of `PATCHES`; then the features
    are reduced, then the patch again. Remaining memory and time go into a larger batch. If the time
    is too short for `STEPS` steps with any size, the size with the most steps is used, provided it
    makes `LEAST_STEPS`.

    Args:
        patch_shape, batch_size: None to choose them.
        smallest_patch: minimum length of the chosen patch along each axis, unless no such patch
            fits into memory.

    Raises:
        VolsegError: even the smallest size does not fit.
    """
    limits = _Limits(scans, budget)
    sizes = _Sizes(scans, patch_shape, batch_size or BATCHES[0], smallest_patch)
    least = min(sizes.of(PATCHES[-1], WIDTHS[-1]), key=limits.step_flops)
    if not limits.allow_memory_of(least):
        if not patch_shape and max(smallest_patch) > 1:
            return choose_size(scans, budget, batch_size=batch_size)
    elif budget.is_least:
        return least
    best = next(filter(limits.allow, sizes), None)
    if best is None:
        if limits.allow(least, steps=LEAST_STEPS):
            return least
        raise limits.refusal(least)
    return best if batch_size is not None else _with_larger_batch(best, limits)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes to choose from, best first; a `patch_shape` that is None is to be chosen too."""

    scans: Scans
    patch_shape: Triple | None
    batch_size: int
    smallest_patch: Triple

    def __iter__(self) -> Iterator[Size]:
        for limit in PATCHES:
            for width in WIDTHS:
                yield from self.of(limit, width)

    def of(self, limit: int, width: int) -> Iterator[Size]:
        """Yield the sizes with features of this width and patches down to about `limit` voxels."""
        spacing_mm = self.scans.spacing_mm
        if self.patch_shape:
            yield _sized(self.patch_shape, spacing_mm, width, self.batch_size, is_fixed=True)
            return
        for patch in _patches(self.scans.shape, spacing_mm, limit, self.smallest_patch):
            yield _sized(patch, spacing_mm, width, self.batch_size, is_fixed=False)


def _with_larger_batch(size: Size, limits: _Limits) -> Size:
    """Return the size with the largest batch within the limits."""
    scans, best = limits.scans, size
    all_voxels = scans.n_cases * math.prod(scans.shape)
    most = min(BATCHES[1], int(BATCH_FRACTION * all_voxels / math.prod(size.patch_shape)))
    for batch in range(size.batch_size + 1, max(size.batch_size, most) + 1):
        larger = _sized(size.patch_shape, scans.spacing_mm, size.features[0], batch, is_fixed=True)
        if not limits.allow(larger):
            break
        best = larger
    return best


@dataclass(frozen=True, slots=True)
class _Limits:
    """Whether training with a size fits into the budget."""

    scans: Scans
    budget: Budget

    def step_bytes(self, size: Size) -> int:
        scans = self.scans
        return size.training_bytes(scans.channels, scans.outputs, half=self.budget.half)

    def step_flops(self, size: Size) -> float:
        return size.step_flops(self.scans.channels, self.scans.outputs)

    def allow(self, size: Size, *, steps: int = STEPS) -> bool:
        flops = self.budget.flops
        in_time = flops is None or steps * self.step_flops(size) <= flops
        return in_time and self.allow_memory_of(size)

    def allow_memory_of(self, size: Size) -> bool:
        return self.step_bytes(size) <= self.budget.memory

    def refusal(self, least: Size) -> VolsegError:
        """Return the error for a dataset whose smallest size exceeds the budget."""
        needed, smaller = self.step_bytes(least), "a smaller train.patch_shape or train.batch_size"
        patch = f"{format_sizes(least.patch_shape)} voxels"
        plan = f"({patch}, batch {least.batch_size}, {least.features[0]} features)"
        if needed > self.budget.memory:
            limit = f"the budget is {self.budget.memory / 2**30:.2f} GB"
            problem = f"takes {needed / 2**30:.2f} GB, and {limit}"
            enough = math.ceil(needed / 2**30 * 10 + 0.5) / 10
            fix = f"give a memory budget of {enough:g}G"
        else:
            assert self.budget.flops is not None
            problem = f"makes fewer than {LEAST_STEPS} steps in the time budget"
            factor = LEAST_STEPS * self.step_flops(least) / self.budget.flops
            fix = f"give {factor:.1f} times the --time-budget"
        return VolsegError(
            f"the smallest plan {plan} {problem}",
            fix=f"{fix}, or {smaller} in the recipe",
            code="E_BUDGET",
        )


def _patches(
    shape: Sequence[float], spacing_mm: Sequence[float], limit: int, smallest: Triple
) -> Iterator[Triple]:
    """Yield patches from the largest sensible one down to about `limit` voxels.

    They are cubes in mm, no longer than the scans and no shorter than `smallest` along any axis.
    """
    median = [max(1.0, float(n)) for n in shape]
    edges = _cube(median, spacing_mm)
    patch = [max(edge, least) for edge, least in zip(edges, smallest, strict=True)]
    previous = None
    while True:
        padded, steps = _padded(patch, spacing_mm)
        if padded != previous:
            yield padded
            previous = padded
        # Shorten the axis that covers most of the scan.
        free = [n for n in range(3) if padded[n] - steps[n] >= smallest[n]]
        if not free:
            return
        axis = max(free, key=lambda n: (padded[n] > 2 * SMALLEST_EDGE, padded[n] / median[n]))
        patch = list(padded)
        patch[axis] -= steps[axis]
        if patch[axis] < SMALLEST_EDGE or math.prod(patch) < limit:
            return


def _cube(median: Sequence[float], spacing_mm: Sequence[float]) -> list[float]:
    """Return the edges of `LARGEST_PATCH`, a cube in mm as far as the scans allow."""
    edge = (LARGEST_PATCH * math.prod(spacing_mm)) ** (1 / 3)
    for _ in range(3):  # the other axes get what a short axis does not use
        free = [n for n in range(3) if edge / spacing_mm[n] < median[n]]
        if not free:
            break
        short = math.prod(median[n] for n in range(3) if n not in free)
        edge = (LARGEST_PATCH / short * math.prod(spacing_mm[n] for n in free)) ** (1 / len(free))
    return [min(n, edge / mm) for n, mm in zip(median, spacing_mm, strict=True)]


def _padded(patch: Sequence[float], spacing_mm: Sequence[float]) -> tuple[Triple, Triple]:
    """Round the patch up to multiples of its total strides; return both."""
    r, a, s = (max(SMALLEST_EDGE, math.ceil(n)) for n in patch)
    strides, _ = topology((r, a, s), spacing_mm)
    steps = tuple(math.prod(stride[n] for stride in strides) for n in range(3))
    r, a, s = (math.ceil(n / step) * step for n, step in zip((r, a, s), steps, strict=True))
    return (r, a, s), (steps[0], steps[1], steps[2])


def _sized(
    patch: Triple, spacing_mm: Sequence[float], width: int, batch_size: int, *, is_fixed: bool
) -> Size:
    strides, kernels = topology(patch, spacing_mm)
    if is_fixed:  # a stated patch keeps its shape, which limits how often it can be halved
        strides, kernels = _dividing(patch, strides, kernels)
    features = tuple(min(MOST_FEATURES, width * 2**level) for level in range(len(strides)))
    return Size(
        features=features,
        strides=strides,
        kernels=kernels,
        patch_shape=patch,
        batch_size=batch_size,
    )


def _dividing(
    patch: Triple, strides: Sequence[Triple], kernels: Sequence[Triple]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    kept: list[Triple] = []
    size = list(patch)
    for stride in strides:
        if any(n % step for n, step in zip(size, stride, strict=True)):
            break
        size = [n // step for n, step in zip(size, stride, strict=True)]
        kept.append(stride)
    return _deep_enough(kept, list(kernels[: len(kept)]))


def _deep_enough(
    strides: list[Triple], kernels: list[Triple]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Append levels without halving until the network has enough levels."""
    n_added = max(0, LEAST_LEVELS - len(strides))
    return (*strides, *[(1, 1, 1)] * n_added), (*kernels, *[kernels[-1]] * n_added)


def _kernel(mm: Sequence[float], finer: Triple) -> Triple:
    """Return a kernel that is flat along axes still too coarse, as long as `finer` was flat."""
    limit = ANISOTROPIC * min(mm)
    r, a, s = (3 if value < limit else size for value, size in zip(mm, finer, strict=True))
    return r, a, s
