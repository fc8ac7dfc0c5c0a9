"""How large a network and its patches may be: depth, strides, kernels, features, patch and batch from the size of the scans and a budget.

The rules are those of nnU-Net's planner in spirit (Isensee et al., Nature Methods 18:203, 2021): patches of the proportions of the scans in
mm, axes halved until they are 4 voxels long, coarse axes later and with flat kernels until then. In addition to the memory, the arithmetic
that a time budget allows is a limit, because on a CPU it is the one that counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from volseg.errors import VolsegError

Triple = tuple[int, int, int]

SMALLEST_EDGE = 4  # voxels of an axis at the coarsest level
LEAST_LEVELS, MOST_LEVELS = 3, 6
MOST_FEATURES = 320
ANISOTROPIC = (
    2.0  # an axis this many times coarser than the finest is neither halved nor convolved along
)
LARGEST_PATCH = 256**3  # voxels, before the scans' own size and the budget limit it
WIDTHS = (32, 24, 16, 12, 8)  # features of the finest level that are tried, best first
# Voxels: a patch gives way down to the first before the network gets thinner; only if none is thin enough, down to the next.
PATCHES = (64**3, 48**3, 32**3, 24**3, 16**3, 8**3)
BATCHES = (2, 24)  # least and most patches per step
SHARE_PER_BATCH = 0.05  # of all training voxels in one batch at most: larger batches would see the same scans again
STEPS = 2500  # that a time budget should allow
LEAST_STEPS = 200  # under which a network learns next to nothing: such a plan is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What training may take. `memory` in bytes; `flops` of the whole run, None where there is no time budget."""

    memory: int
    flops: float | None = None
    half: bool = False  # activations of two bytes, as on a GPU
    is_stated: bool = False  # by the user, so that what exceeds it is refused
    is_least: bool = False  # the smallest size that can learn is wanted, not the best one


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A U-Net (`unet3d`) and its batches. Strides and kernels as in a recipe, finest level first.

    Args:
        depths: of which logits are judged: 1, and one more for each with deep supervision.
        residual, dropout: what its blocks do besides.
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
        """Of one training step: what autograd keeps, gradients, weights, their moments and averages."""
        saved = 0
        for level, (width, voxels) in enumerate(zip(self.features, self._voxels, strict=True)):
            # Each layer keeps what it convolves to and what comes out of norm and activation; on the way up the joined tensor too.
            blocks = 1 if level == len(self.features) - 1 else 2
            more = (
                2 * self.residual + 2 * self.dropout
            )  # the shorter way and the sum; what is left out of two layers
            saved += width * voxels * ((4 if blocks == 1 else 4 + 6) + more * blocks)
        finest = self._voxels[0]
        passing = 2 * self.features[0] * finest  # gradients on their way at the finest level
        loss = 6 * self.depths * outputs * finest + channels * finest
        activations = (2 if half else 4) * (saved + passing) + 4 * loss
        return self.batch_size * activations + 5 * 4 * self.n_weights(channels, outputs)

    def step_flops(self, channels: int, outputs: int) -> float:
        """Of forward and backward pass of one step: three times the convolutions of a forward pass, 2 per multiply and add."""
        total = sum(
            before * after * math.prod(kernel) * voxels
            for before, after, kernel, voxels in self._layers(channels, outputs)
        )
        return 3.0 * 2.0 * self.batch_size * total

    def n_weights(self, channels: int, outputs: int) -> int:
        """Of the convolutions; norms are next to nothing."""
        return sum(
            before * after * math.prod(kernel)
            for before, after, kernel, _ in self._layers(channels, outputs)
        )

    @property
    def _voxels(self) -> list[int]:
        """Per level."""
        found, shape = [], list(self.patch_shape)
        for stride in self.strides:
            shape = [n // step for n, step in zip(shape, stride, strict=True)]
            found.append(math.prod(shape))
        return found

    def _layers(self, channels: int, outputs: int) -> Iterator[tuple[int, int, Sequence[int], int]]:
        """(channels in, channels out, kernel, voxels at which it is applied) of each convolution."""
        before, voxels = channels, self._voxels
        for level, width in enumerate(self.features):
            yield before, width, self.kernels[level], voxels[level]
            yield width, width, self.kernels[level], voxels[level]
            before = width
        for level in range(len(self.features) - 2, -1, -1):
            width = self.features[level]
            # A transposed convolution touches each finer voxel once per pair of channels, whatever its stride.
            yield self.features[level + 1], width, (1, 1, 1), voxels[level]
            kernel = self.kernels[level + 1]  # DynUNet's way up has the kernels of the level below
            yield 2 * width, width, kernel, voxels[level]
            yield width, width, kernel, voxels[level]
        yield self.features[0], outputs, (1, 1, 1), voxels[0]


def topology(
    patch_shape: Triple, spacing_mm: Sequence[float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Strides and kernels per level for patches of about this shape.

    An axis is halved while it keeps `SMALLEST_EDGE` voxels and is not much coarser than the others; it is convolved along from the
    level on at which it is not.
    """
    size, mm = list(patch_shape), [float(each) for each in spacing_mm]
    strides: list[Triple] = [(1, 1, 1)]
    kernels = [_kernel(mm, (1, 1, 1))]
    while len(strides) < MOST_LEVELS:
        long_enough = [n for n in range(3) if size[n] >= 2 * SMALLEST_EDGE]
        if not long_enough:
            break
        finest = min(mm[n] for n in long_enough)
        halved = [n in long_enough and mm[n] < ANISOTROPIC * finest for n in range(3)]
        for n in range(3):
            if halved[n]:
                size[n] //= 2
                mm[n] *= 2
        r, a, s = (2 if each else 1 for each in halved)
        strides.append((r, a, s))
        kernels.append(_kernel(mm, kernels[-1]))
    return _deep_enough(strides, kernels)


def choose_size(
    shape: Sequence[float],
    spacing_mm: Sequence[float],
    *,
    channels: int,
    outputs: int,
    n_cases: int,
    budget: Budget,
    patch_shape: Triple | None = None,
    batch_size: int | None = None,
    smallest_patch: Triple = (1, 1, 1),
) -> Size:
    """The best size that fits.

    The patch is as large as the scans and gives way down to the first of `PATCHES`, then the features do, then the patch again. What
    is left makes the batch larger. Where the time allows no size `STEPS` steps, the one that makes most steps is taken if it makes
    `LEAST_STEPS`.

    Args:
        shape: the median shape of the training scans on the prepared grid.
        patch_shape, batch_size: where they are not to be chosen.
        smallest_patch: a patch that is chosen is no smaller along any axis, unless memory holds no such patch.

    Raises:
        VolsegError: not even the smallest fits.
    """
    smallest = batch_size or BATCHES[0]

    def sizes(limit: int, width: int) -> Iterator[Size]:
        patches = (
            [patch_shape] if patch_shape else _patches(shape, spacing_mm, limit, smallest_patch)
        )
        for patch in patches:
            yield _sized(patch, spacing_mm, width, smallest, is_fixed=patch_shape is not None)

    least = min(sizes(PATCHES[-1], WIDTHS[-1]), key=lambda size: size.step_flops(channels, outputs))
    if (
        not patch_shape
        and max(smallest_patch) > 1
        and not _fits_memory(least, budget, channels, outputs)
    ):
        return choose_size(
            shape,
            spacing_mm,
            channels=channels,
            outputs=outputs,
            n_cases=n_cases,
            budget=budget,
            batch_size=batch_size,
        )
    if budget.is_least and _fits_memory(least, budget, channels, outputs):
        return least
    tried = (size for limit in PATCHES for width in WIDTHS for size in sizes(limit, width))
    found = next((size for size in tried if _fits(size, budget, channels, outputs)), None)
    if found is None and _fits(least, budget, channels, outputs, steps=LEAST_STEPS):
        return least
    if found is None:
        raise VolsegError(
            _too_large(least, budget, channels, outputs),
            fix=_remedy(least, budget, channels, outputs),
            code="E_BUDGET",
        )
    if batch_size is None:
        all_voxels = n_cases * math.prod(shape)
        most = max(
            smallest,
            min(BATCHES[1], int(SHARE_PER_BATCH * all_voxels / math.prod(found.patch_shape))),
        )
        for batch in range(smallest + 1, most + 1):
            larger = _sized(found.patch_shape, spacing_mm, found.features[0], batch, is_fixed=True)
            if not _fits(larger, budget, channels, outputs):
                break
            found = larger
    return found


def _patches(
    shape: Sequence[float], spacing_mm: Sequence[float], limit: int, smallest: Triple
) -> Iterator[Triple]:
    """Patches from the largest sensible one down to about `limit` voxels: a cube in mm, no longer than the scans.

    None is smaller than `smallest` along any axis.
    """
    median = [max(1.0, float(n)) for n in shape]
    edge = (LARGEST_PATCH * math.prod(spacing_mm)) ** (1 / 3)
    for _ in range(3):  # what a short axis does not use is for the others
        free = [n for n in range(3) if edge / spacing_mm[n] < median[n]]
        if not free:
            break
        short = math.prod(median[n] for n in range(3) if n not in free)
        edge = (LARGEST_PATCH / short * math.prod(spacing_mm[n] for n in free)) ** (1 / len(free))
    patch = [
        max(min(n, edge / mm), least)
        for n, mm, least in zip(median, spacing_mm, smallest, strict=True)
    ]
    seen = None
    while True:
        padded, steps = _padded(patch, spacing_mm)
        if padded != seen:
            yield padded
            seen = padded
        # The axis that sees most of the scan gives way.
        free = [n for n in range(3) if padded[n] - steps[n] >= smallest[n]]
        if not free:
            return
        axis = max(free, key=lambda n: (padded[n] > 2 * SMALLEST_EDGE, padded[n] / median[n]))
        shorter = [padded[n] - (steps[n] if n == axis else 0) for n in range(3)]
        if shorter[axis] < SMALLEST_EDGE or math.prod(shorter) < limit:
            return
        patch = [float(n) for n in shorter]


def _padded(patch: Sequence[float], spacing_mm: Sequence[float]) -> tuple[Triple, Triple]:
    """The patch as multiples of what its strides divide by, and these."""
    r, a, s = (max(SMALLEST_EDGE, math.ceil(n)) for n in patch)
    strides, _ = topology((r, a, s), spacing_mm)
    steps = tuple(math.prod(stride[n] for stride in strides) for n in range(3))
    r, a, s = (math.ceil(n / step) * step for n, step in zip((r, a, s), steps, strict=True))
    return (r, a, s), (steps[0], steps[1], steps[2])


def _sized(
    patch: Triple, spacing_mm: Sequence[float], width: int, batch_size: int, *, is_fixed: bool
) -> Size:
    strides, kernels = topology(patch, spacing_mm)
    if is_fixed:  # a stated patch keeps its shape: no more halvings than it divides by
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
    """At least the levels that the network needs; the last ones do not halve anything where nothing is left to halve."""
    more = max(0, LEAST_LEVELS - len(strides))
    return (*strides, *[(1, 1, 1)] * more), (*kernels, *[kernels[-1]] * more)


def _fits(size: Size, budget: Budget, channels: int, outputs: int, *, steps: int = STEPS) -> bool:
    in_time = budget.flops is None or steps * size.step_flops(channels, outputs) <= budget.flops
    return in_time and _fits_memory(size, budget, channels, outputs)


def _fits_memory(size: Size, budget: Budget, channels: int, outputs: int) -> bool:
    return size.training_bytes(channels, outputs, half=budget.half) <= budget.memory


def _too_large(least: Size, budget: Budget, channels: int, outputs: int) -> str:
    needed = least.training_bytes(channels, outputs, half=budget.half)
    what = f"{' × '.join(map(str, least.patch_shape))} voxels, batch {least.batch_size}, {least.features[0]} features"
    if needed > budget.memory:
        return f"the smallest plan ({what}) takes {needed / 2**30:.2f} GB, and the budget is {budget.memory / 2**30:.2f} GB"
    return f"the smallest plan ({what}) makes fewer than {LEAST_STEPS} steps in the time budget"


def _remedy(least: Size, budget: Budget, channels: int, outputs: int) -> str:
    needed = least.training_bytes(channels, outputs, half=budget.half)
    if needed > budget.memory:
        enough = math.ceil(needed / 2**30 * 10 + 0.5) / 10
        return f"give a memory budget of {enough:g}G, or a smaller train.patch_shape or train.batch_size in the recipe"
    assert budget.flops is not None
    times = LEAST_STEPS * least.step_flops(channels, outputs) / budget.flops
    return f"give {times:.1f} times the --time-budget, or a smaller train.patch_shape or train.batch_size in the recipe"


def _kernel(mm: Sequence[float], finer: Triple) -> Triple:
    """Flat along axes that are still too coarse; not again once it was not."""
    r, a, s = (
        3 if each < ANISOTROPIC * min(mm) else before
        for each, before in zip(mm, finer, strict=True)
    )
    return r, a, s
