"""Whether a map of evidence depends on what a network learned, and whether it can be repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations as pairs

import numpy as np
import torch

from volseg.evaluation.saliency import map_similarity
from volseg.inference.explain import Method, Score, seeded
from volseg.networks.image_network import HEAD, ImageNetwork
from volseg.recipe.classification import Target

N_SEEDS = 3  # with which a map is repeated
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
            tensors = network.state_dict()  # those of the network, not copies
            for name in tensors:
                if name.startswith(prefixes):
                    tensors[name].copy_(weights[name])
        yield prefixes[-1].rstrip("."), changed


def with_noise(image: torch.Tensor, seed: int) -> torch.Tensor:
    """Return an image with noise too faint to see, drawn from a seed."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(image.shape).astype(np.float32)
    return image + NOISE * float(image.std()) * torch.from_numpy(noise).to(image.device)


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """An image as network input (C, H, W), what is explained in it, and its maps by method."""

    image: np.ndarray
    index: int
    maps: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class MapChecks:
    """How one map fares; SSIM is None where both maps are empty.

    Args:
        by_layer: (layer that became random, SSIM with the map of the trained networks), from the
            last layer to the first.
        seeds: mean SSIM with the maps of other seeds and noise.
        networks: mean SSIM of the maps of each two networks of an ensemble; None for a single one.
    """

    by_layer: tuple[tuple[str, float | None], ...]
    seeds: float | None
    networks: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """The networks of a model and the methods whose maps are checked.

    Args:
        build: returns a network with the random weights with which a training starts.
        seed: of all random choices. progress: called with the fraction that is done.
    """

    networks: Sequence[ImageNetwork]
    build: Callable[[], ImageNetwork]
    data: Target
    methods: Mapping[str, Method]
    seed: int
    progress: Callable[[float], None]

    def check(self, explained: Sequence[Explained]) -> list[dict[str, MapChecks]]:
        """Return the checks of each map, by method, of each image."""
        n_layers = len(self.networks[0].stage_prefixes) + 1
        total, done = n_layers + N_SEEDS + 1, 0
        layers: list[tuple[str, list[dict[str, float | None]]]] = []
        for layer, networks in randomised_networks(self.networks, self.build, self.seed):
            layers.append((layer, [self._similar(item, networks) for item in explained]))
            done += 1
            self.progress(done / total)
        repeated = []
        for number in range(1, N_SEEDS + 1):
            seed = self.seed + number
            repeated.append([self._similar(item, self.networks, seed) for item in explained])
            self.progress((done + number) / total)
        single = [self._between_networks(item) for item in explained]
        return [
            {
                name: MapChecks(
                    tuple((layer, of_images[n][name]) for layer, of_images in layers),
                    _mean([of_images[n][name] for of_images in repeated]),
                    single[n].get(name),
                )
                for name in self.methods
            }
            for n in range(len(explained))
        ]

    def _maps(
        self, item: Explained, networks: Sequence[ImageNetwork], seed: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return the maps of an image; with a seed, of its copy with noise."""
        score = Score(networks, self.data, item.index)
        image = torch.from_numpy(item.image).to(next(networks[0].parameters()).device)
        image = image if seed is None else with_noise(image, seed)
        seed = self.seed if seed is None else seed
        return {name: method(score, image, seed) for name, method in self.methods.items()}

    def _similar(
        self, item: Explained, networks: Sequence[ImageNetwork], seed: int | None = None
    ) -> dict[str, float | None]:
        maps = self._maps(item, networks, seed)
        return {name: map_similarity(item.maps[name], maps[name]) for name in maps}

    def _between_networks(self, item: Explained) -> dict[str, float | None]:
        if len(self.networks) < 2:
            return {}
        maps = [self._maps(item, [network]) for network in self.networks]
        return {
            name: _mean([map_similarity(one[name], other[name]) for one, other in pairs(maps, 2)])
            for name in self.methods
        }


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
