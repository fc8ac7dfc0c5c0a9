"""Trained folders in the layout of nnU-Net v2, made without it, and its networks as functions.

Names of tensors and order of layers are those of nnU-Net's files; `logits_of` uses no volseg class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
FEATURES = [3, 4, 5]
PATCH = [8, 16, 16]
PLAIN = {"n_conv_per_stage": [2, 1, 3], "n_conv_per_stage_decoder": [1, 2]}
RESIDUAL = {"n_blocks_per_stage": [1, 2, 3], "n_conv_per_stage_decoder": [1, 2]}
FOLDER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def architecture(kind: str = "PlainConvUNet", **changes: Any) -> dict[str, Any]:
    arguments = {
        "n_stages": len(FEATURES),
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": KERNELS,
        "strides": STRIDES,
        **(PLAIN if kind == "PlainConvUNet" else RESIDUAL),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": arguments | changes,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(**changes: Any) -> dict[str, Any]:
    """Return a 3D configuration of plans.json; a change to None removes the key."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    content = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "spacing": [2.5, 0.8, 0.7],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": architecture(),
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def plans(configurations: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    statistics = {
        "mean": 40.0,
        "median": 45.0,
        "std": 160.0,
        "min": -1024.0,
        "max": 3000.0,
        "percentile_00_5": -900.0,
        "percentile_99_5": 300.0,
    }
    if configurations is None:
        configurations = {"3d_fullres": configuration()}
    content = {
        "dataset_name": "Dataset007_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": dict(configurations),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(n): statistics for n in range(4)},
    }
    return content | changes


def dataset(**changes: Any) -> dict[str, Any]:
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1, "tumour": 2},
        "numTraining": 12,
        "file_ending": ".nii.gz",
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def state_dict(
    kind: str = "PlainConvUNet", *, channels: int = 1, heads: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Return random weights under nnU-Net's names, with its repetitions and a head per level."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * math.sqrt(2 / max(1, math.prod(shape[1:])))

    def layer(name: str, before: int, width: int, kernel: Sequence[int], bias: bool = True) -> None:
        parts = {"conv.weight": numbers(width, before, *kernel)}
        if bias:
            parts["conv.bias"] = numbers(width)
        parts |= {"norm.weight": 1 + 0.3 * numbers(width), "norm.bias": numbers(width)}
        for part, tensor in parts.items():
            state[f"{name}.{part}"] = tensor
            alias = part.replace("conv", "all_modules.0").replace("norm", "all_modules.1")
            state[f"{name}.{alias}"] = tensor

    before = channels
    if kind == "ResidualEncoderUNet":
        layer("encoder.stem.convs.0", before, FEATURES[0], KERNELS[0])
        before = FEATURES[0]
    for s, (width, stride, kernel) in enumerate(zip(FEATURES, STRIDES, KERNELS, strict=True)):
        if kind == "PlainConvUNet":
            for i in range(PLAIN["n_conv_per_stage"][s]):
                layer(f"encoder.stages.{s}.0.convs.{i}", before, width, kernel)
                before = width
        else:
            for i in range(RESIDUAL["n_blocks_per_stage"][s]):
                block = f"encoder.stages.{s}.blocks.{i}"
                layer(f"{block}.conv1", before, width, kernel)
                layer(f"{block}.conv2", width, width, kernel)
                if before != width:
                    pooled = i == 0 and math.prod(stride) > 1
                    layer(f"{block}.skip.{int(pooled)}", before, width, (1, 1, 1), bias=False)
                before = width
    state |= {f"decoder.{name}": tensor for name, tensor in state.items()}
    for s, n in enumerate(PLAIN["n_conv_per_stage_decoder"]):
        level = len(FEATURES) - 2 - s
        width = FEATURES[level]
        for i in range(n):
            before = 2 * width if i == 0 else width
            layer(f"decoder.stages.{s}.convs.{i}", before, width, KERNELS[level])
        weight = numbers(FEATURES[level + 1], width, *STRIDES[level + 1])
        state[f"decoder.transpconvs.{s}.weight"] = weight
        state[f"decoder.transpconvs.{s}.bias"] = numbers(width)
        state[f"decoder.seg_layers.{s}.weight"] = numbers(heads, width, 1, 1, 1)
        state[f"decoder.seg_layers.{s}.bias"] = numbers(heads)
    return state


def logits_of(state: Mapping[str, torch.Tensor], patch: torch.Tensor) -> torch.Tensor:
    """Run the network of a `state_dict` layer by layer.

    (N, channels, X, Y, Z) → (N, heads, X, Y, Z).
    """

    def layer(
        x: torch.Tensor, name: str, stride: Sequence[int] = (1, 1, 1), active: bool = True
    ) -> torch.Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = [n // 2 for n in weight.shape[2:]]
        x = functional.conv3d(x, weight, state.get(f"{name}.conv.bias"), tuple(stride), padding)
        x = functional.instance_norm(
            x, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"], eps=1e-5
        )
        return functional.leaky_relu(x, 0.01) if active else x

    def block(x: torch.Tensor, name: str, stride: Sequence[int]) -> torch.Tensor:
        skip = x
        if math.prod(stride) > 1:
            skip = functional.avg_pool3d(x, tuple(stride), tuple(stride))
        for number in (0, 1):
            if f"{name}.skip.{number}.conv.weight" in state:
                skip = layer(skip, f"{name}.skip.{number}", active=False)
        x = layer(layer(x, f"{name}.conv1", stride), f"{name}.conv2", active=False)
        return functional.leaky_relu(x + skip, 0.01)

    x, skips = patch, []
    if "encoder.stem.convs.0.conv.weight" in state:
        x = layer(x, "encoder.stem.convs.0")
    for s, stride in enumerate(STRIDES):
        i = 0
        while f"encoder.stages.{s}.0.convs.{i}.conv.weight" in state:
            x = layer(x, f"encoder.stages.{s}.0.convs.{i}", stride if i == 0 else (1, 1, 1))
            i += 1
        while f"encoder.stages.{s}.blocks.{i}.conv1.conv.weight" in state:
            x = block(x, f"encoder.stages.{s}.blocks.{i}", stride if i == 0 else (1, 1, 1))
            i += 1
        skips.append(x)
    for s in range(len(STRIDES) - 1):
        name, stride = f"decoder.transpconvs.{s}", tuple(STRIDES[-1 - s])
        x = functional.conv_transpose3d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride)
        x = torch.cat([x, skips[-2 - s]], 1)
        i = 0
        while f"decoder.stages.{s}.convs.{i}.conv.weight" in state:
            x = layer(x, f"decoder.stages.{s}.convs.{i}")
            i += 1
    head = f"decoder.seg_layers.{len(STRIDES) - 2}"
    return functional.conv3d(x, state[f"{head}.weight"], state[f"{head}.bias"])


def checkpoint(weights: Mapping[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    """Return what nnU-Net's trainer saves: weights, momenta, a log of NumPy scalars, arguments."""
    content = {
        "network_weights": dict(weights),
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.01}],
        },
        "grad_scaler_state": None,
        "logging": {
            "mean_fg_dice": [np.float64(0.5)],
            "train_losses": [np.float32(-0.4)],
            "lrs": [0.01],
        },
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    return content | changes


def write_model(
    parent: Path,
    *,
    folds: Mapping[str, Any] | None = None,
    plans_json: Any = None,
    dataset_json: Any = None,
    name: str = FOLDER,
    checkpoint_name: str = "checkpoint_final.pth",
) -> Path:
    """Write a trained folder; `folds` maps fold names to checkpoints (default: a plain network)."""
    folder = parent / name
    for fold, content in (folds or {"0": checkpoint(state_dict())}).items():
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(content, folder / f"fold_{fold}" / checkpoint_name)
    (folder / "plans.json").write_text(json.dumps(plans_json or plans()))
    (folder / "dataset.json").write_text(json.dumps(dataset_json or dataset()))
    return folder
