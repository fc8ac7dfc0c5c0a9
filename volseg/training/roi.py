"""Train the coarse first pass: the usual training loop, on the same cases at a coarser spacing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from volseg.inference.roi import find_region
from volseg.inference.stream import ArrayPlanes, Tiling
from volseg.inference.torch_backend import TorchBackend
from volseg.io.files import make_folder
from volseg.io.prepared import (
    IGNORED,
    PreparedCase,
    is_prepared,
    read_prepared_case,
    write_prepared_case,
)
from volseg.networks import copy_weights
from volseg.preprocessing.crop import scaled_box
from volseg.preprocessing.resample import coarsened_mask, resample
from volseg.recipe import Recipe
from volseg.training.loop import Trained, Watch, train_network
from volseg.training.ranks import Team
from volseg.training.run import Job
from volseg.training.samples import sample_voxels
from volseg.training.segmentation import SegmentationObjective


def train_roi(job: Job, team: Team, watch: Watch) -> Trained:
    """Train the network of the recipe's first pass: any label against the background.

    The metrics also state what the first pass costs and saves on the validation cases: the mean
    fraction of labelled voxels inside the region, and the mean fraction of the scan in the region.

    Args:
        job: its objective is that of the fine pass; the coarse cases are written next to the
            checkpoints.
        team, watch: as in `train_network`.
    """
    settings, fine = job.settings, job.objective
    ends = math.inf if settings.seconds is None else time.monotonic() + settings.seconds
    assert isinstance(fine, SegmentationObjective)
    coarse = _coarse_objective(job, fine, watch)
    if settings.seconds is not None:
        settings = replace(settings, seconds=max(1.0, ends - time.monotonic()))
    trained = train_network(replace(job, objective=coarse, settings=settings), team, watch)
    network = copy_weights(coarse.network(), trained.weights)
    backend = TorchBackend(network, team.fabric.device)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for case, small in zip(fine.validation_cases, coarse.validation_cases, strict=True):
        if parts and time.monotonic() > ends:
            break
        watch.tick(f"finding the region of {case.id}", 1.0)
        parts.append((case.mask, _part_in_region(case, small, backend, fine.recipe)))
    return replace(trained, metrics=dict(trained.metrics) | _region_metrics(parts))


def _coarse_objective(job: Job, fine: SegmentationObjective, watch: Watch) -> SegmentationObjective:
    """Return the objective of the first pass, with the cases of the fine one at its spacing."""
    recipe = fine.recipe.coarse
    assert recipe is not None

    def coarsen(case: PreparedCase) -> PreparedCase:
        watch.tick(f"downsampling {case.id}", 0.0)
        return _cached_coarse_case(
            case,
            spacing_mm=fine.recipe.spacing_mm,
            coarse_mm=recipe.spacing_mm,
            folder=job.checkpoints,
            seed=job.settings.seed,
        )

    validation = [coarsen(case) for case in fine.validation_cases]
    return SegmentationObjective([coarsen(case) for case in fine.training], validation, recipe)


def _part_in_region(
    case: PreparedCase, small: PreparedCase, backend: TorchBackend, recipe: Recipe
) -> np.ndarray:
    """Return the part of a case's mask inside the region that is found in the coarse case."""
    assert recipe.roi is not None and recipe.coarse is not None
    planes = ArrayPlanes(np.asarray(small.image))
    region = find_region(planes, backend, Tiling.of(recipe.coarse))
    if region is None:
        return case.mask
    margin = [recipe.roi.margin_mm / mm for mm in recipe.spacing_mm]
    return case.mask[scaled_box(region, small.mask.shape, case.mask.shape, margin).slices]


def _region_metrics(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return the mean fractions of the scan and of the labelled voxels in the regions.

    Args:
        parts: mask of each scan, and its part inside the region.
    """
    of_scan = float(np.mean([part.size / mask.size for mask, part in parts]))
    metrics = {"validation_share_of_scan": round(of_scan, 4)}
    counts = [(_count_labelled(part), _count_labelled(mask)) for mask, part in parts]
    if of_labels := [inside / n for inside, n in counts if n]:
        metrics["validation_labels_inside"] = round(float(np.mean(of_labels)), 4)
    return metrics


def coarse_case(
    case: PreparedCase,
    spacing_mm: Sequence[float],
    coarse_mm: Sequence[float],
    rng: np.random.Generator,
) -> PreparedCase:
    """Resample a prepared case to a coarser grid of the same extent, with every label as class 1.

    Args:
        spacing_mm, coarse_mm: current and new spacing along R, A, S.
        rng: draws the voxels on which patches are centred.
    """
    case.check()
    sizes = zip(case.mask.shape, spacing_mm, coarse_mm, strict=True)
    r, a, s = (max(1, round(n * fine / coarse)) for n, fine, coarse in sizes)
    image = np.stack([resample(channel, (r, a, s)) for channel in case.image])
    unannotated = case.mask == IGNORED
    mask = coarsened_mask(np.where(unannotated, 0, case.mask), (r, a, s))
    if unannotated.any():
        mask[(coarsened_mask(unannotated, (r, a, s)) > 0) & (mask == 0)] = IGNORED
    return PreparedCase(case.id, image, mask, {1: sample_voxels(mask == 1, rng)}, None, case.record)


def _cached_coarse_case(
    case: PreparedCase,
    *,
    spacing_mm: Sequence[float],
    coarse_mm: Sequence[float],
    folder: Path,
    seed: int,
) -> PreparedCase:
    """Return `coarse_case` from the folder, where the first call writes it."""
    facts = json.dumps([case.record["key"], spacing_mm, coarse_mm, seed])
    key = hashlib.sha256(facts.encode()).hexdigest()
    folder = folder / "cases"
    if not is_prepared(folder, case.id, key):
        rng = np.random.default_rng([seed, int(key[:8], 16)])
        coarse = coarse_case(case, spacing_mm, coarse_mm, rng)
        coarse = replace(coarse, record=dict(case.record) | {"key": key})
        make_folder(folder / case.id)
        write_prepared_case(folder / case.id, coarse)
    return read_prepared_case(folder, case.id)


def _count_labelled(mask: np.ndarray) -> int:
    return int(np.count_nonzero((mask > 0) & (mask != IGNORED)))
