"""The recipe of a model that segments."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from volseg.recipe.classify import Classify
from volseg.recipe.data import Data
from volseg.recipe.preprocess import Preprocess
from volseg.recipe.roles import GATE, TYPE, Role, RoleOfClassifier
from volseg.recipe.section import (
    AUTO,
    BatchSize,
    Intensity,
    IntTriple,
    Millimetres,
    Name,
    NamedSection,
    Positive,
    PositiveInt,
    Section,
    SpacingMm,
    Text,
    Triple,
    closed,
    join,
    open_keys,
    refuse,
)
from volseg.recipe.train import Network, Train

PLANNED_LAYERS = ("features", "strides", "kernels")


class Infer(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5  # fraction of a patch shared with the next
    # Test-time augmentation (TTA): average over flipped copies; each axis doubles the time.
    tta_axes: tuple[Literal["R", "A", "S"], ...] = ()
    batch_size: BatchSize = 1
    # voxels of symmetric padding beyond each face of the scan
    margin: Annotated[int, Field(ge=0, le=1024)] = 0
    # Where tiles are run: in the whole scan, or only in the box of its body, outside which the mask
    # is background. Unlike `crop = "body"` this keeps the grid on which the network sees the scan.
    inside: Literal["scan", "body"] = "scan"


class Step(NamedSection):
    """A postprocessing step: `step` is a row of postprocessing/steps.py, other keys go to it."""

    largest = 1e15
    step: Name


class Roi(Section):
    """A coarse first pass: a small network finds the region in which the main network is run."""

    # along R, A, S; several times that of [preprocess]
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm]
    margin_mm: Millimetres = 20.0  # added around the box of all labels that it finds
    network: Network
    train: Train  # of this network; its patch_shape counts coarse voxels
    time_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of --time-budget

    @model_validator(mode="after")
    def _weights_are_those_of_two_classes(self) -> Roi:
        weights = self.train.class_weights
        if weights is not None and len(weights) != 2:
            raise ValueError(
                f"train.class_weights has {len(weights)} numbers, but the first pass has "
                "2 classes (with the background)"
            )
        settings = {"train": self.train.model_dump(), "network": self.network.settings}
        left_open = list(open_keys(settings))
        if left_open:
            raise ValueError(f"{', '.join(left_open)} cannot be auto for the first pass")
        return self


class Measure(Section):
    """Facts about the lesions on which the measurements depend."""

    # Label of the organ that contains the lesions. It is not measured as a lesion; `burden` is the
    # fraction of it that is lesion.
    organ: Name | None = None
    lymph_nodes: tuple[Name, ...] = ()  # labels that are measured along their short axis
    max_targets: PositiveInt = 5  # lesions in the sum of diameters
    max_targets_per_label: PositiveInt = 2
    # (HU, g/cm³) points that replace the published ones
    density_g_cm3: (
        Annotated[tuple[tuple[Intensity, Intensity], ...], Field(max_length=1000)] | None
    ) = None
    calcium: bool = False  # Agatston, volume and mass score
    calcium_threshold_hu: Intensity = 130.0
    # of the scanner, from its calibration phantom; without it no mass score
    calcium_mg_per_ml_hu: Positive | None = None
    mtv_threshold_suv: Positive = 4.0  # from which the fixed metabolic tumour volume counts

    @model_validator(mode="after")
    def _density_ascends(self) -> Measure:
        hu = [point[0] for point in self.density_g_cm3 or ()]
        if self.density_g_cm3 is not None and (len(hu) < 2 or hu != sorted(set(hu))):
            raise ValueError("density_g_cm3 needs two or more points, in ascending order of HU")
        if any(density < 0 for _, density in self.density_g_cm3 or ()):
            raise ValueError("density_g_cm3 must hold densities ≥ 0 g/cm³")
        return self


class SegmentRecipe(Section):
    """How a model that segments is trained and run.

    It is closed if no value is "auto": `volseg.planning.close` fills them in.
    """

    model_config = ConfigDict(title="recipe")
    task: Literal["segment"] = "segment"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=200)]
    description: Text
    intended_use: Text = ""
    limits: Text = ""
    data_source: Text = ""  # attribution that the model card repeats
    data: Data
    preprocess: Preprocess
    network: Network
    train: Train
    infer: Infer = Infer()
    postprocess: Annotated[tuple[Step, ...], Field(max_length=100)] = ()
    classify: Classify | None = None
    classifiers: Annotated[tuple[RoleOfClassifier, ...], Field(max_length=10)] = ()
    roi: Roi | None = None
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _numbers_fit_together(self) -> SegmentRecipe:
        refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        yield from self._wrong_names()
        yield from self._wrong_weights()
        yield from self._wrong_layers()
        yield from self._wrong_roles()
        if self.roi is not None:
            yield from self._wrong_first_pass(self.roi)

    def _wrong_names(self) -> Iterator[str]:
        labels = {self.measure.organ, *self.measure.lymph_nodes} - {None, *self.data.labels}
        if labels:
            yield f"measure names {join(labels)}, which data.labels lacks"
        channels = set(self.preprocess.normalise_channels) - set(self.data.channels)
        if channels:
            names = join(channels)
            yield f"preprocess.normalise_channels names {names}, which data.channels lacks"

    def _wrong_weights(self) -> Iterator[str]:
        weights, n_classes = self.train.class_weights, 1 + len(self.data.labels)
        if weights is not None and len(weights) != n_classes:
            yield (
                f"train.class_weights has {len(weights)} numbers for {n_classes} classes "
                "(with the background)"
            )
        if weights is not None and self.data.regions is not None:
            yield (
                "train.class_weights needs labels that exclude each other: "
                "leave it out with data.regions"
            )

    def _wrong_layers(self) -> Iterator[str]:
        open_layers = [name for name in PLANNED_LAYERS if self.network.settings.get(name) == AUTO]
        layers, n = ", ".join(PLANNED_LAYERS), len(PLANNED_LAYERS)
        if open_layers and (self.network.name != "unet3d" or len(open_layers) < n):
            yield (
                f"only the layers of unet3d can be planned, and only {layers} together: "
                f"make all of them {AUTO!r}, or none"
            )
        if not open_layers and AUTO in (self.train.patch_shape, self.train.batch_size):
            yield (
                "train.patch_shape and batch_size cannot be 'auto' if the network is fixed: "
                f"give numbers, or set {layers} under [network] to 'auto' too"
            )

    def _wrong_roles(self) -> Iterator[str]:
        roles = [classifier.role for classifier in self.classifiers]
        for role in dict.fromkeys(roles):
            if roles.count(role) > 1:
                yield f"classifiers names {roles.count(role)} with the role {role!r}: name one"
        if GATE in roles and self.data.regions_class_order is not None:
            yield f"a classifier with the role {GATE!r} needs labels that exclude each other"
        if TYPE in roles and self.classify is not None:
            yield f"[classify] and a classifier with the role {TYPE!r} exclude each other"

    def _wrong_first_pass(self, roi: Roi) -> Iterator[str]:
        fine = self.preprocess.spacing_mm
        if fine != AUTO and math.prod(roi.spacing_mm) <= math.prod(fine):
            yield "roi.spacing_mm must be coarser than preprocess.spacing_mm"
        if roi.time_fraction + (self.classify.time_fraction if self.classify else 0) >= 1:
            yield "roi.time_fraction + classify.time_fraction must be less than 1"

    @property
    def coarse(self) -> SegmentRecipe | None:
        """Recipe of the first pass: all labels as one, on a coarser grid; None without [roi]."""
        if self.roi is None:
            return None
        data = dict.fromkeys(("regions_class_order", "regions", "ignore"))
        preprocess = {
            "spacing_mm": self.roi.spacing_mm,
            "interpolation": "linear",
            "separate_above": None,
        }
        changes = {
            "name": f"{self.name}_roi",
            "data": self.data.model_copy(update={"labels": {"region": 1}, **data}),
            "preprocess": self.preprocess.model_copy(update=preprocess),
            "network": self.roi.network,
            "train": self.roi.train,
            "infer": Infer(),
            "postprocess": (),
            "classify": None,
            "classifiers": (),
            "roi": None,
        }
        return self.model_copy(update=changes)

    @property
    def open_keys(self) -> list[str]:
        """Keys whose value is "auto", such as `train.batch_size`."""
        parts = {"preprocess": self.preprocess, "network": self.network, "train": self.train}
        return list(open_keys({name: part.model_dump() for name, part in parts.items()}))

    def classifier(self, role: Role) -> RoleOfClassifier | None:
        """Return the classifier with this role; None if there is none."""
        return next((item for item in self.classifiers if item.role == role), None)

    @property
    def leaves_size_open(self) -> bool:
        """True if part of the network or its patches is for a plan to choose."""
        values = (self.train.patch_shape, self.train.batch_size, *self.network.settings.values())
        return any(isinstance(value, str) and value == AUTO for value in values)

    @property
    def spacing_mm(self) -> Triple:
        """Spacing of a closed recipe, along the network's axes."""
        return closed(self.preprocess.spacing_mm)

    @property
    def patch_shape(self) -> IntTriple:
        """Voxels of a patch of a closed recipe, along the network's axes."""
        return closed(self.train.patch_shape)

    @property
    def batch_size(self) -> int:
        """Patches of a training batch of a closed recipe."""
        return closed(self.train.batch_size)

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of comments and order of keys."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
