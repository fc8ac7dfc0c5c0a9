"""Rename the tensors of an nnU-Net checkpoint to volseg's names, and check that they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from volseg.errors import VolsegError
from volseg.networks import build_segmentation, check_finite, unique_tensors
from volseg.recipe import Recipe


def weights_of(
    tensors: Mapping[str, torch.Tensor], recipe: Recipe, path: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint under the names of volseg's network.

    Raises:
        VolsegError: a tensor is missing, of another shape, or not in the network of the plans.
    """
    last = len(recipe.network.settings["features"]) - 2
    with torch.device("meta"):  # names and shapes alone
        ours = unique_tensors(build_segmentation(recipe))
    keys = {name: _their_name(name, recipe.network.name, last) for name in ours}
    shapes = {key: ours[name].shape for name, key in keys.items()}
    again = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
    coarser_head = re.compile(rf"^decoder\.seg_layers\.(?!{last}\.)\d+\.")
    used = [key for key in tensors if not again.search(key) and not coarser_head.search(key)]
    if problem := _mismatch({key: tensors[key].shape for key in used}, shapes):
        raise VolsegError(
            f"{path}: is not the network of plans.json: {problem}",
            fix="give the plans.json of this training; trainers that change the network are not "
            "supported",
            code="E_CKPT",
        )
    weights = {name: tensors[key].to(torch.float32, copy=True) for name, key in keys.items()}
    try:
        check_finite(weights)
    except VolsegError as error:
        raise VolsegError(f"{path}: {error.problem}", fix=error.fix, code=error.code) from error
    return weights


def _mismatch(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> str:
    """Say how tensors differ from those expected; empty if they do not.

    Nothing is copied before: a tensor that repeats one number may claim any size.
    """
    unknown, missing = sorted(shapes.keys() - expected), sorted(expected.keys() - shapes)
    if unknown or missing:
        return (
            f"{len(missing)} of its tensors are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
    misfits = [key for key, shape in expected.items() if shapes[key] != shape]
    return f"{len(misfits)} of its tensors do not fit the network {misfits[:3]}" if misfits else ""


def _their_name(name: str, network: str, last: int) -> str:
    """Return the key of nnU-Net's `state_dict` for one of volseg's tensors.

    Its keys (level s counts from the finest on the way down, from the coarsest on the way up; i is
    a layer or block):

        encoder.stages.{s}.0.convs.{i}.conv|norm.weight|bias     plain encoder
        encoder.stem.convs.0.conv|norm.…                         residual encoder, first convolution
        encoder.stages.{s}.blocks.{i}.conv1|conv2.conv|norm.…    residual encoder
        encoder.stages.{s}.blocks.{i}.skip.{0 or 1}.conv|norm.…  … 1 if it pools before projecting
        decoder.transpconvs.{s}.weight|bias                      transposed convolution into level s
        decoder.stages.{s}.convs.{i}.conv|norm.…
        decoder.seg_layers.{s}.weight|bias                       a head per level, the last is used

    The same tensors appear again under `….all_modules.{n}.…` and `decoder.encoder.…`.
    """
    stage = r"\1.0.convs.\2." if network == "nnunet_plain" else r"\1.blocks.\2."
    rules = (
        (r"^stem\.0\.", "encoder.stem.convs.0."),
        (r"^encoder\.(\d+)\.(\d+)\.", rf"encoder.stages.{stage}"),
        (r"^decoder\.(\d+)\.(\d+)\.", r"decoder.stages.\1.convs.\2."),
        (r"^up\.(\d+)\.", r"decoder.transpconvs.\1."),
        (r"^head\.", f"decoder.seg_layers.{last}."),
    )
    for pattern, replacement in rules:
        theirs, hits = re.subn(pattern, replacement, name)
        if hits:
            return theirs
    raise AssertionError(name)
