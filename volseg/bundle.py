"""A trained model as a folder: weights in safetensors, all else in JSON, and a card; no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from volseg import __version__
from volseg.errors import VolsegError
from volseg.inputs import MAX_TEXT_BYTES, open_regular, parse_json, read_bytes, shorten
from volseg.io.files import make_folder, sha256_of, write_bytes_atomic, write_json_atomic
from volseg.mismatch import list_checks
from volseg.networks import build_classifier, build_segmentation, copy_weights
from volseg.planning.close import Reason
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import (
    AUTO,
    GATE,
    TYPE,
    Preprocess,
    Recipe,
    Roi,
    Role,
    RoleOfClassifier,
    Text,
    listed,
    parse_recipe,
    validation_messages,
)
from volseg.words import format_count, format_sizes

FORMAT_VERSION = 2
DESCRIPTION = "model.json"
SHIPPED = "lung_nodule_ct"
BEST_OF_RUN = (
    "The weights are those of the run that were best on validation cases, "
    "so validation flatters them a little."
)
UNSTATED = "Not stated."
EXPORTED = "openvino"  # subfolder of a model folder with the OpenVINO files
# Weights of the 3D network; further networks of an ensemble are numbered.
SEGMENTATION = "segmentation"
ROI = "roi"  # weights of the coarse first pass
# Metrics that the model box on a report reads; a label or a fold follows the last two.
COUNTS = ("training_cases", "validation_cases")
DICE, NNUNET_DICE = "validation_dice_", "nnunet_validation_dice_fold_"
# The start of a file name in the model's folder.
NetworkName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, eq=False)
class ModelBundle:
    """A trained model: all that inference needs besides the scan.

    Args:
        recipe: closed: it holds no "auto".
        weights: network name (`segmentation`, `segmentation_1`, …, `classifier`, `roi`) → tensors.
        reasons: why the plan chose what the recipe left open.
        metrics: results of training and validation.
        origin: source of an imported model.
        classifiers_sha256: role of each classifier of the recipe → hash of its model.json.
        first_network: name of the 3D network; those of an ensemble begin with it.
    """

    recipe: Recipe
    fingerprint: DatasetFingerprint
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    classifiers_sha256: Mapping[Role, str] = field(default_factory=dict)
    sha256: str = ""
    first_network: str = SEGMENTATION

    @property
    def name(self) -> str:
        """Name of the recipe and start of the hash, for tables."""
        return f"{self.recipe.name}@{self.sha256[:12]}"

    def segmentation_network(self, name: str | None = None) -> nn.Module:
        """Return a 3D network with its trained weights: the first unless `name` gives another.

        It maps (N, channels, R, A, S) to logits (N, outputs, R, A, S).
        """
        weights = self.weights[self.first_network if name is None else name]
        return copy_weights(build_segmentation(self.recipe), weights)

    def segmentation_networks(self) -> tuple[nn.Module, ...]:
        """Return all 3D networks, one unless it is an ensemble, whose logits are averaged."""
        return tuple(map(self.segmentation_network, self.segmentation_names))

    @property
    def segmentation_names(self) -> tuple[str, ...]:
        """Names of the 3D networks in `weights`."""
        indices = range(len(self.weights))
        names = (segmentation_name(index, self.first_network) for index in indices)
        return tuple(name for name in names if name in self.weights)

    @property
    def coarse_bundle(self) -> ModelBundle | None:
        """First pass (any label against background) as a bundle; None if there is none."""
        recipe = self.recipe.coarse
        if recipe is None or ROI not in self.weights:
            return None
        return replace(self, recipe=recipe, first_network=ROI)

    def classifier_network(self) -> nn.Module | None:
        """Return the 2D network with its trained weights; None if there is none."""
        classify = self.recipe.classify
        if classify is None or "classifier" not in self.weights:
            return None
        return copy_weights(build_classifier(classify), self.weights["classifier"])


def segmentation_name(index: int, first: str = SEGMENTATION) -> str:
    """Return the name in `weights` of a 3D network of the ensemble."""
    return first if index == 0 else f"{first}_{index}"


def save_bundle(bundle: ModelBundle, folder: Path) -> ModelBundle:
    """Write a bundle and return it with its hash.

    The files are `card.md`, a `<network>.safetensors` per network and, last, `model.json`: a folder
    without it is not a model.
    """
    make_folder(folder)
    hashes = write_weights(folder, bundle.weights)
    write_bytes_atomic(folder / "card.md", model_card(bundle).encode())
    description = {
        "format_version": FORMAT_VERSION,
        "recipe": bundle.recipe.model_dump(mode="json"),
        "reasons": [line.model_dump() for line in bundle.reasons],
        "fingerprint": bundle.fingerprint.model_dump(mode="json"),
        "metrics": dict(bundle.metrics),
        "origin": dict(bundle.origin),
        "versions": current_versions(),
        "weights_sha256": hashes,
        "classifiers_sha256": dict(bundle.classifiers_sha256),
    }
    write_json_atomic(folder / DESCRIPTION, description)
    return load_bundle(folder)


def write_weights(
    folder: Path, weights: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, str]:
    """Write a safetensors file per network; return name → SHA-256."""
    hashes = {}
    for name, tensors in weights.items():
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        content = save_tensors(stored)
        hashes[name] = hashlib.sha256(content).hexdigest()
        write_bytes_atomic(folder / f"{name}.safetensors", content)
    return hashes


def current_versions() -> dict[str, str]:
    return {"volseg": __version__, "torch": torch.__version__.split("+")[0]}


def bundle_files(networks: Iterable[str]) -> list[str]:
    """Return the paths in a model folder of all files of these networks, with OpenVINO's."""
    names = list(networks)
    weights = [f"{name}.safetensors" for name in names]
    return [DESCRIPTION, "card.md", *weights, *exported_files(names, "fp32")]


def exported_files(networks: Iterable[str], precision: str) -> list[str]:
    """Return the paths in a model folder of the OpenVINO files of these networks."""
    suffixes = ("xml", "bin", "json")
    return [f"{EXPORTED}/{name}.{precision}.{suffix}" for name in networks for suffix in suffixes]


def load_bundle(folder: Path) -> ModelBundle:
    """Read and verify a bundle.

    Raises:
        VolsegError: not a bundle, made by a newer volseg, or the weights were changed.
    """
    with reading_model(folder, _Description):
        content, digest = read_description(folder)
        if content.get("recipe", {}).get("task") == "classify":
            raise VolsegError(
                f"{folder}: is a model that classifies images, and one that segments is needed",
                fix="give a model trained on scans and masks",
                code="E_TASK",
            )
        description = _Description.model_validate(content)
        recipe = _closed_recipe(description.recipe, where=str(folder / DESCRIPTION))
        _check_classifiers(recipe, description.classifiers_sha256)
        return ModelBundle(
            recipe=recipe,
            fingerprint=description.fingerprint,
            weights=StoredWeights(folder, description.weights_sha256),
            metrics=description.metrics,
            versions=description.versions,
            origin=description.origin,
            reasons=description.reasons,
            classifiers_sha256=description.classifiers_sha256,
            sha256=digest,
        )


def read_description(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the content of model.json, and its hash.

    Raises:
        OSError, ValueError, VolsegError: it cannot be read, or its version is another.
    """
    text = read_bytes(folder / DESCRIPTION, max_bytes=MAX_TEXT_BYTES)
    content = parse_json(text)
    _check_version(content, folder)
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise ValueError("it has no recipe")
    return content, hashlib.sha256(text).hexdigest()


@contextmanager
def reading_model(folder: Path, description: type[BaseModel]) -> Iterator[None]:
    """Turn the errors of reading a model folder into a VolsegError.

    Args:
        description: the model of the content of model.json.
    """
    try:
        yield
    except OSError as error:
        name = Path(error.filename or folder).name
        raise VolsegError(
            f"{folder}: not a model folder ({name}: {error.strerror or error})",
            fix="give a folder made by `volseg train` or `volseg import-nnunet`",
            code="E_CKPT",
        ) from error
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            reason = listed(validation_messages(error, description))
        raise VolsegError(
            f"{folder / DESCRIPTION}: damaged ({reason})", fix="copy the model again", code="E_CKPT"
        ) from error


def _check_version(content: Any, folder: Path) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        is_newer = version > FORMAT_VERSION
        raise VolsegError(
            f"{folder}: model format {version} is {'newer' if is_newer else 'older'} than this "
            f"volseg reads ({FORMAT_VERSION})",
            fix="update volseg" if is_newer else "train or import the model again",
            code="E_VERSION",
        )


def _closed_recipe(content: dict[str, Any], where: str) -> Recipe:
    recipe = parse_recipe(content, where=where)
    if recipe.open_keys:
        keys = ", ".join(recipe.open_keys)
        raise ValueError(f"the recipe of a trained model leaves {keys} open")
    return recipe


def _check_classifiers(recipe: Recipe, hashes: Mapping[Role, str]) -> None:
    if {item.role for item in recipe.classifiers} != set(hashes):
        raise ValueError("classifiers_sha256 does not list the classifiers of the recipe")
    if any(item.role != TYPE and item.threshold == AUTO for item in recipe.classifiers):
        raise ValueError("the recipe of a trained model leaves the threshold of a classifier open")


class _Description(BaseModel):
    """The content of model.json."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    format_version: Literal[2]
    recipe: dict[str, Any]
    reasons: tuple[Reason, ...] = ()
    fingerprint: DatasetFingerprint
    metrics: dict[str, Any]
    versions: dict[str, Text]
    origin: dict[str, Text] = {}
    weights_sha256: Annotated[dict[NetworkName, Sha256], Field(min_length=1, max_length=1000)]
    classifiers_sha256: dict[Role, Sha256] = {}

    @field_validator("metrics")
    @classmethod
    def _are_as_they_are_written(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        wrong = [name for name, value in metrics.items() if not _is_metric(name, value)]
        if wrong:
            raise ValueError(f"{shorten(wrong[0])} is {shorten(repr(metrics[wrong[0]]))}")
        return metrics

    @model_validator(mode="after")
    def _holds_a_network(self) -> _Description:
        if SEGMENTATION not in self.weights_sha256:
            names = ", ".join(self.weights_sha256)
            raise ValueError(f"has no network {SEGMENTATION!r}, only {names}")
        return self


def _is_metric(name: str, value: Any) -> bool:
    """Check whether a value is a number, a text or an interval, as the name allows."""
    if name in COUNTS:
        return _is_number(value) and isinstance(value, int) and value >= 0
    is_interval = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    if name.startswith(NNUNET_DICE):
        return _is_number(value)
    if name.startswith(DICE):
        return _is_number(value) or is_interval
    return _is_number(value) or is_interval or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shipped_bundle() -> Path:
    """Return the folder of the model that comes with the package."""
    return Path(__file__).parent / "bundles" / SHIPPED


def model_card(bundle: ModelBundle) -> str:
    """Return Markdown for people: intended use, limits, data, metrics and settings of a model."""
    recipe, metrics = bundle.recipe, bundle.metrics
    sections = {
        "Intended use": [recipe.intended_use or UNSTATED],
        "Limits": [recipe.limits or UNSTATED, "Not a medical device; for research only."],
        "Data": [recipe.data_source or UNSTATED, _training_data(bundle)],
        "Which scans it can tell apart": [
            "Before a scan is segmented it is compared with the training scans:",
            _bullets(list_checks(recipe, bundle.fingerprint)),
        ],
        "Metrics": [_bullets(f"{name}: {_show(value)}" for name, value in metrics.items())],
        "How it was made": list(_making(bundle)),
    }
    if "best_epoch" in metrics or "networks" in metrics:
        sections["Metrics"].append(BEST_OF_RUN)
    paragraphs = [f"# {recipe.name}", recipe.description]
    for heading, texts in sections.items():
        paragraphs += [f"## {heading}", *texts]
    return "\n\n".join(paragraphs) + "\n"


def _training_data(bundle: ModelBundle) -> str:
    data = bundle.recipe.data
    n_cases = bundle.metrics.get("training_cases", bundle.fingerprint.n_cases)
    labels = ", ".join(f"{name} = {value}" for value, name in data.label_names.items())
    channels = ", ".join(data.channels)
    cases = format_count(n_cases, "training case")
    return f"{cases}; channels: {channels}; labels: {labels}."


def _making(bundle: ModelBundle) -> Iterator[str]:
    """Yield the paragraphs on how the model was made."""
    recipe = bundle.recipe
    if bundle.origin:
        yield _bullets(f"{name}: {value}" for name, value in bundle.origin.items())
    yield (
        f"Spacing {format_sizes(recipe.spacing_mm)} mm ({_axes(recipe.preprocess)}), patch "
        f"{format_sizes(recipe.patch_shape)}, batch {recipe.batch_size}; "
        "the whole recipe is in model.json."
    )
    if recipe.roi is not None:
        yield _coarse_pass(recipe.roi)
    if recipe.classifiers:
        yield _bullets(map(_role_text, recipe.classifiers))
    if bundle.reasons:
        yield _reason_table(bundle.reasons)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _reason_table(reasons: Sequence[Reason]) -> str:
    rows = [f"| {line.setting} | {line.value} | {line.reason} |" for line in reasons]
    return "\n".join(["| setting | value | why |", "|---|---|---|", *rows])


def _coarse_pass(roi: Roi) -> str:
    return (
        f"A coarse first pass at {format_sizes(roi.spacing_mm)} mm finds the region of interest; "
        f"more than {roi.margin_mm:g} mm outside it the mask is background. If it finds nothing, "
        "the whole scan is segmented."
    )


def _role_text(item: RoleOfClassifier) -> str:
    """Describe what a classifier does."""
    if item.role == TYPE:
        return f"{item.role}: {item.model} gives every lesion its class"
    what = "slices are skipped" if item.role == GATE else "lesions are dropped"
    limit = f"if the probability of {item.kept_class!r} is below {item.threshold}"
    return f"{item.role}: {item.model}; {what} {limit}"


def _axes(preprocess: Preprocess) -> str:
    """Return the names of the network's axes: of the patient, or of the file's array."""
    names = "RAS" if preprocess.axes == "canonical" else "KJI"
    return ", ".join(names[axis] for axis in preprocess.transpose)


def _show(value: Any) -> str:
    if isinstance(value, list):  # an interval
        return " to ".join(map(_show, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class StoredWeights(Mapping[str, Mapping[str, torch.Tensor]]):
    """Weights that are read from their files on access; OpenVINO files make this unnecessary.

    Raises:
        VolsegError: a file was changed; checked on creation and again on access.
    """

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self._folder, self._hashes = folder, hashes
        for name in hashes:
            self._check(name, sha256_of(self._path(name)))

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        if name not in self._hashes:
            raise KeyError(name)
        try:
            with open_regular(self._path(name)) as file:
                content = file.read()
        except OSError as error:
            raise VolsegError(
                f"{self._path(name)}: cannot be read ({error.strerror or error})",
                fix="copy the model again",
                code="E_CKPT",
            ) from error
        self._check(name, hashlib.sha256(content).hexdigest())
        try:
            return load_tensors(content)
        # KeyError: a number type that torch lacks
        except (SafetensorError, KeyError, ValueError) as error:
            raise VolsegError(
                f"{self._path(name)}: damaged ({error})", fix="copy the model again", code="E_CKPT"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._hashes

    def __iter__(self) -> Iterator[str]:
        return iter(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _check(self, name: str, digest: str) -> None:
        if digest != self._hashes[name]:
            raise VolsegError(
                f"{self._path(name)}: the weights are not those that were saved",
                fix="copy the model again",
                code="E_CKPT",
            )
