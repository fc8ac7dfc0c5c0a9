"""Translate plans of nnU-Net into volseg's recipe and fingerprint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volseg.inputs import shorten
from volseg.nnunet.checkpoint import Checkpoint
from volseg.nnunet.plans import (
    Architecture,
    Configuration,
    Dataset,
    Intensities,
    Plans,
    resampling_of,
    unsupported,
)
from volseg.planning.fingerprint import DatasetFingerprint, IntensityStatistics
from volseg.recipe import Recipe, parse_recipe

OVERLAP = 0.5  # nnU-Net's step is half a patch
CT_BODY_ABOVE = -500.0  # HU: between air and fat

# reader → axes of its arrays: those of the file (slowest first), or of the patient (S, A, R)
_AXES = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "canonical",
    "NibabelIOWithReorient": "canonical",
}
_INTERPOLATION = {1: "linear", 3: "cubic"}
# architecture → file in networks/, its key for the numbers of convolutions or blocks going down
_NETWORKS = {
    "PlainConvUNet": ("nnunet_plain", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("nnunet_residual", "n_blocks_per_stage"),
}
_TRAINING_ONLY = {"n_stages", "dropout_op", "dropout_op_kwargs", "deep_supervision"}


def recipe_of(
    dataset: Dataset,
    plans: Plans,
    configuration: Configuration,
    checkpoint: Checkpoint,
    name: str,
    folder: Path,
) -> Recipe:
    """Return the recipe with which volseg runs a configuration as nnU-Net does."""
    plans_path = folder / "plans.json"
    network, settings = _network(configuration.architecture, plans_path)
    channels = dataset.channels
    if not channels:
        raise unsupported(
            folder / "dataset.json", "names no channels", fix='add "channel_names": {"0": "CT"}'
        )
    schemes = configuration.normalization_schemes
    if not len(channels) == len(schemes) == len(configuration.use_mask_for_norm):
        raise unsupported(
            plans_path,
            f"normalises {len(schemes)} channels, but dataset.json names {len(channels)}",
            fix="copy the dataset.json with which the model was trained",
        )
    forms = {
        channel: _normaliser(scheme, masked, plans.intensities.get(str(number)), plans_path)
        for number, (channel, scheme, masked) in enumerate(
            zip(channels, schemes, configuration.use_mask_for_norm, strict=True)
        )
    }
    first = forms[channels[0]]
    labels, order = _labels(dataset, folder / "dataset.json")
    title = f"{plans.dataset_name}_{name}"
    default = f"nnU-Net model {plans.dataset_name}, configuration {name}."
    source = "; ".join(str(text) for text in (dataset.reference, dataset.licence) if text)
    is_ct = schemes[0] == "CTNormalization"
    content = {
        "name": re.sub(r"[^a-z0-9_]", "_", title.lower()).lstrip("_")[:200] or "nnunet",
        "description": shorten(str(dataset.description or default), 5000),
        "data_source": shorten(source, 5000),
        "data": {
            "channels": channels,
            "labels": labels,
            "intensity_unit": "HU" if is_ct else "a.u.",
            "regions_class_order": order,
        },
        "preprocess": {
            "spacing_mm": configuration.spacing,
            "crop": "nonzero",
            "normalise": first,
            "normalise_channels": {name: form for name, form in forms.items() if form != first},
            "normalise_first": True,
            **_axes(plans, plans_path),
            **_resampling(configuration, plans_path),
            **({"body_above": CT_BODY_ABOVE} if is_ct else {}),
        },
        "network": {"name": network, **settings},
        "train": {"patch_shape": configuration.patch_size, "batch_size": configuration.batch_size},
        "infer": {"overlap": OVERLAP, "tta_axes": _tta_axes(checkpoint, folder)},
    }
    return parse_recipe(content, where=str(folder))


def fingerprint_of(dataset: Dataset, plans: Plans, recipe: Recipe) -> DatasetFingerprint:
    """Return what is known about the training cases; nnU-Net saves no spacings or voxel counts."""
    foreground = {
        channel: IntensityStatistics(
            mean=intensities.mean,
            sd=intensities.std,
            p00_5=intensities.percentile_00_5,
            median=intensities.median,
            p99_5=intensities.percentile_99_5,
        )
        for number, channel in enumerate(recipe.data.channels)
        if (intensities := plans.intensities.get(str(number))) is not None
    }
    return DatasetFingerprint(
        n_cases=dataset.numTraining,
        spacings_mm=(),
        shapes=(),
        label_voxels={},
        foreground=foreground,
    )


def _labels(dataset: Dataset, where: Path) -> tuple[dict[str, int], list[int] | None]:
    """Return name → mask value, and for regions the values in the order of the output channels.

    `ignore` marks unannotated voxels and has no channel. Regions have the order of the file.
    """
    lists = {name: [v] if isinstance(v, int) else v for name, v in dataset.labels.items()}
    named = {name: v for name, v in lists.items() if name != "ignore" and set(v) != {0}}
    if not named:
        raise unsupported(where, "names no label beside the background")
    if all(len(values) == 1 for values in named.values()):
        labels = {name: values[0] for name, values in named.items()}
        if sorted(labels.values()) != list(range(1, len(labels) + 1)):
            raise unsupported(
                where,
                f"labels {labels} are not numbered 1, 2, … {len(labels)}, so the channels of the "
                "network cannot be assigned to them",
                fix="copy the dataset.json with which the model was trained",
            )
        return labels, None
    order = dataset.regions_class_order
    if order is None or len(order) != len(named):
        raise unsupported(
            where,
            f"has {len(named)} regions, but regions_class_order {order}",
            fix='give "regions_class_order" with one number per region',
        )
    return dict(zip(named, order, strict=True)), order


def _normaliser(
    scheme: str, masked: bool, intensities: Intensities | None, where: Path
) -> dict[str, Any]:
    """Return the recipe's table for nnU-Net's normalisation of a channel."""
    if scheme == "CTNormalization":
        if intensities is None:
            raise unsupported(
                where, "CTNormalization has no intensity statistics", fix="copy the plans again"
            )
        return {
            "method": "window",
            "low": intensities.percentile_00_5,
            "high": intensities.percentile_99_5,
            "mean": intensities.mean,
            "sd": max(intensities.std, 1e-8),
        }
    span = {"low_percent": 0, "high_percent": 100}
    forms = {
        "ZScoreNormalization": {"method": "zscore", "region": "nonzero" if masked else "scan"},
        "NoNormalization": {"method": "scale"},
        "RescaleTo01Normalization": {"method": "percentile", **span, "region": "scan"},
        "RGBTo01Normalization": {"method": "scale", "divide_by": 255},
    }
    if scheme not in forms:
        names = ", ".join(["CTNormalization", *forms])
        raise unsupported(where, f"normalisation {scheme!r} is unknown; volseg supports {names}")
    return forms[scheme]


def _axes(plans: Plans, where: Path) -> dict[str, Any]:
    """Return the axes that the network sees, as keys of the recipe."""
    reader, forward = plans.image_reader_writer, plans.transpose_forward
    if reader not in _AXES:
        problem = f"reader {reader!r} is unknown or not for NIfTI"
        raise unsupported(where, f"{problem}; volseg supports {', '.join(_AXES)}")
    # The readers that reorient give (S, A, R), the reverse of volseg's axes.
    transpose = forward if _AXES[reader] == "stored" else [2 - axis for axis in forward]
    return {"axes": _AXES[reader], "transpose": transpose}


def _resampling(configuration: Configuration, where: Path) -> dict[str, Any]:
    """Return order and anisotropy rule of the images; the logits must follow it, linearly."""
    images = resampling_of(
        configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs, where
    )
    logits = resampling_of(
        configuration.resampling_fn_probabilities,
        configuration.resampling_fn_probabilities_kwargs,
        where,
    )
    if images.order not in _INTERPOLATION or logits.order != 1:
        raise unsupported(
            where,
            f"resamples images with order {images.order} and logits with order {logits.order}; "
            "volseg supports 3 or 1 for images, and 1 for logits",
        )
    if images.separate_above != logits.separate_above:
        raise unsupported(where, "resamples images and logits by different rules of anisotropy")
    interpolation = _INTERPOLATION[images.order]
    return {
        "interpolation": interpolation,
        "separate_above": images.separate_above,
        "clip_overshoot": interpolation == "cubic",
    }


def _tta_axes(checkpoint: Checkpoint, folder: Path) -> list[str]:
    axes = checkpoint.tta_axes
    if any(axis not in (0, 1, 2) for axis in axes):
        raise unsupported(folder, f"the checkpoint mirrors axes {axes} of a 3D network")
    return ["RAS"[axis] for axis in axes]


def _network(architecture: Architecture, where: Path) -> tuple[str, dict[str, Any]]:
    """Return the file in networks/ and the arguments of its `build`."""
    kind = architecture.network_class_name.rpartition(".")[2]
    if kind not in _NETWORKS:
        names = ", ".join(_NETWORKS)
        raise unsupported(where, f"architecture {kind!r} is unknown; volseg supports {names}")
    name, n_down = _NETWORKS[kind]
    kwargs = {
        key: value for key, value in architecture.arch_kwargs.items() if key not in _TRAINING_ONLY
    }
    pop = kwargs.pop
    try:
        levels = len(kwargs["strides"])
        settings: dict[str, Any] = {
            "features": _per_level(pop("features_per_stage"), levels),
            "strides": [_triple(stride) for stride in pop("strides")],
            "kernels": [_triple(kernel) for kernel in _per_level(pop("kernel_sizes"), levels)],
            n_down: _per_level(pop(n_down), levels),
            "n_conv_per_stage_decoder": _per_level(pop("n_conv_per_stage_decoder"), levels - 1),
            "conv_bias": bool(pop("conv_bias", False)),
            **_norm(pop("norm_op", None), pop("norm_op_kwargs", None) or {}, where),
            **_activation(pop("nonlin", None), pop("nonlin_kwargs", None) or {}, where),
        }
        if name == "nnunet_residual":
            settings["stem_channels"] = pop("stem_channels", None)
            if str(kwargs.get("block", "BasicBlockD")).endswith("BasicBlockD"):
                pop("block", None)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise unsupported(
            where, f"architecture {kind} is not described as nnU-Net does ({error!r})"
        ) from error
    if not str(pop("conv_op", "Conv3d")).endswith("Conv3d"):
        raise unsupported(
            where, "the network is not 3D", fix="import a 3D configuration of the same dataset"
        )
    unknown = {key: value for key, value in kwargs.items() if value not in (None, False)}
    if unknown:
        raise unsupported(where, f"architecture {kind} has unsupported settings: {unknown}")
    return name, settings


def _per_level(value: Any, levels: int) -> list[Any]:
    return [value] * levels if isinstance(value, int) else list(value)


def _triple(value: Any) -> list[int]:
    return [value] * 3 if isinstance(value, int) else [int(number) for number in value]


def _norm(kind: Any, arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    kwargs = dict(arguments)
    settings = {
        "norm_eps": float(kwargs.pop("eps", 1e-5)),
        "norm_affine": bool(kwargs.pop("affine", False)),
    }
    kwargs.pop("momentum", None)
    if not str(kind).endswith("InstanceNorm3d") or any(kwargs.values()):
        problem = f"normalisation layer {kind} {dict(arguments)} is unknown"
        raise unsupported(where, f"{problem}; volseg supports InstanceNorm3d")
    return settings


def _activation(kind: Any, arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    name = str(kind).rpartition(".")[2]
    if name not in ("LeakyReLU", "ReLU"):
        problem = f"activation {kind} is unknown; volseg supports LeakyReLU and ReLU"
        raise unsupported(where, problem)
    return {"slope": 0.0 if name == "ReLU" else float(arguments.get("negative_slope", 0.01))}
