import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import random_classifier
from laws import CountingBackend, oblique, orientations

import volseg
from volseg.attached import closed_role, load_attached
from volseg.bundle import load_bundle
from volseg.commands.gate_judging import gate_summary
from volseg.errors import VolsegError
from volseg.evaluation.fusion import Fusion
from volseg.evaluation.operating import OperatingPoint
from volseg.image_bundle import load_image_bundle
from volseg.inference.choose import choose_backend
from volseg.inference.head import BACKGROUND
from volseg.inference.roles import (
    GateReport,
    KeptSlices,
    RunningClassifier,
    lesion_probabilities,
)
from volseg.inference.stream import ArrayPlanes, KeptPlanes, Tiling, predict_slabs
from volseg.inference.tiles import tile_starts
from volseg.io.images import read_image
from volseg.io.volumes import read_mask, read_volume
from volseg.preprocessing.images import to_input
from volseg.preprocessing.lesion_images import lesion_input
from volseg.preprocessing.prepare import Preparation
from volseg.recipe import RoleOfClassifier, parse_recipe
from volseg.segmentation import load_model, segment_case
from volseg.volume import BoundingBox, Geometry, Volume

KEPT_SLICE, KEPT_LESION = "with label", "matched"


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The trained model without its own [classify] and post-processing, to attach others to."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(model, folder)
    content = json.loads((folder / "model.json").read_text())
    content["recipe"] |= {"classify": None, "postprocess": [], "infer": {"overlap": 0.0}}
    (folder / "model.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "openvino", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate") / "gate"
    random_classifier(folder, "slice", ["without label", KEPT_SLICE])
    return folder


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesions") / "lesions"
    random_classifier(folder, "lesion", ["false", KEPT_LESION])
    return folder


def speckled(seed=0):
    """A scan on an oblique grid with six balls of several sizes in tissue."""
    rng = np.random.default_rng(seed)
    array = rng.normal(20, 10, (36, 30, 40))
    for number, centre in enumerate(
        [(7, 7, 7), (27, 8, 8), (8, 22, 19), (27, 22, 20), (17, 15, 33)]
    ):
        index = np.moveaxis(np.indices(array.shape), 0, -1)
        array[np.linalg.norm(index - centre, axis=-1) <= 2.5 + 0.5 * number] = 150
    return Volume(array.astype(np.int16), Geometry(array.shape, oblique((2, 2, 2))))


@pytest.fixture(scope="module")
def loaded(plain):
    return load_model(load_bundle(plain), "cpu", backend="torch")


def attached(loaded, **roles):
    """Return a loaded model with classifiers: role → (folder, threshold)."""
    choice = choose_backend("torch", "cpu", "fp32")
    running = {}
    for role, (folder, threshold) in roles.items():
        bundle = load_image_bundle(folder)
        stated = RoleOfClassifier(role=role, model=str(folder), threshold=threshold)
        item = closed_role(stated, bundle, folder)
        running[role] = RunningClassifier.load(item, bundle, choice)
    return replace(loaded, attached=running)


def segmented(model, scan):
    return segment_case({"ct": scan}, model, case_id="a")


def between(p):
    """Return a threshold in the middle between two of the probabilities."""
    ranked = np.sort(p)
    return float(ranked[len(p) // 2 - 1 : len(p) // 2 + 1].mean())


def test_thresholds_of_zero_change_no_byte(loaded, gate, lesions):
    scan = speckled()
    both = attached(loaded, gate=(gate, 0.0), filter=(lesions, 0.0))
    before, after = segmented(loaded, scan), segmented(both, scan)
    assert before.mask.array.tobytes() == after.mask.array.tobytes()
    assert before.confidence.tobytes() == after.confidence.tobytes()
    assert len(before.lesions) > 2
    assert repr(after.lesions) == repr(before.lesions)  # NaN is not equal to itself
    assert (after.n_dropped, after.gate.n_tiles_skipped, after.gate.n_skipped) == (0, 0, 0)
    assert (before.n_dropped, before.gate) == (None, None)


def test_a_gate_that_skips_all_gives_an_empty_mask_and_runs_no_tile(loaded, gate):
    counting = CountingBackend(loaded.segmentation)
    gated = replace(attached(loaded, gate=(gate, 1.0)), segmentation=counting)
    result = segmented(gated, speckled())
    assert not result.mask.array.any()
    assert result.gate.n_skipped == result.gate.n_slices
    assert result.gate.n_tiles_skipped == result.gate.n_tiles > 0
    assert counting.tiles == 0
    assert result.gate.seconds_saved is None


@pytest.mark.parametrize("turned", [False, True])
def test_slices_are_skipped_by_what_the_gate_says_of_their_files(loaded, gate, turned, tmp_path):
    """Witness: the slices as `read_image` reads them, and the network as a torch module."""
    scan = speckled()
    if turned:  # the same scan, stored upside down with its axes in another order
        array, affine = list(orientations(scan))[29]
        scan = Volume(np.ascontiguousarray(array), Geometry(array.shape, affine))
    volseg.write_volume(scan, tmp_path / "scan.nii.gz")
    bundle, n_slices = load_image_bundle(gate), scan.canonical().array.shape[2]
    pictures = [read_image(tmp_path / "scan.nii.gz", k) for k in range(n_slices)]
    images = np.stack([to_input(picture, bundle.recipe.images) for picture in pictures])
    with torch.inference_mode():
        p = bundle.networks()[0](torch.from_numpy(images)).softmax(dim=1)[:, 1].double().numpy()
    threshold = between(p)
    counting = CountingBackend(loaded.segmentation)
    gated = replace(attached(loaded, gate=(gate, threshold)), segmentation=counting)
    result = segmented(gated, scan)
    np.testing.assert_array_equal(result.gate.skipped, np.flatnonzero(p < threshold))
    assert result.gate.n_skipped == n_slices // 2
    assert counting.tiles == result.gate.n_tiles - result.gate.n_tiles_skipped


@pytest.mark.parametrize("flip", [False, True])
def test_planes_of_another_spacing_show_the_slices_that_they_overlap(loaded, flip):
    """Witness: in mm, along the axis of the slices."""
    settings = loaded.bundle.recipe.preprocess.model_copy(update={"crop": "none"})
    affine = np.diag([2.0, 2.0, -3.1 if flip else 3.1, 1])
    scan = Volume(np.zeros((20, 20, 13), np.int16), Geometry((20, 20, 13), affine))
    is_kept = np.zeros(13, bool)
    is_kept[[4, 11]] = True
    trail = Preparation({"ct": scan}, settings).trail
    whole = BoundingBox.whole(trail.shape)
    planes = KeptSlices(is_kept, 2, 0.0).planes(trail, whole)
    n, mm = trail.shape[2], 13 * 3.1 / trail.shape[2]
    expected = [
        any(
            is_kept[k] and k * 3.1 < (j + 1) * mm - 1e-6 and (k + 1) * 3.1 > j * mm + 1e-6
            for k in range(13)
        )
        for j in range(n)
    ]
    assert planes.axis == 2
    assert planes.is_kept.tolist() == expected
    part = BoundingBox((0, 0, 5), (trail.shape[0], trail.shape[1], n - 2))
    assert KeptSlices(is_kept, 2, 0.0).planes(trail, part).is_kept.tolist() == expected[5:-2]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tiles_without_kept_planes_are_counted_as_they_are_skipped(axis):
    shape, patch = (17, 21, 19), 6
    is_kept = np.zeros(shape[axis], bool)
    is_kept[[4, 5]] = True
    tiling = Tiling(patch_shape=(patch,) * 3, overlap=0.5, kept_planes=KeptPlanes(axis, is_kept))
    counting = CountingBackend(Twice())
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    slabs = predict_slabs(ArrayPlanes(array), counting, tiling, n_classes=2)
    logits = np.concatenate([slab.numpy().copy() for slab in slabs], axis=3)
    starts = [tile_starts(n, patch, 0.5) for n in shape]
    touching = [start for start in starts[axis] if is_kept[start : start + patch].any()]
    others = [len(along) for n, along in enumerate(starts) if n != axis]
    assert counting.tiles == len(touching) * others[0] * others[1]
    assert tiling.count_skipped(shape) == tiling.count(shape) - counting.tiles
    run = np.zeros(shape[axis], bool)
    for start in touching:
        run[start : start + patch] = True
    foreground = np.moveaxis(logits[1], axis, 0)
    np.testing.assert_allclose(foreground[run], np.moveaxis(-array[0], axis, 0)[run], atol=1e-4)
    assert (foreground[~run] == -BACKGROUND).all()


class Twice:
    """A network that returns its input and its negative."""

    head = None

    def logits(self, batch):
        return np.concatenate([batch, -batch], axis=1)

    def release(self):
        pass


def test_dropped_lesions_leave_mask_and_table_alike(loaded, lesions):
    scan = speckled()
    before = segmented(loaded, scan)
    ids = before.lesion_ids.array
    running = attached(loaded, filter=(lesions, 0.5)).attached["filter"]
    p = lesion_probabilities(scan, before.measured.scan.lesions, running, most=1000)[:, 1]
    threshold = between(p)
    after = segmented(attached(loaded, filter=(lesions, threshold)), scan)
    kept = np.flatnonzero(p > threshold) + 1
    assert 0 < len(kept) < len(p)
    expected = np.where(np.isin(ids, kept), before.mask.array, 0)
    np.testing.assert_array_equal(after.mask.array, expected)
    assert after.n_dropped == len(p) - len(kept)
    assert [row.lesion_id for row in after.lesions] == list(range(1, len(kept) + 1))
    volumes = [row.volume_mm3 for row in before.lesions if row.lesion_id in kept]
    assert [row.volume_mm3 for row in after.lesions] == volumes
    np.testing.assert_array_equal(after.lesion_ids.array > 0, expected > 0)


def test_a_type_gives_every_lesion_its_class(loaded, tmp_path):
    names = ["cyst", "solid", "fat"]
    random_classifier(tmp_path / "type", "lesion", names, seed=3)
    result = segmented(attached(loaded, type=(tmp_path / "type", "auto")), speckled())
    assert len(result.lesions) > 2
    for row in result.lesions:
        parts = dict(part.split("=") for part in row.class_probabilities.split(";"))
        assert list(parts) == names
        assert sum(map(float, parts.values())) == pytest.approx(1, abs=2e-4)
        assert row.class_name == max(names, key=lambda name: float(parts[name]))


def test_a_fused_type_is_the_classifier_on_its_own_with_the_same_mask(loaded, tmp_path):
    names = ("volume_ml", "intensity_mean", "sphericity")
    fusion = Fusion(
        names, np.array([0, 0.1, 100, 0.8]), np.array([2, 0.2, 50, 0.2]),
        np.array([1.0, -0.7, 0.4, 0.9]), np.array(0.3),
    )  # fmt: skip
    random_classifier(tmp_path / "type", "lesion", ["benign", "malignant"], fusion=fusion)
    scan = speckled()
    result = segmented(attached(loaded, type=(tmp_path / "type", "auto")), scan)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    volseg.write_volume(scan, tmp_path / "images" / "a.nii.gz")
    volseg.write_volume(result.mask, tmp_path / "labels" / "a.nii.gz")
    volseg.infer(tmp_path, model=tmp_path / "type", out=tmp_path / "r", pages=False)
    table = volseg.read_table(tmp_path / "r" / "classes.csv").set_index("case_id")
    assert len(table) == len(result.lesions) > 2
    for row in result.lesions:
        p = table.loc[f"a_{row.lesion_id}", f"probability_{row.class_name}"]
        assert p == pytest.approx(row.class_probability, abs=2e-6)
    image = load_image_bundle(tmp_path / "type").networks()[0]
    settings = load_image_bundle(tmp_path / "type").recipe.images
    for row in result.lesions:  # by hand: outputs of the torch module, and the table's columns
        inside = result.lesion_ids.array == row.lesion_id
        with torch.inference_mode():
            (logits,) = image(torch.from_numpy(lesion_input(scan, inside, settings)[None])).numpy()
        inputs = [logits[1] - logits[0], *(getattr(row, name) for name in names)]
        z = (np.array(inputs) - fusion.means) / fusion.deviations @ fusion.weights + 0.3
        p = 1 / (1 + np.exp(-z))
        expected = {"malignant": p, "benign": 1 - p}[row.class_name]
        assert row.class_probability == pytest.approx(expected, abs=1e-5)


def test_every_lesion_of_the_table_has_a_probability_of_each_class(plain, dataset, tmp_path):
    random_classifier(tmp_path / "type", "lesion", ["a=1;b", "solid"], seed=3)
    volseg.attach(plain, type=tmp_path / "type", out=tmp_path / "m")
    result = volseg.infer(
        [dataset / "images" / f"scan_{n}.nii.gz" for n in (6, 7)],
        model=tmp_path / "m",
        out=tmp_path / "r",
        pages=False,
    )
    table = result.lesions
    assert len(table) > 1
    columns = ["probability_a=1;b", "probability_solid"]
    assert list(table.columns[-2:]) == columns
    np.testing.assert_allclose(table[columns].sum(axis=1), 1, atol=2e-4)
    best = table[columns].idxmax(axis=1).str.removeprefix("probability_")
    assert (best == table["class_name"]).all()
    np.testing.assert_allclose(table[columns].max(axis=1), table["class_probability"], atol=1e-4)


def test_thresholds_come_from_the_point_of_sensitivity_99(plain, tmp_path):
    point = OperatingPoint("sensitivity_0.99", KEPT_LESION, 0.125, 0.99, 0.6)
    random_classifier(tmp_path / "c", "lesion", ["false", KEPT_LESION], points=[point])
    report = volseg.attach(plain, filter=tmp_path / "c", out=tmp_path / "m")
    (item,) = load_bundle(tmp_path / "m").recipe.classifiers
    assert (item.threshold, item.keeps) == (0.125, KEPT_LESION)
    assert "p = 0.125" in report.roles["filter"]


@pytest.mark.parametrize(
    ("kind", "classes", "role", "message"),
    [
        ("slice", ["false", KEPT_LESION], "filter", "needs a classifier with input = 'lesion'"),
        ("lesion", ["a", "b"], "filter", "has no class 'matched'"),
        ("lesion", ["false", KEPT_LESION], "filter", "has no operating point sensitivity_0.99"),
        ("lesion", ["without label", KEPT_SLICE], "gate", "input = 'slice'"),
    ],
)
def test_a_classifier_that_cannot_have_the_role_is_refused(
    kind, classes, role, message, plain, tmp_path
):
    random_classifier(tmp_path / "c", kind, classes)
    with pytest.raises(VolsegError, match=message):
        volseg.attach(plain, **{role: tmp_path / "c"}, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_classifier_that_was_changed_after_it_was_attached_is_refused(plain, lesions, tmp_path):
    volseg.attach(plain, filter=lesions, filter_threshold=0.2, out=tmp_path / "m")
    random_classifier(
        tmp_path / "m" / "classifiers" / "filter", "lesion", ["false", "matched"], seed=9
    )
    with pytest.raises(VolsegError, match="not the classifier that was attached"):
        load_attached(load_bundle(tmp_path / "m"), tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "classifiers")
    with pytest.raises(VolsegError, match="not a model folder"):
        load_attached(load_bundle(tmp_path / "m"), tmp_path / "m")


def test_what_attach_cannot_do_is_refused(plain, gate, tmp_path):
    with pytest.raises(VolsegError, match="nothing to attach"):
        volseg.attach(plain, out=tmp_path / "m")
    with pytest.raises(VolsegError, match="--filter-threshold is given without --filter"):
        volseg.attach(plain, gate=gate, filter_threshold=0.5, out=tmp_path / "m")
    with pytest.raises(VolsegError, match="is a model that classifies images"):
        volseg.attach(gate, gate=gate, gate_threshold=0.5, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_recipe_names_one_classifier_per_role(tiny_recipe):
    content = tiny_recipe.model_dump()
    both = [{"role": "filter", "model": "a"}, {"role": "filter", "model": "b"}]
    for named, message in (
        (both, "names 2 with the role 'filter'"),
        ([{"role": "type", "model": "a"}], r"\[classify\] and a classifier .* exclude each other"),
        ([{"role": "type", "model": "a", "threshold": 0.5}], "drops nothing"),
    ):
        with pytest.raises(VolsegError, match=message):
            parse_recipe(content | {"classifiers": named}, where="test")


@pytest.mark.slow
def test_a_recipe_that_names_classifiers_trains_a_model_that_holds_them(
    dataset, tiny_recipe, gate, tmp_path
):
    roles = [{"role": "gate", "model": str(gate), "threshold": 1.0}]
    stated = parse_recipe(tiny_recipe.model_dump() | {"classifiers": roles}, where="test")
    volseg.train(dataset, recipe=stated, out=tmp_path / "m", epochs=1, device="cpu")
    (item,) = load_bundle(tmp_path / "m").recipe.classifiers
    assert item.model == load_image_bundle(gate).name
    assert volseg.check(tmp_path / "m") == []
    result = volseg.infer(
        dataset / "images" / "scan_7.nii.gz", model=tmp_path / "m", out=tmp_path / "r", pages=False
    )
    assert not result.mask("scan_7").array.any()
    absent = [{"role": "gate", "model": str(tmp_path / "absent")}]
    stated = parse_recipe(tiny_recipe.model_dump() | {"classifiers": absent}, where="test")
    with pytest.raises(VolsegError, match="absent: not a model folder"):
        volseg.train(dataset, recipe=stated, out=tmp_path / "n", device="cpu")


def test_infer_writes_what_was_dropped_and_skipped(plain, gate, lesions, dataset, tmp_path):
    options = {"gate": gate, "filter": lesions, "gate_threshold": 1.0, "filter_threshold": 1.0}
    volseg.attach(plain, **options, out=tmp_path / "m")
    lines = []
    scan = dataset / "images" / "scan_7.nii.gz"
    result = volseg.infer(
        scan, model=tmp_path / "m", out=tmp_path / "r", pages=False, announce=lines.append
    )
    row = result.cases.iloc[0]
    n = read_volume(scan).canonical().array.shape[2]
    assert (row["n_dropped"], row["slices_skipped"]) == (0, f"0-{n - 1}")
    assert any(f"gate: {n} of {n} slices skipped" in text for text in lines)
    assert any("filter: 0 predicted lesions dropped in 1 scan" in text for text in lines)


def test_evaluate_says_how_many_slices_with_a_label_the_gate_kept(dataset, tmp_path):
    """A stored table says what was skipped; the reference masks say what that costs."""
    shutil.copytree(dataset / "labels", tmp_path / "r" / "masks")
    names = [f"scan_{n}" for n in range(3)]
    skipped = {"scan_0": "0-3;20", "scan_1": "", "scan_2": "0-11"}
    with (tmp_path / "r" / "cases.csv").open("w") as file:
        csv.writer(file).writerows([["case_id", "slices_skipped"], *skipped.items()])
    summary = gate_summary(
        tmp_path / "r",
        [
            (
                tmp_path / "r" / "masks" / f"{name}.nii.gz",
                dataset / "labels" / f"{name}.nii.gz",
                None,
            )
            for name in names
        ],
    )
    expected = np.zeros(4, int)
    for name in names:
        array = read_mask(dataset / "labels" / f"{name}.nii.gz").canonical().array
        has = [bool(array[:, :, k].any()) for k in range(array.shape[2])]
        gone = {"scan_0": {0, 1, 2, 3, 20}, "scan_1": set(), "scan_2": set(range(12))}[name]
        kept = sum(label for k, label in enumerate(has) if k not in gone)
        expected += [len(has), len(gone), sum(has), kept]
    assert list(summary.values())[:4] == expected.tolist()
    assert summary["sensitivity"] == expected[3] / expected[2] < 1
    (tmp_path / "r" / "cases.csv").unlink()
    assert gate_summary(tmp_path / "r", []) is None


def test_ranges_of_skipped_slices():
    report = GateReport(
        n_slices=9, n_skipped=5, n_tiles=1, n_tiles_skipped=0, seconds=0, seconds_saved=None,
        skipped=np.array([0, 1, 2, 5, 8]),
    )  # fmt: skip
    assert report.ranges == "0-2;5;8"


def test_a_second_prediction_on_one_lesion_is_neither_matched_nor_false(dataset, tmp_path):
    """The ball of a scan is predicted in two pieces, and a corner is predicted too."""
    truth = read_mask(dataset / "labels" / "scan_4.nii.gz")
    array, middle = truth.array.copy(), truth.array.shape[0] // 2
    array[middle - 1] = 0  # the larger piece on one side of this plane, the smaller on the other
    array[0, 0, 0] = 3
    (tmp_path / "r" / "masks").mkdir(parents=True)
    volseg.write_volume(truth.with_array(array), tmp_path / "r" / "masks" / "scan_4.nii.gz")
    report = volseg.candidates(dataset, tmp_path / "r", out=tmp_path / "c")
    with (tmp_path / "c" / "cases.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["matched", "", "false"]
    assert (report.n_matched, report.n_false, report.n_partial) == (1, 1, 1)
    assert report.outcome == "3 predicted lesions: 1 matched, 1 false, 1 partial"


def test_candidates_are_the_predicted_lesions_with_their_status(plain, dataset, tmp_path):
    """Witness: `evaluate`, whose detections.csv lists the same predicted lesions."""
    scans = [dataset / "images" / f"scan_{n}.nii.gz" for n in (5, 6, 7)]
    volseg.infer(scans, model=plain, out=tmp_path / "r", pages=False)
    report = volseg.candidates(dataset, tmp_path / "r", out=tmp_path / "c")
    volseg.evaluate(reference=dataset, predicted=tmp_path / "r", out=tmp_path / "e")
    with (tmp_path / "e" / "detections.csv").open() as file:
        expected = {
            f"{row['case_id']}_{row['lesion_id']}": (
                "" if row["status"] == "false" and int(row["n_overlapping"]) else row["status"],
                int(row["n_voxels"]),
            )
            for row in csv.DictReader(file)
            if row["side"] == "predicted"
        }
    with (tmp_path / "c" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = {
        row["subject"]: (row["status"], int(read_mask(tmp_path / "c" / row["label"]).array.sum()))
        for row in rows
    }
    assert summary == expected
    assert report.n_matched == sum(status == "matched" for status, _ in expected.values()) > 0
    assert {row["split"] for row in rows} <= {"train", "val", "test"}
    assert all((tmp_path / "c" / row["image"]).is_file() for row in rows)
    with pytest.raises(VolsegError, match="was predicted in"):
        volseg.candidates(dataset, [tmp_path / "r", tmp_path / "r"], out=tmp_path / "twice")
