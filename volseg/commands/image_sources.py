"""Where the input of a classifier comes from: an image, slices through a lesion, or a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import ndimage

from volseg.commands.batch import reason_of
from volseg.commands.placing import place_mask
from volseg.commands.scan_sources import Embed, ScanSource, Unmeasured, scan_digest, scans_of
from volseg.commands.seen_images import image_key
from volseg.errors import ScanError, VolsegError, named
from volseg.image import Image2D
from volseg.io.cases import Case, dataset_error
from volseg.io.image_cases import ImageCase, find_images
from volseg.io.images import ImageReader
from volseg.io.layouts import find_scans, survey_cases
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.fusible import fusible_measurements
from volseg.postprocessing.lesions import MANY, Lesions, label_lesions
from volseg.preprocessing.images import to_input
from volseg.preprocessing.lesion_images import LesionView, cut_lesion, lesion_input, white_of
from volseg.recipe import ClassifyRecipe
from volseg.recipe.classification import LESION, SCAN
from volseg.recipe.images import Images
from volseg.volume import BoundingBox, Volume

GLANCE = LesionView(field_of_view_mm=48.0, pixels=48)  # by which lesions are compared and shown


class ImageSource(Protocol):
    """Reads the images of cases; neighbouring cases of one file need one reading."""

    def picture(self, case: ImageCase) -> Image2D:
        """Return the image as a person would look at it.

        Raises:
            ScanError: it cannot be read.
        """
        ...

    def network_input(self, case: ImageCase, settings: Images) -> np.ndarray:
        """Return (C, pixels, pixels) float32.

        Of a lesion it is (planes, C, pixels, pixels), of a scan (S, features + 1).

        Raises:
            VolsegError: it cannot be read, or not normalised.
        """
        ...

    def measurements(self, case: ImageCase, names: Sequence[str]) -> np.ndarray:
        """Return (k,) measurements of a lesion, by which it is judged too.

        Raises:
            ScanError: scan or mask cannot be read.
        """
        ...


def source_of(recipe: ClassifyRecipe, embed: Embed | None = None) -> ImageSource:
    """Return what reads the cases of a recipe.

    Args:
        embed: the network of slices of a recipe of scans; without it there are only pictures.
    """
    if recipe.data.input == SCAN:
        return ScanSource(embed)
    return LesionSource() if recipe.data.input == LESION else FileSource()


def case_key(case: ImageCase, digest_of: Callable[[Path], str]) -> str:
    """Return what tells the image, lesion or scan of a case from all others.

    Args:
        digest_of: hash of a file.
    """
    if case.slices:
        return scan_digest(case, digest_of)
    return image_key(digest_of(case.path), case.index)


def find_inputs(
    recipe: ClassifyRecipe,
    inputs: Sequence[Path],
    *,
    failed: Callable[[str, str], None] = lambda name, reason: None,
    remark: Callable[[str], None] = lambda text: None,
) -> list[ImageCase]:
    """Return the images, lesions or scans to classify with the model of a recipe.

    Args:
        failed: called with the id of a scan whose lesions cannot be read, and the reason.
        remark: called with each choice that was made in reading the inputs.

    Raises:
        VolsegError: as `find_images` and `find_lesions`, or slices cannot be put in order.
    """
    if recipe.data.input == LESION:
        return find_lesions(inputs, failed, remark=remark)
    images = find_images(inputs, remark=remark)
    if recipe.data.input != SCAN:
        return images
    mistakes = list[str]()
    scans = scans_of(images, mistakes)
    if mistakes:
        raise dataset_error(mistakes, ", ".join(map(str, inputs)))
    return scans


class FileSource(Unmeasured):
    """Images and slices of volumes."""

    def __init__(self) -> None:
        self._reader = ImageReader()

    def picture(self, case: ImageCase) -> Image2D:
        return self._reader.read(case.path, case.index)

    def network_input(self, case: ImageCase, settings: Images) -> np.ndarray:
        image = self.picture(case)
        with named(case.path, ScanError):
            return to_input(image, settings)


class LesionSource:
    """Lesions of scans with masks; the index of a case is the number of its lesion, from 1."""

    def __init__(self) -> None:
        self._paths: tuple[Path, Path | None] | None = None
        self._scan: Volume | None = None
        self._lesions = Lesions(np.zeros(0), [], [])
        self._measured: dict[tuple[str, ...], np.ndarray] = {}
        self._boxes: list[tuple[slice, ...]] = []

    def picture(self, case: ImageCase) -> Image2D:
        image, inside = self._lesion(case, GLANCE)
        intensities, _ = cut_lesion(image, inside, GLANCE)
        axial = intensities[0, :1].transpose(0, 2, 1)[:, ::-1, ::-1]  # right at the left, front up
        return Image2D(np.ascontiguousarray(axial), white_of(image))

    def network_input(self, case: ImageCase, settings: Images) -> np.ndarray:
        image, inside = self._lesion(case, LesionView.of(settings))
        with named(case.path, ScanError):
            return lesion_input(image, inside, settings)

    def _lesion(self, case: ImageCase, view: LesionView) -> tuple[Volume, np.ndarray]:
        """Return the part of the scan that a view of a lesion shows, and the lesion's voxels."""
        self._read(case)
        assert self._scan is not None and case.index is not None
        box = view.box(BoundingBox.of(self._boxes[case.index - 1]), self._scan.geometry)
        return self._scan.crop(box), self._lesions.ids[box.slices] == case.index

    def measurements(self, case: ImageCase, names: Sequence[str]) -> np.ndarray:
        """Return (k,) measurements of a lesion.

        Raises:
            ScanError: scan or mask cannot be read.
        """
        self._read(case)
        assert self._scan is not None and case.index is not None
        key = tuple(names)
        if key not in self._measured:  # of all lesions of the scan at once
            self._measured[key] = fusible_measurements(self._scan, self._lesions, key, most=MANY)
        return self._measured[key][case.index - 1]

    def _read(self, case: ImageCase) -> None:
        if self._paths == (case.path, case.mask):
            return
        self._paths = None
        self._scan, self._lesions = read_lesions(case.path, case.mask)
        self._boxes, self._measured = ndimage.find_objects(self._lesions.ids), {}
        self._paths = (case.path, case.mask)


def read_lesions(path: Path, mask_path: Path | None) -> tuple[Volume, Lesions]:
    """Return a scan and its lesions.

    Raises:
        ScanError: a file cannot be read, or the mask does not lie on the scan.
    """
    assert mask_path is not None, "cases without a mask have no lesions"
    scan, mask = read_volume(path), read_mask(mask_path, like=path)
    names = {"mask_name": str(mask_path), "grid_name": str(path)}
    placed = place_mask(mask, scan.geometry, **names).mask
    return scan, label_lesions(placed.array, placed.geometry)


def lesions_of(cases: Sequence[Case], failed: Callable[[str, str], None]) -> Iterator[ImageCase]:
    """Yield a case per lesion, named by scan and number, of those scans that have a mask.

    Args:
        failed: called with the id of a scan whose lesions cannot be read, and the reason.
    """
    for case in cases:
        if case.reference is None:
            continue
        path = next(iter(case.images.values()))
        try:
            _, lesions = read_lesions(path, case.reference)
        except ScanError as error:
            failed(case.id, reason_of(error))
            continue
        for number in range(1, len(lesions.labels) + 1):
            yield ImageCase(
                id=f"{case.id}_{number}",
                path=path,
                index=number,
                patient=case.patient or case.id,
                split=case.split,
                cells=case.classes,
                mask=case.reference,
                where=case.id,
            )


def survey_lesions(
    dataset: Path, target: str, failed: Callable[[str, str], None]
) -> tuple[list[ImageCase], list[str]]:
    """Return the lesions of a dataset of scans and masks, and remarks on how it was read.

    Raises:
        VolsegError: the dataset has mistakes, or lacks the column of the target.
    """
    survey = survey_cases(dataset, None)
    if survey.mistakes:
        raise dataset_error(survey.mistakes, str(dataset))
    columns = dict.fromkeys(name for case in survey.cases for name in case.classes)
    if target not in columns:
        listed = ", ".join(columns) or "none"
        raise VolsegError(
            f"{dataset}: has no column {target!r}; its other columns are {listed}",
            fix="name one of them as data.target in the recipe",
            code="E_TARGET",
        )
    return list(lesions_of(survey.cases, failed)), list(survey.remarks)


def find_lesions(
    inputs: Sequence[Path],
    failed: Callable[[str, str], None],
    *,
    remark: Callable[[str], None],
) -> list[ImageCase]:
    """Return the lesions to classify, of scans with masks.

    Raises:
        VolsegError: as `find_scans`, or no scan has a mask.
    """
    cases = find_scans(inputs, None, remark=remark)
    if not any(case.reference for case in cases):
        raise VolsegError(
            f"{', '.join(map(str, inputs))}: no scan has a mask, and the model classifies lesions",
            fix="give a table with the columns image and label, or a folder of scans and masks",
            code="E_DATASET",
        )
    return list(lesions_of(cases, failed))
