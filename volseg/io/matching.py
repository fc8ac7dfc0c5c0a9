"""Which files belong together, judged by their names: channels of a case, a scan and its mask."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from volseg.io.formats import format_of, stem_of


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


MASK_WORDS = _set(
    "seg segs segmentation segmentations mask masks label labels dseg gt truth groundtruth roi "
    "rois annotation annotations contour contours delineation manual consensus rater lesion "
    "lesions tumor tumors tumour tumours nodule nodules labelstr labelsts"
)
SCAN_WORDS = _set(
    "image images img imgs scan scans volume volumes vol raw orig original imagestr imagests"
)
CHANNEL_WORDS = _set(
    "t1 t1w t1n t1c t1ce t1gd t1post t2 t2w t2f t2s t2star flair pd pdw dwi adc swi ct cta cect "
    "ncct pet suv mr mri"
)
MODIFIERS = _set("ce gd post pre contrast w")  # of a channel, right after its word
BIDS_FOLDERS = _set("anat func perf fmap")
DERIVATIVES = "derivatives"

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """The path of a file below the searched folder, as words in lower case.

    Args:
        path: relative to the folder.
        key: words that tell cases apart.
        role: words that say which file of a case it is, each once.
        idle: words that all scans hold and no mask does.
    """

    path: PurePath
    key: Words
    role: Words
    idle: Words = ()

    @property
    def is_mask(self) -> bool:
        return any(_is_mask_word(word) for word in self.role)

    @property
    def channel(self) -> str:
        """Name of the channel; empty if the file names none."""
        return "_".join(word for word in self.role if word not in SCAN_WORDS)


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one case.

    Args:
        id: what tells the case apart, as it is written in the names.
        patient: the same for scans of one folder, or of one `sub-` of BIDS.
        images: channel → scan; the only channel has an empty name if no file names one.
        masks: usually one.
    """

    id: str
    patient: str
    images: Mapping[str, PurePath]
    masks: Sequence[PurePath] = ()
    repeated: Sequence[PurePath] = ()  # scans of a channel that another one has


def words_in(text: str) -> Words:
    """Split a name into runs of letters and digits, in lower case.

    >>> words_in("Müller-01_T1w")
    ('müller', '01', 't1w')
    """
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def group_files(paths: Collection[PurePath]) -> list[Group]:
    """Group the files below a folder into cases, by the words that their names share.

    Words of channels and masks tell the files of a case apart, unless all names hold them. Masks
    that fit no scan by these words fit those from which all of them differ by the same words.

    Args:
        paths: relative to the folder.
    """
    names = [_split(path) for path in paths]
    names = [name for name in names if name.is_mask or not _is_derived(name.path)]
    by_key: dict[Words, list[Name]] = defaultdict(list)
    for name in _with_numbered_channels(_without_shared_roles(names)):
        by_key[name.key].append(name)
    _join_remaining_masks(by_key)
    return [_group(members) for members in by_key.values()]


def are_related(groups: Sequence[Group]) -> bool:
    """Tell whether grouping found more than single scans."""
    return any(len(group.images) > 1 or group.masks for group in groups)


def _split(path: PurePath) -> Name:
    folders = list(path.parts[:-1])
    if _is_derived(path):
        folders = folders[2:]  # the second names the program that made them
    stem = words_in(stem_of(Path(path)))
    if not format_of(Path(path)).holds_scans:
        stem = (*stem, "seg")
    kept: list[str] = []
    for folder in folders:
        words = words_in(folder)
        if folder.casefold() not in BIDS_FOLDERS and not _holds(stem, words):
            kept += words
    key: list[str] = []
    role: list[str] = []
    for word in (*kept, *stem):
        (role if _is_role(word, role) else key).append(word)
    return Name(path, tuple(key), tuple(dict.fromkeys(role)))


def _is_derived(path: PurePath) -> bool:
    return len(path.parts) > 1 and path.parts[0].casefold() == DERIVATIVES


def _is_mask_word(word: str) -> bool:
    return word.rstrip("0123456789") in MASK_WORDS


def _is_role(word: str, role: Sequence[str]) -> bool:
    if word in SCAN_WORDS | CHANNEL_WORDS or _is_mask_word(word):
        return True
    return bool(role) and word in MODIFIERS and role[-1] in CHANNEL_WORDS


def _holds(words: Words, part: Words) -> bool:
    """Tell whether a part stands in a row of words."""
    n = len(part)
    return any(words[start : start + n] == part for start in range(len(words) - n + 1))


def _without_shared_roles(names: Sequence[Name]) -> list[Name]:
    """Move words of a role that all names hold to the key: they tell no files apart."""
    shared = set.intersection(*(set(name.role) for name in names)) if names else set[str]()
    return [
        replace(
            name,
            key=(*name.key, *(word for word in name.role if word in shared)),
            role=tuple(word for word in name.role if word not in shared),
        )
        for name in names
    ]


def _with_numbered_channels(names: Sequence[Name]) -> list[Name]:
    """Take numbers as in `scan_0000`, `scan_0001` for channels, where masks or all cases say so.

    Either masks go with the names without numbers, or every case has the same two or more numbers.
    """
    numbers = _numbers_of([name.key for name in names if not name.is_mask])
    masks = {name.key for name in names if name.is_mask}
    if () in numbers or not masks <= numbers.keys():
        return list(names)
    if not masks and (len(set(numbers.values())) != 1 or len(next(iter(numbers.values()))) < 2):
        return list(names)
    return [
        name if name.is_mask else replace(name, key=name.key[:-1], role=(*name.role, name.key[-1]))
        for name in names
    ]


def _numbers_of(scans: Collection[Words]) -> dict[Words, Words]:
    """Return key without its last word → these words, sorted; empty unless all are `0000` … `0009`.

    >>> _numbers_of([("a", "0000"), ("a", "0001"), ("b", "0000")])
    {('a',): ('0000', '0001'), ('b',): ('0000',)}
    """
    numbers: dict[Words, Words] = {}
    for *key, last in filter(None, scans):
        if re.fullmatch(r"000\d", last):
            numbers[tuple(key)] = tuple(sorted((*numbers.get(tuple(key), ()), last)))
    n_numbered = sum(map(len, numbers.values()))
    return numbers if n_numbered == len(scans) else {}


def _join_remaining_masks(by_key: dict[Words, list[Name]]) -> None:
    """Give masks without a scan to the scans that they fit without the words of one side only.

    Only if each of them then fits exactly one scan.
    """
    masks = [key for key, members in by_key.items() if all(name.is_mask for name in members)]
    scans = [key for key in by_key if key not in masks]
    for mask, (scan, idle) in pair_keys(scans, masks).items():
        members = [replace(name, idle=idle) for name in by_key[scan]]
        by_key[scan] = members + by_key.pop(mask)


def pair_keys(
    scans: Collection[Words], masks: Collection[Words]
) -> dict[Words, tuple[Words, Words]]:
    """Return mask → scan, and words of the scan to ignore, without words that one side shares.

    Empty unless every mask fits one scan, and no two of them the same.
    """
    for side in ("masks", "scans", "both"):
        idle_in_masks = _idle(masks, scans) if side != "scans" else frozenset()
        idle_in_scans = _idle(scans, masks) if side != "masks" else frozenset()
        scan_of = {_without(key, idle_in_scans): key for key in scans}
        mask_of = {_without(key, idle_in_masks): key for key in masks}
        are_unique = len(scan_of) == len(scans) and len(mask_of) == len(masks)
        if are_unique and () not in mask_of and mask_of.keys() <= scan_of.keys():
            pairs = {mask: scan_of[short] for short, mask in mask_of.items()}
            return {
                mask: (scan, tuple(word for word in scan if word in idle_in_scans))
                for mask, scan in pairs.items()
            }
    return {}


def pair_names(scans: Collection[str], masks: Collection[str]) -> dict[str, str]:
    """Return name of a scan → name of its mask: equal names, else those that differ alike.

    Other names pair only if they differ by the same words for all scans or for all masks.
    """
    equal = {name: name for name in scans if name in masks}
    if len(equal) in (len(scans), len(masks)):
        return equal
    scan_of, mask_of = ({words_in(name): name for name in names} for names in (scans, masks))
    if len(scan_of) < len(scans) or len(mask_of) < len(masks):
        return equal
    pairs = {scan: mask for mask, (scan, _) in pair_keys(scan_of, mask_of).items()}
    if not pairs:
        pairs = {scan: mask for scan, (mask, _) in pair_keys(mask_of, scan_of).items()}
    if len(pairs) <= len(equal):
        return equal
    return {scan_of[scan]: mask_of[mask] for scan, mask in pairs.items()}


def _idle(keys: Collection[Words], others: Collection[Words]) -> frozenset[str]:
    """Return the words that all keys hold and not all others do."""
    if not keys or not others:
        return frozenset()
    return frozenset.intersection(*map(frozenset, keys)) - frozenset.intersection(
        *map(frozenset, others)
    )


def _without(key: Words, words: Collection[str]) -> Words:
    return tuple(word for word in key if word not in words)


def _group(members: Sequence[Name]) -> Group:
    images: dict[str, PurePath] = {}
    repeated: list[PurePath] = []
    scans = [name for name in members if not name.is_mask]
    for name in scans:
        if name.channel in images:
            repeated.append(name.path)
        images.setdefault(name.channel, name.path)
    masks = [name.path for name in members if name.is_mask]
    name = (scans or members)[0]
    case_id = _id_of(name)
    subject = re.match(r"sub-[^\W_]+", case_id)
    patient = subject[0] if subject else (_folders_of(name) or [case_id])[0]
    return Group(case_id, patient, images, masks, repeated)


def _id_of(name: Name) -> str:
    """Return the name of a file without the words of its role, below folders it does not repeat."""
    stem = stem_of(Path(name.path))
    parts = re.split(r"([\W_]+)", stem)  # words at even places, what separates them between
    for word in (*name.role, *name.idle):
        place = next((i for i in range(0, len(parts), 2) if parts[i].casefold() == word), None)
        if place is not None:
            del parts[place : place + 2]
    stem = "".join(parts).strip("_-. ")
    words = words_in(stem)
    if set(words) <= SCAN_WORDS and len(name.path.parts) > 1:  # as in patient/image.nii
        stem, words = "", ()
    folders = [part for part in _folders_of(name) if not _holds(words, words_in(part))]
    return "_".join([*folders, *([stem] if stem else [])])


def _folders_of(name: Name) -> list[str]:
    """Return the folders of a file that tell cases apart."""
    folders = name.path.parts[2 if _is_derived(name.path) else 0 : -1]
    role = {*name.role, *BIDS_FOLDERS}
    return [folder for folder in folders if not set(words_in(folder)) <= role]
