"""Train the coarse first pass: the usual training loop, on the same cases at a coarser spacing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from volseg.execution.threads import Threads
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
from volseg.networks import build_segmentation, copy_weights
from volseg.preprocessing.crop import scaled_box
from volseg.preprocessing.resample import coarsened_mask, resample
from volseg.recipe import Recipe
from volseg.training.loop import Report, RunSettings, Tick, Trained, no_tick, train_segmentation
from volseg.training.ranks import Team
from volseg.training.samples import sample_voxels


def train_roi(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    settings: RunSettings,
    *,
    team: Team,
    folder: Path,
    resume: bool,
    initial: Mapping[str, torch.Tensor],
    report: Report,
    tick: Tick = no_tick,
    threads: Threads | None = None,
) -> Trained:
    """Train the network of the recipe's first pass: any label against the background.

    The metrics also state what the first pass costs and saves on the validation cases: the mean
    fraction of labelled voxels inside the region, and the mean fraction of the scan in the region.

    Args:
        training, validation, recipe: of the fine pass.
        folder: for the coarse cases and the checkpoints.
        settings, team, resume, initial, report, tick, threads: as in `train_segmentation`.
    """
    ends = math.inf if settings.seconds is None else time.monotonic() + settings.seconds
    coarse = recipe.coarse
    assert recipe.roi is not None and coarse is not None
    make = partial(
        _cached_coarse_case,
        spacing_mm=recipe.spacing_mm,
        coarse_mm=coarse.spacing_mm,
        folder=folder,
        seed=settings.seed,
    )

    def coarsen(case: PreparedCase) -> PreparedCase:
        tick(f"downsampling {case.id}", 0.0)
        return make(case)

    coarse_validation = [coarsen(case) for case in validation]
    coarse_training = [coarsen(case) for case in training]
    if settings.seconds is not None:
        settings = replace(settings, seconds=max(1.0, ends - time.monotonic()))
    trained = train_segmentation(
        coarse_training,
        coarse_validation,
        coarse,
        settings,
        team=team,
        checkpoints=folder,
        resume=resume,
        initial=initial,
        report=report,
        tick=tick,
        threads=threads,
    )
    network = copy_weights(build_segmentation(coarse), trained.weights)
    backend = TorchBackend(network, team.fabric.device)
    tiling = Tiling(patch_shape=coarse.patch_shape, overlap=coarse.infer.overlap)
    margin = [recipe.roi.margin_mm / mm for mm in recipe.spacing_mm]
    fractions = []
    for fine, small in zip(validation, coarse_validation, strict=True):
        if fractions and time.monotonic() > ends:
            break
        tick(f"finding the region of {fine.id}", 1.0)
        region, mask = find_region(ArrayPlanes(np.asarray(small.image)), backend, tiling), fine.mask
        if region is not None:
            mask = mask[scaled_box(region, small.mask.shape, mask.shape, margin).slices]
        fractions.append(_fractions(fine.mask, mask))
    of_labels = [labelled for labelled, _ in fractions if labelled is not None]
    of_scan = float(np.mean([scan for _, scan in fractions]))
    metrics = dict(trained.metrics) | {"validation_share_of_scan": round(of_scan, 4)}
    if of_labels:
        metrics["validation_labels_inside"] = round(float(np.mean(of_labels)), 4)
    return replace(trained, metrics=metrics)


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
