"""Self-supervised pretraining of a 2D network: it learns from images without labels.

A network learns to give two random views of an image the same embedding, and is then a start for
`--init`. A loop needs `Views` and the module `SimSiam`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from volseg.networks.image_network import ImageNetwork


class SimSiam(nn.Module):
    """Loss of two views of the same images: one view's embedding predicts that of the other.

    The gradient reaches the predicting side alone, which keeps all embeddings from becoming equal;
    `spread` tells whether they do. The network's head takes no part and stays random.

    Args:
        network: whose weights before the head are trained; they are what to keep.
        width: features of the projection that is compared, at least 4.

    Source: Chen & He, Exploring simple Siamese representation learning, CVPR 2021.
    """

    def __init__(self, network: ImageNetwork, *, width: int = 256) -> None:
        super().__init__()
        self.network = network
        self.projector = nn.Sequential(
            nn.Linear(network.head.in_features, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(width, width // 4, bias=False),
            nn.BatchNorm1d(width // 4),
            nn.ReLU(inplace=True),
            nn.Linear(width // 4, width),
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the loss of two views (N, C, H, W) of N ≥ 2 images: from -1, the best, to 1."""
        one, other = (self.projector(self.network.embed(view)) for view in (first, second))
        similarity = self._similarity(one, other) + self._similarity(other, one)
        return -0.5 * similarity.mean()

    def _similarity(self, projection: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return (N,) the cosine between what one view predicts of the other, and the other."""
        return functional.cosine_similarity(self.predictor(projection), target.detach())

    @torch.no_grad()
    def spread(self, images: torch.Tensor) -> float:
        """Return how much projections of images differ: 0 not at all, 1 as random directions."""
        directions = functional.normalize(self.projector(self.network.embed(images)), dim=1)
        return float(directions.std(dim=0).mean()) * math.sqrt(directions.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Random views of images, from which a network learns what stays the same.

    An image is cropped and turned about the crop, perhaps mirrored, changed in contrast and
    brightness, perhaps blurred, and gets noise. Images are taken to be standardised: mean 0,
    standard deviation 1.

    Args:
        crop: least edge of the crop, as a fraction of the image's; the largest is 1.
        rotation_degrees: largest rotation.
        mirror: whether left and right are exchanged in half of the views.
        contrast: largest factor; the smallest is its inverse.
        brightness: largest offset.
        blur_probability: of a 3 × 3 average.
        noise_sd: largest standard deviation.
    """

    crop: float = 0.55
    rotation_degrees: float = 20.0
    mirror: bool = True
    contrast: float = 1.4
    brightness: float = 0.3
    blur_probability: float = 0.3
    noise_sd: float = 0.15

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a view (N, C, H, W) of each image, of the same size.

        Args:
            generator: on the CPU, so that the views do not depend on the device.
        """
        n = len(images)

        def uniform(low: float, high: float) -> torch.Tensor:
            numbers = low + (high - low) * torch.rand(n, generator=generator)
            return numbers.to(images.device).view(n, 1, 1, 1)

        grid = functional.affine_grid(self._frames(n, generator), list(images.shape), False)
        views = functional.grid_sample(
            images, grid.to(images), padding_mode="reflection", align_corners=False
        )
        span = math.log(self.contrast)
        views = views * uniform(-span, span).exp() + uniform(-self.brightness, self.brightness)
        padded = functional.pad(views, (1, 1, 1, 1), mode="replicate")
        blurred = functional.avg_pool2d(padded, 3, stride=1)
        views = torch.where(uniform(0, 1) < self.blur_probability, blurred, views)
        noise = torch.randn(images.shape, generator=generator).to(images)
        return views + noise * uniform(0, self.noise_sd)

    def _frames(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Return (n, 2, 3) affine maps from the view to the image, as `affine_grid` takes them."""
        numbers = torch.rand(5, n, generator=generator)
        scale = self.crop + (1 - self.crop) * numbers[0]
        angle = (2 * numbers[1] - 1) * math.radians(self.rotation_degrees)
        mirror = torch.where(numbers[2] < 0.5, -1.0, 1.0) if self.mirror else torch.ones(n)
        shift_x, shift_y = (2 * numbers[3:] - 1) * (1 - scale)
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        across = torch.stack([cosine * mirror, -sine, shift_x], dim=1)
        down = torch.stack([sine * mirror, cosine, shift_y], dim=1)
        return torch.stack([across, down], dim=1)
