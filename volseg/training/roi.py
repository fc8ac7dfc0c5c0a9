"""Train the coarse first pass: the usual training loop, on the same cases at a coarser spacing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
    assert isinstance(fine, SegmentationObjective) and fine.recipe.coarse is not None
    make = partial(
        _cached_coarse_case,
        spacing_mm=fine.recipe.spacing_mm,
        coarse_mm=fine.recipe.coarse.spacing_mm,
        folder=job.checkpoints,
        seed=settings.seed,
    )

    def coarsen(case: PreparedCase) -> PreparedCase:
        watch.tick(f"downsampling {case.id}", 0.0)
        return make(case)

    validation = [coarsen(case) for case in fine.validation_cases]
    training = [coarsen(case) for case in fine.training]
    coarse = SegmentationObjective(training, validation, fine.recipe.coarse)
    if settings.seconds is not None:
        settings = replace(settings, seconds=max(1.0, ends - time.monotonic()))
    trained = train_network(replace(job, objective=coarse, settings=settings), team, watch)
    network = copy_weights(coarse.network(), trained.weights)
    backend = TorchBackend(network, team.fabric.device)
    fractions = []
    for case, small in zip(fine.validation_cases, validation, strict=True):
        if fractions and time.monotonic() > ends:
            break
        watch.tick(f"finding the region of {case.id}", 1.0)
        fractions.append(_fractions(case.mask, _part_in_region(case, small, backend, fine.recipe)))
    of_labels = [labelled for labelled, _ in fractions if labelled is not None]
    of_scan = float(np.mean([scan for _, scan in fractions]))
    metrics = dict(trained.metrics) | {"validation_share_of_scan": round(of_scan, 4)}
    if of_labels:
        metrics["validation_labels_inside"] = round(float(np.mean(of_labels)), 4)
    return replace(trained, metrics=metrics)


def _part_in_region(
    case: PreparedCase, small: PreparedCase, backend: TorchBackend, recipe: Recipe
) -> np.ndarray:
    """Return the part of a case's mask inside the region that is found in the coarse case."""
    assert recipe.roi is not None and recipe.coarse is not None
    tiling = Tiling(patch_shape=recipe.coarse.patch_shape, overlap=recipe.coarse.infer.overlap)
    region = find_region(ArrayPlanes(np.asarray(small.image)), backend, tiling)
    if region is None:
        return case.mask
    margin = [recipe.roi.margin_mm / mm for mm in recipe.spacing_mm]
    return case.mask[scaled_box(region, small.mask.shape, case.mask.shape, margin).slices]


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


def _fractions(mask: np.ndarray, part: np.ndarray) -> tuple[float | None, float]:
    """Return which fraction of the labelled voxels, and of all voxels, lies in a part of the mask.

    The first is None for a mask without labelled voxels.
    """
    n_labelled = _count_labelled(mask)
    return _count_labelled(part) / n_labelled if n_labelled else None, part.size / mask.size


def _count_labelled(mask: np.ndarray) -> int:
    return int(np.count_nonzero((mask > 0) & (mask != IGNORED)))
