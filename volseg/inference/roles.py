"""What attached classifiers say of a scan: which slices hold something, and what lesions are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from volseg.image_bundle import ImageBundle
from volseg.inference.choose import BackendChoice
from volseg.inference.image_predictor import ImagePredictor, load_predictor
from volseg.inference.images import judged_predictions
from volseg.inference.stream import KeptPlanes
from volseg.io.images import slice_image, through_axis
from volseg.measurement.fusible import fusible_measurements
from volseg.postprocessing.lesions import Lesions
from volseg.preprocessing.images import to_input
from volseg.preprocessing.lesion_images import LesionView, lesion_input
from volseg.preprocessing.prepare import Trail
from volseg.recipe import RoleOfClassifier
from volseg.volume import AxisOrder, BoundingBox, Geometry, Volume
from volseg.words import format_ranges

TOGETHER = 64  # images that are in memory at a time


@dataclass(frozen=True, slots=True, eq=False)
class RunningClassifier:
    """An attached classifier with its networks loaded."""

    settings: RoleOfClassifier
    bundle: ImageBundle
    predictor: ImagePredictor

    @classmethod
    def load(
        cls, settings: RoleOfClassifier, bundle: ImageBundle, choice: BackendChoice
    ) -> RunningClassifier:
        return cls(settings, bundle, load_predictor(bundle, choice))

    @property
    def names(self) -> tuple[str, ...]:
        return self.bundle.recipe.data.names

    def probabilities(
        self, images: Iterator[np.ndarray], measurements: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (n, classes) float64 probabilities of network inputs.

        Args:
            measurements: (n, k) that the classifier is fused with.
        """
        parts, batch = [np.empty((0, len(self.names)))], list[np.ndarray]()
        for image in images:
            batch.append(image)
            if len(batch) == TOGETHER:
                parts.append(self._predict(batch))
                batch = []
        if batch:
            parts.append(self._predict(batch))
        outputs, data = np.concatenate(parts), self.bundle.recipe.data
        return judged_predictions(outputs, data, self.bundle.judgement, measurements)

    def _predict(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.predictor.predict(np.stack(images)).outputs

    def keeps(self, probabilities: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which slices or lesions stay, from (n, classes) probabilities."""
        kept = self.names.index(self.settings.kept_class)
        return ~(probabilities[:, kept] < self.settings.threshold)


def classes_of_lesions(
    image: Volume, lesions: Lesions, classifier: RunningClassifier, *, most: int
) -> list[Mapping[str, float]]:
    """Return class name → probability for each lesion 1, 2, …, the first `most`."""
    probabilities = lesion_probabilities(image, lesions, classifier, most=most)
    return [dict(zip(classifier.names, row, strict=True)) for row in probabilities.tolist()]


def lesion_probabilities(
    image: Volume, lesions: Lesions, classifier: RunningClassifier, *, most: int
) -> np.ndarray:
    """Return (n, classes) probabilities of lesions 1, 2, …, the first `most`."""
    settings, ids = classifier.bundle.recipe.images, lesions.ids
    view, fusion, measured = LesionView.of(settings), classifier.bundle.judgement.fusion, None
    if fusion is not None:
        measured = fusible_measurements(image, lesions, fusion.names, most=most)

    def inputs() -> Iterator[np.ndarray]:
        boxes = ndimage.find_objects(ids, max_label=min(most, int(ids.max(initial=0))))
        for lesion, box in enumerate(boxes, start=1):
            near = view.box(BoundingBox.of(box), image.geometry)
            yield lesion_input(image.crop(near), ids[near.slices] == lesion, settings)

    return classifier.probabilities(inputs(), measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What a gate skipped in a scan, or in several.

    Args:
        skipped: slices that hold nothing by the gate, counted from 0 at the feet; of one scan.
        seconds: for the gate. seconds_saved: tiles that were skipped × mean time of those run; None
            if none was run.
    """

    n_slices: int
    n_skipped: int
    n_tiles: int
    n_tiles_skipped: int
    seconds: float
    seconds_saved: float | None
    skipped: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def total(cls, reports: Sequence[GateReport]) -> GateReport:
        """Return the sum over scans."""
        saved = [report.seconds_saved for report in reports if report.seconds_saved is not None]
        return cls(
            n_slices=sum(report.n_slices for report in reports),
            n_skipped=sum(report.n_skipped for report in reports),
            n_tiles=sum(report.n_tiles for report in reports),
            n_tiles_skipped=sum(report.n_tiles_skipped for report in reports),
            seconds=math.fsum(report.seconds for report in reports),
            seconds_saved=math.fsum(saved) if saved else None,
        )

    @property
    def ranges(self) -> str:
        """The skipped slices as text: `0-11;30`."""
        return format_ranges(self.skipped.tolist())

    @property
    def text(self) -> str:
        saved = "" if self.seconds_saved is None else f"; saved about {self.seconds_saved:.1f} s"
        return (
            f"gate: {self.n_skipped} of {self.n_slices} slices skipped, {self.n_tiles_skipped} of "
            f"{self.n_tiles} tiles{saved}, the gate took {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True, eq=False)
class KeptSlices:
    """The axial slices of a scan that a gate keeps.

    Args:
        is_kept: (n,) bool along the canonical axis `through`.
        seconds: that it took.
    """

    is_kept: np.ndarray
    through: int
    seconds: float

    @classmethod
    def of(cls, scan: Volume, gate: RunningClassifier) -> KeptSlices:
        """Ask the gate about every slice; the slices are those on which it was trained."""
        started, volume = time.monotonic(), scan.canonical()
        through = through_axis(volume.geometry.shape)
        settings = gate.bundle.recipe.images

        def inputs() -> Iterator[np.ndarray]:
            for index in range(volume.geometry.shape[through]):
                yield to_input(slice_image(volume, through, index), settings)

        is_kept = gate.keeps(gate.probabilities(inputs()))
        return cls(is_kept, through, time.monotonic() - started)

    @property
    def skipped(self) -> np.ndarray:
        return np.flatnonzero(~self.is_kept)

    def planes(self, trail: Trail, part: BoundingBox) -> KeptPlanes:
        """Return the planes of a part of the prepared grid that show any of these slices."""
        axis, is_kept = self._in_prepared_order(trail)
        n, planes = len(is_kept), trail.shape[axis]
        first = np.floor(np.arange(planes) * n / planes + 1e-9).astype(int)
        last = np.ceil((np.arange(planes) + 1) * n / planes - 1e-9).astype(int)
        sums = np.concatenate([[0], np.cumsum(is_kept)])
        shows = sums[last] > sums[first]
        return KeptPlanes(axis, shows[part.start[axis] : part.stop[axis]])

    def _in_prepared_order(self, trail: Trail) -> tuple[int, np.ndarray]:
        """Return the axis of the prepared grid along which slices follow, and these inside it."""
        stored = _along_stored_axis(self.is_kept, self.through, trail.geometry)
        axis = trail.order.axes.index(AxisOrder.of(trail.geometry).axes[self.through])
        is_kept = stored[::-1] if trail.order.flipped[axis] else stored
        return axis, is_kept[trail.box.slices[axis]]


def _along_stored_axis(is_kept: np.ndarray, through: int, geometry: Geometry) -> np.ndarray:
    """Return values along a canonical axis in the order of the stored array."""
    return is_kept[::-1] if AxisOrder.of(geometry).flipped[through] else is_kept
