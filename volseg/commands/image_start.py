"""Where the training of a classifier starts: weights of a file or model, and what they expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.errors import VolsegError, named
from volseg.inputs import read_json
from volseg.planning.images import SeenImages
from volseg.recipe import ClassifyRecipe, parse_image_recipe
from volseg.recipe.classification import SCAN
from volseg.recipe.images import Images, ScaleImage
from volseg.recipe.section import closed
from volseg.recipe.train import Network
from volseg.words import format_count

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    import torch

    from volseg.networks.adapt import Adapted, Scaling
    from volseg.training.objective import Weights

PRETRAINED = "pretrained.json"  # recipe and metrics of `volseg pretrain`
CANDIDATES: tuple[dict[str, Any], ...] = (  # networks for which there are public weights
    {"name": "vgg", "depth": 16},
    {"name": "vgg", "depth": 13},
    {"name": "vgg", "depth": 11},
    {"name": "resnet2d", "depth": 18},
    {"name": "resnet2d", "depth": 50},
    {"name": "densenet2d"},
    {"name": "efficientnet_lite"},
)


def seen_by(start: Start | None) -> SeenImages | None:
    """Return what is known of the images that the weights saw; None for random weights."""
    return None if start is None else start.seen


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Weights to start from.

    Args:
        tensors: by name. scaling: of the input in their training, if it is known.
        network, images: sections of the recipe of a model that volseg trained; None for a file.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    scaling: Scaling | None = None
    network: Network | None = None
    images: Images | None = None

    @classmethod
    def read(cls, path: Path) -> Start:
        """Read a file of weights, or the first network of a classifier.

        Raises:
            VolsegError: it is neither.
        """
        from volseg.image_bundle import CLASSIFIER, ENCODER, is_image_model, load_image_bundle
        from volseg.networks.adapt import read_weights

        if (path / PRETRAINED).is_file():
            return cls._pretrained(path)
        if is_image_model(path):
            bundle = load_image_bundle(path)
            recipe = bundle.recipe
            tensors = bundle.weights[ENCODER if recipe.data.input == SCAN else CLASSIFIER]
            return cls(path, tensors, network=recipe.network, images=recipe.images)
        weights = read_weights(path)
        return cls(path, weights.tensors, weights.scaling)

    @classmethod
    def _pretrained(cls, path: Path) -> Start:
        from volseg.networks.adapt import read_weights

        try:
            content = read_json(path / PRETRAINED)["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VolsegError(
                f"{path / PRETRAINED}: damaged ({error})", fix="copy it again", code="E_CKPT"
            ) from error
        recipe = parse_image_recipe(content, where=str(path / PRETRAINED))
        tensors = read_weights(path).tensors
        return cls(path, tensors, network=recipe.network, images=recipe.images)

    def fitted_to(self, recipe: ClassifyRecipe) -> ClassifyRecipe:
        """Return an automatic recipe with the network of these weights, and its input scaling."""
        network = self.network or self._recognised()
        images = recipe.images
        if self.images is not None:
            normalise = self.images.normalise
            images = images.model_copy(update={"normalise": normalise})
        return recipe.model_copy(update={"network": network, "images": images})

    @property
    def seen(self) -> SeenImages:
        """What is known of the images that the weights saw.

        Mean and standard deviation are one number, as the number of channels is not known yet.
        """
        one = None if self.scaling is None else self.scaling.of_channels(1)
        scaling = None if one is None else ScaleImage(mean=one.mean, sd=one.sd)
        pixels = None if self.images is None else closed(self.images.pixels)
        return SeenImages(scaling, pixels)

    def _recognised(self) -> Network:
        """Return the network that has the names and shapes of these weights."""
        from volseg.networks import build_network
        from volseg.networks.adapt import Status, adapt

        best, most = None, 0
        for candidate in CANDIDATES:
            try:
                network = build_network(in_channels=3, out_channels=2, **candidate)
                n = adapt(network, self.tensors).count(Status.LOADED)  # type: ignore[arg-type]
            except VolsegError:
                continue
            if n > most:
                best, most = candidate, n
        if best is None:
            names = dict.fromkeys(str(candidate["name"]) for candidate in CANDIDATES)
            raise VolsegError(
                f"{self.path}: its tensors are those of none of {', '.join(names)}",
                fix="give a recipe with the [network] that they belong to",
                code="E_CKPT",
            )
        return Network.model_validate(best)

    def pruned(self, fraction: float) -> Start:
        """Return the start without this fraction of the channels of each convolution of a VGG.

        Raises:
            VolsegError: the network is none.
        """
        from volseg.networks import architecture, build_network, copy_weights
        from volseg.networks.adapt import input_channels
        from volseg.networks.vgg import Settings, Vgg
        from volseg.training.compress import prune_channels

        network = self.network or self._recognised()
        settings = architecture(network)
        if not isinstance(settings, Settings):
            raise VolsegError(
                f"{self.path}: is a {network.name}, and only a vgg can be pruned",
                fix="leave out --prune, or make a smaller student with --teacher",
                code="E_USAGE",
            )
        n_channels = input_channels(network.name, self.tensors)
        n_classes = len(self.tensors["head.weight"]) if "head.weight" in self.tensors else 2
        whole = build_network(
            network.name, in_channels=n_channels, out_channels=n_classes, **network.settings
        )
        weights, _ = self.adapted_to(whole)
        copy_weights(whole, dict(whole.state_dict()) | dict(weights))
        assert isinstance(whole, Vgg)
        smaller = prune_channels(whole, settings, fraction)
        section = Network.model_validate(
            {"name": network.name, **network.settings, "widths": smaller.settings.widths}
        )
        return replace(self, tensors=smaller.weights, network=section)

    def adapted_to(self, network: Any) -> tuple[Weights, list[str]]:
        """Return the tensors that fit a network, and sentences on what fitted and what did not."""
        from volseg.networks.adapt import Status, adapt

        with named(self.path):
            adapted = adapt(network, self.tensors)
        taken = (Status.LOADED, Status.ADAPTED)
        weights = {
            row.tensor: adapted.weights[row.tensor] for row in adapted.rows if row.status in taken
        }
        return weights, list(_table(adapted, self.path))


def _table(adapted: Adapted, path: Path) -> list[str]:
    """Return a line with the numbers of tensors, and one per tensor that was not simply loaded."""
    from volseg.networks.adapt import Status

    counts = {status: adapted.count(status) for status in Status}
    listed = ", ".join(f"{n} {status.value}" for status, n in counts.items() if n)
    lines = [f"--init {path}: {format_count(len(adapted.rows), 'tensor')}: {listed}"]
    for row in adapted.rows:
        if row.status is not Status.LOADED:
            lines.append(f"--init: {row.tensor}: {row.status.value}: {row.reason}")
    return lines
