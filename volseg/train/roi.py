"""Train the coarse first pass, with the one training loop, on the same cases at its spacing."""

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

from volseg.execute.threads import Threads
from volseg.infer.backends import TorchBackend
from volseg.infer.roi import find_region
from volseg.infer.stream import ArrayPlanes, Tiling
from volseg.io.files import make_folder
from volseg.io.prepared import (
    IGNORED,
    PreparedCase,
    is_prepared,
    read_prepared_case,
    write_prepared_case,
)
from volseg.models import build_segmentation, set_weights
from volseg.plan import Plan
from volseg.preprocess.crop import scaled_box
from volseg.preprocess.resample import coarsened_mask, resample
from volseg.recipe import Recipe
from volseg.train.loop import Report, RunSettings, Tick, Trained, no_tick, train_segmentation
from volseg.train.ranks import Team
from volseg.train.samples import sample_voxels


def train_roi(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
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

    The metrics also say what it costs and saves on the validation cases: the mean share of a case's labelled voxels that lie in the region, and the
    mean share of a scan that the region is.

    Args:
        training, validation, plan: of the fine pass. folder: for the coarse cases and the checkpoints.
        settings, team, resume, initial, report, tick, threads: as in `train_segmentation`.
    """
    ends = math.inf if settings.seconds is None else time.monotonic() + settings.seconds
    coarse = recipe.coarse
    assert recipe.roi is not None and coarse is not None
    coarse_plan = plan.coarse(recipe.roi)
    make = partial(
        _kept,
        spacing_mm=plan.spacing_mm,
        coarse_mm=coarse_plan.spacing_mm,
        folder=folder,
        seed=settings.seed,
    )

    def kept(case: PreparedCase) -> PreparedCase:
        tick(f"a coarse copy of {case.id}", 0.0)
        return make(case)

    coarse_validation = [kept(case) for case in validation]
    coarse_training = [kept(case) for case in training]
    if settings.seconds is not None:
        settings = replace(settings, seconds=max(1.0, ends - time.monotonic()))
    trained = train_segmentation(
        coarse_training,
        coarse_validation,
        coarse,
        coarse_plan,
        settings,
        team=team,
        checkpoints=folder,
        resume=resume,
        initial=initial,
        report=report,
        tick=tick,
        threads=threads,
    )
    backend = TorchBackend(
        set_weights(build_segmentation(coarse), trained.weights), team.fabric.device
    )
    tiling = Tiling(patch_shape=coarse_plan.patch_shape, overlap=coarse.infer.overlap)
    margin = [recipe.roi.margin_mm / mm for mm in plan.spacing_mm]
    shares = []
    for fine, small in zip(validation, coarse_validation, strict=True):
        if shares and time.monotonic() > ends:
            break
        tick(f"finding the region of {fine.id}", 1.0)
        found = find_region(ArrayPlanes(np.asarray(small.image)), backend, tiling)
        box = (
            None if found is None else scaled_box(found, small.mask.shape, fine.mask.shape, margin)
        )
        shares.append(_shares(fine.mask, fine.mask if box is None else fine.mask[box.slices]))
    inside = [share for share, _ in shares if share is not None]
    metrics = dict(trained.metrics) | {
        "validation_share_of_scan": round(float(np.mean([s for _, s in shares])), 4)
    }
    if inside:
        metrics["validation_labels_inside"] = round(float(np.mean(inside)), 4)
    return replace(trained, metrics=metrics)


def coarse_case(
    case: PreparedCase,
    spacing_mm: Sequence[float],
    coarse_mm: Sequence[float],
    rng: np.random.Generator,
) -> PreparedCase:
    """A prepared case on a coarser grid over the same field of view, with every label as class 1.

    Args:
        spacing_mm, coarse_mm: along R, A, S, of the case and of the one to make.
        rng: draws the voxels on which patches are centred.
    """
    case.check()
    sizes = zip(case.mask.shape, spacing_mm, coarse_mm, strict=True)
    r, a, s = (max(1, round(n * fine / coarse)) for n, fine, coarse in sizes)
    image = np.stack([resample(channel, (r, a, s)) for channel in case.image])
    unknown = case.mask == IGNORED
    mask = coarsened_mask(np.where(unknown, 0, case.mask), (r, a, s))
    if unknown.any():
        mask[(coarsened_mask(unknown, (r, a, s)) > 0) & (mask == 0)] = IGNORED
    return PreparedCase(case.id, image, mask, {1: sample_voxels(mask == 1, rng)}, None, case.record)


def _kept(
    case: PreparedCase,
    *,
    spacing_mm: Sequence[float],
    coarse_mm: Sequence[float],
    folder: Path,
    seed: int,
) -> PreparedCase:
    """`coarse_case`, kept in a folder and made only once."""
    key = hashlib.sha256(
        json.dumps([case.record["key"], spacing_mm, coarse_mm, seed]).encode()
    ).hexdigest()
    folder = folder / "cases"
    if not is_prepared(folder, case.id, key):
        made = coarse_case(
            case, spacing_mm, coarse_mm, np.random.default_rng([seed, int(key[:8], 16)])
        )
        make_folder(folder / case.id)
        write_prepared_case(
            folder / case.id, replace(made, record=dict(case.record) | {"key": key})
        )
    return read_prepared_case(folder, case.id)


def _shares(mask: np.ndarray, part: np.ndarray) -> tuple[float | None, float]:
    """Of the labelled voxels of the mask (None where there are none) and of all its voxels, the share in a part of it."""
    labelled = _labelled(mask)
    return _labelled(part) / labelled if labelled else None, part.size / mask.size


def _labelled(mask: np.ndarray) -> int:
    """Voxels of it."""
    return int(np.count_nonzero((mask > 0) & (mask != IGNORED)))
