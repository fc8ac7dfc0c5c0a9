"""Folders of scans and masks that belong together by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from volseg.errors import VolsegError
from volseg.io.cases import ONE_CHANNEL, Channels, Listing, Row, safe_id
from volseg.io.files import RECORDS
from volseg.io.formats import is_scan, stem_of
from volseg.io.matching import Group, are_related, group_files
from volseg.io.paths import visible_paths
from volseg.words import format_count

MAX_CANDIDATES = 3  # names listed for a mask without a scan


def read_folder(dataset: Path, channels: Channels, *, may_split: bool) -> Listing:
    """Read scans and masks below a folder, which belong together by their names.

    Files of `images/` and `labels/` with equal names do; else `group_files` decides.

    Args:
        may_split: take scans of several channels for cases of their own if one channel is
            requested and none has its name.
    """
    has_images = (dataset / "images").is_dir()
    if has_images and (channels.names is None or len(channels.names) == 1):
        listing = _read_equal_names(dataset, channels)
        if listing is not None:
            return listing
    paths = _paths_of(dataset)
    if has_images and not scans_in(dataset / "images"):
        return Listing(mistakes=[lone_mask(path, stem_of(path), ()) for path in paths])
    groups = group_files([path.relative_to(dataset) for path in paths])
    is_flat = not has_images and all(path.parent == dataset for path in paths)
    if is_flat and not are_related(groups):
        return _single_scans(paths, channels, dataset)
    if may_split and _takes_one_of_none(channels, groups):
        scans = (path for group in groups for path in (*group.images.values(), *group.repeated))
        listing = _single_scans([dataset / path for path in scans], channels, dataset)
        names = sorted({name for group in groups for name in group.images} - {""})
        listing.remarks.append(
            f"W_CHANNELS: {dataset}: holds scans named {', '.join(names)}, and one channel is "
            "needed, so each scan is a case of its own"
        )
        return listing
    return _listing_of(dataset, groups, channels)


def _paths_of(dataset: Path) -> list[Path]:
    """Return the scans and masks of `images/` and `labels/`, else of the folder or those below."""
    if (dataset / "images").is_dir():
        return scans_in(dataset / "images") + scans_in(dataset / "labels")
    return scans_in(dataset) or _scans_below(dataset)


def _single_scans(paths: Sequence[Path], channels: Channels, origin: Path) -> Listing:
    return Listing([row_of_scan(path, channels, where=str(path), origin=origin) for path in paths])


def _takes_one_of_none(channels: Channels, groups: Sequence[Group]) -> bool:
    """Tell whether one channel is requested of cases with several, none of which has its name."""
    names = {name for group in groups for name in group.images}
    requested = [name.casefold() for name in channels.names or ()]
    return len(requested) == 1 and len(names) > 1 and requested[0] not in names


def _read_equal_names(dataset: Path, channels: Channels) -> Listing | None:
    """Read `images/` and `labels/`; None unless each mask has the name of a scan of its own."""
    images = dataset / "images"
    scans, masks = scans_in(images), scans_in(dataset / "labels")
    label_of = {stem_of(path): path for path in masks}
    if len(label_of) < len(masks) or not label_of.keys() <= set(map(stem_of, scans)):
        return None
    listing = Listing()
    for path in scans:
        label = label_of.get(stem_of(path))
        row = row_of_scan(path, channels, where=str(path), origin=images)
        why = "no mask has its name" if label is None else "scan and mask have the same name"
        listing.rows.append(replace(row, reference=label, why=why))
    return listing


def _listing_of(dataset: Path, groups: Sequence[Group], channels: Channels) -> Listing:
    """Make a row of each group; report groups that are no case."""
    cases = [group for group in groups if group.images]
    ids = [group.id for group in cases]
    lone = [(group.id, mask) for group in groups if not group.images for mask in group.masks]
    listing = Listing(mistakes=[lone_mask(dataset / mask, name, ids) for name, mask in lone])
    reader = _GroupReader.of(dataset, cases, channels)
    for group in cases:
        listing.mistakes += reader.mistakes_in(group)
        try:
            listing.rows.append(reader.row_of(group))
        except VolsegError as error:
            listing.mistakes.append(error.problem)
    listing.remarks += _remarks(dataset, listing.rows)
    return listing


@dataclass(frozen=True, slots=True)
class _GroupReader:
    """Makes rows of the groups of a folder that hold scans.

    Args:
        names: channels of all groups. n_scans: patient → number of groups.
    """

    dataset: Path
    channels: Channels
    names: Sequence[str]
    n_scans: Mapping[str, int]

    @classmethod
    def of(cls, dataset: Path, groups: Sequence[Group], channels: Channels) -> _GroupReader:
        names = dict.fromkeys(name for group in groups for name in group.images)
        return cls(dataset, channels, list(names), Counter(group.patient for group in groups))

    def row_of(self, group: Group) -> Row:
        """Return the row of a group.

        Raises:
            VolsegError: it lacks a requested channel.
        """
        first = self._first(group)
        images = self.channels.pick(self._images(group), str(first))
        return Row(
            where=str(first),
            id=safe_id(group.id or stem_of(first)),
            images=images,
            reference=self.dataset / group.masks[0] if group.masks else None,
            patient=group.patient if self.n_scans[group.patient] > 1 else None,
            why=f"{format_count(len(images) + len(group.masks), 'file')} with this id in folder or "
            "file name",
        )

    def mistakes_in(self, group: Group) -> Iterator[str]:
        """Yield that a group has two scans of one channel, two masks, or not all channels."""
        first = self._first(group)
        for path in group.repeated:
            yield (
                f"{self.dataset / path}: by its name belongs to the same case as {first}, and to "
                "the same channel; rename one of them"
            )
        if len(group.masks) > 1:
            names = ", ".join(str(self.dataset / mask) for mask in group.masks)
            yield (
                f"{first}: has {len(group.masks)} masks: {names}; name the one to use in the table "
                f"that `volseg cases {self.dataset} --out cases.csv` writes"
            )
        everywhere = [self._channel(name) for name in self.names]
        yield from self.channels.lacking(self._images(group), everywhere, str(first))

    def _first(self, group: Group) -> Path:
        return self.dataset / next(iter(group.images.values()))

    def _images(self, group: Group) -> dict[str, Path]:
        return {self._channel(name): self.dataset / path for name, path in group.images.items()}

    def _channel(self, name: str) -> str:
        """Return the channel of a name; one that all scans have tells nothing, if one is requested.

        Without a request for channels it is kept, as the recipe may need it.
        """
        is_only = len(self.names) == 1 and self.channels.names is not None
        return ONE_CHANNEL if is_only or not name else name


def _remarks(dataset: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Say in one line how files were put together, with an example."""
    row = max(rows, key=lambda row: (row.reference is not None, len(row.images)), default=None)
    if row is None:
        return
    files = [f"{path.name} ({name})" for name, path in row.images.items()]
    files += [] if row.reference is None else [f"{row.reference.name} (mask)"]
    yield (
        f"N_NAMES: {dataset}: {format_count(len(rows), 'case')} put together by their names, such "
        f"as {row.id}: {', '.join(files)}"
    )


def lone_mask(path: Path, name: str, scans: Sequence[str]) -> str:
    near = get_close_matches(name, scans, n=MAX_CANDIDATES, cutoff=0.5)
    hint = f"; similar names are {', '.join(near)}" if near else ""
    return f"{path}: no scan goes with this mask, by its name{hint}"


def _scans_below(folder: Path) -> list[Path]:
    """Return the scans in all folders below, except hidden folders and results of volseg."""
    scans: list[Path] = []
    for path in visible_paths(folder):
        if path.is_dir() and not (path / RECORDS).is_dir():
            scans += scans_in(path) + _scans_below(path)
    return scans


def row_of_scan(path: Path, channels: Channels, *, where: str, origin: Path) -> Row:
    """Return the row of a scan of one channel, whose id is its name."""
    images = channels.pick({ONE_CHANNEL: path}, str(origin))
    return Row(where=where, id=safe_id(stem_of(path)), images=images, why="a scan by itself")


# ---- files


def scans_in(folder: Path) -> list[Path]:
    return [path for path in visible_paths(folder) if is_scan(path)]
