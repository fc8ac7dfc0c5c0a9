"""Values of JSON files as text; a value of another type than expected becomes "", unknown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from volseg.inputs import shorten
from volseg.words import format_list, format_number

MAX_TEXT, MAX_NAMES = 800, 20  # characters of a text; names in a list
UNITS = {"_mm3": "mm³", "_mm": "mm"}  # end of the name of a setting → its unit
NETWORK = re.compile(r"(?:segmentation|classifier)(?:_\d+)?")  # names in weights_sha256


def clean(text: str) -> str:
    """Return a text of a stranger on one line, without control characters.

    >>> clean(" a\\n\\x1b[31mb ")
    'a [31mb'
    """
    kept = (char if char.isprintable() else " " for char in text)
    return shorten(" ".join("".join(kept).split()), MAX_TEXT)


def show_text(value: Any) -> str:
    """Return a text without its final full stop, or a number."""
    return clean(value).rstrip(". ") if isinstance(value, str) else show_number(value)


def show_number(value: Any) -> str:
    """Return a number with at most six digits.

    >>> show_number(0.002), show_number(2), show_number(149.785305)
    ('0.002', '2', '149.785')
    """
    if not _is_number(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:g}"


def show_short(value: Any) -> str:
    """Return a number with three digits, or as a whole number.

    >>> show_short(4.3722), show_short(-367.75), show_short(11281.04)
    ('4.37', '-368', '11281')
    """
    return format_number(value, 3) if _is_number(value) else ""


def show_signed(value: Any) -> str:
    """Return a change with its sign."""
    return f"{'+' * (value > 0)}{show_short(value)}" if _is_number(value) else ""


def show_extent(low: Any, high: Any) -> str:
    """Return the length between two coordinates."""
    return show_short(high - low) if _is_number(low) and _is_number(high) else ""


def show_names(value: Any) -> str:
    """Return names that a cell joins.

    >>> show_names("benign|malignant")
    'benign, malignant'
    """
    from volseg.recipe.classification import SEPARATOR  # imports numpy; `volseg --help` needs none

    return clean(value).replace(SEPARATOR, ", ") if isinstance(value, str) else ""


def show_positive(value: Any) -> str:
    return show_number(value) if _is_number(value) and value > 0 else ""


def show_several(value: Any) -> str:
    """Return a number above 1, such as that of the networks of an ensemble."""
    return show_number(value) if _is_number(value) and value > 1 else ""


def show_score(value: Any) -> str:
    return f"{value:.3f}" if _is_number(value) else ""


def show_percent(value: Any) -> str:
    return f"{100 * value:.3g} %" if _is_number(value) else ""


def show_count(*values: Any) -> str:
    """Return the sum of counts; of a list or an object, that of its entries."""
    counts = [len(value) if isinstance(value, list | Mapping) else value for value in values]
    return str(sum(counts)) if all(isinstance(n, int) and _is_number(n) for n in counts) else ""


def show_some(*values: Any) -> str:
    """Return the sum of counts unless it is 0."""
    count = show_count(*values)
    return "" if count == "0" else count


def show_interval(value: Any) -> str:
    """Return the ends of an interval."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return " to ".join(map(show_score, value)) if is_pair else ""


def show_range(value: Any) -> str:
    """Return the ends of a range of settings."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return " to ".join(map(show_number, value)) if is_pair else ""


def show_sizes(value: Any) -> str:
    """Return numbers along several axes.

    >>> show_sizes([0.5, 0.5, 2])
    '0.5 × 0.5 × 2'
    """
    if not isinstance(value, list) or not value or not all(map(_is_number, value)):
        return ""
    return " × ".join(map(show_number, value))


def show_spans(value: Any) -> str:
    """Return the smallest and largest number along each axis.

    >>> show_spans([[0.7, 2.5], [0.8, 2.5]])
    '0.7 to 0.8 × 2.5'
    """
    rows = value if isinstance(value, list) else []
    is_table = bool(rows) and all(show_sizes(row) and len(row) == len(rows[0]) for row in rows)
    if not is_table:
        return ""
    ends = [(format_number(min(axis), 3), format_number(max(axis), 3)) for axis in zip(*rows)]
    return " × ".join(low if low == high else f"{low} to {high}" for low, high in ends)


def show_list(value: Any) -> str:
    """Return texts or numbers, or the names in an object, separated by commas."""
    entries = list(value) if isinstance(value, list | Mapping) else []
    texts = [show_text(entry) for entry in entries]
    return format_list(texts, MAX_NAMES) if all(texts) else ""


def show_sentences(value: Any) -> str:
    """Return texts separated by semicolons."""
    texts = [show_text(entry) for entry in value] if isinstance(value, list) else []
    return "; ".join(texts) if all(texts) else ""


def show_pairs(value: Any) -> str:
    """Return names with their values.

    >>> show_pairs({"nodule": 1, "vessel": 2})
    'nodule (1), vessel (2)'
    """
    if not isinstance(value, Mapping) or not all(map(show_text, value.values())):
        return ""
    return format_list([f"{clean(k)} ({show_text(v)})" for k, v in value.items()], MAX_NAMES)


def show_settings(value: Any) -> str:
    """Return the settings of a network, a loss or a step, except for its name.

    >>> show_settings({"name": "unet3d", "features": [6, 12], "strides": [[1, 1, 2]], "on": True})
    'features 6, 12; strides 1 × 1 × 2; on'
    >>> show_settings({"step": "remove_small", "min_volume_mm3": 8.0})
    'min volume 8 mm³'
    """
    if not isinstance(value, Mapping):
        return ""
    lines = [
        _named(name, _setting(setting))
        for name, setting in value.items()
        if name not in ("name", "step") and setting is not None and setting is not False
    ]
    return "; ".join(lines)


def show_steps(value: Any) -> str:
    """Return steps of post-processing with their settings."""
    steps = value if isinstance(value, list) else []
    if not all(isinstance(step, Mapping) and isinstance(step.get("step"), str) for step in steps):
        return ""
    return ", then ".join(_with(_words(step["step"]), show_settings(step)) for step in steps)


def show_augmentation(value: Any) -> str:
    """Return the random changes that are switched on, with probability and settings."""
    if not isinstance(value, Mapping):
        return ""
    texts = [f"flips along {show_list(value['flip_axes'])}"] if value.get("flip_axes") else []
    for name, chance in value.items():
        if name.endswith("_probability") and show_positive(chance):
            change = _words(name.removesuffix("_probability"))
            texts.append(f"{change} {show_number(chance)}")
    return "; ".join(texts)


def show_points(value: Any) -> str:
    """Return operating points: class, threshold, and what they gave on validation images."""
    points = (
        [point for point in value if isinstance(point, Mapping)] if isinstance(value, list) else []
    )
    return "; ".join(map(_point, points))


def _point(point: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{name} {show_score(point.get(name))}" for name in ("sensitivity", "specificity")
    )
    least = f"{show_text(point.get('class_name'))} from {show_score(point.get('threshold'))}"
    return f"{_words(str(point.get('name')))}: {least} ({rates})"


def show_networks(value: Any) -> str:
    """Return whether the weights are of one network or of an ensemble, by task."""
    names = (
        [name for name in value if NETWORK.fullmatch(name)] if isinstance(value, Mapping) else []
    )
    kinds = {name.partition("_")[0] for name in names}
    main = "segmentation" if "segmentation" in kinds else "classifier"
    n = sum(name.partition("_")[0] == main for name in names)
    if not n:
        return ""
    return (
        "a single network" if n == 1 else f"an ensemble of {n} networks, whose outputs are averaged"
    )


def _named(name: str, value: str) -> str:
    """Return a setting with its value and the unit that its name states."""
    unit = next((suffix for suffix in UNITS if name.endswith(suffix)), "")
    parts = (_words(name.removesuffix(unit)), value, UNITS.get(unit, ""))
    return " ".join(filter(None, parts))


def _with(name: str, settings: str) -> str:
    return f"{name} ({settings})" if settings else name


def _words(name: str) -> str:
    return clean(name).replace("_", " ")


def _setting(value: Any) -> str:
    """Return the value of a setting; "" for True, whose name says it."""
    if value is True:
        return ""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return ", ".join(map(show_sizes, value))
    if isinstance(value, Mapping):
        return _with("", show_settings(value)).strip()
    return show_list(value) if isinstance(value, list) else show_text(value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


# What stands behind the colon of a field in a template.
FORMATS: dict[str, Callable[..., str]] = {
    "text": show_text,
    "number": show_number,
    "short": show_short,
    "signed": show_signed,
    "extent": show_extent,
    "names": show_names,
    "positive": show_positive,
    "several": show_several,
    "score": show_score,
    "percent": show_percent,
    "count": show_count,
    "some": show_some,
    "interval": show_interval,
    "range": show_range,
    "sizes": show_sizes,
    "spans": show_spans,
    "list": show_list,
    "sentences": show_sentences,
    "pairs": show_pairs,
    "settings": show_settings,
    "steps": show_steps,
    "augmentation": show_augmentation,
    "points": show_points,
    "networks": show_networks,
}
