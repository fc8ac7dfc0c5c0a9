"""The section [preprocess]: scan → network input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from volseg.recipe.normalise import Normalise, Normaliser
from volseg.recipe.section import AUTO, Auto, Intensity, IntTriple, Name, Section, SpacingMm, Weight


class Preprocess(Section):
    # R, A, S; or those of the file, slowest first (K, J, I), unflipped
    axes: Literal["canonical", "stored"] = "canonical"
    # Network axis n is axis transpose[n] of these; spacing and patch are in the network's order.
    transpose: IntTriple = (0, 1, 2)
    # along R, A, S; auto: median of the training cases
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | Auto = AUTO
    interpolation: Literal["linear", "cubic"] = "linear"
    # If the coarsest spacing of the scan, or else of the target, is more than this many times the
    # finest, that axis (if no other is as coarse) takes the nearest slice and only the other two
    # are interpolated, in resampling to the target and back.
    separate_above: Weight | None = None
    # cubic: clip to the range of the scan (of the slice, if an axis is separate)
    clip_overshoot: bool = False
    # outside the box of the body the mask is background by definition
    crop: Literal["body", "nonzero", "none"] = "body"
    # a voxel above this intensity is body; per_scan: a tenth of its 99th percentile
    body_above: Intensity | Literal["per_scan"] = "per_scan"
    normalise: Normalise
    # channels that are normalised differently
    normalise_channels: dict[Name, Normalise] = Field(default={})
    normalise_first: bool = False  # normalise before resampling instead of after it

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Preprocess:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(
                f"transpose must hold 0, 1 and 2 once each, got {list(self.transpose)}"
            )
        forms = (self.normalise, *self.normalise_channels.values())
        if self.crop != "nonzero" and any(f.fitted_region == "nonzero" for f in forms):
            raise ValueError('region = "nonzero" needs crop = "nonzero"')
        return self

    def normaliser_of(self, channel: str) -> Normalise:
        return self.normalise_channels.get(channel, self.normalise)

    def normalised_by(self, forms: Mapping[str, Normaliser]) -> Preprocess:
        """Return these settings with a normaliser for each channel, the first one's as default."""
        if all(self.normaliser_of(name) == form for name, form in forms.items()):
            return self
        default = next(iter(forms.values()))
        others = {name: form for name, form in forms.items() if form != default}
        return self.model_copy(update={"normalise": default, "normalise_channels": others})
