"""A lesion in its bounding box: the values in it, in its core and round it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from volseg.measurement.form import EXPECTED_REACH, Form, Forms
from volseg.measurement.scan import Box, CanonicalScan
from volseg.measurement.shape import core, grown


@dataclass(frozen=True, slots=True, eq=False)
class LesionBox:
    """A lesion in its bounding box; `start_mm` (3,) is the centre of the box's first voxel, RAS."""

    view: CanonicalScan
    number: int
    box: Box
    start_mm: np.ndarray
    form: Form

    @classmethod
    def of(cls, view: CanonicalScan, number: int, box: Box, forms: Forms) -> LesionBox:
        start_mm = view.image.geometry.to_world_mm(np.array([side.start for side in box]))
        return cls(view, number, box, start_mm, forms.of(view.ids[box] == number))

    @property
    def touches_border(self) -> bool:
        """True if a voxel lies on the edge of the array; a single slice has none across it."""
        sides = zip(self.box, self.view.ids.shape, strict=True)
        return any(size > 1 and (side.start == 0 or side.stop == size) for side, size in sides)

    def values(self, array: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        """Return the values (N,) of a canonical view where `inside` is true, in any order.

        Default: the lesion. Boolean indexing is several times faster in memory order.
        """
        axes, mask = self.view.memory, self.form.inside if inside is None else inside
        return array[self.box].transpose(axes)[mask.transpose(axes)]

    def core_values(self, array: np.ndarray) -> np.ndarray:
        """Return the values (N,) of a canonical view in the core of the lesion, in any order."""
        if not self.form.is_large:
            has_core = self.form.has_core
            return self.values(array, self.form.core) if has_core else array[:0, 0, 0].copy()

        inside = self.form.inside.transpose(self.view.memory)
        values = array[self.box].transpose(self.view.memory)

        def parts() -> Iterator[np.ndarray]:
            for start, stop in self.form.slabs(inside):
                low, high = max(0, start - 1), stop + 1
                yield values[start:stop][core(inside[low:high])[start - low : stop - low]]

        return _concatenated(parts, array.dtype)

    def halo_confidence(self) -> np.ndarray:
        """Return the confidence (N,) in the background round the lesion, in any order."""
        assert self.view.confidence is not None
        ids, confidence, reach = self.view.ids, self.view.confidence, EXPECTED_REACH
        if not self.form.is_large:
            return _halo_values(confidence, ids, self.box, self.form.halo, (reach, reach))
        axes = self.view.memory
        inside = self.form.inside.transpose(axes)
        ids, confidence = ids.transpose(axes), confidence.transpose(axes)
        first, *others = (self.box[axis] for axis in axes)

        def parts() -> Iterator[np.ndarray]:
            n = len(inside)
            for start, stop in self.form.slabs(inside):
                # Voxels up to `reach` before and after this slab grow into it.
                low, high = max(0, start - reach), min(n, stop + reach)
                before, after = (0 if start else reach), (0 if stop < n else reach)
                whole = grown(np.pad(inside[low:high], reach), reach)
                halo = whole[start - low + reach - before : stop - low + reach + after]
                box = (slice(first.start + start, first.start + stop), others[0], others[1])
                yield _halo_values(confidence, ids, box, halo, (before, after))

        return _concatenated(parts, confidence.dtype)


def _halo_values(
    confidence: np.ndarray, ids: np.ndarray, box: Box, halo: np.ndarray, ends: tuple[int, int]
) -> np.ndarray:
    """Return the confidence (N,) in the background voxels of `halo`.

    Args:
        halo: bool of the box, extended by `ends` voxels before and after it along the first axis,
            and by `EXPECTED_REACH` along the others.
    """
    sides, halo_sides = [], []
    for axis, (side, n) in enumerate(zip(box, ids.shape, strict=True)):
        before, after = (EXPECTED_REACH, EXPECTED_REACH) if axis else ends
        start, stop = max(0, side.start - before), min(n, side.stop + after)
        sides.append(slice(start, stop))
        halo_sides.append(slice(start - side.start + before, stop - side.start + before))
    part = tuple(sides)
    return confidence[part][halo[tuple(halo_sides)] & (ids[part] == 0)]


def _concatenated(parts: Callable[[], Iterator[np.ndarray]], dtype: np.dtype) -> np.ndarray:
    """Concatenate the parts; computing them twice avoids a second copy in memory."""
    values = np.empty(sum(part.size for part in parts()), dtype)
    start = 0
    for part in parts():
        values[start : start + part.size] = part
        start += part.size
    return values
