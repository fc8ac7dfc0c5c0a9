"""The images that a call of `infer` names: files, folders, tables, MedMNIST files, volumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from volseg.errors import VolsegError
from volseg.io.formats import is_scan, stem_of
from volseg.io.image_cases import ImageCase, survey_images
from volseg.io.images import is_image
from volseg.io.volumes import read_header
from volseg.words import format_numbered

MAX_SHOWN = 10  # mistakes listed in one message


def find_images(paths: Sequence[Path]) -> tuple[list[ImageCase], list[str]]:
    """Return the images at these paths, with remarks on how they were read.

    A volume stands for all of its axial slices.

    Raises:
        VolsegError: there are none, or the tables have mistakes, or two images share an id.
    """
    cases, remarks, mistakes = list[ImageCase](), list[str](), list[str]()
    for path in map(Path, paths):
        if path.is_file() and is_image(path):
            cases.append(ImageCase(id=path.stem, path=path, where=str(path)))
        elif path.is_file() and is_scan(path):
            cases += _slices(path)
        else:
            survey = survey_images(path)
            cases += survey.cases
            # Which folders are classes is of no importance here.
            remarks += [text for text in survey.remarks if not text.startswith("W_FOLDERS")]
            mistakes += survey.mistakes
    first: dict[str, ImageCase] = {}
    for case in cases:
        if first.setdefault(case.id, case) is not case:
            mistakes.append(f"{case.path}: has the id {case.id!r} of {first[case.id].path}")
    origin = ", ".join(map(str, paths))
    if mistakes:
        raise VolsegError(
            f"{origin}: {format_numbered(mistakes, MAX_SHOWN)}",
            fix="correct them and run again; nothing was done",
            code="E_DATASET",
        )
    if not cases:
        raise VolsegError(
            f"{origin}: no images found",
            fix="give images, a folder of images or a table with a column `image`",
            code="E_DATASET",
        )
    return cases, remarks


def _slices(path: Path) -> list[ImageCase]:
    n = read_header(path).geometry.shape[2]
    stem = stem_of(path)
    return [
        ImageCase(id=f"{stem}_{index:04}", path=path, index=index, patient=stem, where=str(path))
        for index in range(n)
    ]
