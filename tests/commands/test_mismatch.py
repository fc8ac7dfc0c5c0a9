"""Scans with a doubted unit, or unlike those of training, through `measure`, `infer`, `train`."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import TINY
from laws import ball, grid_around, oblique, real_data

import volseg
from volseg.bundle import load_bundle
from volseg.cli import app
from volseg.errors import VolsegError
from volseg.io.volumes import read_volume, write_volume
from volseg.pages import slices
from volseg.recipe import load_recipe
from volseg.volume import Volume

WITHHELD = ("density_g_cm3", "mass_g", "agatston_score", "calcium_volume_mm3", "calcium_mass_mg")
CLASS = ("class_name", "class_probability", "class_probabilities")
UNITS = {  # --unit → what is done to the CT, and whether numbers may be made of it
    "proved": ("HU", lambda hu: hu, True),
    "guessed": (None, lambda hu: hu, False),
    "no ct, guessed": (None, lambda hu: hu + 1024, False),
    "intercept missing": ("HU", lambda hu: hu + 1024, False),
    "scaled to 0..1": ("HU", lambda hu: (hu + 1000) / 1400, False),
    "standardised": ("HU", lambda hu: (hu - hu.mean()) / hu.std(), False),
    "all but constant": ("HU", lambda hu: np.where(hu == hu.max(), 201, 200), False),
}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def plaque(tmp_path):
    """Make a calcified plaque of 400 HU in tissue in air, and write its mask."""
    geometry = grid_around(16, oblique((0.8, 1.0, 2.0)), margin=3)
    values = np.where(ball(14, geometry), 40.0, -1000.0)
    inside = ball(6, geometry)
    values[inside] = 400
    write_volume(
        Volume(np.asfortranarray(inside.astype(np.uint8)), geometry), tmp_path / "mask.nii.gz"
    )
    return Volume(np.asfortranarray(values.astype(np.float32)), geometry)


@pytest.mark.parametrize("case", UNITS)
def test_from_a_guessed_or_contradicted_unit_there_is_no_density_mass_or_calcium(
    case, plaque, tmp_path
):
    unit, change, is_proved = UNITS[case]
    write_volume(
        plaque.with_array(np.asfortranarray(change(plaque.array))), tmp_path / "scan.nii.gz"
    )
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    report = volseg.measure(**files, out=tmp_path / "out", intensity_unit=unit, calcium=True)
    (lesion,), (row,) = (rows(tmp_path / "out" / f"{name}.csv") for name in ("lesions", "cases"))
    assert [bool(lesion[name]) for name in WITHHELD[:4]] == [is_proved] * 4
    assert bool(row["agatston_score"]) == is_proved
    assert float(lesion["volume_ml"]) > 0 and lesion["intensity_mean"]  # what needs no unit stays
    warnings = [text for text in report.warnings if text.startswith("W_UNIT: scan: ")]
    assert len(warnings) == (not is_proved)
    if not is_proved:
        assert "density, mass, calcium: " in lesion["notes"]
        assert warnings[0].removeprefix("W_UNIT: scan: ") in lesion["notes"]
        assert "W_UNIT: " in row["warnings"]
        assert lesion["intensity_unit"] == ("HU" if case == "guessed" else "a.u.")


@pytest.mark.parametrize(
    ("unit", "shown"), [("HU", "HU"), (None, "HU (in doubt)"), ("SUV", "a.u."), ("Bq/mL", "Bq/mL")]
)
def test_pages_and_pictures_mark_a_unit_in_doubt(unit, shown, plaque, tmp_path, monkeypatch):
    captions = []
    draw = slices.draw_slice
    monkeypatch.setattr(
        slices, "draw_slice", lambda *given: captions.append(given[-1]) or draw(*given)
    )
    noise = np.random.default_rng(0).normal(0, 9, plaque.array.shape).astype(np.float32)
    write_volume(
        plaque.with_array(np.asfortranarray(plaque.array + noise)), tmp_path / "scan.nii.gz"
    )
    mask = np.zeros(plaque.array.shape, np.uint8)
    for n in range(6):  # enough for a histogram
        mask[2 + 3 * n : 4 + 3 * n, 5, 5] = 1
    write_volume(plaque.with_array(np.asfortranarray(mask)), tmp_path / "mask.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    volseg.measure(**files, out=tmp_path / "out", intensity_unit=unit, figures=True)
    assert captions[0].endswith(f" {shown}")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    axis, table = page.partition("Mean intensity")[2], page.partition('id="lesions-data">')[2]
    assert f">{shown}</text>" in axis.partition("</svg>")[0]
    assert f'"unit": "{shown}"' in table.replace('":"', '": "').partition("</script>")[0]
    viewer = (tmp_path / "out" / "viewer" / "scan.html").read_text(encoding="utf-8")
    assert f'aria-label="Intensity shown as white"> {shown}</span>' in viewer
    assert f'"unit": "{shown}"' in viewer.replace('":"', '": "')


@pytest.mark.parametrize(
    "spelling", ["HU ", "hu", "H.U.", "Hounsfield", "hounsfield units", " Hounsfield_Unit"]
)
def test_hu_is_hu_however_it_is_written(spelling, plaque, tmp_path):
    write_volume(plaque, tmp_path / "scan.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    volseg.measure(**files, out=tmp_path / "out", intensity_unit=spelling)
    (lesion,) = rows(tmp_path / "out" / "lesions.csv")
    assert lesion["intensity_unit"] == "HU" and lesion["mass_g"]
    (tmp_path / "r.toml").write_text(
        TINY.replace('intensity_unit = "HU"', f'intensity_unit = "{spelling}"')
    )
    assert load_recipe(tmp_path / "r.toml").data.intensity_unit == "HU"


@pytest.mark.parametrize("misspelt", ["Hounsfeld", "houndsfield units"])
def test_what_is_almost_a_known_unit_is_refused(misspelt, plaque, tmp_path):
    write_volume(plaque, tmp_path / "scan.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    with pytest.raises(
        VolsegError, match=f"--unit '{misspelt}' is almost the unit (HU|SUV): write"
    ) as caught:
        volseg.measure(**files, out=tmp_path / "out", intensity_unit=misspelt)
    assert caught.value.code == "E_USAGE"
    (tmp_path / "r.toml").write_text(
        TINY.replace('intensity_unit = "HU"', f'intensity_unit = "{misspelt}"')
    )
    with pytest.raises(VolsegError, match="is almost the unit"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("unit", ["Bq/mL", "SUV", "SUVR", "mHU", "mm2/s", "T1 in ms", "a. u."])
def test_in_another_unit_than_hu_every_lesion_says_why_there_is_no_mass(unit, plaque, tmp_path):
    scan = plaque.with_array(np.asfortranarray((plaque.array + 1000) / 400))
    write_volume(scan, tmp_path / "scan.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    volseg.measure(**files, out=tmp_path / "out", intensity_unit=unit)
    (lesion,) = rows(tmp_path / "out" / "lesions.csv")
    assert not lesion["mass_g"] and not lesion["density_g_cm3"]
    assert f"density, mass: need HU, but the unit is {lesion['intensity_unit']}" in lesion["notes"]


def test_a_unit_of_spaces_is_none(plaque, tmp_path):
    write_volume(plaque, tmp_path / "scan.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    volseg.measure(**files, out=tmp_path / "out", intensity_unit="  ")
    (lesion,) = rows(tmp_path / "out" / "lesions.csv")
    assert "no --unit given" in lesion["notes"]


def test_a_mask_without_lesions_has_no_calcium_score_of_zero_in_a_doubted_unit(plaque, tmp_path):
    write_volume(plaque, tmp_path / "scan.nii.gz")
    empty = plaque.with_array(np.zeros(plaque.array.shape, np.uint8))
    write_volume(empty, tmp_path / "mask.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    for unit, score in (("HU", "0"), (None, "")):
        volseg.measure(**files, out=tmp_path / "out", intensity_unit=unit, calcium=True)
        assert rows(tmp_path / "out" / "cases.csv")[0]["agatston_score"] == score


def test_a_recipe_states_the_unit_unless_it_was_guessed(plaque, tmp_path):
    write_volume(plaque, tmp_path / "scan.nii.gz")
    files = {"image": tmp_path / "scan.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    for line, is_proved in (("", True), ("unit_guessed = true\n", False)):
        (tmp_path / "r.toml").write_text(
            TINY.replace('intensity_unit = "HU"\n', f'intensity_unit = "HU"\n{line}')
        )
        volseg.measure(**files, out=tmp_path / "out", recipe=tmp_path / "r.toml")
        assert bool(rows(tmp_path / "out" / "lesions.csv")[0]["mass_g"]) == is_proved


def magnetic(scan):
    """What the scan would look like on MRI: no air below 0, tissue and ball brighter than it."""
    values = np.where(scan.array < -500, 0, 300 + 3.0 * scan.array)
    return scan.with_array(np.asfortranarray(np.abs(values).astype(np.float32)))


@pytest.mark.slow
def test_a_scan_of_another_modality_is_refused_and_marked_where_it_is_accepted(
    dataset, model, tmp_path, capsys
):
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(dataset / "images" / "scan_6.nii.gz", scans)
    write_volume(magnetic(read_volume(dataset / "images" / "scan_7.nii.gz")), scans / "mr.nii.gz")
    seen = []
    report = volseg.infer(
        scans,
        model=model,
        out=tmp_path / "out",
        device="cpu",
        progress=lambda *what: seen.append(what),
    )
    assert report.exit_code == 3 and list(report.failed) == ["mr"]
    assert (
        report.failed["mr"].startswith("E_MODALITY: ")
        and "--accept-mismatch" in report.failed["mr"]
    )
    assert not any(detail.startswith("mr: ") for _, _, detail in seen)  # no tile of it was run
    assert not (tmp_path / "out" / "masks" / "mr.nii.gz").exists()
    (lesion,) = rows(tmp_path / "out" / "lesions.csv")
    assert lesion["density_g_cm3"] and lesion["class_name"]

    for _ in range(2):  # the second call finds all done, and warns again
        with pytest.raises(SystemExit) as left:
            app(
                [
                    "infer",
                    str(scans),
                    "--model",
                    str(model),
                    "--out",
                    str(tmp_path / "out"),
                    "--device",
                    "cpu",
                    "--accept-mismatch",
                ]
            )
        assert left.value.code == 0
        assert "warning: W_MODALITY: mr: " in capsys.readouterr().err
    marked = [row for row in rows(tmp_path / "out" / "lesions.csv") if row["case_id"] == "mr"]
    row = {row["case_id"]: row for row in rows(tmp_path / "out" / "cases.csv")}["mr"]
    assert marked and "W_MODALITY: " in row["warnings"]
    for lesion in marked:
        assert "W_MODALITY: " in lesion["notes"] and lesion["notes"].startswith(
            "density, mass, class: "
        )
        assert not any(lesion[name] for name in (*WITHHELD, *CLASS))
        assert lesion["intensity_unit"] == "a.u." and float(lesion["volume_ml"]) > 0
    page = (tmp_path / "out" / "viewer" / "mr.html").read_text(encoding="utf-8")
    assert (
        "W_MODALITY: " in page
        and "This scan does not resemble the training scans: W_MODALITY" in page
    )

    report = volseg.infer(
        scans, model=model, out=tmp_path / "out", device="cpu"
    )  # without the option it is refused again
    assert list(report.failed) == ["mr"]
    row = {row["case_id"]: row for row in rows(tmp_path / "out" / "cases.csv")}["mr"]
    assert (
        "W_MODALITY: " in row["warnings"]
        and "W_STALE: the last run failed (E_MODALITY" in row["warnings"]
    )


def test_an_unusual_grid_is_a_warning_on_row_page_and_terminal(dataset, model, tmp_path):
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    padded = np.pad(scan.array, ((0, 60), (0, 0), (0, 0)), mode="edge")
    affine = scan.geometry.affine
    write_volume(
        Volume(np.asfortranarray(padded), type(scan.geometry)(padded.shape, affine)),
        tmp_path / "wide.nii.gz",
    )
    report = volseg.infer(tmp_path / "wide.nii.gz", model=model, out=tmp_path / "out", device="cpu")
    (row,) = rows(tmp_path / "out" / "cases.csv")
    assert (
        row["status"] == "done"
        and "W_FOV: field of view along R, A, S 144 x 52 x 52.8 mm, in training 48"
        in row["warnings"]
    )
    assert [warning.partition(": field")[0] for warning in report.warnings] == ["W_FOV: wide"]
    assert all(row["density_g_cm3"] for row in rows(tmp_path / "out" / "lesions.csv"))
    assert "does not resemble the training scans: W_FOV." in (
        tmp_path / "out" / "viewer" / "wide.html"
    ).read_text("utf-8")


def test_every_scan_of_many_with_one_warning_is_named(dataset, model, tmp_path):
    (tmp_path / "scans").mkdir()
    for n in range(7):
        write_volume(
            magnetic(read_volume(dataset / "images" / "scan_7.nii.gz")),
            tmp_path / "scans" / f"mr_{n}.nii.gz",
        )
    report = volseg.infer(
        tmp_path / "scans", model=model, out=tmp_path / "out", device="cpu", accept_mismatch=True
    )
    names = [text.split(": ")[1] for text in report.warnings if text.startswith("W_MODALITY: ")]
    assert names == [f"mr_{n}" for n in range(7)]


def test_the_time_of_all_scans_is_announced_before_the_first_tile(dataset, model, tmp_path):
    (tmp_path / "scans").mkdir()
    write_volume(
        magnetic(read_volume(dataset / "images" / "scan_7.nii.gz")), tmp_path / "scans" / "a.nii.gz"
    )
    for n in (6, 7):
        shutil.copy(dataset / "images" / f"scan_{n}.nii.gz", tmp_path / "scans")
    output = []  # announced lines, and progress as tuples
    options = {"model": model, "out": tmp_path / "out", "device": "cpu"}
    options |= {"announce": output.append, "progress": lambda *call: output.append(call)}
    volseg.infer(tmp_path / "scans", **options)
    (line,) = (line for line in output if isinstance(line, str) and line.startswith("time: "))
    first_tile = next(n for n, call in enumerate(output) if call[0] == "Tiles")
    assert output.index(line) < first_tile
    tiles = {call[2].split()[-1] for call in output if call[0] == "Tiles"}
    assert "tiles in 2 scans, about " in line and len(tiles) > 0
    output.clear()
    volseg.infer(tmp_path / "scans" / "scan_6.nii.gz", **options)  # complete: nothing to time
    assert not any(isinstance(line, str) and line.startswith("time: ") for line in output)


def test_run_json_and_both_pages_hold_the_model_box(dataset, model, tmp_path):
    volseg.infer(
        dataset / "images" / "scan_6.nii.gz", model=model, out=tmp_path / "out", device="cpu"
    )
    bundle = load_bundle(model)
    box = json.loads((tmp_path / "out" / "run.json").read_text())["model_box"]
    assert box["name"] == bundle.name
    assert (box["intended_use"], box["limits"]) == ("Tests.", "Tests only.")
    assert box["training_cases"] == 4
    assert box["dice"][0]["mean"] == bundle.metrics["validation_dice_lesion"]

    def boxes():
        pages = (tmp_path / "out" / "report.html", tmp_path / "out" / "viewer" / "scan_6.html")
        return [
            page.read_text("utf-8")
            .partition('<section class="model"')[2]
            .partition("</section>")[0]
            for page in pages
        ]

    before = boxes()
    for text in before:
        assert bundle.name in text and "Tests only." in text and "4 cases, validated on 2" in text
        assert f"lesion {bundle.metrics['validation_dice_lesion']:.2f}" in text
    volseg.report(tmp_path / "out")  # the pages made again, from the folder alone
    assert boxes() == before


def test_a_plan_without_a_recipe_marks_its_unit_as_a_guess_unless_the_dataset_says_ct(
    dataset, tmp_path
):
    from volseg.commands.automatic_recipe import recipe_for

    guessed = recipe_for(dataset, None)
    assert (guessed.data.intensity_unit, guessed.data.unit_guessed) == ("HU", True)
    table = rows(dataset / "cases.csv")
    shutil.copytree(dataset, tmp_path / "d")
    with (tmp_path / "d" / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*table[0], "modality"])
        writer.writeheader()
        writer.writerows(row | {"modality": "CT"} for row in table)
    stated = recipe_for(tmp_path / "d", None)
    assert (stated.data.intensity_unit, stated.data.unit_guessed) == ("HU", False)


def test_training_scans_that_contradict_the_recipes_unit_are_named(dataset, tmp_path, tiny_recipe):
    shutil.copytree(dataset, tmp_path / "d")
    for n in range(3):
        path = tmp_path / "d" / "images" / f"scan_{n}.nii.gz"
        scan = read_volume(path)
        write_volume(scan.with_array(np.asfortranarray(scan.array + 1024)), path)
        (warning,) = volseg.plan(tmp_path / "d", recipe=tiny_recipe).warnings
        assert warning.startswith(
            f"W_UNIT: {n + 1} of 4 training scans contradict the unit of the recipe"
        )
        assert (
            "a model refuses such scans" if n == 0 else "a model reports no values in that unit"
        ) in warning
    problems = volseg.check(tmp_path / "d", tiny_recipe)
    assert [problem["where"] for problem in problems if problem["code"] == "W_UNIT"] == [
        "scan_0",
        "scan_1",
        "scan_2",
    ]


@pytest.mark.slow
def test_a_pet_and_an_mr_get_no_hu_density_mass_or_class_from_the_shipped_model(tmp_path):
    scans = [real_data(f"sts_sarcoma/images/STS_018_{name}.nii.gz") for name in ("PET", "MR_T1")]
    report = volseg.infer(scans, out=tmp_path / "out", device="cpu")
    assert report.exit_code == 4
    assert all(reason.startswith("E_MODALITY: ") for reason in report.failed.values())
    assert rows(tmp_path / "out" / "lesions.csv") == []


def test_a_corrected_mask_keeps_the_warnings_of_its_scan_and_the_model_box(
    dataset, model, tmp_path
):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    padded = np.asfortranarray(np.pad(scan.array, ((0, 60), (0, 0), (0, 0)), mode="edge"))
    write_volume(
        Volume(padded, type(scan.geometry)(padded.shape, scan.geometry.affine)),
        scans / "wide.nii.gz",
    )
    write_volume(magnetic(read_volume(dataset / "images" / "scan_7.nii.gz")), scans / "mr.nii.gz")
    volseg.infer(scans, model=model, out=out, device="cpu", accept_mismatch=True)

    def on_pages():
        pages = [
            (out / name).read_text("utf-8")
            for name in ("report.html", "viewer/mr.html", "viewer/wide.html")
        ]
        return [
            page.partition('<section class="model"')[2].partition("</section>")[0] for page in pages
        ]

    before, boxes = {row["case_id"]: row["warnings"] for row in rows(out / "cases.csv")}, on_pages()
    assert "W_FOV: " in before["wide"] and before["mr"].startswith("W_MODALITY: ") and all(boxes)
    for _ in range(2):  # corrected, and corrected again
        for name in before:
            mask = read_volume(out / "masks" / f"{name}.nii.gz")
            array = mask.array.copy()
            array[tuple(np.argwhere(array)[0])] = 0
            write_volume(mask.with_array(array), out / "masks" / f"{name}.nii.gz")
        assert sorted(volseg.measure(out).done) == ["mr", "wide"]
        for row in rows(out / "cases.csv"):
            assert row["warnings"].startswith(before[row["case_id"]].split("; W_BORDER")[0])
            assert "W_CORRECTED: " in row["warnings"]
        assert on_pages() == boxes
        marked = [row for row in rows(out / "lesions.csv") if row["case_id"] == "mr"]
        assert marked
        for lesion in marked:
            assert "W_MODALITY: " in lesion["notes"] and not any(
                lesion[name] for name in (*WITHHELD, *CLASS)
            )
    record = out / ".volseg" / "wide.json"
    content = json.loads(record.read_text())
    for remarks in ("W_FOV", ["W_FOV: so", 3], None):  # of a stranger
        content["source"]["remarks"] = remarks
        record.write_text(json.dumps(content))
        shutil.copy(out / "lesion_ids" / "wide.nii.gz", out / "masks" / "wide.nii.gz")
        assert volseg.measure(out).failed["wide"].startswith("E_RECORD: ")
