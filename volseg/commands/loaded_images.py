"""Prepared images as training takes them, with the recipe that they were prepared for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.errors import VolsegError
from volseg.io.files import json_text
from volseg.io.image_cases import survey_images
from volseg.io.layouts import survey_cases
from volseg.io.prepared_images import CASES_FILE, ImageSet, read_prepared_images
from volseg.recipe import ClassifyRecipe, parse_image_recipe
from volseg.recipe.classification import LESION
from volseg.recipe.section import AUTO

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Reason
    from volseg.planning.images import ImageFingerprint, SeenImages


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """Prepared images, the dataset they come from and the closed recipe they were made for."""

    images: ImageSet
    recipe: ClassifyRecipe
    reasons: tuple[Reason, ...]
    fingerprint: ImageFingerprint
    warnings: Sequence[str]
    listing: str = ""  # `listing_digest` of the dataset
    encoder: str = ""  # hash of the network that embedded the slices of scans

    def with_training_of(
        self, recipe: ClassifyRecipe, folder: Path, *, seen: SeenImages | None
    ) -> LoadedImages:
        """Return the images with the network and training settings of another recipe, closed.

        Args:
            seen: by the weights that the network starts from; None for random weights.

        Raises:
            VolsegError: they were prepared for another target or input.
        """
        from volseg.planning.images import close_images

        stored = self.recipe.data
        images = recipe.images
        is_open = [name for name in ("normalise", "pixels") if getattr(images, name) == AUTO]
        prepared = {name: getattr(self.recipe.images, name) for name in is_open}
        images = images.model_copy(update=prepared)
        stated = recipe.model_copy(update={"data": stored, "images": images})
        closed = close_images(stated, self.fingerprint, seen=seen)
        stated_data = {key: v for key, v in recipe.data.model_dump().items() if v != AUTO}
        is_other = stored.model_dump() | stated_data != stored.model_dump()
        if is_other or closed.recipe.images != self.recipe.images:
            raise VolsegError(
                f"{folder}: was prepared for recipe {self.recipe.name!r} with other [data] or "
                "[images] settings",
                fix="run `volseg preprocess` with this recipe first, or give the dataset itself",
                code="E_PREPARED",
            )
        return replace(self, recipe=closed.recipe, reasons=closed.reasons)


def load_images(folder: Path) -> LoadedImages:
    """Load a folder of prepared images.

    Raises:
        VolsegError: it is not one.
    """
    from volseg.planning.close import Reason
    from volseg.planning.images import ImageFingerprint

    images, content = read_prepared_images(folder)
    try:
        return LoadedImages(
            images,
            parse_image_recipe(content["recipe"], where=str(folder / CASES_FILE)),
            tuple(map(Reason.model_validate, content["reasons"])),
            ImageFingerprint.model_validate(content["fingerprint"]),
            list(map(str, content["warnings"])),
            str(content.get("listing", "")),
            str(content.get("encoder", "")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise VolsegError(
            f"{folder}: not a folder of prepared images ({error})",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        ) from error


def listing_digest(dataset: Path, recipe: ClassifyRecipe) -> str:
    """Return a hash of the files of a dataset, their sizes and what it states of each.

    Raises:
        VolsegError: the dataset cannot be listed.
    """
    lines: list[tuple[object, ...]] = []
    if recipe.data.input == LESION:
        for case in survey_cases(dataset, None).cases:
            files = [*case.images.values(), case.reference]
            lines.append((case.id, *map(_size, files), case.split, case.patient, case.classes))
    else:
        for image in survey_images(dataset).cases:
            files = (image.path, image.mask)
            place = (image.id, image.index, *map(_size, files))
            lines.append((*place, image.split, image.patient, dict(image.cells)))
    return hashlib.sha256(json_text(lines).encode(errors="surrogateescape")).hexdigest()


def _size(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_size
    except OSError:
        return None
