"""`volseg explain`: maps of what a classifier looked at, with their checks and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import failure_reason
from volseg.commands.image_sources import FileSource
from volseg.commands.placing import place_mask
from volseg.errors import UnexpectedError, VolsegError
from volseg.evaluation.saliency import (
    SIMPLE_MAPS,
    average_precision,
    centre_map,
    evidence,
    map_similarity,
    pointing,
)
from volseg.evaluation.saliency_rows import (
    EXPLAIN,
    RANDOMISATION,
    SALIENCY,
    ExplainRow,
    RandomisationRow,
    SaliencyRow,
    doubts_of,
)
from volseg.evaluation.saliency_scores import METRICS, saliency_rows
from volseg.image import Image2D
from volseg.inputs import read_json
from volseg.io.files import json_text
from volseg.io.formats import is_scan
from volseg.io.image_cases import ImageCase, find_images
from volseg.io.image_listing import slice_id
from volseg.io.images import slice_image, stack_slices, through_axis
from volseg.io.series import split_volume
from volseg.io.volumes import read_header, read_mask, write_volume
from volseg.options import ExplainOptions, command
from volseg.pages.about import About
from volseg.preprocessing.images import to_pixels
from volseg.recipe.classification import NUMBER, Target
from volseg.reports import ExplainReport
from volseg.store.outputs import Commit, OutputFolder
from volseg.store.tables import table
from volseg.words import format_count, format_list

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.image_bundle import ImageBundle
    from volseg.inference.explain import Method
    from volseg.inference.explain_checks import Explained, MapChecks
    from volseg.networks.image_network import ImageNetwork

EXPLAINED = ("image", "slice")  # input of the models that are explained
MAPPING, CHECKING = "Mapping", "Checking the maps"
RUN, PAGE, MAPS = "run.json", "explain.html", "maps"
HEIGHT = 96  # pixels of a picture on the page


@command(ExplainOptions)
def explain(options: ExplainOptions) -> ExplainReport:
    """Map what a classifier looked at.

    Raises:
        VolsegError: the request is wrong. An image that cannot be used becomes a failed row.
        EnvironmentProblem: captum is not installed.

    Example:
        >>> import volseg
        >>> result = volseg.explain("images", model="image_model", method="gradcam", most=2)
        >>> len(result.explained), sorted(result.verdicts)
        (2, ['gradcam'])
    """
    from volseg.image_bundle import load_image_bundle
    from volseg.inference.explain import load_captum

    bundle, remarks = load_image_bundle(options.model), list[str]()
    seen = bundle.recipe.data.input
    if seen not in EXPLAINED:
        raise VolsegError(
            f"{options.model}: classifies {seen}s, and only models of images and slices are "
            "explained",
            fix="give a model that classifies images or slices",
            code="E_TASK",
        )
    load_captum()
    methods = _methods(options.method)
    index = _class_index(options.class_name, bundle.recipe.data)
    cases = find_images(options.scans, remark=remarks.append)
    remarks = [text for text in remarks if not text.startswith("N_FOLDERS")]
    n_images = len(cases)
    cases = _spread(cases, options.most)
    if len(cases) < n_images:
        remarks.append(f"N_MOST: explained {len(cases)} of {n_images} images; --most takes more")
    options.warn(*remarks)
    inputs = [*options.scans, options.model, *{case.path for case in cases}]
    with OutputFolder(options.out, "explain", inputs=inputs) as outputs:
        outputs.check_overwrites([EXPLAIN, RANDOMISATION, SALIENCY, RUN, PAGE])
        run = _Run(options, bundle, methods, index, outputs)
        return run.run(cases, remarks)


def _methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Return the requested methods with their usual settings.

    Raises:
        VolsegError: a name is unknown.
    """
    from volseg.inference.explain import METHODS

    names = tuple(METHODS) if names is None else names
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise VolsegError(
            f"--method {','.join(names)}: {format_list(unknown, 5) or 'nothing'} is no method",
            fix=f"give some of {', '.join(METHODS)}",
            code="E_USAGE",
        )
    return {name: METHODS[name]() for name in dict.fromkeys(names)}


def _class_index(name: str | None, data: Target) -> int | None:
    """Return the index of the class to explain; None for the most probable one.

    Raises:
        VolsegError: the model has no such class.
    """
    if data.kind == NUMBER and name is None:
        return 0
    if name is None:
        return None
    if name not in data.names:
        raise VolsegError(
            f"--class {name}: the model has no such class",
            fix=f"give one of {', '.join(data.names)}" if data.names else "leave it out",
            code="E_USAGE",
        )
    return data.names.index(name)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most this many items, at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[n] for n in np.linspace(0, len(items) - 1, most).round().astype(int)]


class _Masks:
    """Reads the masks of slices; keeps the last one, for the next slice of the same volume."""

    def __init__(self) -> None:
        self._paths: tuple[Path, Path] | None = None
        self._mask = None

    def of(self, case: ImageCase, image: Image2D) -> np.ndarray | None:
        """Return (H, W) bool; None without a mask.

        Raises:
            ScanError: it cannot be read, or does not lie on its volume.
        """
        if case.mask is None or case.index is None:
            return None
        if self._paths != (case.path, case.mask):
            grid = read_header(case.path).geometry
            names = {"mask_name": str(case.mask), "grid_name": str(case.path)}
            mask = place_mask(read_mask(case.mask, like=case.path), grid, **names).mask
            self._mask, self._paths = mask.canonical(), (case.path, case.mask)
        assert self._mask is not None
        through = through_axis(self._mask.geometry.shape)
        inside = slice_image(self._mask, through, case.index).array[0] > 0
        assert inside.shape == image.array.shape[1:]
        return inside


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """An image as a person sees it, and its mask (H, W) if there is one."""

    case: ImageCase
    picture: Image2D
    mask: np.ndarray | None


@dataclass(frozen=True, slots=True)
class _Scan:
    """The maps of a volume so far: method → index of the slice → (H, W)."""

    name: str
    slices: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Collected:
    """What a run has made so far.

    Args:
        rows: by case and method. explained: by case. scans: unfinished ones by path.
        pictures: case and method → JPEG.
    """

    rows: dict[tuple[str, str], ExplainRow] = field(default_factory=dict)
    explained: dict[str, Explained] = field(default_factory=dict)
    scans: dict[Path, _Scan] = field(default_factory=dict)
    pictures: dict[tuple[str, str], bytes] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        options: ExplainOptions,
        bundle: ImageBundle,
        methods: Mapping[str, Method],
        index: int | None,
        outputs: OutputFolder,
    ) -> None:
        from volseg.inference.choose import choose_backend
        from volseg.inference.image_predictor import load_predictor

        self._options, self._bundle, self._methods = options, bundle, methods
        self._index, self._outputs = index, outputs
        choice = choose_backend("torch", options.device, "fp32")
        self._device = choice.device
        self._predictor = load_predictor(bundle, choice, folder=options.model, n_images=1)
        self._networks: list[ImageNetwork] = [
            network.to(choice.device) for network in bundle.networks()
        ]
        self._source, self._masks, self._collected = FileSource(), _Masks(), _Collected()

    def run(self, cases: Sequence[ImageCase], remarks: Sequence[str]) -> ExplainReport:
        collected, options = self._collected, self._options
        last = {case.path: number for number, case in enumerate(cases, start=1)}
        with self._outputs.staged() as commit:
            for number, case in enumerate(cases, start=1):
                try:
                    self._explain(case, commit)
                except Exception as error:  # of any kind: the other images continue
                    problem = error if isinstance(error, VolsegError) else UnexpectedError(error)
                    reason = failure_reason(self._outputs, case.id, problem)
                    collected.failed[case.id] = reason
                    options.report_failure(case.id, reason)
                    collected.rows[case.id, ""] = self._failed_row(case, reason)
                options.progress(MAPPING, number / len(cases), case.id)
                if last[case.path] == number:
                    self._write_scan(commit, case.path)
            layers, verdicts = self._check()
            scores = saliency_rows(collected.rows.values(), list(self._methods))
            remarks = [*remarks, *_no_better(scores)]
            options.warn(*_no_better(scores))
            self._write(commit, layers, scores, verdicts, remarks)
        return ExplainReport(
            out=options.out,
            done=list(collected.explained),
            failed=collected.failed,
            warnings=remarks,
            verdicts=verdicts,
            scores=_score_texts(scores),
        )

    # ---- one image

    def _explain(self, case: ImageCase, commit: Commit) -> None:
        """Make the maps of an image, score them, and draw them."""
        from volseg.inference.explain_checks import Explained

        fit = self._bundle.recipe.images.fit
        picture = self._source.picture(case)
        image = self._source.network_input(case, self._bundle.recipe.images)
        seen = _Seen(case, picture, self._masks.of(case, picture))
        index, probability = self._predicted(image)
        maps = self._maps(image, index)
        height, width = picture.array.shape[1:]
        shown = {name: to_pixels(saliency, (height, width), fit) for name, saliency in maps.items()}
        rows = {
            name: replace(
                self._row(seen, name, shown[name]),
                class_name=self._class_name(index),
                probability=probability,
                ssim_centre=map_similarity(saliency, centre_map(saliency.shape)),
            )
            for name, saliency in maps.items()
        }
        drawn = {name: _drawn(seen, saliency) for name, saliency in shown.items()}
        for name, (png, jpeg) in drawn.items():  # nothing of an image that failed before
            commit.write(f"{MAPS}/{case.id}_{name}.png", png)
            self._collected.pictures[case.id, name] = jpeg
            self._collected.rows[case.id, name] = rows[name]
            if _is_slice(case) and case.index is not None:
                of_scan = self._collected.scans.setdefault(case.path, _Scan(_scan_name(case)))
                of_scan.slices.setdefault(name, {})[case.index] = shown[name]
        self._collected.explained[case.id] = Explained(image, index, maps)

    def _maps(self, image: np.ndarray, index: int) -> dict[str, np.ndarray]:
        """Return the map of each method, on the pixels of the network's input."""
        import torch

        from volseg.inference.explain import Score

        score = Score(self._networks, self._bundle.recipe.data, index)
        tensor, seed = torch.from_numpy(image).to(self._device), self._options.seed
        return {name: method(score, tensor, seed) for name, method in self._methods.items()}

    def _class_name(self, index: int) -> str:
        data = self._bundle.recipe.data
        return data.names[index] if data.names else data.target

    def _row(self, seen: _Seen, method: str, shown: np.ndarray) -> ExplainRow:
        case = seen.case
        is_slice = _is_slice(case)
        return ExplainRow(
            case_id=case.id,
            patient=case.patient,
            scan=_scan_name(case) if is_slice else None,
            slice_index=case.index if is_slice else None,
            method=method,
            is_empty=not evidence(shown).any(),
            model=self._bundle.name,
            **_mask_scores(seen.picture, shown, seen.mask),
        )

    def _predicted(self, image: np.ndarray) -> tuple[int, float]:
        """Return the index of the class to explain, and its probability (or the number)."""
        from volseg.inference.images import to_predictions

        bundle = self._bundle
        outputs = self._predictor.predict(image[None]).outputs
        predicted = to_predictions(outputs, bundle.recipe.data, bundle.judgement.temperature)[0]
        index = int(predicted.argmax()) if self._index is None else self._index
        return index, float(predicted[index])

    def _failed_row(self, case: ImageCase, reason: str) -> ExplainRow:
        return ExplainRow(
            case_id=case.id,
            patient=case.patient,
            model=self._bundle.name,
            status="failed",
            error=reason,
        )

    def _write_scan(self, commit: Commit, path: Path) -> None:
        """Write the maps of a volume, all of whose slices are done, on its grid."""
        scan = self._collected.scans.pop(path, None)
        for method, slices in scan.slices.items() if scan is not None else ():
            volume = stack_slices(slices, read_header(path).geometry)
            assert scan is not None
            write_volume(volume, commit.path(f"{MAPS}/{scan.name}_{method}.nii.gz"), like=path)

    # ---- checks of the methods

    def _check(self) -> tuple[list[RandomisationRow], dict[str, str | None]]:
        """Check the methods on some images; complete the rows, and return the verdicts."""
        from volseg.inference.explain_checks import Checker
        from volseg.networks import build_images

        names = _spread(list(self._collected.explained), self._options.checked)
        if not names or not self._options.checked:
            return [], dict.fromkeys(self._methods)
        checker = Checker(
            networks=self._networks,
            build=partial(build_images, self._bundle.recipe),
            data=self._bundle.recipe.data,
            methods=self._methods,
            seed=self._options.seed,
            progress=lambda fraction: self._options.progress(CHECKING, fraction, ""),
        )
        checks = checker.check([self._collected.explained[name] for name in names])
        layers = list[RandomisationRow]()
        for name, of_image in zip(names, checks, strict=True):
            for method, check in of_image.items():
                layers += _layer_rows(name, method, check)
                self._complete(name, method, check)
        verdicts = {method: self._verdict(method, checks) for method in self._methods}
        for (name, method), row in self._collected.rows.items():
            if row.status == "done":
                self._replace(name, method, doubt=verdicts[method] or None)
                self._replace(name, method, is_reliable=not verdicts[method])
        return layers, dict(verdicts)

    def _complete(self, name: str, method: str, check: MapChecks) -> None:
        self._replace(
            name,
            method,
            ssim_head=check.by_layer[0][1],
            ssim_all=check.by_layer[-1][1],
            ssim_seeds=check.seeds,
            ssim_networks=check.networks,
        )

    def _replace(self, name: str, method: str, **values: Any) -> None:
        rows = self._collected.rows
        rows[name, method] = replace(rows[name, method], **values)

    def _verdict(self, method: str, checks: Sequence[Mapping[str, MapChecks]]) -> str:
        """Return the checks that a method fails, on the mean of the images."""
        of_method = [check[method] for check in checks]
        seeds = [check.seeds for check in of_method if check.seeds is not None]
        rows = [row for (_, name), row in self._collected.rows.items() if name == method]
        return doubts_of(
            list(_mean_by_layer(of_method)),
            float(np.mean(seeds)) if seeds else None,
            all_empty=all(row.is_empty for row in rows),
        )

    # ---- the files

    def _write(
        self,
        commit: Commit,
        layers: Sequence[RandomisationRow],
        scores: Sequence[SaliencyRow],
        verdicts: Mapping[str, str | None],
        remarks: Sequence[str],
    ) -> None:
        """Write tables and page; files of an earlier call that this one did not write go."""
        from volseg.pages.explain_page import Maps, explain_page

        collected = self._collected
        rows = list(collected.rows.values())
        about = About.now("explain", self._bundle.name)
        page = explain_page(
            about,
            Maps(
                rows=rows,
                layers=layers,
                scores=scores,
                verdicts=verdicts,
                pictures=collected.pictures,
                remarks=remarks,
            ),
        )
        commit.write(EXPLAIN, table(ExplainRow, rows))
        commit.write(RANDOMISATION, table(RandomisationRow, layers))
        commit.write(SALIENCY, table(SaliencyRow, scores))
        commit.write(PAGE, page.html().encode())
        maps = [name for name in commit.hashes() if name.startswith(f"{MAPS}/")]
        content = {
            **about.as_json(),
            "task": "classify",
            "settings": self._options.stated(),
            "methods": list(self._methods),
            "verdicts": dict(verdicts),
            "maps": maps,
        }
        commit.write(RUN, json_text(content))
        commit.finish(last=RUN, removed=_earlier_maps(self._options.out))


def _drawn(seen: _Seen, saliency: np.ndarray) -> tuple[bytes, bytes]:
    """Return the picture of a map as PNG, and as JPEG beside the image for the page."""
    from volseg.pages.montage import smaller_jpeg
    from volseg.pages.overlays import overlay, pair_jpeg, plain, png_of

    picture = overlay(seen.picture, evidence(saliency), seen.mask)
    pair = pair_jpeg(plain(seen.picture, seen.mask), picture)
    return png_of(picture), smaller_jpeg(pair, HEIGHT)


def _scan_name(case: ImageCase) -> str:
    """Return the name of the volume of a slice: its id without the number."""
    assert case.index is not None
    return case.id.removesuffix(slice_id("", case.index))


def _is_slice(case: ImageCase) -> bool:
    return case.index is not None and is_scan(split_volume(case.path)[0])


def _earlier_maps(out: Path) -> list[str]:
    """Return the maps that an earlier call wrote."""
    try:
        names = read_json(out / RUN)["maps"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _layer_rows(name: str, method: str, check: MapChecks) -> list[RandomisationRow]:
    return [
        RandomisationRow(case_id=name, method=method, n_random=n, layer=layer, ssim=ssim)
        for n, (layer, ssim) in enumerate(check.by_layer, start=1)
    ]


# ---- scores against masks


def _mask_scores(picture: Image2D, saliency: np.ndarray, mask: np.ndarray | None) -> dict[str, Any]:
    """Return the scores of a map, and of the simple maps beside it; none without a mask."""
    if mask is None or not mask.any():
        return {}
    scores = {
        "mask_fraction": float(mask.mean()),
        "auprc": average_precision(saliency, mask),
        "pointing": pointing(evidence(saliency), mask),
    }
    for name, simple in SIMPLE_MAPS.items():
        values = simple(picture.array)
        scores[f"auprc_{name}"] = average_precision(values, mask)
        scores[f"pointing_{name}"] = pointing(values, mask)
    return scores


def _mean_by_layer(checks: Sequence[MapChecks]) -> Iterator[tuple[str, float]]:
    """Yield each layer with the mean similarity of the images, from the last layer on."""
    for n, (layer, _) in enumerate(checks[0].by_layer):
        values = [check.by_layer[n][1] for check in checks]
        numbers = [value for value in values if value is not None]
        if numbers:
            yield layer, float(np.mean(numbers))


def _no_better(scores: Sequence[SaliencyRow]) -> list[str]:
    """Return a warning for each method that is not above a simple map, with its interval if any."""
    warnings = []
    for row in scores:
        lowest = row.value if row.low is None else row.low
        if row.against and row.metric == METRICS[0] and not (lowest or 0) > 0:
            warnings.append(
                f"W_SALIENCY: {row.method}: its AUPRC is not above that of the simple map "
                f"{row.against} (difference {row.value:.3f}, {format_count(row.n, 'image')})"
            )
    return warnings


def _score_texts(scores: Sequence[SaliencyRow]) -> dict[str, str]:
    """Return method or simple map → its mean scores in words."""
    from volseg.pages.explain_page import score_text

    texts = dict[str, str]()
    for row in scores:
        if not row.against:
            before = f"{texts[row.method]}, " if row.method in texts else ""
            texts[row.method] = f"{before}{row.metric} {score_text(row)}"
    return texts
