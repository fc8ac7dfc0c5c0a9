"""Close a recipe: a value, with its reason, in place of each "auto"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.errors import VolsegError
from volseg.networks import architecture
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import (
    AUTO,
    PLANNED_LAYERS,
    Network,
    Normaliser,
    Recipe,
    Text,
    Train,
    parse_recipe,
)
from volseg.sizing import (
    ANISOTROPIC,
    MOST_FEATURES,
    SMALLEST_EDGE,
    STEPS,
    WIDTHS,
    Budget,
    Scans,
    Size,
    choose_size,
)
from volseg.words import format_sizes

# An axis this many times coarser than the finest is resampled to a low percentile, not the median.
ANISOTROPY = 3.0
SMALLEST_PATCH = 16  # voxels along an axis, or the whole scan: less shows no context
LARGEST_LESION = 128**3  # voxels of a patch that lesions may ask for: organs are seen part by part
FEW_SLICES = 8  # of the median scan along its shortest axis: hardly a volume
SMALL_FRACTION = 0.1  # of the median scan in a patch, below which context is missing
# (labelled fraction of the voxels up to which it holds, fraction of patches centred on a label)
RARITY = ((0.001, 0.67), (0.05, 0.5), (1.0, 0.34))
DEFAULT_BUDGET = Budget(memory=8 << 30)
STATED = "stated by the recipe"
MEDIAN_LESION, SEEN = CONTEXT = ("median lesion", "part of a scan in a patch")
LEVELS = (
    f"an axis is halved while {SMALLEST_EDGE} voxels remain and it is less than "
    f"{ANISOTROPIC:g} times coarser than the finest"
)
FEATURES = (
    f"doubled per level up to {MOST_FEATURES}; the widest of {', '.join(map(str, WIDTHS))} "
    "that fits with this patch"
)
WINDOW = {  # key of a normaliser → the statistic that it gets, and its name
    "low": ("p00_5", "0.5 percentile"),
    "high": ("p99_5", "99.5 percentile"),
    "mean": ("mean", "mean"),
    "sd": ("sd", "standard deviation"),
}


class Reason(BaseModel):
    """A decision of a plan, for people; `key` is that in the recipe, as `train.batch_size`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: Text
    setting: Text
    value: Text
    reason: Text


class Closed(NamedTuple):
    """A recipe without "auto", and the reason of each of its decisions."""

    recipe: Recipe
    reasons: tuple[Reason, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the content of `from_json`."""
        reasons = [line.model_dump() for line in self.reasons]
        return {"recipe": self.recipe.model_dump(mode="json"), "reasons": reasons}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Closed:
        """Return what `as_json` was called on.

        Raises:
            ValueError, KeyError, TypeError, VolsegError: it is not such content, or not closed.
        """
        recipe = parse_recipe(content["recipe"], where="the plan")
        if recipe.open_keys:
            raise ValueError(f"{', '.join(recipe.open_keys)} is not planned")
        return Closed(recipe, tuple(map(Reason.model_validate, content["reasons"])))


def close(
    recipe: Recipe, fingerprint: DatasetFingerprint, budget: Budget = DEFAULT_BUDGET
) -> Closed:
    """Return the recipe with a value, derived from the fingerprint, in place of each "auto".

    Raises:
        VolsegError: the recipe can only be run, not trained, or nothing fits the budget.
    """
    _refuse_untrainable(recipe)
    spacing, why_spacing = _spacing(recipe, fingerprint)
    forms = {
        name: _normaliser(name, recipe.preprocess.normaliser_of(name), fingerprint)
        for name in recipe.data.channels
    }
    size, why_size = _size(recipe, fingerprint, spacing, budget)
    fraction, why_fraction = _foreground_fraction(recipe, fingerprint)
    closed = _with(
        recipe,
        spacing_mm=spacing,
        forms=forms,
        train={
            "patch_shape": size.patch_shape,
            "batch_size": size.batch_size,
            "foreground_fraction": fraction,
        },
        layers={name: json.loads(json.dumps(getattr(size, name))) for name in PLANNED_LAYERS},
    )
    why = {"spacing": why_spacing, "patches on labels": why_fraction} | why_size
    for name in recipe.data.channels:
        form = recipe.preprocess.normaliser_of(name)
        statistics = ", ".join(WINDOW[key][1] for key in form.open_keys)
        text = f"{statistics} under the training labels" if statistics else form.why
        why[_intensities(name)] = text or STATED
    lines = _decisions(recipe, closed)
    reasons = [line.model_copy(update={"reason": why.get(line.setting, STATED)}) for line in lines]
    return Closed(closed, (*reasons, *_context(recipe, closed, fingerprint)))


def fill(recipe: Recipe, plan: Closed) -> Closed:
    """Return the recipe with the values of a closed one in place of each "auto".

    Raises:
        VolsegError: the closed recipe lacks one of them.
    """
    other = plan.recipe
    if missing := list(_missing(recipe, other)):
        raise VolsegError(
            f"the plan has no value for {', '.join(missing)}, which recipe {recipe.name!r} "
            "leaves open",
            fix="state it in the recipe, or make a new plan with `volseg plan`",
            code="E_PLAN",
        )
    forms = {name: _form(recipe, name) for name in recipe.data.channels}
    closed = _with(
        recipe,
        spacing_mm=other.spacing_mm,
        forms={
            name: form.model_copy(
                update={key: getattr(_form(other, name), key) for key in form.open_keys}
            )
            for name, form in forms.items()
        },
        train=other.train.model_dump(include={"patch_shape", "batch_size", "foreground_fraction"}),
        layers=other.network.settings,
    )
    earlier = {line.setting: line for line in plan.reasons}
    lines = [_kept(line, earlier) for line in _decisions(recipe, closed)]
    context = [line for line in plan.reasons if line.setting in CONTEXT]
    return Closed(closed, (*lines, *context))


def _missing(recipe: Recipe, closed: Recipe) -> Iterator[str]:
    """Yield what the recipe leaves open and another, closed one does not have."""
    for name in recipe.data.channels:
        form = _form(recipe, name)
        is_known = name in closed.data.channels and isinstance(_form(closed, name), type(form))
        if form.open_keys and not is_known:
            yield f"the intensity window of channel {name!r}"
    settings = recipe.network.settings
    for name in PLANNED_LAYERS:
        if settings.get(name) == AUTO and name not in closed.network.settings:
            yield f"network.{name}"


def _form(recipe: Recipe, channel: str) -> Normaliser:
    return recipe.preprocess.normaliser_of(channel)


def _kept(line: Reason, earlier: Mapping[str, Reason]) -> Reason:
    former = earlier.get(line.setting)
    return former if former is not None and former.value == line.value else line


def _with(
    recipe: Recipe,
    *,
    spacing_mm: tuple[float, float, float],
    forms: Mapping[str, Normaliser],
    train: Mapping[str, Any],
    layers: Mapping[str, Any],
) -> Recipe:
    """Return the recipe with these values in place of each "auto"."""
    preprocess = recipe.preprocess.normalised_by(forms)
    if preprocess.spacing_mm == AUTO:
        preprocess = preprocess.model_copy(update={"spacing_mm": spacing_mm})
    open_train = {key: n for key, n in train.items() if getattr(recipe.train, key) == AUTO}
    settings = recipe.network.settings
    open_layers = {key: layers[key] for key, value in settings.items() if value == AUTO}
    return recipe.model_copy(
        update={
            "preprocess": preprocess,
            "train": recipe.train.model_copy(update=open_train),
            "network": Network(name=recipe.network.name, **(settings | open_layers)),
        }
    )


def _decisions(recipe: Recipe, closed: Recipe) -> list[Reason]:
    """Return a line per decision with its value in the closed recipe, as if all were stated."""
    lines = [("preprocess.spacing_mm", "spacing", f"{format_sizes(closed.spacing_mm)} mm")]
    for name in closed.data.channels:
        channels = closed.preprocess.normalise_channels
        key = f"normalise_channels.{name}" if name in channels else "normalise"
        lines.append((f"preprocess.{key}", _intensities(name), _form(closed, name).shown))
    lines.append(("train.patch_shape", "patch", f"{format_sizes(closed.patch_shape)} voxels"))
    lines.append(("train.batch_size", "batch", str(closed.batch_size)))
    if recipe.network.settings.get("features") == AUTO:
        features, strides, kernels = (closed.network.settings[name] for name in PLANNED_LAYERS)
        flat = [f"level {n}" for n, kernel in enumerate(kernels) if 1 in kernel]
        lines += [
            ("network.strides", "levels", str(len(strides))),
            ("network.strides", "strides", "; ".join(map(format_sizes, strides))),
            ("network.kernels", "kernels", f"flat at {', '.join(flat)}" if flat else "3 × 3 × 3"),
            ("network.features", "features", ", ".join(map(str, features))),
        ]
    else:
        lines.append(("network.name", "network", closed.network.name))
    fraction = f"{closed.train.foreground_fraction:.0%}"
    lines.append(("train.foreground_fraction", "patches on labels", fraction))
    return [
        Reason(key=key, setting=setting, value=value, reason=STATED)
        for key, setting, value in lines
    ]


def check_budget(recipe: Recipe, budget: Budget) -> None:
    """Check that a step of training with a closed recipe fits into the budget's memory.

    Networks whose architecture has no `size` pass.

    Raises:
        VolsegError: it does not; the fix names a number that would fit.
    """
    size = size_of(recipe)
    if size is None:
        return
    channels, outputs = len(recipe.data.channels), recipe.data.n_outputs
    needed = size.training_bytes(channels, outputs, half=budget.half)
    if needed <= budget.memory:
        return
    smaller = [
        batch
        for batch in range(1, size.batch_size)
        if replace(size, batch_size=batch).training_bytes(channels, outputs, half=budget.half)
        <= budget.memory
    ]
    enough = math.ceil(needed / 2**30 * 10) / 10
    number = f"batch_size {smaller[-1]}" if smaller else "a smaller patch_shape"
    raise VolsegError(
        f"a step with patch {format_sizes(size.patch_shape)}, batch {size.batch_size} and features "
        f"{', '.join(map(str, size.features))} takes about {needed / 2**30:.2f} GB, and the budget "
        f"is {budget.memory / 2**30:.2f} GB",
        fix=f"give --vram {enough:g}G, or {number} in the recipe",
        code="E_BUDGET",
    )


def size_of(recipe: Recipe) -> Size | None:
    """Return the network and batches of a closed recipe; None if they are not modelled."""
    return architecture(recipe.network).size(recipe.patch_shape, recipe.batch_size)


def step_flops(recipe: Recipe) -> float | None:
    """Return the operations of a training step with a closed recipe; None if not modelled."""
    size = size_of(recipe)
    if size is None:
        return None
    flops = size.step_flops(len(recipe.data.channels), recipe.data.n_outputs)
    return flops * recipe.train.accumulate


def _refuse_untrainable(recipe: Recipe) -> None:
    """Raise if a recipe has regions without their labels: it can only be run."""
    if recipe.data.regions_class_order is not None and recipe.data.regions is None:
        raise VolsegError(
            f"recipe {recipe.name!r} has overlapping regions, but does not say of which labels "
            "they consist",
            fix="add data.regions, such as { tumour = [1, 2], core = [2] }, or leave out "
            "data.regions_class_order",
            code="E_RECIPE",
        )


def _spacing(
    recipe: Recipe, fingerprint: DatasetFingerprint
) -> tuple[tuple[float, float, float], str]:
    """Return the recipe's spacing, or else the median spacing per axis, and why.

    A strongly anisotropic axis takes the 10th percentile, so scans with thin slices keep detail.
    """
    preprocess = recipe.preprocess
    if preprocess.spacing_mm != AUTO:
        return preprocess.spacing_mm, STATED
    if (preprocess.axes, preprocess.transpose) != ("canonical", (0, 1, 2)):
        raise VolsegError(
            f"recipe {recipe.name!r} has other axes than R, A, S, so its spacing cannot be planned",
            fix="state preprocess.spacing_mm in the order of its axes",
            code="E_RECIPE",
        )
    spacings = np.array(fingerprint.spacings_mm)
    spacing, why = np.median(spacings, axis=0), "the median of the training scans"
    coarse = int(np.argmax(spacing))
    if spacing[coarse] > ANISOTROPY * spacing.min():
        finer = max(
            float(np.percentile(spacings[:, coarse], 10)), float(np.delete(spacing, coarse).max())
        )
        ratio = spacing[coarse] / spacing.min()
        why += f"; along {'RAS'[coarse]} ({ratio:.1f} times coarser) the 10th percentile"
        spacing[coarse] = finer
    r, a, s = (round(float(value), 4) for value in spacing)
    return (r, a, s), why


def _normaliser(channel: str, form: Normaliser, fingerprint: DatasetFingerprint) -> Normaliser:
    """Return the normaliser with the statistics of the channel in place of each "auto"."""
    if not form.open_keys:
        return form
    if channel not in fingerprint.foreground:
        raise VolsegError(
            f"no training case has channel {channel!r}, so its intensity window cannot be planned",
            fix="add cases with this channel, or leave it out of data.channels",
            code="E_DATASET",
        )
    statistics = fingerprint.foreground[channel]
    planned = {key: getattr(statistics, WINDOW[key][0]) for key in form.open_keys}
    try:
        return type(form).model_validate(form.model_dump() | planned)
    except ValidationError as error:
        values = ", ".join(f"{key} {value:g}" for key, value in planned.items())
        problem = f"the intensities of channel {channel!r} under the labels give {values}"
        if statistics.p00_5 == statistics.p99_5:
            problem = f"channel {channel!r} has the same intensity under all labels"
        raise VolsegError(
            f"{problem}, so its intensity window cannot be planned",
            fix="check the masks, or state the window under [preprocess.normalise]",
            code="E_DATASET",
        ) from error


def _size(
    recipe: Recipe,
    fingerprint: DatasetFingerprint,
    spacing: tuple[float, float, float],
    budget: Budget,
) -> tuple[Size, dict[str, str]]:
    """Choose patch, batch and network where the recipe leaves them open, and say why."""
    train = recipe.train
    patch = None if train.patch_shape == AUTO else train.patch_shape
    batch = None if train.batch_size == AUTO else train.batch_size
    if recipe.network.settings.get("features") != AUTO:
        assert patch is not None and batch is not None, "a recipe refuses this"
        return Size(features=(), strides=(), kernels=(), patch_shape=patch, batch_size=batch), {}
    scans = Scans(
        shape=_median_shape(fingerprint, spacing),
        spacing_mm=spacing,
        n_cases=fingerprint.n_cases,
        channels=len(recipe.data.channels),
        outputs=recipe.data.n_outputs,
    )
    size = choose_size(
        scans,
        budget,
        patch_shape=patch,
        batch_size=batch,
        smallest_patch=_smallest_patch(_lesion_shape(fingerprint, spacing), scans.shape),
    )
    return size, _why_size(size, scans, budget, train)


def _why_size(size: Size, scans: Scans, budget: Budget, train: Train) -> dict[str, str]:
    """Return the reasons for the values of a size that training leaves open."""
    why = {
        "levels": LEVELS,
        "strides": "finest level first",
        "kernels": "flat along an axis while it is coarser than the others",
        "features": FEATURES,
    }
    limit = _limit(size, scans, budget)
    if train.patch_shape == AUTO:
        seen = min(1.0, math.prod(size.patch_shape) / math.prod(scans.shape))
        scan = format_sizes(round(n) for n in scans.shape)
        why["patch"] = f"covers {seen:.0%} of the median scan ({scan} voxels); {limit}"
    if train.batch_size == AUTO:
        why["batch"] = f"fits the budget: {limit}"
    return why


def _limit(size: Size, scans: Scans, budget: Budget) -> str:
    """Return what a step takes of the budget, for people."""
    needed = size.training_bytes(scans.channels, scans.outputs, half=budget.half) / 2**30
    limit = f"a step takes about {needed:.2f} of the {budget.memory / 2**30:.1f} GB"
    if budget.flops is not None:
        steps = budget.flops / size.step_flops(scans.channels, scans.outputs)
        limit += f" and the time allows about {steps:.0f} steps (the target is {STEPS})"
    return limit


def _lesion_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[int, int, int] | None:
    """Return the extent of the median lesion in voxels of this spacing; None if it is unknown."""
    if fingerprint.lesion_extent_mm is None:
        return None
    lengths = zip(fingerprint.lesion_extent_mm, spacing, strict=True)
    r, a, s = (max(1, math.ceil(length / mm - 1e-3)) for length, mm in lengths)
    return r, a, s


def _smallest_patch(
    lesion: tuple[int, int, int] | None, median: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Return the smallest patch in which a network can learn what a lesion looks like."""
    edges = [max(n, SMALLEST_PATCH) for n in lesion or (1, 1, 1)]
    shrink = max(1.0, math.prod(edges) / LARGEST_LESION) ** (1 / 3)
    pairs = zip(edges, median, strict=True)
    r, a, s = (max(1, min(math.ceil(edge / shrink), math.ceil(n))) for edge, n in pairs)
    return r, a, s


def _median_shape(
    fingerprint: DatasetFingerprint, spacing: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the median shape of the scans on a grid of this spacing."""
    extents = np.array(fingerprint.shapes) * np.array(fingerprint.spacings_mm)
    r, a, s = (float(n) for n in np.median(extents / np.array(spacing), axis=0))
    return max(1.0, r), max(1.0, a), max(1.0, s)


def _foreground_fraction(recipe: Recipe, fingerprint: DatasetFingerprint) -> tuple[float, str]:
    """Return the fraction of patches centred on a label, larger for rarer labels, and why."""
    if recipe.train.foreground_fraction != AUTO:
        return recipe.train.foreground_fraction, STATED
    n_voxels = sum(math.prod(shape) for shape in fingerprint.shapes)
    labelled = sum(fingerprint.label_voxels.values()) / n_voxels
    fraction = next(fraction for most, fraction in RARITY if labelled <= most)
    why = f"{labelled:.2%} of the voxels are labelled; the rarer, the more patches on labels"
    return fraction, why


def _context(recipe: Recipe, closed: Recipe, fingerprint: DatasetFingerprint) -> list[Reason]:
    """Return lines that compare a patch with the lesions, if it was planned, and with a scan."""
    lines, patch = [], closed.patch_shape
    lesion = _lesion_shape(fingerprint, closed.spacing_mm)
    if lesion is not None and recipe.network.settings.get("features") == AUTO:
        cut = any(p < n for p, n in zip(patch, lesion, strict=True))
        reason = "larger than a patch, so seen part by part" if cut else "fits into a patch"
        lines.append((MEDIAN_LESION, f"{format_sizes(lesion)} voxels", reason))
    median = _median_shape(fingerprint, closed.spacing_mm)
    pairs = zip(median, patch, strict=True)
    seen = math.prod(min(n, p) for n, p in pairs) / math.prod(median)
    if min(median) < FEW_SLICES:
        reason = (
            f"nearly 2D, with {min(median):.0f} slices: a patch holds all of them, and kernels are "
            "flat where slices are thick"
        )
    elif seen < SMALL_FRACTION:
        reason = "little; a coarse first pass ([roi] in the recipe) would give a patch context"
    else:
        reason = "enough context, so no coarse first pass is needed"
    lines.append((SEEN, f"{seen:.0%}", reason))
    return [
        Reason(key="train.patch_shape", setting=setting, value=value, reason=reason)
        for setting, value, reason in lines
    ]


def _intensities(channel: str) -> str:
    return f"intensities of {channel}"
