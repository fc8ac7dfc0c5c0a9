"""Transfer of trained weights into a 2D network: read a file, fit its tensors, list what fitted."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from pickle import UnpicklingError  # what torch raises with weights_only; nothing is unpickled here
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from volseg.errors import VolsegError, missing_path, named
from volseg.inputs import open_regular, shorten
from volseg.networks import architecture, check_finite, image_network_names, unique_tensors
from volseg.networks.image_network import HEAD, ImageArchitecture, ImageNetwork
from volseg.recipe import Network

MODEL_FILES = ("classifier.safetensors", "segmentation.safetensors")  # of a model folder
NESTED = ("state_dict", "model_state_dict", "model", "network_weights")  # keys of a checkpoint
LEAST_SHARE = 0.5  # of the weights before the head that a file must hold
IMAGENET_CLASSES = 1000
# Raised by reading a file that holds no weights, or more than weights.
_DAMAGE = (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a network's input was in its training: (pixel - mean) / sd, per channel.

    Args:
        mean, sd: of pixels from 0 to 1, one per channel.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]

    def of_channels(self, n: int) -> Scaling:
        """Return the scaling of n channels: their average for each, unless there are n already."""
        if n == len(self.mean):
            return self
        mean, sd = (sum(values) / len(values) for values in (self.mean, self.sd))
        return Scaling((mean,) * n, (sd,) * n)


# torchvision's weights; its documentation of each model gives these.
IMAGENET = Scaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The metadata "input" of files whose scaling is described in words.
DESCRIBED = {
    "RGB 224x224, (x - 127) / 128": Scaling((127 / 255,) * 3, (128 / 255,) * 3),
    "RGB, 0..255, minus (123.68, 116.779, 103.939), not divided": Scaling(
        (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class WeightFile:
    """Tensors of a file by name, in single precision.

    Args:
        scaling: what the input was scaled with in training; None if the file does not tell.
        source: where the weights come from, for the card of the model.
    """

    tensors: Mapping[str, torch.Tensor]
    scaling: Scaling | None
    source: str


class Status(StrEnum):
    """What became of a tensor."""

    LOADED = "loaded"
    ADAPTED = "adapted"
    RANDOM = "random"
    UNUSED = "unused"


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A row of the table of a transfer: a tensor of the network, or one of the file left unused."""

    tensor: str
    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """All tensors of a network after a transfer, as `copy_weights` takes them, and its table."""

    weights: Mapping[str, torch.Tensor]
    rows: tuple[TensorRow, ...]

    def count(self, status: Status) -> int:
        """Count the tensors with this status."""
        return sum(row.status is status for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: the number of tensors of each status, with the first reason for it."""
        parts = []
        for status in Status:
            rows = [row for row in self.rows if row.status is status]
            example = next((f" ({row.tensor}: {row.reason})" for row in rows if row.reason), "")
            if rows:
                parts.append(f"{len(rows)} {status}{example}")
        return "; ".join(parts)


def read_weights(path: Path) -> WeightFile:
    """Read the weights of a safetensors file, a torch state dict or a model folder of volseg.

    Nothing is unpickled but tensors and containers. A safetensors file may state its scaling as
    metadata `mean` and `sd`: JSON lists, of pixels from 0 to 1.

    Raises:
        VolsegError: it is missing, damaged, asks the unpickler for more than tensors, or holds NaN.
    """
    file = _file_in(path)
    try:
        open_regular(file).close()  # it neither waits for a pipe nor opens a device
        is_safe = file.suffix == ".safetensors"
        tensors, metadata = _read_safetensors(file) if is_safe else (_read_torch(file), {})
    except UnpicklingError as error:
        raise _pickle_problem(file, error) from error
    except OSError as error:
        raise VolsegError(
            f"{file}: cannot be read ({error.strerror or error})",
            fix="check the path and its permissions",
            code="E_CKPT",
        ) from error
    except (*_DAMAGE, SafetensorError) as error:
        # The others speak of the insides of the unpickler.
        is_reason = isinstance(error, RuntimeError | ValueError | SafetensorError) and str(error)
        reason = f" ({shorten(str(error).strip().splitlines()[0], 200)})" if is_reason else ""
        raise VolsegError(
            f"{file}: not a file of weights{reason}",
            fix="give a .safetensors file, a state dict saved by torch.save, or a model folder",
            code="E_CKPT",
        ) from error
    with named(file):
        check_finite(tensors)
    source = metadata.get("source", file.name)
    return WeightFile(tensors, _scaling(tensors, metadata), shorten(source, 200))


def adapt(network: ImageNetwork, tensors: Mapping[str, torch.Tensor]) -> Adapted:
    """Return the network's tensors with those of a file in place of its random ones.

    A tensor is taken if name and shape fit, its name translated by `ImageNetwork.renames`. The
    first convolution is adapted to another number k of channels: each gets the sum over the file's
    channels divided by k, so a grey image copied into all channels gives the same activations. A
    head with other classes stays random.

    Raises:
        VolsegError: fewer than half of the network's weights before the head are in the file.
    """
    renamed = _rename(network, tensors)
    weights: dict[str, torch.Tensor] = {}
    rows: list[TensorRow] = []
    for name, target in unique_tensors(network).items():
        weight, row = _fit(name, target, renamed, is_first=name == network.first_convolution)
        weights[name] = weight
        rows.append(row)
    _check_share(network, rows, tensors)
    unused = (name for name in renamed if name not in weights)
    rows += [TensorRow(name, Status.UNUSED, "the network has no such tensor") for name in unused]
    return Adapted(weights, tuple(rows))


def input_channels(name: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the channels that the first layer of a network has in a file; 1 if it lacks it.

    Args:
        name: of the network.
    """
    skeleton = _skeleton(name)
    first = _rename(skeleton, tensors).get(skeleton.first_convolution)
    return 1 if first is None or first.ndim != 4 else first.shape[1]


def _pickle_problem(file: Path, error: UnpicklingError) -> VolsegError:
    """Return an error without torch's advice to unpickle whatever there is."""
    request = re.search(r"GLOBAL (\S+)", str(error))
    if request is None:
        return VolsegError(
            f"{file}: not a file of weights: torch cannot read it",
            fix="give a .safetensors file, a state dict saved by torch.save, or a model folder",
            code="E_CKPT",
        )
    return VolsegError(
        f"{file}: holds more than tensors ({shorten(request[1])}); it was not loaded",
        fix="save it again with torch.save(model.state_dict(), …) or as safetensors",
        code="E_PICKLE",
    )


def _file_in(path: Path) -> Path:
    """Return the file with the weights: the path itself, or that of a model folder's network."""
    if not path.exists():
        raise missing_path(path)
    if not path.is_dir():
        return path
    for name in MODEL_FILES:
        if (path / name).is_file():
            return path / name
    raise VolsegError(
        f"{path}: not a model folder: it has neither of {', '.join(MODEL_FILES)}",
        fix="give a folder made by `volseg train` or `volseg pretrain`, or a file of weights",
        code="E_CKPT",
    )


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(file), framework="pt") as content:
        tensors = {name: _single(content.get_tensor(name)) for name in content.keys()}  # noqa: SIM118
        return tensors, dict(content.metadata() or {})


def _read_torch(file: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other protocols of pickle; what fails is an error
        content = _innermost(torch.load(str(file), map_location="cpu", weights_only=True))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by name")
    if all(name.startswith("module.") for name in tensors):  # saved from a DataParallel network
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name: _single(tensor.detach()) for name, tensor in tensors.items()}


def _innermost(content: Any) -> Any:
    """Return the state dict that a checkpoint holds beside other things, or what it is itself."""
    for _ in NESTED:
        inner = (content.get(key) for key in NESTED) if isinstance(content, dict) else ()
        content = next((value for value in inner if isinstance(value, dict)), content)
    return content


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _scaling(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Scaling | None:
    """Return the scaling that the file states, or that of torchvision for an ImageNet head."""
    if "mean" in metadata and "sd" in metadata:
        mean, sd = (_numbers(metadata[key]) for key in ("mean", "sd"))
        if mean and len(mean) == len(sd) and min(sd) > 0:
            return Scaling(mean, sd)
    if metadata:
        return DESCRIBED.get(metadata.get("input", ""))
    heads = (tensors.get(f"{name}.bias") for name in ("fc", "classifier", "classifier.6"))
    if any(bias is not None and len(bias) == IMAGENET_CLASSES for bias in heads):
        return IMAGENET
    return None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = json.loads(text)
        return tuple(float(value) for value in values)
    except (ValueError, TypeError, RecursionError):
        return ()


def _rename(network: ImageNetwork, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in network.renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _fit(
    name: str, target: torch.Tensor, tensors: Mapping[str, torch.Tensor], *, is_first: bool
) -> tuple[torch.Tensor, TensorRow]:
    """Return the tensor of the file, fitted, or the network's, with the row that says so."""
    if name not in tensors:
        return target, TensorRow(name, Status.RANDOM, "not in the file")
    tensor = tensors[name]
    if tensor.shape == target.shape:
        return tensor.to(target.dtype), TensorRow(name, Status.LOADED)
    shapes = f"{list(tensor.shape)} in the file, {list(target.shape)} here"
    if is_first and _differs_in_channels(tensor, target):
        n, k = tensor.shape[1], target.shape[1]
        adapted = (tensor.sum(dim=1, keepdim=True) / k).expand_as(target).contiguous()
        return adapted, TensorRow(name, Status.ADAPTED, f"{n} channels in the file, {k} here")
    if name.startswith(HEAD):
        shapes = f"{tensor.shape[0] if tensor.ndim else 0} outputs in the file, {len(target)} here"
    return target, TensorRow(name, Status.RANDOM, shapes)


def _differs_in_channels(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    shapes = [(len(weight), *weight.shape[2:]) for weight in (tensor, target) if weight.ndim == 4]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _check_share(
    network: ImageNetwork, rows: list[TensorRow], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check that at least half of the weights before the head are in the file."""
    sizes = {n: p.numel() for n, p in network.named_parameters() if not n.startswith(HEAD)}
    fitted = sum(sizes.get(row.tensor, 0) for row in rows if row.status is not Status.RANDOM)
    if fitted >= LEAST_SHARE * sum(sizes.values()):
        return
    likely = next(_architectures_of(tensors), None)
    is_of = "a state dict of another architecture" + (f", probably {likely}" if likely else "")
    first = ", ".join(list(tensors)[:3])
    raise VolsegError(
        f"the weights do not fit the network: only {fitted:,} of the {sum(sizes.values()):,} "
        f"weights before its head are in the file; it is {is_of} "
        f"(its first tensors: {shorten(first, 120)})",
        fix="give weights of the network under [network], or name there the network of the weights",
        code="E_CKPT",
    )


def _architectures_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield the 2D architectures of which, with default settings, a file holds half of the names.

    Names alone are compared: other widths are still the same architecture.
    """
    for name in image_network_names():
        network = _skeleton(name)
        names = {key for key, _ in network.named_parameters() if not key.startswith(HEAD)}
        renamed = _rename(network, tensors)
        if len(names & set(renamed)) >= LEAST_SHARE * len(names):
            yield name


@cache
def _skeleton(name: str) -> ImageNetwork:
    """Return a network without memory for its weights, with default settings."""
    settings = architecture(Network(name=name))
    assert isinstance(settings, ImageArchitecture)
    with torch.device("meta"):
        return settings.build(1, 2)
