"""Pairs of a reference and a predicted mask: which files belong together, and how they compare."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg.commands.batch import mask_digest_of
from volseg.commands.dicom_results import SEG
from volseg.commands.label_values import Shared, parsed_pairs, renamed, shared_voxels, values_in
from volseg.commands.mask_measurement import most_labels
from volseg.commands.placing import place_mask
from volseg.commands.region_values import names_in_file, new_values, value_of_names
from volseg.errors import ScanError, VolsegError
from volseg.evaluation.detection import (
    DetectionRow,
    Matching,
    NoisyMaskError,
    by_label,
    detect_lesions,
    detect_objects,
    with_lesions,
)
from volseg.evaluation.memory import LIBRARIES, most_evaluating, plan_evaluating, plan_reading
from volseg.evaluation.overlap import COUNTED_TOGETHER, OverlapRow, evaluate_case
from volseg.execution.memory import Budget
from volseg.io.cases import ONE_CHANNEL, Case, Listing, Row, safe_id
from volseg.io.csv_text import iterate_csv
from volseg.io.dataset_json import IGNORE, stated_labels
from volseg.io.dicom_masks import lone_masks
from volseg.io.files import RECORDS
from volseg.io.folders import scans_in
from volseg.io.formats import RESULT_SUFFIX, is_dicom_scan, stem_of, table_name, without_places
from volseg.io.layouts import find_cases, find_scans, is_dataset
from volseg.io.matching import pair_names
from volseg.io.series import TILT, with_mark
from volseg.io.volumes import mask_notes, read_mask, read_mask_header
from volseg.options import EvaluateOptions
from volseg.postprocessing.lesions import MANY
from volseg.store.evaluations import EvaluatedCase
from volseg.store.records import LESION_IDS
from volseg.store.reviews import Reviews, read_reviews
from volseg.volume import Volume, slabs_of

SAME_PLACE_MM = 0.01  # tables round centroids to four digits


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPairs:
    """The masks of a call, and how a pair of them is compared.

    Args:
        truths, guesses: case id → reference mask and predicted mask.
        label_names: value → name, where it is stated.
        value_of_name: name → value of labels whose files number them in their own ways.
        ignored: value of unannotated voxels in the reference, if any.
        renamed_values: predicted value → the reference value that it stands for.
        reviews: verdicts of a reader on the predicted lesions.
        remarks: choices that were made in reading the two datasets.
    """

    options: EvaluateOptions
    truths: Mapping[str, _Mask]
    guesses: Mapping[str, _Mask]
    predictions: _Predictions
    label_names: Mapping[int, str]
    value_of_name: Mapping[str, int]
    ignored: int | None
    renamed_values: Mapping[int, int]
    budget: Budget
    reviews: Reviews
    remarks: Sequence[str]

    @classmethod
    def of(cls, options: EvaluateOptions) -> MaskPairs:
        reviews = _reviews_of(options)
        remarks: list[str] = []
        truths = _masks(options.reference, remarks.append)
        guesses = _masks(options.predicted, remarks.append)
        options.warn(*remarks)
        truth_of = {guess: truth for truth, guess in pair_names(truths, guesses).items()}
        guesses = {truth_of.get(name, name): mask for name, mask in guesses.items()}
        if not truths.keys() & guesses.keys():
            raise VolsegError(
                f"no mask of {options.predicted} has the name of one in {options.reference}, "
                f"such as {next(iter(truths), 'none')!r}",
                fix="name the masks after their cases",
                code="E_DATASET",
            )
        renamed_values = parsed_pairs(options.labels)
        predictions = _Predictions.of(options.predicted, truth_of, renamed_values)
        stated = stated_labels(options.reference) if is_dataset(options.reference) else {}
        ignored = stated.pop(IGNORE, None)
        label_names = predictions.label_names | {value: name for name, value in stated.items()}
        value_of_name = _value_of_name(options, label_names, truths, guesses)
        return cls(
            options=options,
            truths=truths,
            guesses=guesses,
            predictions=predictions,
            label_names={value: name for name, value in value_of_name.items()} | label_names,
            value_of_name=value_of_name,
            ignored=ignored,
            renamed_values=renamed_values,
            reviews=reviews,
            remarks=remarks,
            budget=Budget(
                options.max_ram,
                options.announce,
                what="comparing these masks",
                otherwise="cut both masks to the region that matters",
                libraries=LIBRARIES,
            ),
        )

    @property
    def common(self) -> list[str]:
        """Cases that have both masks."""
        return [name for name in self.truths if name in self.guesses]

    @property
    def used(self) -> list[Path]:
        """Files and folders that the call reads."""
        masks = [mask.path for mask in (*self.truths.values(), *self.guesses.values())]
        review = [] if self.reviews.path is None else [self.reviews.path]
        return [self.options.reference, self.options.predicted, *masks, *review]

    @property
    def settings(self) -> dict[str, Any]:
        """How the masks are read, as JSON."""
        options = self.options
        return {
            "objects": options.objects,
            "threshold": options.threshold,
            "labels": list(options.labels),
            **({"values": dict(self.value_of_name)} if self.value_of_name else {}),
        }

    @property
    def unpaired(self) -> dict[str, list[str]]:
        """Cases with one mask only, under the names that summary.json gives them."""
        return {
            "not_predicted": sorted(self.truths.keys() - self.guesses.keys()),
            "not_in_reference": sorted(self.guesses.keys() - self.truths.keys()),
        }

    def patient_of(self, case_id: str) -> str | None:
        """Return the patient whom the reference names, if any."""
        return self.truths[case_id].patient

    def reason_for_tables(self, case_id: str, reason: str) -> str:
        """Return why a pair failed, without paths if its scan is DICOM: they may name patients."""
        names: dict[Path, str] = {}
        masks = {"the reference": self.truths[case_id], "the prediction": self.guesses[case_id]}
        for name, mask in masks.items():
            names[mask.path] = name
            if mask.scan is not None and is_dicom_scan(mask.scan):
                names[mask.scan] = table_name(mask.scan)
        return without_places(reason, names) if len(names) > len(masks) else reason

    def digests(self, case_id: str) -> tuple[str, str]:
        truth, guess = (
            mask_digest_of(*mask.read_from)
            for mask in (self.truths[case_id], self.guesses[case_id])
        )
        return truth, self._reviewed(guess, case_id)

    def _reviewed(self, digest: str | None, case_id: str) -> str:
        """Return the digest of a predicted mask, with the lesions that a reader rejected."""
        rejected = self.reviews.rejected(case_id)
        without = f" without lesions {', '.join(map(str, rejected))}" if rejected else ""
        return f"{digest}{without}"

    def compare(self, case_id: str) -> EvaluatedCase:
        """Compare the two masks of a case."""
        read = self._read(case_id)
        truth, guess = read.truth, read.guess
        shared: Shared = {}
        if self.options.objects == "labels":
            names, rows = self._compare_foreground(case_id, truth, guess)
        else:
            shared = shared_voxels(truth, guess)
            values = values_in(truth) | values_in(guess)
            stated = {**read.names, **self.label_names}
            names = {value: stated.get(value, f"label_{value}") for value in values}
            rows = evaluate_case(truth, guess, names, case_id=case_id)
        patient = self.patient_of(case_id)
        detections: list[DetectionRow] = []
        try:
            for row in self._detections(case_id, truth, guess, names):
                confidence = self.predictions.confidence_of(row)
                detections.append(replace(row, patient=patient, confidence=confidence))
        except NoisyMaskError as error:
            rows = [replace(row, notes=_joined(row.notes, _noise_note(error))) for row in rows]
        else:
            lesions_of = by_label(detections)
            rows = [with_lesions(row, lesions_of.get(row.label, ())) for row in rows]
        return EvaluatedCase(
            overlap=[
                replace(row, patient=patient, notes=_joined(row.notes, *read.notes)) for row in rows
            ],
            detections=detections,
            masks=(truth.sha256, self._reviewed(guess.sha256, case_id)),
            shared=shared,
        )

    def _compare_foreground(
        self, case_id: str, truth: Volume, guess: Volume
    ) -> tuple[dict[int, str], list[OverlapRow]]:
        """Return the name and the row of all objects together, which are label 1."""
        names = {1: self.label_names.get(1, "objects")}
        inside = [(mask.array > 0).view(np.uint8) for mask in (truth, guess)]
        masks = truth.with_array(inside[0]), guess.with_array(inside[1])
        return names, evaluate_case(masks[0], masks[1], names, case_id=case_id)

    def _detections(
        self, case_id: str, truth: Volume, guess: Volume, names: Mapping[int, str]
    ) -> list[DetectionRow]:
        min_iou = self.options.min_iou
        if self.options.objects == "labels":
            return detect_objects(truth, guess, Matching(truth.geometry, names, case_id, min_iou))
        return detect_lesions(truth, guess, names, case_id=case_id, min_iou=min_iou)

    def _read(self, case_id: str) -> _ReadMasks:
        """Read both masks of a case onto the grid of the reference; announce the peak memory.

        Raises:
            ScanError: comparing them may exceed the budget (E_RAM), a mask cannot be read, or they
                have other voxels (E_PAIR).
        """
        masks = self.truths[case_id], self.guesses[case_id]
        paths = [mask.path for mask in masks]
        budget = self.budget
        process = budget.process
        headers = [read_mask_header(*mask.read_from) for mask in masks]
        reading = plan_reading(headers, process=process)
        enough = most_evaluating(headers, process=process).total
        if refusal := budget.refusal(reading, enough=enough):
            raise refusal
        objects, threshold = self.options.objects, self.options.threshold
        limits = {"max_labels": most_labels(objects), "threshold": threshold}
        read_from = [mask.read_from for mask in masks]
        truth, predicted = (read_mask(path, like=scan, **limits) for path, scan in read_from)
        notes = [note for path, scan in read_from for note in mask_notes(path, scan)]
        name = stem_of(paths[1])
        if name in self.reviews.of_case:
            _remove_rejected(predicted, name, self.options.predicted, self.reviews)
        placed = place_mask(
            predicted,
            truth.geometry,
            mask_name=str(paths[1]),
            grid_name=str(paths[0]),
            other="reference",
        )
        names = names_in_file(*masks[0].read_from)
        values = new_values(names, self.value_of_name)
        truth = renamed(truth, values)
        guess = renamed(self._by_name(placed.mask, masks[1]), self.renamed_values)
        copies = 2 * truth.array.size if objects == "labels" else 0
        peak = plan_evaluating(truth, guess, process=process, copies=copies)
        peak = max(reading, peak, key=lambda peak: peak.total)
        if refusal := budget.refusal(peak):
            raise refusal
        budget.announce(peak, case_id)
        self._clear_ignored(truth, guess)
        names = {values.get(value, value): name for value, name in names.items()}
        return _ReadMasks(truth, guess, [*notes, *placed.notes], names)

    def _by_name(self, guess: Volume, mask: _Mask) -> Volume:
        """Return a predicted mask with the values that its names have in this comparison."""
        if _numbers_by_recipe(self.options):
            return guess
        return renamed(guess, new_values(names_in_file(*mask.read_from), self.value_of_name))

    def _clear_ignored(self, truth: Volume, guess: Volume) -> None:
        """Count unannotated voxels of the reference as background in both masks, in place."""
        if self.ignored is not None:
            for part in slabs_of(truth.array):
                unannotated = truth.array[part] == self.ignored
                truth.array[part][unannotated] = guess.array[part][unannotated] = 0


def _value_of_name(
    options: EvaluateOptions,
    stated: Mapping[int, str],
    truths: Mapping[str, _Mask],
    guesses: Mapping[str, _Mask],
) -> dict[str, int]:
    """Return name → value if files name their regions; {} if none does."""
    if options.objects == "labels":
        return {}  # equal values are not the same objects there
    cases = sorted(truths.keys() & guesses.keys())
    of_truths = [names_in_file(*truths[case].read_from) for case in cases]
    predicted = [] if _numbers_by_recipe(options) else [guesses[case] for case in cases]
    of_guesses = [names_in_file(*mask.read_from) for mask in predicted]
    if not any((*of_truths, *of_guesses)):
        return {}
    return value_of_names(stated, of_truths, of_guesses)


def _numbers_by_recipe(options: EvaluateOptions) -> bool:
    """Tell whether the predicted masks are those of a results folder, numbered by its recipe."""
    return (options.predicted / "masks").is_dir()


def _reviews_of(options: EvaluateOptions) -> Reviews:
    reviews = read_reviews(options.review)
    if reviews and not (options.predicted / LESION_IDS).is_dir():
        raise VolsegError(
            f"{options.predicted}: has no folder {LESION_IDS}, to which the numbers of "
            f"{options.review} refer",
            fix="give the results folder of `volseg infer` to --predicted",
            code="E_REVIEW",
        )
    return reviews


def _remove_rejected(guess: Volume, case_id: str, results: Path, reviews: Reviews) -> None:
    """Set the voxels of the rejected lesions of a predicted mask to 0, in place.

    Raises:
        ScanError: the review is of other lesions, or their numbers cannot be read.
    """
    path = results / LESION_IDS / f"{case_id}{RESULT_SUFFIX}"
    ids = read_mask(with_mark(path, TILT), max_labels=2**32)
    if difference := guess.geometry.difference(ids.geometry):
        raise ScanError(
            f"{path}: is not on the grid of the predicted mask: {difference}",
            fix="run `volseg infer` again",
            code="E_REVIEW",
        )
    sizes: Counter[int] = Counter()
    for part in slabs_of(ids.array, COUNTED_TOGETHER):
        numbers, counts = np.unique(ids.array[part], return_counts=True)
        sizes.update(dict(zip(numbers.tolist(), counts.tolist())))
    reviews.check(case_id, sizes)
    is_rejected = np.zeros(max(sizes) + 1, bool)
    is_rejected[reviews.rejected(case_id)] = True
    for part in slabs_of(ids.array, COUNTED_TOGETHER):
        guess.array[part][is_rejected[ids.array[part]]] = 0


@dataclass(frozen=True, slots=True, eq=False)
class _ReadMasks:
    """Two masks on one grid, notes on how they were read, and the names of the reference."""

    truth: Volume
    guess: Volume
    notes: Sequence[str]
    names: Mapping[int, str]


def _noise_note(error: NoisyMaskError) -> str:
    return f"lesions: {error.code}: {error.problem}, so they were not matched"


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


@dataclass(frozen=True, slots=True)
class _Mask:
    """A mask, the scan on which it is drawn, if known, and its patient."""

    path: Path
    patient: str | None = None
    scan: Path | None = None

    @property
    def read_from(self) -> tuple[Path, Path | None]:
        """Paths of the mask and its scan that accept tilted stacks: all measures use the affine."""
        return with_mark(self.path, TILT), self.scan and with_mark(self.scan, TILT)


def _masks(path: Path, remark: Callable[[str], None]) -> dict[str, _Mask]:
    """Return case id → mask of a mask folder, results folder or dataset; with patients if known."""
    if (path / RECORDS).is_dir() and not (path / "masks").is_dir():
        raise VolsegError(
            f"{path}: holds no masks", fix="give the results of `volseg infer`", code="E_DATASET"
        )
    is_described = is_dataset(path)
    has_masks = (path / "masks").is_dir() and not is_described
    folder = path / "masks" if has_masks else path
    if not is_described and (cases := _dicom_masks(folder)):
        return {case.id: _Mask(case.images[ONE_CHANNEL]) for case in cases}
    # A case may lack any channel here: only its mask is read.
    cases = find_cases(folder, None, allow_missing=True, remark=remark)
    references = {
        case.id: _Mask(case.reference, case.patient, next(iter(case.images.values())))
        for case in cases
        if case.reference is not None
    }
    if references or is_described:
        return references
    return {
        case.id: _Mask(case.images[ONE_CHANNEL]) for case in find_scans([folder], (ONE_CHANNEL,))
    }


def _dicom_masks(folder: Path) -> list[Case]:
    """Return the segmentations of DICOM in a folder of nothing else, as cases of their names."""
    if not folder.is_dir() or scans_in(folder):
        return []
    rows = [
        Row(where=str(file), id=safe_id(file.stem), images={ONE_CHANNEL: file})
        for file in lone_masks(folder)
    ]
    return Listing(rows).cases(str(folder)) if rows else []


@dataclass(frozen=True, slots=True)
class _Predictions:
    """Lesion confidences and label names from lesions.csv of a results folder, else empty.

    Args:
        confidence: case → (label, number of voxels) → centroid in RAS mm and mean confidence of
            each such lesion; lesion numbers differ if an organ is also a label. Noisy masks, whose
            lesions are not matched, have none.
        label_names: value → name.
    """

    confidence: Mapping[str, Mapping[tuple[int, int], Sequence[tuple[np.ndarray, float]]]]
    label_names: dict[int, str]

    @classmethod
    def of(
        cls, folder: Path, truth_of: Mapping[str, str], renamed_values: Mapping[int, int]
    ) -> _Predictions:
        """Read them from a folder.

        Args:
            truth_of: case id → that of the reference.
            renamed_values: predicted value → that of the reference.
        """
        folder = folder.parent if folder.name == SEG else folder
        table = folder / "lesions.csv"
        if not ((folder / "masks").is_dir() and table.is_file()):
            return cls({}, {})
        try:
            confidence = defaultdict(lambda: defaultdict(list))
            names: dict[int, str] = {}
            n_lines: Counter[str] = Counter()
            for line in iterate_csv(table):
                name = truth_of.get(line["case_id"], line["case_id"])
                n_lines[name] += 1
                label = int(line["label"])
                label = renamed_values.get(label, label)
                if line["label_name"]:
                    names[label] = line["label_name"]
                if n_lines[name] > MANY:
                    confidence.pop(name, None)
                elif line["confidence_mean"]:
                    centre = np.array([float(line[f"centroid_{axis}_mm"]) for axis in "ras"])
                    key = label, int(line["n_voxels"])
                    confidence[name][key].append((centre, float(line["confidence_mean"])))
            return cls(confidence, names)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise VolsegError(
                f"{table}: is not a table of lesions ({error!r})",
                fix="run `volseg infer` again",
                code="E_DATASET",
            ) from error

    def confidence_of(self, lesion: DetectionRow) -> float | None:
        """Return the confidence of a predicted lesion; None if its mask changed since the table."""
        if lesion.side != "predicted":
            return None
        centre = np.array([lesion.centroid_r_mm, lesion.centroid_a_mm, lesion.centroid_s_mm])
        entries = self.confidence.get(lesion.case_id, {}).get((lesion.label, lesion.n_voxels), ())
        for centroid, confidence in entries:
            if np.abs(centroid - centre).max() < SAME_PLACE_MM:
                return confidence
        return None
