"""What a classifier of images looked at: maps of evidence for one class, by captum.

A method is a row of `METHODS`: a frozen dataclass that is called with a `Score`, an image and a
seed, and returns the evidence of each pixel of the network's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional

from volseg.errors import EnvironmentProblem
from volseg.evaluation.saliency import evidence
from volseg.networks.image_network import HEAD, ImageNetwork
from volseg.recipe.classification import CLASSES, Target

BATCH = 32  # changed copies of an image that a network sees at once


class Score(nn.Module):
    """Log-odds of one class, or a number, from images (N, C, H, W) → (N,).

    It is what the networks give together, without temperature and test-time augmentation, neither
    of which changes what the evidence is.

    Args:
        networks: their outputs are averaged.
        index: of the class or label; 0 for a number.
    """

    def __init__(self, networks: Sequence[ImageNetwork], data: Target, index: int) -> None:
        super().__init__()
        self.networks, self.index = nn.ModuleList(networks), index
        self.is_exclusive = data.kind == CLASSES
        for module in self.modules():
            if getattr(module, "inplace", False):
                vars(module)["inplace"] = False  # it would overwrite maps that a hook has taken
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([network(images) for network in self.networks]).mean(0)
        logit = outputs[:, self.index]
        if not self.is_exclusive:
            return logit
        others = [n for n in range(outputs.shape[1]) if n != self.index]
        return logit - torch.logsumexp(outputs[:, others], dim=1)


class Method(ABC):
    """A way to find the evidence in an image."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, score: Score, image: torch.Tensor, seed: int) -> np.ndarray:
        """Return the evidence (H, W) float32 for the class, negative if it speaks against it.

        Args:
            image: (C, H, W) float32 on the device of the networks.
            seed: of the random choices, if it makes any.

        Raises:
            EnvironmentProblem: captum is not installed.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GradCam(Method):
    """Maps of layers, weighted by their mean gradients; the mean over the stages of the network.

    The last layer alone is the usual choice, but its few pixels miss a small object
    (docs/benchmarks.md). Only what speaks for the class is in the map.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017.

    Args:
        least_pixels: edge of the maps of the last stage that counts.
        only_last: take that stage alone.
    """

    least_pixels: int = 6
    only_last: bool = False

    def __call__(self, score: Score, image: torch.Tensor, seed: int) -> np.ndarray:
        attr = load_captum()
        batch, total = _leaf(image), np.zeros(image.shape[-2:])
        for network in score.networks:
            assert isinstance(network, ImageNetwork)
            names = feature_layers(network, batch, self.least_pixels)
            for name in names[-1:] if self.only_last else names:
                layer = attr.LayerGradCam(score, network.get_submodule(name))
                maps = layer.attribute(batch, relu_attributions=True).detach()
                enlarged = functional.interpolate(maps, image.shape[-2:], mode="bilinear")
                total += evidence(enlarged[0, 0].cpu().numpy())
        return total.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegratedGradients(Method):
    """Gradients on the way from an even image to this one; they add up to the change of the score.

    Source: Sundararajan et al., Axiomatic attribution for deep networks, ICML 2017.

    Args:
        steps: on the way.
        smoothing: standard deviation of a Gaussian that spreads the evidence, as a fraction of the
            edge; it keeps the sum.
    """

    steps: int = 48
    smoothing: float = 1 / 24

    def __call__(self, score: Score, image: torch.Tensor, seed: int) -> np.ndarray:
        attr = load_captum()
        gradients = attr.IntegratedGradients(score).attribute(
            _leaf(image),
            baselines=without_detail(image)[None],
            n_steps=self.steps,
            internal_batch_size=BATCH,
        )
        contributions = gradients.detach()[0].sum(0).cpu().numpy().astype(np.float64)
        # Reflected at the edges, so that nothing is lost there.
        spread = [self.smoothing * n for n in contributions.shape]
        return ndimage.gaussian_filter(contributions, spread, mode="reflect").astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Occlusion(Method):
    """How much the score falls when a square gets the image's mean; the mean of its positions.

    Source: Zeiler & Fergus, Visualizing and understanding convolutional networks, ECCV 2014.

    Args:
        window: edge of the square, as a fraction of the image's edge; it moves by half of that.
    """

    window: float = 1 / 8

    def __call__(self, score: Score, image: torch.Tensor, seed: int) -> np.ndarray:
        attr = load_captum()
        edges = [max(2, round(self.window * n)) for n in image.shape[-2:]]
        with torch.no_grad():
            falls = attr.Occlusion(score).attribute(
                image[None],
                sliding_window_shapes=(len(image), *edges),
                strides=(len(image), *(edge // 2 for edge in edges)),
                baselines=without_detail(image)[None],
                perturbations_per_eval=BATCH,
            )
        return falls[0].mean(0).cpu().numpy().astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lime(Method):
    """A linear model of the score on copies of the image in which half of the superpixels are left.

    Source: Ribeiro et al., Why should I trust you?, KDD 2016; superpixels: Achanta et al., IEEE
    Trans Pattern Anal Mach Intell 34:2274 (2012).

    Args:
        superpixels: about as many. samples: copies of the image.
        kernel: width of the weights of the copies, by their cosine distance from the image.
        ridge: penalty of the linear model.
    """

    superpixels: int = 64
    samples: int = 512
    kernel: float = 0.25
    ridge: float = 1e-2

    def __call__(self, score: Score, image: torch.Tensor, seed: int) -> np.ndarray:
        attr = load_captum()
        segments = torch.from_numpy(superpixels(image.cpu().numpy(), self.superpixels))
        lime = attr.Lime(
            score, interpretable_model=Ridge(self.ridge), similarity_func=self._similarity
        )
        with seeded(seed), torch.no_grad():
            falls = lime.attribute(
                image[None],
                baselines=without_detail(image)[None],
                feature_mask=segments[None, None].expand(1, *image.shape).to(image.device),
                n_samples=self.samples,
                perturbations_per_eval=BATCH,
            )
        return falls[0, 0].cpu().numpy().astype(np.float32)

    def _similarity(
        self, image: torch.Tensor, copy: torch.Tensor, left: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return the weight of a copy in which the superpixels `left` (1, n) are left."""
        distance = 1 - left.float().mean().sqrt()
        return torch.exp(-(distance**2) / (2 * self.kernel**2))


class Ridge:
    """A linear model with an intercept, fitted by weighted least squares with a penalty."""

    def __init__(self, penalty: float) -> None:
        self._penalty, self._slopes = penalty, torch.zeros(0)

    def fit(self, train_data: Any, **_: Any) -> None:
        """Fit rows (n, k), targets (n,) and weights (n,), which captum gives in batches."""
        parts = [torch.cat(part).double().cpu() for part in zip(*train_data, strict=True)]
        rows, targets, weights = parts
        weights = weights.flatten() / weights.sum()
        mean, level = weights @ rows, weights @ targets.flatten()
        centred = rows - mean
        normal = centred.T @ (weights[:, None] * centred)
        normal += self._penalty * torch.eye(len(normal), dtype=torch.float64) / rows.shape[1]
        moments = centred.T @ (weights * (targets.flatten() - level))
        self._slopes = torch.linalg.solve(normal, moments)

    def representation(self) -> torch.Tensor:
        return self._slopes[None].float()


# ---- parts of the methods


def load_captum() -> Any:
    """Import captum's methods.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        from captum import attr
    except ImportError as error:
        raise EnvironmentProblem(
            "captum is not installed, and `volseg explain` needs it",
            fix="pip install 'volseg[explain]'",
            code="E_BACKEND",
        ) from error
    return attr


def without_detail(image: torch.Tensor) -> torch.Tensor:
    """Return (C, H, W) of each channel's mean: what an image without evidence is.

    Black would be no such image: dark evidence would go unseen, and bright tissue count twice.
    """
    return image.mean(dim=(1, 2), keepdim=True).expand_as(image).clone()


def superpixels(image: np.ndarray, n: int) -> np.ndarray:
    """Return the number (H, W) of the superpixel of each pixel of (C, H, W), from 0."""
    from skimage.segmentation import slic

    grey = image.mean(axis=0, dtype=np.float64)
    scaled = (grey - grey.min()) / max(float(np.ptp(grey)), 1e-12)
    labels = slic(scaled, n_segments=n, compactness=0.1, channel_axis=None, start_label=0)
    return np.unique(labels, return_inverse=True)[1].reshape(grey.shape)


@contextmanager
def seeded(seed: int):
    """Let torch draw from a seed inside; what it draws afterwards does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def feature_layers(network: ImageNetwork, batch: torch.Tensor, least_pixels: int) -> list[str]:
    """Return the names of the modules with whose maps the stages end, without too small maps.

    All that the network knows of an image passes through each of them.

    Args:
        batch: (1, C, H, W).
        least_pixels: edge of the maps; if all are smaller, the first stage's are taken.
    """
    ends = _stage_ends(network, batch)
    large = [name for name, edge in ends if edge >= least_pixels]
    return large or [ends[0][0]]


def _stage_ends(network: ImageNetwork, batch: torch.Tensor) -> list[tuple[str, int]]:
    """Return the module that gives the maps with which each stage ends, and their edge."""
    prefixes, ends = [*network.stage_prefixes, (HEAD,)], list[tuple[str, int]]()
    last, stages = ("", 0), list[int]()

    def starts(name: str) -> None:
        stage = next((n for n, of in enumerate(prefixes) if f"{name}.".startswith(of)), None)
        if stage is None or stage in stages:
            return
        if stages:
            ends.append(last)
        stages.append(stage)

    def finishes(name: str, output: object) -> None:
        nonlocal last
        if isinstance(output, torch.Tensor) and output.ndim == batch.ndim:
            last = (name, min(output.shape[-2:]))

    hooks = []
    for name, module in network.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: starts(name)))
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, output, name=name: finishes(name, output)
                )
            )
    try:
        with torch.no_grad():
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return ends


def _leaf(image: torch.Tensor) -> torch.Tensor:
    """Return a batch of one image, of which gradients are taken."""
    return image[None].clone().requires_grad_()


METHODS: dict[str, type[Method]] = {
    "gradcam": GradCam,
    "gradients": IntegratedGradients,
    "occlusion": Occlusion,
    "lime": Lime,
}
