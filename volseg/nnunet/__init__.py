"""Models of nnU-Net v2: convert a trained folder to a `ModelBundle` that gives nnU-Net's masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from volseg.bundle import NNUNET_DICE, ModelBundle, segmentation_name
from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.files import sha256_of
from volseg.nnunet.checkpoint import Checkpoint, read_checkpoint
from volseg.nnunet.plans import Plans, configuration_of, read_dataset, read_plans
from volseg.nnunet.recipe import fingerprint_of, recipe_of
from volseg.nnunet.weights import weights_of

FINAL = "checkpoint_final.pth"
ALL_FOLDS = "all"  # name of the fold that was trained on every case


def read_nnunet(
    folder: Path, *, folds: Sequence[str] | None = None, checkpoint: str = FINAL
) -> ModelBundle:
    """Return a trained nnU-Net v2 folder as a bundle; several folds become an ensemble.

    Args:
        folder: `<trainer>__<plans>__<configuration>`, which holds plans.json, dataset.json and a
            checkpoint per fold.
        folds: such as `("0", "1")` or `("all",)`; None for all numbered folds, else `all`.
        checkpoint: the file in each fold's folder.

    Raises:
        VolsegError: a file is missing or damaged, or volseg does not support the model.
    """
    dataset, plans = read_dataset(folder), read_plans(folder)
    paths = {fold: _checkpoint_path(folder, fold, checkpoint) for fold in _folds(folder, folds)}
    members = [read_checkpoint(path) for path in paths.values()]
    first = members[0]
    name = _configuration_name(folder, plans, first)
    configuration = configuration_of(plans, name, folder / "plans.json")
    recipe = recipe_of(dataset, plans, configuration, first, name, folder)
    weights = {
        segmentation_name(index): weights_of(member.weights, recipe, path)
        for index, (member, path) in enumerate(zip(members, paths.values(), strict=True))
    }
    hashes = {f"fold_{fold}/{checkpoint}": sha256_of(path) for fold, path in paths.items()}
    return ModelBundle(
        recipe=recipe,
        fingerprint=fingerprint_of(dataset, plans, recipe),
        weights=weights,
        metrics=_validation_dice(folder, list(paths), checkpoint),
        origin={
            "nnU-Net dataset": plans.dataset_name,
            "nnU-Net plans": plans.plans_name,
            "nnU-Net trainer": first.trainer,
            "nnU-Net configuration": name,
            **{path: f"sha256 {digest}" for path, digest in hashes.items()},
        },
    )


def _folds(folder: Path, names: Sequence[str] | None) -> list[str]:
    """Return these folds, or without `names` all numbered folds, else `all`."""
    available = sorted(
        path.name.removeprefix("fold_") for path in folder.glob("fold_*") if path.is_dir()
    )
    if names is not None:
        folds = [fold.strip().removeprefix("fold_") for fold in names]
        missing = [fold for fold in folds if fold not in available]
        if missing or len(set(folds)) < len(folds):
            problem = f"folds {', '.join(folds)} name one twice"
            if missing:
                problem = f"has no fold {', '.join(missing)}"
            raise VolsegError(
                f"{folder}: {problem}; it has {', '.join(available) or 'none'}",
                fix="name existing folds, once each, such as --folds 0,1,2 or --folds all",
                code="E_NNUNET",
            )
        return folds
    numbered = sorted((fold for fold in available if fold.isdecimal()), key=int)
    folds = numbered or [fold for fold in available if fold == ALL_FOLDS]
    if not folds:
        raise VolsegError(
            f"{folder}: has no fold_0, fold_1, … or fold_all",
            fix="copy the trained folds as well",
            code="E_NNUNET",
        )
    return folds


def _checkpoint_path(folder: Path, fold: str, checkpoint: str) -> Path:
    path = folder / f"fold_{fold}" / checkpoint
    if not path.is_file():
        if path.exists():
            raise VolsegError(
                f"{path}: not a file", fix="give the checkpoint itself", code="E_NOTFILE"
            )
        others = sorted(other.name for other in path.parent.glob("checkpoint_*.pth"))
        fix = f"give --checkpoint {others[0]}" if others else "copy it"
        raise VolsegError(
            f"{path}: there is no such checkpoint; the fold has {', '.join(others) or 'none'}",
            fix=f"{fix}, or leave the fold out with --folds",
            code="E_NNUNET",
        )
    return path


def _configuration_name(folder: Path, plans: Plans, checkpoint: Checkpoint) -> str:
    """Return the last part of the folder's name, else the name in the checkpoint."""
    parts = folder.resolve().name.split("__")
    name = parts[2] if len(parts) == 3 else checkpoint.configuration
    if name != checkpoint.configuration:
        raise VolsegError(
            f"{folder}: is named for configuration {name!r}, but its checkpoint was trained as "
            f"{checkpoint.configuration!r}",
            fix="give the folder its original name",
            code="E_NNUNET",
        )
    if name not in plans.configurations:
        names = ", ".join(plans.configurations)
        raise VolsegError(
            f"{folder / 'plans.json'}: has no configuration {name!r}; it has {names}",
            fix="copy the plans.json with which the model was trained",
            code="E_NNUNET",
        )
    return name


def _validation_dice(folder: Path, folds: Sequence[str], checkpoint: str) -> dict[str, float]:
    """Return the mean validation Dice of each fold for which nnU-Net saved it.

    It belongs to the final checkpoint.
    """
    metrics = {}
    for fold in folds if checkpoint == FINAL else ():
        try:
            path = folder / f"fold_{fold}" / "validation" / "summary.json"
            summary = read_json(path, is_finite=False)
            metrics[f"{NNUNET_DICE}{fold}"] = float(summary["foreground_mean"]["Dice"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
