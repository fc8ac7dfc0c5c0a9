"""Folders of 2D images: one per class, within one per split or without."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from volseg.io.cases import safe_id, split_of
from volseg.io.image_listing import ImageCase, ImageListing
from volseg.words import format_count, format_list

CLASS = "class"  # the column that folders give
# The end of a name that is one of a mask, and the separator before it.
MASK_END = re.compile(r"[_ -](?:mask|seg|segmentation|gt)(?:[_ -]?[0-9]{1,9})?\Z", re.IGNORECASE)


def read_image_folders(dataset: Path, paths: Sequence[Path]) -> ImageListing:
    """List images by their folders: the split if all of them lie in folders of splits, the class.

    Args:
        paths: image files below the data set.
    """
    listing = ImageListing()
    images, masks = _without_masks(paths)
    if masks:
        first = next(iter(masks.values())).relative_to(dataset)
        count = format_count(len(paths) - len(images), "file")
        listing.remarks.append(
            f"N_MASKS: {dataset}: {count} named as masks of other images are no images of their "
            f"own, first {first}"
        )
    relative = [path.relative_to(dataset) for path in images]
    level = _split_level([path.parent.parts for path in relative])
    folders = [_without(path.parent.parts, level) for path in relative]
    depth = _common_depth(folders)
    for path, name, below, parts in zip(images, _ids(relative), folders, relative, strict=True):
        split = None if level is None else split_of(parts.parts[level])
        cells = _cells(below[depth:])
        case = ImageCase(name, path, None, None, split, cells, masks.get(path), str(path))
        listing.cases.append(case)
    _name_classes(listing, dataset)
    return listing


def _cells(folders: tuple[str, ...]) -> dict[str, str]:
    cells = {CLASS: folders[0] if folders else ""}
    return cells | ({"folder": "/".join(folders[1:])} if len(folders) > 1 else {})


def _name_classes(listing: ImageListing, dataset: Path) -> None:
    """State the classes; without a folder that names one, images have none."""
    counts = Counter(case.cells[CLASS] for case in listing.cases)
    if set(counts) <= {""}:
        listing.cases = [replace(case, cells={}) for case in listing.cases]
        return
    listing.columns = [CLASS]
    words = [f"{name or 'none'} ({n})" for name, n in sorted(counts.items())]
    text = f"classes are the names of folders: {format_list(words, 10)}"
    listing.remarks.append(f"N_FOLDERS: {dataset}: {text}")


def _without_masks(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """Return the images, and image → mask for files such as `x_mask.png` beside `x.png`."""
    stems = {(path.parent, path.stem): path for path in paths}
    masks: dict[Path, Path] = {}
    images = []
    for path in paths:
        match = MASK_END.search(path.stem)
        image = stems.get((path.parent, path.stem[: match.start()])) if match else None
        if image is None:
            images.append(path)
        else:
            masks.setdefault(image, path)
    return images, masks


def _split_level(parents: Sequence[tuple[str, ...]]) -> int | None:
    """Return the level of folders at which all of them are splits; None if there is none."""
    for level in range(max(map(len, parents), default=0)):
        if all(len(folders) > level and split_of(folders[level]) for folders in parents):
            return level
    return None


def _without(folders: tuple[str, ...], level: int | None) -> tuple[str, ...]:
    return folders if level is None else folders[:level] + folders[level + 1 :]


def _common_depth(parents: Sequence[tuple[str, ...]]) -> int:
    """Return the number of folders around all images, before those that tell images apart."""
    distinct, depth = set(parents), 0
    while len(distinct) > 1 and len({folders[: depth + 1] for folders in distinct}) == 1:
        depth += 1
    return depth


def _ids(paths: Sequence[Path]) -> list[str]:
    """Return ids: file names, with folders, then also the suffix, if they would repeat."""
    ids: list[str] = []
    for is_long, has_suffix in ((False, False), (True, False), (True, True)):
        ids = [_id_of(path, is_long=is_long, has_suffix=has_suffix) for path in paths]
        if len({name.casefold() for name in ids}) == len(ids):
            break
    return ids


def _id_of(path: Path, *, is_long: bool, has_suffix: bool) -> str:
    name = path.name if has_suffix else path.stem
    return safe_id("_".join((*path.parent.parts, name)) if is_long else name)
