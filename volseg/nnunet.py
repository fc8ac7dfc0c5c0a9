"""Models of nnU-Net v2: convert a trained folder to a `ModelBundle` that gives nnU-Net's masks.

Such a folder is named `<trainer>__<plans>__<configuration>` and holds `plans.json`, `dataset.json`
and, per fold, a checkpoint: a pickle with the network's `state_dict` among other things. Only what
`ALLOWED` names is unpickled.

Keys of that `state_dict` (level s counts from the finest on the way down, from the coarsest on the
way up; i is a layer or block):

    encoder.stages.{s}.0.convs.{i}.conv|norm.weight|bias        plain encoder
    encoder.stem.convs.0.conv|norm.…                            residual encoder, first convolution
    encoder.stages.{s}.blocks.{i}.conv1|conv2.conv|norm.…       residual encoder
    encoder.stages.{s}.blocks.{i}.skip.{0 or 1}.conv|norm.…     … 1 if it pools before projecting
    decoder.transpconvs.{s}.weight|bias                         transposed convolution into level s
    decoder.stages.{s}.convs.{i}.conv|norm.…
    decoder.seg_layers.{s}.weight|bias                          a head per level, the last is used

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
from volseg.inputs import open_regular, read_bytes, read_json, shorten
from volseg.io.files import sha256_of
from volseg.networks import build_segmentation, check_finite, unique_tensors
from volseg.planning import Count, DatasetFingerprint, IntensityStatistics, Plan
from volseg.recipe import (
    Intensity,
    LabelValue,
    Name,
    Recipe,
    Window,
    listed,
    parse_recipe,
    validation_messages,
)

Model = TypeVar("Model", bound=BaseModel)

FINAL = "checkpoint_final.pth"
ALL_FOLDS = "all"  # name of the fold that was trained on every case
OVERLAP = 0.5  # nnU-Net's step is half a patch
CT_BODY_ABOVE = -500.0  # HU: between air and fat

# All that a checkpoint of nnU-Net may ask the unpickler for: tensors, containers, and the NumPy
# scalars of its log.
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
_DAMAGE = (  # raised by reading a file that is not a checkpoint
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
# Twice the log of 8000 epochs with 117 classes; the weights are separate files in the archive.
MAX_PICKLE_BYTES = 64 << 20
MAX_PICKLE_RATIO = 20  # of compression; `torch.save` does not compress at all
MAX_OPCODES = 10_000_000
MAX_MEMBERS = 100_000  # files in the archive: one per tensor
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")

# reader → axes of its arrays: those of the file (slowest first), or of the patient (S, A, R)
_AXES = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "canonical",
    "NibabelIOWithReorient": "canonical",
}
_INTERPOLATION = {1: "linear", 3: "cubic"}
# architecture → file in models/, its key for the numbers of convolutions or blocks on the way down
_NETWORKS = {
    "PlainConvUNet": ("nnunet_plain", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("nnunet_residual", "n_blocks_per_stage"),
}
_TRAINING_ONLY = {"n_stages", "dropout_op", "dropout_op_kwargs", "deep_supervision"}


def read_nnunet(
    folder: Path, *, folds: Sequence[str] | None = None, checkpoint: str = FINAL
) -> ModelBundle:
    """Return a trained nnU-Net v2 folder as a bundle; several folds become an ensemble.

    Args:
        folder: holds plans.json and dataset.json.
        folds: such as `("0", "1")` or `("all",)`; None for all numbered folds, else `all`.
        checkpoint: the file in each fold's folder.

    Raises:
        VolsegError: a file is missing or damaged, or volseg does not support the model.
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
    forms = {channel: recipe.preprocess.normaliser_of(channel) for channel in recipe.data.channels}
    windows = {channel: form for channel, form in forms.items() if isinstance(form, Window)}
    hashes = {f"fold_{fold}/{checkpoint}": sha256_of(path) for fold, path in paths.items()}
    assert recipe.preprocess.spacing_mm != "auto"
    assert recipe.train.patch_shape != "auto"
    return ModelBundle(
        recipe=recipe,
        plan=Plan(
            spacing_mm=recipe.preprocess.spacing_mm,
            patch_shape=recipe.train.patch_shape,
            batch_size=configuration.batch_size,
            windows=windows,
        ),
        fingerprint=_fingerprint(dataset, plans, recipe),
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


class _Loose(BaseModel):
    """A part of nnU-Net's JSON; keys that volseg does not need are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Dataset(_Loose):
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
        """Ratio of spacings above which the coarsest axis is not interpolated."""
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
    foreground_intensity_properties_by_modality: dict[str, _Intensities] = {}  # in older plans

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


def _read_checkpoint(path: Path) -> _Checkpoint:
    """Read the parts of a checkpoint that inference needs, without running code from it.

    Raises:
        VolsegError: the pickle asks for a name outside `ALLOWED`, or is not a checkpoint.
    """
    make_scalar: Any = np.float64(0).__reduce__()[0]
    cores = ("_core", "core")  # NumPy 2 and 1
    scalars: list[Any] = [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in cores]
    dtypes = [type(np.dtype(kind)) for kind in _DTYPES]
    try:
        _refuse_other_names(path)
        with torch.serialization.safe_globals([np.dtype, *dtypes, *scalars]):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        arguments, weights = content["init_args"], content["network_weights"]
        tta_axes = content.get("inference_allowed_mirroring_axes")
        return _Checkpoint(
            weights={str(key): tensor.detach() for key, tensor in weights.items()},
            trainer=shorten(str(content["trainer_name"]), 200),
            configuration=shorten(str(arguments["configuration"]), 200),
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
    """Check the names that a pickle asks for, without running it."""
    requested, from_the_stack = _names_in(_pickle_of(path))
    others = sorted(requested - ALLOWED)
    if others or from_the_stack:
        names = ", ".join(others[:5]) or "names that it puts together while it is read"
        raise VolsegError(
            f"{path}: its pickle asks for {names}, which no checkpoint of nnU-Net needs; "
            "it was not loaded",
            fix="take the checkpoint from a source that you trust, or save it again without "
            "these objects",
            code="E_PICKLE",
        )


def _pickle_of(path: Path) -> bytes:
    """Read the pickle in a zip archive of `torch.save`; any other file is taken to be a pickle."""
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
    """Return the names `module.name` that a pickle asks for, and whether any come from its stack.

    `torch.save` takes none from the stack; such a name is guessed from the last two texts, as in an
    honest pickle.
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


def _configuration(plans: _Plans, name: str, where: Path) -> _Configuration:
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
            raise _unsupported(where, problem)
        visited.add(parent)
        for key, value in plans.configurations[parent].items():
            content.setdefault(key, value)
        parent = plans.configurations[parent].get("inherits_from")
    if content.get("previous_stage"):
        raise _unsupported(
            where,
            f"configuration {name!r} is the second stage of a cascade and needs the masks of "
            f"{content['previous_stage']!r}",
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
    for key, name_in_plans, supported in (
        ("preprocessor", configuration.preprocessor_name, "DefaultPreprocessor"),
        ("label manager", plans.label_manager, "LabelManager"),
    ):
        if name_in_plans != supported:
            problem = f"{key} {name_in_plans!r} is unknown; volseg supports {supported}"
            raise _unsupported(where, problem)
    return configuration


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
        raise _unsupported(where, f"written before nnU-Net v2.4, but lacks {error}") from error


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


def _labels(dataset: _Dataset, where: Path) -> tuple[dict[str, int], list[int] | None]:
    """Return name → mask value, and for regions the values in the order of the output channels.

    `ignore` marks unannotated voxels and has no channel. Regions have the order of the file.
    """
    lists = {name: [v] if isinstance(v, int) else v for name, v in dataset.labels.items()}
    named = {name: v for name, v in lists.items() if name != "ignore" and set(v) != {0}}
    if not named:
        raise _unsupported(where, "names no label beside the background")
    if all(len(values) == 1 for values in named.values()):
        labels = {name: values[0] for name, values in named.items()}
        if sorted(labels.values()) != list(range(1, len(labels) + 1)):
            raise _unsupported(
                where,
                f"labels {labels} are not numbered 1, 2, … {len(labels)}, so the channels of the "
                "network cannot be assigned to them",
                fix="copy the dataset.json with which the model was trained",
            )
        return labels, None
    order = dataset.regions_class_order
    if order is None or len(order) != len(named):
        raise _unsupported(
            where,
            f"has {len(named)} regions, but regions_class_order {order}",
            fix='give "regions_class_order" with one number per region',
        )
    return dict(zip(named, order, strict=True)), order


def _normaliser(
    scheme: str, masked: bool, intensities: _Intensities | None, where: Path
) -> dict[str, Any]:
    """Return the recipe's table for nnU-Net's normalisation of a channel."""
    if scheme == "CTNormalization":
        if intensities is None:
            raise _unsupported(
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
        raise _unsupported(where, f"normalisation {scheme!r} is unknown; volseg supports {names}")
    return forms[scheme]


def _axes(plans: _Plans, where: Path) -> dict[str, Any]:
    """Return the axes that the network sees, as keys of the recipe."""
    reader, forward = plans.image_reader_writer, plans.transpose_forward
    if reader not in _AXES:
        problem = f"reader {reader!r} is unknown or not for NIfTI"
        raise _unsupported(where, f"{problem}; volseg supports {', '.join(_AXES)}")
    # The readers that reorient give (S, A, R), the reverse of volseg's axes.
    transpose = forward if _AXES[reader] == "stored" else [2 - axis for axis in forward]
    return {"axes": _AXES[reader], "transpose": transpose}


def _resampling(configuration: _Configuration, where: Path) -> dict[str, Any]:
    """Return order and anisotropy rule of the images; the logits must follow it, linearly."""
    images = _resampler(
        configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs, where
    )
    logits = _resampler(
        configuration.resampling_fn_probabilities,
        configuration.resampling_fn_probabilities_kwargs,
        where,
    )
    if images.order not in _INTERPOLATION or logits.order != 1:
        raise _unsupported(
            where,
            f"resamples images with order {images.order} and logits with order {logits.order}; "
            "volseg supports 3 or 1 for images, and 1 for logits",
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
        resampling = _checked(_Resampling, arguments, where)
    elif function == "resample_torch_fornnunet":  # linear by default, separate where needed
        changes = {"force_separate_z": None, **arguments, "order": 1}
        resampling = _checked(_Resampling, changes, where)
    else:
        raise _unsupported(where, f"resampling function {function!r} is unknown")
    if resampling.order_z != 0 or resampling.is_seg or resampling.mode != "linear":
        problem = f"resampling function {function!r} has unsupported arguments {dict(arguments)}"
        raise _unsupported(where, problem)
    return resampling


def _tta_axes(checkpoint: _Checkpoint, folder: Path) -> list[str]:
    axes = checkpoint.tta_axes
    if any(axis not in (0, 1, 2) for axis in axes):
        raise _unsupported(folder, f"the checkpoint mirrors axes {axes} of a 3D network")
    return ["RAS"[axis] for axis in axes]


# ---- network


def _network(architecture: _Architecture, where: Path) -> tuple[str, dict[str, Any]]:
    """Return the file in models/ and the arguments of its `build`."""
    kind = architecture.network_class_name.rpartition(".")[2]
    if kind not in _NETWORKS:
        names = ", ".join(_NETWORKS)
        raise _unsupported(where, f"architecture {kind!r} is unknown; volseg supports {names}")
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
        raise _unsupported(
            where, f"architecture {kind} is not described as nnU-Net does ({error!r})"
        ) from error
    if not str(pop("conv_op", "Conv3d")).endswith("Conv3d"):
        raise _unsupported(
            where, "the network is not 3D", fix="import a 3D configuration of the same dataset"
        )
    unknown = {key: value for key, value in kwargs.items() if value not in (None, False)}
    if unknown:
        raise _unsupported(where, f"architecture {kind} has unsupported settings: {unknown}")
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
        raise _unsupported(where, f"{problem}; volseg supports InstanceNorm3d")
    return settings


def _activation(kind: Any, arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    name = str(kind).rpartition(".")[2]
    if name not in ("LeakyReLU", "ReLU"):
        problem = f"activation {kind} is unknown; volseg supports LeakyReLU and ReLU"
        raise _unsupported(where, problem)
    return {"slope": 0.0 if name == "ReLU" else float(arguments.get("negative_slope", 0.01))}


def _weights(
    tensors: Mapping[str, torch.Tensor], recipe: Recipe, path: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint under the names of volseg's network.

    Raises:
        VolsegError: a tensor is missing, of another shape, or not in the network of the plans.
    """
    last = len(recipe.network.settings["features"]) - 2
    with torch.device("meta"):  # names and shapes alone
        network = build_segmentation(recipe)
    theirs = {
        name: _their_name(name, recipe.network.name, last) for name in unique_tensors(network)
    }
    again = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
    coarser_head = re.compile(rf"^decoder\.seg_layers\.(?!{last}\.)\d+\.")
    used = {key for key in tensors if not again.search(key) and not coarser_head.search(key)}
    unknown = sorted(used - set(theirs.values()))
    missing = sorted(set(theirs.values()) - used)
    problem = f"{path}: is not the network of plans.json"
    fix = "give the plans.json of this training; trainers that change the network are not supported"
    if unknown or missing:
        raise VolsegError(
            f"{problem}: {len(missing)} of its tensors are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}",
            fix=fix,
            code="E_CKPT",
        )
    shapes = {name: tensor.shape for name, tensor in unique_tensors(network).items()}
    misfits = [key for name, key in theirs.items() if tensors[key].shape != shapes[name]]
    if misfits:  # checked before copying: a tensor that repeats one number may claim any size
        raise VolsegError(
            f"{problem}: {len(misfits)} of its tensors do not fit the network {misfits[:3]}",
            fix=fix,
            code="E_CKPT",
        )
    weights = {name: tensors[key].to(torch.float32, copy=True) for name, key in theirs.items()}
    try:
        check_finite(weights)
    except VolsegError as error:
        raise VolsegError(f"{path}: {error.problem}", fix=error.fix, code=error.code) from error
    return weights


def _their_name(name: str, network: str, last: int) -> str:
    """Return the key of nnU-Net's `state_dict` for one of volseg's tensors."""
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


# ---- training data


def _fingerprint(dataset: _Dataset, plans: _Plans, recipe: Recipe) -> DatasetFingerprint:
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
    return {name: value for name, value in metrics.items() if np.isfinite(value)}
