"""The parts of nnU-Net's plans.json and dataset.json that volseg needs, read and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.planning.fingerprint import Count
from volseg.recipe import Intensity, LabelValue, Name, listed, validation_messages

Model = TypeVar("Model", bound=BaseModel)


def read_dataset(folder: Path) -> Dataset:
    """Read the dataset.json of a trained folder."""
    return _checked(Dataset, _json_of(folder, "dataset.json"), folder / "dataset.json")


def read_plans(folder: Path) -> Plans:
    """Read the plans.json of a trained folder."""
    return _checked(Plans, _json_of(folder, "plans.json"), folder / "plans.json")


def configuration_of(plans: Plans, name: str, where: Path) -> Configuration:
    """Return the configuration with what it inherits, in today's form.

    Raises:
        VolsegError: it is 2D, the second stage of a cascade, or not supported by volseg.
    """
    content: dict[str, Any] = {}
    visited: set[str] = set()
    parent: Any = name
    while parent is not None:
        if parent in visited or parent not in plans.configurations:
            problem = f"configuration {name!r} inherits from {parent!r}, which is missing or itself"
            raise unsupported(where, problem)
        visited.add(parent)
        for key, value in plans.configurations[parent].items():
            content.setdefault(key, value)
        parent = plans.configurations[parent].get("inherits_from")
    if content.get("previous_stage"):
        raise unsupported(
            where,
            f"configuration {name!r} is the second stage of a cascade and needs the masks of "
            f"{content['previous_stage']!r}",
            fix="import the 3d_fullres or 3d_lowres model of the same dataset",
        )
    if isinstance(patch := content.get("patch_size"), list) and len(patch) == 2:
        raise unsupported(
            where,
            f"configuration {name!r} is 2D; volseg runs 3D networks",
            fix="import the 3d_fullres or 3d_lowres model of the same dataset",
        )
    if "architecture" not in content and "UNet_class_name" in content:
        content["architecture"] = _modern_architecture(content, where)
    configuration = _checked(Configuration, content, f"{where}, configuration {name}")
    for key, name_in_plans, supported in (
        ("preprocessor", configuration.preprocessor_name, "DefaultPreprocessor"),
        ("label manager", plans.label_manager, "LabelManager"),
    ):
        if name_in_plans != supported:
            problem = f"{key} {name_in_plans!r} is unknown; volseg supports {supported}"
            raise unsupported(where, problem)
    return configuration


def resampling_of(function: str, arguments: Mapping[str, Any], where: Path) -> Resampling:
    """Return what a resampling function of the plans does, if volseg supports it."""
    if function == "resample_data_or_seg_to_shape":
        resampling = _checked(Resampling, arguments, where)
    elif function == "resample_torch_fornnunet":  # linear by default, separate where needed
        changes = {"force_separate_z": None, **arguments, "order": 1}
        resampling = _checked(Resampling, changes, where)
    else:
        raise unsupported(where, f"resampling function {function!r} is unknown")
    if resampling.order_z != 0 or resampling.is_seg or resampling.mode != "linear":
        problem = f"resampling function {function!r} has unsupported arguments {dict(arguments)}"
        raise unsupported(where, problem)
    return resampling


def unsupported(where: Path, problem: str, fix: str | None = None) -> VolsegError:
    """Return the error for a model that volseg does not import."""
    return VolsegError(
        f"{where}: {problem}",
        fix=fix or "run this model with nnU-Net; volseg imports its standard ones",
        code="E_NNUNET",
    )


class _Loose(BaseModel):
    """A part of nnU-Net's JSON; keys that volseg does not need are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Dataset(_Loose):
    channel_names: dict[Name, Name] | None = None
    modality: dict[Name, Name] | None = None  # the channels in older files
    labels: dict[Name, LabelValue | list[LabelValue]]
    regions_class_order: list[LabelValue] | None = None
    numTraining: Count = 0  # noqa: N815
    description: Any = None
    reference: Any = None
    licence: Any = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names in the order of the files `_0000`, `_0001`, …; repeated names get their number."""
        names = list((self.channel_names or self.modality or {}).values())
        counts = Counter(names)
        return tuple(
            name if counts[name] == 1 else f"{name}_{n:04d}" for n, name in enumerate(names)
        )


class Architecture(_Loose):
    network_class_name: str
    arch_kwargs: dict[str, Any]


class Resampling(_Loose):
    order: int = 3
    order_z: int = 0
    is_seg: bool = False
    force_separate_z: bool | None = False
    separate_z_anisotropy_threshold: float = 3.0
    mode: str = "linear"

    @property
    def separate_above(self) -> float | None:
        """Ratio of spacings above which the coarsest axis is not interpolated."""
        if self.force_separate_z is None:
            return self.separate_z_anisotropy_threshold
        return 0.0 if self.force_separate_z else None


class Configuration(_Loose):
    patch_size: list[int]
    batch_size: int = 2
    spacing: list[float]
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    preprocessor_name: str = "DefaultPreprocessor"
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: dict[str, Any]
    architecture: Architecture
    previous_stage: str | None = None


class Intensities(_Loose):
    mean: Intensity
    median: Intensity
    std: Intensity
    percentile_00_5: Intensity
    percentile_99_5: Intensity


class Plans(_Loose):
    dataset_name: str
    plans_name: str
    image_reader_writer: str
    label_manager: str = "LabelManager"
    transpose_forward: list[int]
    configurations: dict[str, dict[str, Any]]
    foreground_intensity_properties_per_channel: dict[str, Intensities] = {}
    foreground_intensity_properties_by_modality: dict[str, Intensities] = {}  # in older plans

    @property
    def intensities(self) -> dict[str, Intensities]:
        return (
            self.foreground_intensity_properties_per_channel
            or self.foreground_intensity_properties_by_modality
        )


def _json_of(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except OSError as error:
        inner = sorted(path.parent for path in folder.glob("*/plans.json"))
        form = f"<trainer>__<plans>__<configuration>, with {name} and fold_*/"
        raise VolsegError(
            f"{folder}: not a trained nnU-Net folder, it has no readable {name} "
            f"({error.strerror or error})",
            fix=f"give {inner[0] if inner else form}",
            code="E_NNUNET",
        ) from error
    except ValueError as error:
        raise VolsegError(
            f"{folder / name}: not JSON ({error})", fix="copy the file again", code="E_NNUNET"
        ) from error


def _checked(model: type[Model], content: Any, where: Path | str) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise VolsegError(
            f"{where}: not a file of nnU-Net v2: {listed(validation_messages(error, model))}",
            fix="give the files of nnU-Net v2; models of version 1 have to be trained again",
            code="E_NNUNET",
        ) from error


def _modern_architecture(old: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the architecture of plans from before nnU-Net v2.4.

    In these its numbers are keys of the configuration itself.
    """
    try:
        n_down, plain = old["n_conv_per_stage_encoder"], old["UNet_class_name"] == "PlainConvUNet"
        widest, base = old["unet_max_num_features"], old["UNet_base_num_features"]
        features = [min(base * 2**level, widest) for level in range(len(n_down))]
        return {
            "network_class_name": old["UNet_class_name"],
            "arch_kwargs": {
                "features_per_stage": features,
                "kernel_sizes": old["conv_kernel_sizes"],
                "strides": old["pool_op_kernel_sizes"],
                "n_conv_per_stage" if plain else "n_blocks_per_stage": n_down,
                "n_conv_per_stage_decoder": old["n_conv_per_stage_decoder"],
                "conv_op": "Conv3d",
                "conv_bias": True,
                "norm_op": "InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "nonlin": "LeakyReLU",
            },
        }
    except (KeyError, TypeError) as error:
        raise unsupported(where, f"written before nnU-Net v2.4, but lacks {error}") from error
