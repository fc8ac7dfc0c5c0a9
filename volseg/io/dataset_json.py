"""What a `dataset.json` of nnU-Net or the Medical Decathlon states; its content is untrusted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.inputs import MAX_NAME, label_value, parse_json, shorten
from volseg.io.cases import ONE_CHANNEL
from volseg.io.tables import read_description

FILE = "dataset.json"
IGNORE = "ignore"  # nnU-Net's label of voxels excluded from training and evaluation


def stated_labels(dataset: Path) -> dict[str, int]:
    """Return name → value of the labels in `dataset.json`, without background; {} if none.

    Regions, which are lists of values, are left out. nnU-Net labels unannotated voxels `ignore`.
    """
    labels = _names(_read(dataset), "labels")
    return {name: value for name, value in _named_values(labels) if value}


def stated_regions(dataset: Path) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Return nnU-Net's overlapping regions: name → mask values, and the value written for each."""
    description = _read(dataset)
    order = description.get("regions_class_order")
    if not isinstance(order, list):
        return {}, ()
    for mistake in mistakes_in(description):
        raise VolsegError(f"{dataset}: {mistake}", fix=f"correct {FILE}", code="E_DATASET")
    regions = {
        name: tuple(map(int, values if isinstance(values, list) else [values]))
        for name, values in description["labels"].items()
        if values != 0 and name != IGNORE
    }
    return regions, tuple(map(int, order))


def stated_modalities(dataset: Path) -> dict[str, str]:
    """Return channel → modality, such as CT, from `dataset.json`; {} if it states none."""
    description = _read(dataset)
    channels = _names(description, "channel_names") or _names(description, "modality")
    names = [str(name) for name in channels.values()]
    return {ONE_CHANNEL: names[0]} | {name: name for name in names} if names else {}


def read_dataset_json(dataset: Path) -> dict[str, Any]:
    """Read the `dataset.json` of a folder, whose entries `mistakes_in` checks.

    Raises:
        VolsegError: it cannot be read or is not a JSON object.
    """
    path, fix = dataset / FILE, "repair it, or describe the data in cases.csv"
    try:
        description = parse_json(read_description(path))
    except ValueError as error:
        raise VolsegError(f"{path}: is not JSON ({error})", fix=fix) from error
    if not isinstance(description, dict):
        raise VolsegError(f"{path}: is not a JSON object", fix=fix)
    return description


def mistakes_in(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes in the labels, regions and channels of a `dataset.json`."""
    yield from _entry_mistakes(description, "labels", "a whole number, or a list of them")
    yield from _entry_mistakes(description, "channel_names", "a name")
    yield from _entry_mistakes(description, "modality", "a name")
    pairs = list(_named_values(_names(description, "labels")))
    for n_used in (Counter(name for name, _ in pairs), Counter(value for _, value in pairs)):
        for part in (part for part, n in n_used.items() if n > 1):
            yield f"{FILE}: labels has {shorten(repr(part))} twice"
    order = description.get("regions_class_order")
    if order is None:
        return
    if not (isinstance(order, list) and order and all(map(_is_label_value, order))):
        text = shorten(json.dumps(order))
        yield f"{FILE}: regions_class_order is {text}, not a list of whole numbers"
    elif not isinstance(description.get("labels"), dict):
        yield f"{FILE}: regions_class_order is given without labels"


def _entry_mistakes(description: Mapping[str, Any], key: str, expected: str) -> Iterator[str]:
    entries, is_valid = description.get(key, {}), _is_label if key == "labels" else _is_channel
    if not isinstance(entries, dict):
        text = shorten(json.dumps(entries))
        yield f"{FILE}: {key!r} is {text}, not an object of names"
        return
    for name, value in entries.items():
        if not is_valid(name, value):
            text = f"{json.dumps(shorten(name))}: {shorten(json.dumps(value))}"
            yield f"{FILE}: {key} holds {text}, where {expected} is expected"


def _read(dataset: Path) -> dict[str, Any]:
    """Read the `dataset.json` of a folder that cases.csv does not describe; {} if none."""
    if (dataset / "cases.csv").is_file() or not (dataset / FILE).is_file():
        return {}
    return read_dataset_json(dataset)


def _names(description: Mapping[str, Any], key: str) -> dict[str, Any]:
    entries = description.get(key)
    return entries if isinstance(entries, dict) else {}


def _named_values(labels: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, value) of each label that is not a region."""
    for key, entry in labels.items():
        # The Decathlon maps values to names.
        name, value = (entry, key) if key.isdecimal() else (key, entry)
        number = label_value(str(value))
        if number is not None:
            yield str(name), number


def _is_label(name: str, entry: Any) -> bool:
    """Check a label or region: its name and value, or its value and name in the Decathlon."""
    if isinstance(entry, list) and entry:
        return len(name) <= MAX_NAME and all(map(_is_label_value, entry))
    value = name if name.isdecimal() else entry
    return max(len(name), len(str(entry))) <= MAX_NAME and _is_label_value(value)


def _is_channel(number: str, name: Any) -> bool:
    return isinstance(name, str) and max(len(number), len(name)) <= MAX_NAME


def _is_label_value(value: Any) -> bool:
    """Check whether this is a mask value; the Decathlon writes it as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return 0 <= value < 2**32
    return isinstance(value, str) and value.isdecimal() and len(value) < 10
