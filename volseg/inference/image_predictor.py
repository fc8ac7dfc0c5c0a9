"""The networks of a classifier of images on a backend: outputs and embeddings in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from volseg.image_bundle import ENCODER, ImageBundle
from volseg.inference.backend import Backend, device_of, mean_of, run_on_device
from volseg.inference.choose import BackendChoice, NetworkSource
from volseg.inference.export import convert
from volseg.inference.images import flipped_copies
from volseg.inference.openvino_backend import OpenVINOBackend
from volseg.inference.torch_backend import TorchBackend
from volseg.networks.image_network import PLANES_NDIM, ImageNetwork
from volseg.preprocessing.resample import send
from volseg.recipe import ClassifyRecipe
from volseg.recipe.classification import SCAN, ImageInfer

if TYPE_CHECKING:
    import openvino

IMAGE_NDIM = 3  # channels, H, W


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What a model computes of N images: outputs (N, k), embeddings (N, features), both float32.

    The embeddings are those of its first network.
    """

    outputs: np.ndarray
    embeddings: np.ndarray


class Embedding(nn.Module):
    """A network without its head: (N, channels, H, W) → (N, features).

    The head runs in fp32 on any backend. So a pass gives outputs and embeddings, and the layer that
    decides is not quantised.
    """

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.embed(images)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One network: a backend that embeds, and the head on the backend's device."""

    backend: Backend
    head: nn.Linear

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, features) of images (N, C, H, W), or of (N, planes, C, H, W) the mean."""
        if images.ndim == PLANES_NDIM:
            return self.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        return run_on_device(self.backend, images)


@dataclass(frozen=True, slots=True, eq=False)
class ImagePredictor:
    """The networks of a model, ready to run; their outputs are averaged.

    Args:
        encoder: embeds the slices of scans; None for other models.
    """

    members: Sequence[Member]
    infer: ImageInfer
    encoder: Backend | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Settings that affect the numbers besides the weights; part of the key of a result."""
        if self.encoder is not None:
            return self.encoder.identity
        return mean_of([member.backend for member in self.members]).identity

    def embed_slices(self, images: np.ndarray) -> np.ndarray:
        """Return (S, features) float32 of the slices (S, C, H, W) of a scan."""
        assert self.encoder is not None, "only models of scans embed slices"
        size = self.infer.batch_size
        starts = range(0, len(images), size)
        device = device_of(self.encoder)
        parts = [send(torch.from_numpy(images[start : start + size]), device) for start in starts]
        return torch.cat([run_on_device(self.encoder, part).cpu() for part in parts]).numpy()

    def predict(self, images: np.ndarray) -> Predicted:
        """Return what the networks compute of images (N, C, H, W) or (N, planes, C, H, W).

        Of scans it takes the embedded slices, (N, S, features + 1).

        Outputs are averaged over flipped copies (TTA); embeddings are those of the images as they
        are.
        """
        size = self.infer.batch_size
        starts = range(0, len(images), size)
        parts = [self._predict(np.array(images[start : start + size])) for start in starts]
        outputs, embeddings = zip(*parts, strict=True)
        return Predicted(torch.cat(outputs).numpy(), torch.cat(embeddings).numpy())

    @torch.inference_mode()
    def _predict(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        device = device_of(self.members[0].backend)
        copies = flipped_copies(send(torch.from_numpy(images), device), self.infer.tta_axes)
        embedded = [[member.embed(copy) for copy in copies] for member in self.members]
        # The head is linear: its output of the mean is the mean of its outputs.
        outputs = [
            member.head(torch.stack(copies).mean(0))
            for member, copies in zip(self.members, embedded, strict=True)
        ]
        return torch.stack(outputs).mean(0).cpu(), embedded[0][0].cpu()

    def release(self) -> None:
        for backend in (*(member.backend for member in self.members), self.encoder):
            if backend is not None:
                backend.release()


def load_predictor(
    bundle: ImageBundle,
    choice: BackendChoice,
    *,
    folder: Path | None = None,
    n_images: int | None = None,
) -> ImagePredictor:
    """Load the networks of a bundle, ready to run.

    Args:
        folder: the bundle's folder. Its OpenVINO files are used if they were made from this bundle.
        n_images: how many images there are, if fewer than a batch.

    Raises:
        VolsegError: the folder has no quantised network for int8, or OpenVINO does not support the
            network.
    """
    if bundle.recipe.data.input == SCAN:
        return _scan_predictor(bundle, choice, folder)
    members = []
    for name in bundle.network_names:
        network = bundle.network(name)
        backend = _backend(bundle, name, network, choice, folder=folder, n_images=n_images)
        members.append(Member(backend, network.head.to(choice.device)))
    return ImagePredictor(members, bundle.recipe.infer)


def _scan_predictor(
    bundle: ImageBundle, choice: BackendChoice, folder: Path | None
) -> ImagePredictor:
    """Return the network of slices on the chosen backend, and those of scans with torch in fp32."""
    encoder = _backend(bundle, ENCODER, bundle.slice_network(), choice, folder=folder)
    members = []
    for network in bundle.networks():
        backend = TorchBackend(
            Embedding(network), choice.device, precision="fp32", channels_last=False
        )
        members.append(Member(backend, network.head.to(choice.device)))
    return ImagePredictor(members, bundle.recipe.infer, encoder)


def _backend(
    bundle: ImageBundle,
    name: str,
    network: ImageNetwork,
    choice: BackendChoice,
    *,
    folder: Path | None,
    n_images: int | None = None,
) -> Backend:
    """Return a network without its head on the chosen backend."""
    if choice.backend == "torch":
        return TorchBackend(Embedding(network), choice.device, precision=choice.precision)
    source = NetworkSource(
        folder=folder,
        name=name,
        model_sha256=bundle.sha256,
        convert=lambda: convert_embedding(bundle, network),
    )
    return source.backend(embedding_shape(bundle.recipe, n_images), choice.precision)


def openvino_predictor(
    bundle: ImageBundle, embeddings: Mapping[str, openvino.Model], precision: str, n_images: int
) -> ImagePredictor:
    """Return a bundle's networks on OpenVINO, from name → network without head."""
    shape = embedding_shape(bundle.recipe, n_images)
    members = [
        Member(OpenVINOBackend(model, shape, precision=precision), bundle.network(name).head)
        for name, model in embeddings.items()
    ]
    return ImagePredictor(members, bundle.recipe.infer)


def convert_embedding(bundle: ImageBundle, network: ImageNetwork) -> openvino.Model:
    """Convert a network without its head to OpenVINO, and compare the two on the reference image.

    The whole image is traced: how often a small one can be halved is a constant in the trace.

    Raises:
        VolsegError: as `convert`.
    """
    shape = embedding_shape(bundle.recipe, 1)
    if bundle.reference is None or bundle.recipe.data.input == SCAN:
        image = np.random.default_rng(0).normal(size=shape[1:])
    else:
        image = bundle.reference.image.reshape(-1, *shape[1:])[0]
    example = torch.from_numpy(image.astype(np.float32)[None])
    return convert(Embedding(network), shape, example)


def embedding_shape(recipe: ClassifyRecipe, n_images: int | None = None) -> tuple[int, ...]:
    """Return (N, channels, H, W) of the batches that inference feeds a network; planes are in N."""
    n = recipe.infer.batch_size if n_images is None else min(recipe.infer.batch_size, n_images)
    planes = recipe.input_shape[0] if len(recipe.input_shape) > IMAGE_NDIM else 1
    return (max(1, n) * planes, *recipe.input_shape[-IMAGE_NDIM:])
