"""THE CHAIN: one scan → lesions and numbers. No path, no print, no device name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.bundle import ModelBundle
from volseg.errors import ScanError
from volseg.infer.backends import Backend, TorchBackend, choose_backend, load_backend
from volseg.infer.classify import classify_lesions
from volseg.infer.stream import Tiling, predict_slabs
from volseg.infer.tiles import thinnest_axis
from volseg.measure.lesions import LesionMeasurement, measure_lesions
from volseg.postprocess.lesions import label_lesions
from volseg.postprocess.steps import make_steps
from volseg.preprocess.prepare import MaskRestorer, Preparation
from volseg.volume import WORLD_AXES, Volume


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle whose networks are loaded and ready: made once, used for every scan."""

    bundle: ModelBundle
    segmentation: Backend
    classifier: Backend | None


@dataclass(frozen=True, slots=True, eq=False)
class CaseResult:
    """What one scan gives: masks on its own grid and a row per lesion, the largest first."""

    mask: Volume  # label values of the recipe
    lesion_ids: Volume  # 1 = largest
    lesions: Sequence[LesionMeasurement]


def load_model(
    bundle: ModelBundle,
    device: str = "auto",
    *,
    backend: str = "auto",
    precision: str = "auto",
    folder: Path | None = None,
) -> Model:
    """Make the bundle's networks ready to run.

    Args:
        device: `auto`, `cpu` or `cuda`. backend: `auto`, `torch` or `openvino`.
        precision: `auto`, `fp32`, `fp16` or `int8`, of the segmentation; the classifier is small and always runs in torch.
        folder: the bundle's own, from which files made for OpenVINO are read where it has them.
    """
    choice = choose_backend(backend, device, precision)
    classifier = bundle.classifier_network()
    return Model(
        bundle,
        load_backend(bundle, choice, folder=folder),
        None if classifier is None else TorchBackend(classifier, choice.device, precision=choice.precision),
    )


def segment_case(images: Mapping[str, Volume], model: Model, *, case_id: str) -> CaseResult:
    """Segment, post-process, label, score and measure one scan.

    Args:
        images: channel name → scan; every channel of the recipe must be there.

    Raises:
        ScanError: a channel is missing, or the channels lie on different grids.
    """
    recipe = model.bundle.recipe
    channels = recipe.data.channels
    chosen = {name: images[name] for name in _present(images, channels, case_id)}
    scan = chosen[channels[0]]
    mask, confidence = _predict(chosen, model)
    for step in make_steps(recipe.postprocess):
        mask = step(mask, scan.geometry)
    lesions = label_lesions(mask, scan.geometry)
    classes = None
    if model.classifier is not None and recipe.classify is not None:
        classes = classify_lesions(scan, lesions.ids, model.classifier, recipe.classify)
    rows = measure_lesions(
        scan,
        lesions.ids,
        lesions.labels,
        case_id=case_id,
        label_names=recipe.data.label_names,
        intensity_unit=recipe.data.intensity_unit,
        confidence=confidence,
        classes=classes,
    )
    return CaseResult(scan.with_array(mask), scan.with_array(lesions.ids), rows)


def _predict(images: Mapping[str, Volume], model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Mask (I, J, K) of label values and confidence (I, J, K) uint8, both on the scan's grid."""
    recipe, plan = model.bundle.recipe, model.bundle.plan
    preparation = Preparation(images, plan.prepare_settings(recipe.preprocess, list(images)))
    trail = preparation.trail
    regions = recipe.data.regions_class_order
    values = list(recipe.data.label_names) if regions is None else list(regions)
    tiling = Tiling(
        patch_shape=plan.patch_shape,
        overlap=recipe.infer.overlap,
        mirror_axes=[WORLD_AXES[name] for name in recipe.infer.mirror_axes],
        batch_size=recipe.infer.batch_size,
        margin=recipe.infer.margin,
        empty_level=preparation.empty_level,
    )
    axis = thinnest_axis(trail.shape, plan.patch_shape) if trail.separate_axis is None else trail.separate_axis
    restorer = MaskRestorer(trail, values, axis=axis, regions=regions is not None)
    if preparation.has_body:
        for slab in predict_slabs(preparation.planes(axis), model.segmentation, tiling, n_classes=recipe.data.n_outputs):
            restorer.add(slab)
    return restorer.result()


def _present(images: Mapping[str, Volume], wanted: Sequence[str], case_id: str) -> Sequence[str]:
    missing = [name for name in wanted if name not in images]
    if missing:
        raise ScanError(
            f"case {case_id!r} lacks channels {missing}; it has {sorted(images)}",
            fix=f"add the {missing[0]!r} scan, or use a model without it",
            code="E_CHANNELS",
        )
    return wanted
