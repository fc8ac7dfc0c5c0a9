"""Whether a map of evidence depends on what a network learned, and whether it can be repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from volseg.inference.explain import seeded
from volseg.networks.image_network import HEAD, ImageNetwork

NOISE = 0.01  # standard deviation of the noise on an image, as a fraction of that of the image


def randomised_networks(
    networks: Sequence[ImageNetwork], build: Callable[[], ImageNetwork], seed: int
) -> Iterator[tuple[str, list[ImageNetwork]]]:
    """Yield the networks with ever more random layers: the head first, at last all of them.

    Args:
        build: returns a network with the random weights with which a training starts.
        seed: of these weights.

    Yields:
        (name of the layer that became random, networks): the same networks are yielded each time.

    Source: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018 (cascading randomisation).
    """
    changed = copy.deepcopy(list(networks))
    fresh = []
    for number in range(len(changed)):
        with seeded(seed + number):
            fresh.append(build().state_dict())
    for prefixes in reversed([*changed[0].stage_prefixes, (HEAD,)]):
        for network, weights in zip(changed, fresh, strict=True):
            own = network.state_dict()  # its tensors are those of the network
            for name in own:
                if name.startswith(prefixes):
                    own[name].copy_(weights[name])
        yield prefixes[-1].rstrip("."), changed


def with_noise(image: torch.Tensor, seed: int) -> torch.Tensor:
    """Return an image with noise that nobody sees, drawn from a seed."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(image.shape).astype(np.float32)
    return image + NOISE * float(image.std()) * torch.from_numpy(noise).to(image.device)
