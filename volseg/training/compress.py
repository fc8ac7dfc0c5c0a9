"""Smaller networks from trained ones: pruning of weights and channels, and distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.networks import unique_tensors
from volseg.networks.image_network import HEAD
from volseg.networks.vgg import Settings as VggSettings
from volseg.networks.vgg import Vgg


def magnitude_masks(network: nn.Module, fraction: float) -> dict[str, torch.Tensor]:
    """Return which weights stay if the smallest ones of the whole network are set to zero.

    Weights of convolutions and linear layers are ranked together by their absolute value; those of
    the head, biases and norms all stay. It makes a file that compresses well, not a faster network:
    `prune_channels` does.

    Args:
        fraction: of the ranked weights that are set to zero, in [0, 1).

    Returns:
        Parameter name → bool tensor of its shape.

    Source: Han et al., Learning both weights and connections, NeurIPS 2015.
    """
    _check_fraction(fraction)
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear) and not f"{name}.".startswith(HEAD)
    }
    sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    n_zero = int(fraction * len(sizes))
    masks = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    masks[torch.argsort(sizes, stable=True)[:n_zero]] = False
    parts = masks.split([weight.numel() for weight in weights.values()])
    named = zip(weights.items(), parts, strict=True)
    return {name: part.view_as(weight) for (name, weight), part in named}


def apply_masks(network: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the weights to zero where a mask is False; call it after each step of fine-tuning."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A smaller VGG: its settings, and the weights for `copy_weights` to fine-tune from."""

    settings: VggSettings
    weights: Mapping[str, torch.Tensor]


def prune_channels(network: Vgg, settings: VggSettings, fraction: float) -> Pruned:
    """Return a VGG without the channels whose filters have the smallest L1 norm.

    Of each convolution the same fraction is removed, with the weights of the next layer that read
    it. With half of the channels, a quarter of the multiply-adds is left.

    Args:
        fraction: of the channels of each convolution, in [0, 1); at least one channel stays.

    Source: Li et al., Pruning filters for efficient convnets, ICLR 2017.
    """
    _check_fraction(fraction)
    tensors = unique_tensors(network)
    weights: dict[str, torch.Tensor] = {}
    widths = []
    inputs = torch.arange(tensors[network.first_convolution].shape[1])
    for name in [name for name in tensors if name.endswith(".weight")]:
        weight, bias = tensors[name], name.replace(".weight", ".bias")
        kept = torch.arange(len(weight))
        if not name.startswith(HEAD):
            n = max(1, len(weight) - int(fraction * len(weight)))
            norms = weight.abs().sum(dim=(1, 2, 3))
            kept = torch.argsort(norms, descending=True, stable=True)[:n].sort().values.cpu()
            widths.append(n)
        weights[name] = weight[kept][:, inputs].clone()
        weights[bias] = tensors[bias][kept].clone()
        inputs = kept
    return Pruned(replace(settings, widths=tuple(widths)), weights)


class Distillation(nn.Module):
    """Loss of a student: agreement with a teacher's softened output, and with the targets.

    It is weight · T² · KL(teacher ‖ student), both at temperature T, + (1 - weight) · supervised.
    Of several labels the divergence is that of each label; of a number it is the squared error.

    Args:
        supervised: (logits, targets) → loss of the targets alone.

    Source: Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        weight: float = 0.7,
        kind: Literal["classes", "labels", "number"] = "classes",
        supervised: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = functional.cross_entropy,
    ) -> None:
        super().__init__()
        if temperature <= 0 or not 0 <= weight <= 1:
            raise VolsegError(
                f"distillation with temperature {temperature:g} and weight {weight:g}",
                fix="give a temperature above 0 and a weight from 0 to 1",
            )
        self.temperature, self.weight = temperature, weight
        self.kind, self.supervised = kind, supervised

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of the logits (N, k) of both, with targets as `supervised` takes them."""
        imitation = self.imitate(student, teacher.detach())
        return self.weight * imitation + (1 - self.weight) * self.supervised(student, targets)

    def imitate(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the part of the loss that needs no targets, for images without a label too."""
        if self.kind == "number":
            return functional.mse_loss(student, teacher)
        t = self.temperature
        if self.kind == "classes":
            student, teacher = (logits.log_softmax(1) for logits in (student / t, teacher / t))
        else:  # each label is a distribution over yes and no
            pairs = (torch.stack([z, -z], 2) for z in (student / t, teacher / t))
            student, teacher = (functional.logsigmoid(z).flatten(0, 1) for z in pairs)
        return t**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise VolsegError(
            f"a fraction of {fraction:g} cannot be pruned", fix="give one from 0 up to, but not, 1"
        )
