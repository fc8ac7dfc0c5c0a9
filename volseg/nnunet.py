"""Models of nnU-Net v2: a trained folder → a `ModelBundle` that prepares, predicts and restores as nnU-Net does.

Such a folder is named `<trainer>__<plans>__<configuration>` and holds `plans.json`, `dataset.json` and, per fold, a checkpoint: a pickle
with the network's `state_dict` among other things. Only what `ALLOWED` names is unpickled.

Facts about the keys of that `state_dict` (level s counts from the finest on the way down, from the coarsest on the way up; layer or block i):

    encoder.stages.{s}.0.convs.{i}.conv|norm.weight|bias        plain encoder
    encoder.stem.convs.0.conv|norm.…                            residual encoder: its first convolution
    encoder.stages.{s}.blocks.{i}.conv1|conv2.conv|norm.…       residual encoder
    encoder.stages.{s}.blocks.{i}.skip.{0 or 1}.conv|norm.…     residual encoder: 1 where the block pools before it projects
    decoder.transpconvs.{s}.weight|bias                         transposed convolution into level s
    decoder.stages.{s}.convs.{i}.conv|norm.…
    decoder.seg_layers.{s}.weight|bias                          a head per level; the last is the network's output

The same tensors appear again under `….all_modules.{n}.…` and `decoder.encoder.…`.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch raises with weights_only; nothing is unpickled here
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.bundle import NNUNET_DICE, ModelBundle, segmentation_name
from volseg.errors import VolsegError
from volseg.inputs import open_regular, read_bytes, read_json, shortened
from volseg.io.files import sha256_of
from volseg.models import build_segmentation, check_finite, weights_of
from volseg.plan import Count, DatasetFingerprint, IntensityStatistics, Plan
from volseg.recipe import (
    Intensity,
    LabelValue,
    Name,
    Recipe,
    Window,
    listed,
    mistakes_of,
    parse_recipe,
)

Model = TypeVar("Model", bound=BaseModel)

FINAL = "checkpoint_final.pth"
ALL_FOLDS = "all"  # the name of the fold that was trained on every case
OVERLAP = 0.5  # nnU-Net's step is half a patch
CT_BODY_ABOVE = -500.0  # HU: between air and fat

# Everything that a checkpoint of nnU-Net may ask the unpickler for: tensors, containers, and the NumPy scalars of its log.
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = frozenset(
    {
        "_codecs.encode",
        "collections.OrderedDict",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
    }
)
_DAMAGE = (  # what reading a file that is no checkpoint can raise
    UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
MAX_PICKLE_BYTES = (
    64 << 20
)  # of the log of 8000 epochs with 117 classes it is half; the weights lie beside it
MAX_PICKLE_RATIO = 20  # of what a pickle unpacks to; `torch.save` does not compress at all
MAX_OPCODES = 10_000_000
MAX_MEMBERS = 100_000  # files in the archive: one per tensor
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")

_AXES = {  # reader → do its arrays have the file's axes (slowest first), or those of the patient (S, A, R)?
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "canonical",
    "NibabelIOWithReorient": "canonical",
}
_INTERPOLATION = {1: "linear", 3: "cubic"}
_NETWORKS = {  # architecture → file in models/, its name for the numbers of convolutions or blocks on the way down
    "PlainConvUNet": ("nnunet_plain", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("nnunet_residual", "n_blocks_per_stage"),
}
_WITHOUT_EFFECT = {
    "n_stages",
    "dropout_op",
    "dropout_op_kwargs",
    "deep_supervision",
}  # on inference


def read_nnunet(
    folder: Path, *, folds: Sequence[str] | None = None, checkpoint: str = FINAL
) -> ModelBundle:
    """A trained nnU-Net v2 folder as a bundle; several folds become an ensemble.

    Args:
        folder: holds plans.json and dataset.json.
        folds: such as `("0", "1")` or `("all",)`; None for every numbered fold there is, else `all`.
        checkpoint: the file in each fold's folder.

    Raises:
        VolsegError: a file is missing or damaged, or the model needs something that volseg does not have.
    """
    plans_path = folder / "plans.json"
    dataset = _checked(_Dataset, _json_of(folder, "dataset.json"), folder / "dataset.json")
    plans = _checked(_Plans, _json_of(folder, "plans.json"), plans_path)
    paths = {fold: _checkpoint_path(folder, fold, checkpoint) for fold in _folds(folder, folds)}
    first, *others = (_read_checkpoint(path) for path in paths.values())
    name = _configuration_name(folder, plans, first)
    configuration = _configuration(plans, name, plans_path)
    recipe = _recipe(dataset, plans, configuration, first, name, folder)
    members = (first, *others)
    weights = {
        segmentation_name(index): _weights(member.weights, recipe, path)
        for index, (member, path) in enumerate(zip(members, paths.values(), strict=True))
    }
    windows = {channel: recipe.preprocess.normalise_of(channel) for channel in recipe.data.channels}
    assert recipe.preprocess.spacing_mm != "auto"
    assert recipe.train.patch_shape != "auto"
    return ModelBundle(
        recipe=recipe,
        plan=Plan(
            spacing_mm=recipe.preprocess.spacing_mm,
            patch_shape=recipe.train.patch_shape,
            batch_size=configuration.batch_size,
            windows={
                channel: form for channel, form in windows.items() if isinstance(form, Window)
            },
        ),
        fingerprint=_fingerprint(dataset, plans, recipe),
        weights=weights,
        metrics=_validation_dice(folder, list(paths), checkpoint),
        origin={
            "nnU-Net dataset": plans.dataset_name,
            "nnU-Net plans": plans.plans_name,
            "nnU-Net trainer": first.trainer,
            "nnU-Net configuration": name,
            **{
                f"fold_{fold}/{checkpoint}": f"sha256 {sha256_of(path)}"
                for fold, path in paths.items()
            },
        },
    )


class _Loose(BaseModel):
    """A part of nnU-Net's JSON: what is needed is checked, the rest is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Dataset(_Loose):
    channel_names: dict[Name, Name] | None = None
    modality: dict[Name, Name] | None = None  # what older files call the channels
    labels: dict[Name, LabelValue | list[LabelValue]]
    regions_class_order: list[LabelValue] | None = None
    numTraining: Count = 0  # noqa: N815
    description: Any = None
    reference: Any = None
    licence: Any = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names in the order of the files `_0000`, `_0001`, …; a name that stands there twice gets its number."""
        names = list((self.channel_names or self.modality or {}).values())
        counts = Counter(names)
        return tuple(
            name if counts[name] == 1 else f"{name}_{n:04d}" for n, name in enumerate(names)
        )


class _Architecture(_Loose):
    network_class_name: str
    arch_kwargs: dict[str, Any]


class _Resampling(_Loose):
    order: int = 3
    order_z: int = 0
    is_seg: bool = False
    force_separate_z: bool | None = False
    separate_z_anisotropy_threshold: float = 3.0
    mode: str = "linear"

    @property
    def separate_above(self) -> float | None:
        """Ratio of spacings over which the coarsest axis is not interpolated."""
        if self.force_separate_z is None:
            return self.separate_z_anisotropy_threshold
        return 0.0 if self.force_separate_z else None


class _Configuration(_Loose):
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
    architecture: _Architecture
    previous_stage: str | None = None


class _Intensities(_Loose):
    mean: Intensity
    median: Intensity
    std: Intensity
    percentile_00_5: Intensity
    percentile_99_5: Intensity


class _Plans(_Loose):
    dataset_name: str
    plans_name: str
    image_reader_writer: str
    label_manager: str = "LabelManager"
    transpose_forward: list[int]
    configurations: dict[str, dict[str, Any]]
    foreground_intensity_properties_per_channel: dict[str, _Intensities] = {}
    foreground_intensity_properties_by_modality: dict[
        str, _Intensities
    ] = {}  # what older plans call it

    @property
    def intensities(self) -> dict[str, _Intensities]:
        return (
            self.foreground_intensity_properties_per_channel
            or self.foreground_intensity_properties_by_modality
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Checkpoint:
    weights: Mapping[str, torch.Tensor]
    trainer: str
    configuration: str
    tta_axes: tuple[int, ...]


# ---- files


def _json_of(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except OSError as error:
        inner = sorted(path.parent for path in folder.glob("*/plans.json"))
        raise VolsegError(
            f"{folder}: not a trained nnU-Net folder, it has no readable {name} ({error.strerror or error})",
            fix=f"give {inner[0]}"
            if inner
            else f"give <trainer>__<plans>__<configuration>, with {name} and fold_*/",
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
            f"{where}: not as nnU-Net v2 writes it: {listed(mistakes_of(error, model))}",
            fix="give the files of nnU-Net v2; models of version 1 have to be trained again",
            code="E_NNUNET",
        ) from error


def _folds(folder: Path, wanted: Sequence[str] | None) -> list[str]:
    """Which folds to take: those asked for, else the numbered ones that are there, else `all`."""
    found = sorted(
        path.name.removeprefix("fold_") for path in folder.glob("fold_*") if path.is_dir()
    )
    if wanted is not None:
        folds = [fold.strip().removeprefix("fold_") for fold in wanted]
        missing = [fold for fold in folds if fold not in found]
        if missing or len(set(folds)) < len(folds):
            problem = (
                f"has no fold {', '.join(missing)}"
                if missing
                else f"folds {', '.join(folds)} name one twice"
            )
            raise VolsegError(
                f"{folder}: {problem}; it has {', '.join(found) or 'none'}",
                fix="name folds that are there, once each, such as --folds 0,1,2 or --folds all",
                code="E_NNUNET",
            )
        return folds
    folds = sorted((fold for fold in found if fold.isdecimal()), key=int) or [
        fold for fold in found if fold == ALL_FOLDS
    ]
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
                f"{path}: is not a file", fix="give the checkpoint itself", code="E_NOTFILE"
            )
        there = sorted(other.name for other in path.parent.glob("checkpoint_*.pth"))
        others = f"--checkpoint {there[0]}" if there else "copy it"
        raise VolsegError(
            f"{path}: there is no such checkpoint; the fold has {', '.join(there) or 'none'}",
            fix=f"{others}, or leave the fold out with --folds",
            code="E_NNUNET",
        )
    return path


def _read_checkpoint(path: Path) -> _Checkpoint:
    """The parts of a checkpoint that inference needs; nothing in it is run.

    Raises:
        VolsegError: the pickle asks for a name outside `ALLOWED`, or is not a checkpoint.
    """
    make_scalar: Any = np.float64(0).__reduce__()[0]
    scalars: list[Any] = [
        (make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")
    ]  # NumPy 2 and 1
    dtypes = [type(np.dtype(kind)) for kind in _DTYPES]
    try:
        _refuse_other_names(path)
        with torch.serialization.safe_globals([np.dtype, *dtypes, *scalars]):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        arguments, weights = content["init_args"], content["network_weights"]
        tta_axes = content.get("inference_allowed_mirroring_axes")
        return _Checkpoint(
            weights={str(key): tensor.detach() for key, tensor in weights.items()},
            trainer=shortened(str(content["trainer_name"]), 200),
            configuration=shortened(str(arguments["configuration"]), 200),
            tta_axes=tuple(int(axis) for axis in tta_axes or ()),
        )
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise VolsegError(
            f"{path}: not a checkpoint of nnU-Net v2 ({type(error).__name__}: {reason})",
            fix="copy it again",
            code="E_CKPT",
        ) from error
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror or error})",
            fix="check its permissions",
            code="E_PERM",
        ) from error


def _refuse_other_names(path: Path) -> None:
    """Look, without running it, at what the pickle asks for."""
    asked, from_the_stack = _names_in(_pickle_of(path))
    others = sorted(asked - ALLOWED)
    if others or from_the_stack:
        named = ", ".join(others[:5]) or "names that it puts together while it is read"
        raise VolsegError(
            f"{path}: its pickle asks for {named}, which no checkpoint of nnU-Net needs; it was not loaded",
            fix="take the checkpoint from a source that you trust, or save it again without these objects",
            code="E_PICKLE",
        )


def _pickle_of(path: Path) -> bytes:
    """The pickle in a file of `torch.save`, which is a zip archive; any other file is taken to be one itself."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return read_bytes(path, max_bytes=MAX_PICKLE_BYTES)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise ValueError(f"holds {len(members):,} files, more than {MAX_MEMBERS:,}")
            (member,) = (member for member in members if member.filename.endswith("/data.pkl"))
            size, packed = member.file_size, member.compress_size
            if size > min(MAX_PICKLE_BYTES, MAX_PICKLE_RATIO * packed):
                raise ValueError(f"its pickle of {packed:,} bytes unpacks to {size:,}")
            return archive.read(member)


def _names_in(data: bytes) -> tuple[set[str], bool]:
    """The `module.name`s that the unpickler would look up, and whether it takes some from its stack, as `torch.save` never does.

    For those the names are the last two texts, which is what an honest pickle means by them.
    """
    names: set[str] = set()
    from_the_stack = False
    texts, memo = ["", ""], {}
    last: str | None = None
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_OPCODES:
            raise ValueError(f"its pickle holds more than {MAX_OPCODES:,} instructions")
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            from_the_stack = True
            names.add(".".join(texts[-2:]) if argument is None else f"extension {argument}")
        elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = last
            continue
        last = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET") else argument
        if isinstance(last, str):
            texts = [texts[-1], last]
    return names, from_the_stack


# ---- configuration


def _configuration_name(folder: Path, plans: _Plans, checkpoint: _Checkpoint) -> str:
    """The last part of the folder's name; where it has none, what the checkpoint says."""
    parts = folder.resolve().name.split("__")
    name = parts[2] if len(parts) == 3 else checkpoint.configuration
    if name != checkpoint.configuration:
        raise VolsegError(
            f"{folder}: is named for configuration {name!r}, but its checkpoint was trained as {checkpoint.configuration!r}",
            fix="give the folder its own name back",
            code="E_NNUNET",
        )
    if name not in plans.configurations:
        raise VolsegError(
            f"{folder / 'plans.json'}: has no configuration {name!r}; it has {', '.join(plans.configurations)}",
            fix="put the plans beside the model with which it was trained",
            code="E_NNUNET",
        )
    return name


def _configuration(plans: _Plans, name: str, where: Path) -> _Configuration:
    """The configuration with what it inherits, in today's form.

    Raises:
        VolsegError: it is 2D, the second stage of a cascade, or needs code that volseg does not have.
    """
    content: dict[str, Any] = {}
    visited: set[str] = set()
    parent: Any = name
    while parent is not None:
        if parent in visited or parent not in plans.configurations:
            raise _unsupported(
                where,
                f"configuration {name!r} inherits from {parent!r}, which is missing or itself",
            )
        visited.add(parent)
        for key, value in plans.configurations[parent].items():
            content.setdefault(key, value)
        parent = plans.configurations[parent].get("inherits_from")
    if content.get("previous_stage"):
        raise _unsupported(
            where,
            f"configuration {name!r} is the second stage of a cascade, fed with the masks of {content['previous_stage']!r}",
            fix="import the 3d_fullres or 3d_lowres model of the same dataset",
        )
    if isinstance(patch := content.get("patch_size"), list) and len(patch) == 2:
        raise _unsupported(
            where,
            f"configuration {name!r} is 2D; volseg runs 3D networks",
            fix="import the 3d_fullres or 3d_lowres model of the same dataset",
        )
    if "architecture" not in content and "UNet_class_name" in content:
        content["architecture"] = _modern_architecture(content, where)
    configuration = _checked(_Configuration, content, f"{where}, configuration {name}")
    for key, found, known in (
        ("preprocessor", configuration.preprocessor_name, "DefaultPreprocessor"),
        ("label manager", plans.label_manager, "LabelManager"),
    ):
        if found != known:
            raise _unsupported(where, f"{key} {found!r} is unknown; volseg does what {known} does")
    return configuration


def _modern_architecture(old: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The architecture of plans that were written before nnU-Net v2.4, in which its numbers lay in the configuration itself."""
    try:
        n_down, plain = old["n_conv_per_stage_encoder"], old["UNet_class_name"] == "PlainConvUNet"
        widest, base = old["unet_max_num_features"], old["UNet_base_num_features"]
        return {
            "network_class_name": old["UNet_class_name"],
            "arch_kwargs": {
                "features_per_stage": [
                    min(base * 2**level, widest) for level in range(len(n_down))
                ],
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
        raise _unsupported(where, f"its old form lacks {error}") from error


def _unsupported(where: Path, problem: str, fix: str | None = None) -> VolsegError:
    return VolsegError(
        f"{where}: {problem}",
        fix=fix or "run this model with nnU-Net; volseg imports its standard ones",
        code="E_NNUNET",
    )


# ---- recipe


def _recipe(
    dataset: _Dataset,
    plans: _Plans,
    configuration: _Configuration,
    checkpoint: _Checkpoint,
    name: str,
    folder: Path,
) -> Recipe:
    plans_path = folder / "plans.json"
    network, settings = _network(configuration.architecture, plans_path)
    channels = dataset.channels
    if not channels:
        raise _unsupported(
            folder / "dataset.json", "names no channels", fix='add "channel_names": {"0": "CT"}'
        )
    schemes = configuration.normalization_schemes
    if not len(channels) == len(schemes) == len(configuration.use_mask_for_norm):
        raise _unsupported(
            plans_path,
            f"normalises {len(schemes)} channels, but dataset.json names {len(channels)}",
            fix="put the dataset.json beside the model with which it was trained",
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
    content = {
        "name": re.sub(r"[^a-z0-9_]", "_", title.lower()).lstrip("_")[:200] or "nnunet",
        "description": shortened(
            str(
                dataset.description or f"nnU-Net model {plans.dataset_name}, configuration {name}."
            ),
            5000,
        ),
        "data_source": shortened(
            "; ".join(str(text) for text in (dataset.reference, dataset.licence) if text), 5000
        ),
        "data": {
            "channels": channels,
            "labels": labels,
            "intensity_unit": "HU" if schemes[0] == "CTNormalization" else "a.u.",
            "regions_class_order": order,
        },
        "preprocess": {
            "spacing_mm": configuration.spacing,
            "crop": "nonzero",
            "normalise": first,
            "normalise_channels": {
                channel: form for channel, form in forms.items() if form != first
            },
            "normalise_first": True,
            **_axes(plans, plans_path),
            **_resampling(configuration, plans_path),
            **({"body_above": CT_BODY_ABOVE} if schemes[0] == "CTNormalization" else {}),
        },
        "network": {"name": network, **settings},
        "train": {"patch_shape": configuration.patch_size, "batch_size": configuration.batch_size},
        "infer": {"overlap": OVERLAP, "tta_axes": _tta_axes(checkpoint, folder)},
    }
    return parse_recipe(content, where=str(folder))


def _labels(dataset: _Dataset, where: Path) -> tuple[dict[str, int], list[int] | None]:
    """Name → mask value, and for regions the values in the order of the network's output channels.

    `ignore` marks voxels that training left out, so no channel stands for it. Channels of regions come in the order of the file.
    """
    named = {
        name: [value] if isinstance(value, int) else value for name, value in dataset.labels.items()
    }
    named = {
        name: values for name, values in named.items() if name != "ignore" and set(values) != {0}
    }
    if not named:
        raise _unsupported(where, "names no label beside the background")
    if all(len(values) == 1 for values in named.values()):
        labels = {name: values[0] for name, values in named.items()}
        if sorted(labels.values()) != list(range(1, len(labels) + 1)):
            raise _unsupported(
                where,
                f"labels {labels} are not numbered 1, 2, … {len(labels)}, so no channel of the network can be told from another",
                fix="put the dataset.json beside the model with which it was trained",
            )
        return labels, None
    order = dataset.regions_class_order
    if order is None or len(order) != len(named):
        raise _unsupported(
            where,
            f"has {len(named)} regions, but regions_class_order {order}",
            fix='give "regions_class_order" one number per region',
        )
    return dict(zip(named, order, strict=True)), order


def _normaliser(
    scheme: str, masked: bool, found: _Intensities | None, where: Path
) -> dict[str, Any]:
    """nnU-Net's class for a channel → a table of the recipe."""
    if scheme == "CTNormalization":
        if found is None:
            raise _unsupported(
                where, "CTNormalization has no intensity statistics", fix="copy the plans again"
            )
        return {
            "method": "window",
            "low": found.percentile_00_5,
            "high": found.percentile_99_5,
            "mean": found.mean,
            "sd": max(found.std, 1e-8),
        }
    forms = {
        "ZScoreNormalization": {"method": "zscore", "region": "nonzero" if masked else "scan"},
        "NoNormalization": {"method": "scale"},
        "RescaleTo01Normalization": {
            "method": "percentile",
            "low_percent": 0,
            "high_percent": 100,
            "region": "scan",
        },
        "RGBTo01Normalization": {"method": "scale", "divide_by": 255},
    }
    if scheme not in forms:
        raise _unsupported(
            where,
            f"normalisation {scheme!r} is unknown; known are CTNormalization, {', '.join(forms)}",
        )
    return forms[scheme]


def _axes(plans: _Plans, where: Path) -> dict[str, Any]:
    """Which axes the network sees."""
    reader, forward = plans.image_reader_writer, plans.transpose_forward
    if reader not in _AXES:
        raise _unsupported(
            where, f"reader {reader!r} is unknown or not for NIfTI; known are {', '.join(_AXES)}"
        )
    # The readers that reorient give (S, A, R), the reverse of ours.
    transpose = forward if _AXES[reader] == "stored" else [2 - axis for axis in forward]
    return {"axes": _AXES[reader], "transpose": transpose}


def _resampling(configuration: _Configuration, where: Path) -> dict[str, Any]:
    """Order and anisotropy rule of the images; the logits have to come back by the same rule, linearly."""
    images, logits = (
        _resampler(function, arguments, where)
        for function, arguments in (
            (configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs),
            (
                configuration.resampling_fn_probabilities,
                configuration.resampling_fn_probabilities_kwargs,
            ),
        )
    )
    if images.order not in _INTERPOLATION or logits.order != 1:
        raise _unsupported(
            where,
            f"resamples images with order {images.order} and logits with order {logits.order}, not 3 or 1 and 1",
        )
    if images.separate_above != logits.separate_above:
        raise _unsupported(where, "resamples images and logits by different rules of anisotropy")
    interpolation = _INTERPOLATION[images.order]
    return {
        "interpolation": interpolation,
        "separate_above": images.separate_above,
        "clip_overshoot": interpolation == "cubic",
    }


def _resampler(function: str, arguments: Mapping[str, Any], where: Path) -> _Resampling:
    if function == "resample_data_or_seg_to_shape":
        found = _checked(_Resampling, arguments, where)
    elif (
        function == "resample_torch_fornnunet"
    ):  # its own defaults: linear, and separate where it has to be
        found = _checked(_Resampling, {"force_separate_z": None, **arguments, "order": 1}, where)
    else:
        raise _unsupported(where, f"resampling function {function!r} is unknown")
    if found.order_z != 0 or found.is_seg or found.mode != "linear":
        raise _unsupported(
            where, f"resampling function {function!r} has arguments {dict(arguments)}"
        )
    return found


def _tta_axes(checkpoint: _Checkpoint, folder: Path) -> list[str]:
    if any(axis not in (0, 1, 2) for axis in checkpoint.tta_axes):
        raise _unsupported(
            folder, f"the checkpoint mirrors axes {checkpoint.tta_axes} of a 3D network"
        )
    return ["RAS"[axis] for axis in checkpoint.tta_axes]


# ---- network


def _network(architecture: _Architecture, where: Path) -> tuple[str, dict[str, Any]]:
    """File in models/ and the arguments of its `build`."""
    kind = architecture.network_class_name.rpartition(".")[2]
    if kind not in _NETWORKS:
        raise _unsupported(
            where, f"architecture {kind!r} is unknown; known are {', '.join(_NETWORKS)}"
        )
    name, n_down = _NETWORKS[kind]
    rest = {
        key: value for key, value in architecture.arch_kwargs.items() if key not in _WITHOUT_EFFECT
    }
    try:
        levels = len(rest["strides"])
        settings: dict[str, Any] = {
            "features": _per_level(rest.pop("features_per_stage"), levels),
            "strides": [_triple(stride) for stride in rest.pop("strides")],
            "kernels": [_triple(kernel) for kernel in _per_level(rest.pop("kernel_sizes"), levels)],
            n_down: _per_level(rest.pop(n_down), levels),
            "n_conv_per_stage_decoder": _per_level(
                rest.pop("n_conv_per_stage_decoder"), levels - 1
            ),
            "conv_bias": bool(rest.pop("conv_bias", False)),
            **_norm(rest.pop("norm_op", None), rest.pop("norm_op_kwargs", None) or {}, where),
            **_activation(rest.pop("nonlin", None), rest.pop("nonlin_kwargs", None) or {}, where),
        }
        if name == "nnunet_residual":
            settings["stem_channels"] = rest.pop("stem_channels", None)
            if str(rest.get("block", "BasicBlockD")).endswith("BasicBlockD"):
                rest.pop("block", None)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _unsupported(
            where, f"architecture {kind} is not described as nnU-Net does ({error!r})"
        ) from error
    if not str(rest.pop("conv_op", "Conv3d")).endswith("Conv3d"):
        raise _unsupported(
            where, "the network is not 3D", fix="import a 3D configuration of the same dataset"
        )
    unknown = {key: value for key, value in rest.items() if value not in (None, False)}
    if unknown:
        raise _unsupported(
            where, f"architecture {kind} has settings that volseg does not know: {unknown}"
        )
    return name, settings


def _per_level(value: Any, levels: int) -> list[Any]:
    return [value] * levels if isinstance(value, int) else list(value)


def _triple(value: Any) -> list[int]:
    return [value] * 3 if isinstance(value, int) else [int(number) for number in value]


def _norm(kind: Any, arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    rest = dict(arguments)
    found = {
        "norm_eps": float(rest.pop("eps", 1e-5)),
        "norm_affine": bool(rest.pop("affine", False)),
    }
    rest.pop("momentum", None)
    if not str(kind).endswith("InstanceNorm3d") or any(rest.values()):
        raise _unsupported(
            where,
            f"normalisation layer {kind} {dict(arguments)} is unknown; known is InstanceNorm3d",
        )
    return found


def _activation(kind: Any, arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    name = str(kind).rpartition(".")[2]
    if name not in ("LeakyReLU", "ReLU"):
        raise _unsupported(where, f"activation {kind} is unknown; known are LeakyReLU and ReLU")
    return {"slope": 0.0 if name == "ReLU" else float(arguments.get("negative_slope", 0.01))}


def _weights(
    found: Mapping[str, torch.Tensor], recipe: Recipe, path: Path
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names of our network, which they are tried on.

    Raises:
        VolsegError: a tensor is missing, of another shape, or there are some which the network of the plans does not have.
    """
    last = len(recipe.network.settings["features"]) - 2
    with torch.device("meta"):  # names and shapes alone
        network = build_segmentation(recipe)
    theirs = {name: _their_name(name, recipe.network.name, last) for name in weights_of(network)}
    again = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
    coarser_head = re.compile(rf"^decoder\.seg_layers\.(?!{last}\.)\d+\.")
    used = {key for key in found if not again.search(key) and not coarser_head.search(key)}
    strange = sorted(used - set(theirs.values()))
    missing = sorted(set(theirs.values()) - used)
    if strange or missing:
        raise VolsegError(
            f"{path}: is not the network of plans.json: {len(missing)} of its tensors are missing {missing[:3]}, "
            f"{len(strange)} are unknown {strange[:3]}",
            fix="give the plans.json of this training; a trainer that changes the network cannot be imported",
            code="E_CKPT",
        )
    shapes = {name: tensor.shape for name, tensor in weights_of(network).items()}
    misfits = [key for name, key in theirs.items() if found[key].shape != shapes[name]]
    if misfits:  # before any is copied: a tensor that repeats one number may claim any size
        raise VolsegError(
            f"{path}: is not the network of plans.json: {len(misfits)} of its tensors do not fit the network {misfits[:3]}",
            fix="give the plans.json of this training; a trainer that changes the network cannot be imported",
            code="E_CKPT",
        )
    weights = {name: found[key].to(torch.float32, copy=True) for name, key in theirs.items()}
    try:
        check_finite(weights)
    except VolsegError as error:
        raise VolsegError(f"{path}: {error.problem}", fix=error.fix, code=error.code) from error
    return weights


def _their_name(name: str, network: str, last: int) -> str:
    """The key of nnU-Net's `state_dict` for one of our tensors."""
    plain = network == "nnunet_plain"
    rules = (
        (r"^stem\.0\.", "encoder.stem.convs.0."),
        (
            r"^encoder\.(\d+)\.(\d+)\.",
            r"encoder.stages.\1.0.convs.\2." if plain else r"encoder.stages.\1.blocks.\2.",
        ),
        (r"^decoder\.(\d+)\.(\d+)\.", r"decoder.stages.\1.convs.\2."),
        (r"^up\.(\d+)\.", r"decoder.transpconvs.\1."),
        (r"^head\.", f"decoder.seg_layers.{last}."),
    )
    for pattern, replacement in rules:
        theirs, hits = re.subn(pattern, replacement, name)
        if hits:
            return theirs
    raise AssertionError(name)


# ---- what is known about its training


def _fingerprint(dataset: _Dataset, plans: _Plans, recipe: Recipe) -> DatasetFingerprint:
    """What nnU-Net's files say about the training cases; it keeps no spacing or voxel count per case."""
    foreground = {
        channel: IntensityStatistics(
            mean=found.mean,
            sd=found.std,
            p00_5=found.percentile_00_5,
            median=found.median,
            p99_5=found.percentile_99_5,
        )
        for number, channel in enumerate(recipe.data.channels)
        if (found := plans.intensities.get(str(number))) is not None
    }
    return DatasetFingerprint(
        n_cases=dataset.numTraining,
        spacings_mm=(),
        shapes=(),
        label_voxels={},
        foreground=foreground,
    )


def _validation_dice(folder: Path, folds: Sequence[str], checkpoint: str) -> dict[str, float]:
    """Mean Dice of each fold's validation cases, where nnU-Net left it; it belongs to the final checkpoint."""
    metrics = {}
    for fold in folds if checkpoint == FINAL else ():
        try:
            summary = read_json(
                folder / f"fold_{fold}" / "validation" / "summary.json", is_finite=False
            )
            metrics[f"{NNUNET_DICE}{fold}"] = float(summary["foreground_mean"]["Dice"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return {name: value for name, value in metrics.items() if np.isfinite(value)}
