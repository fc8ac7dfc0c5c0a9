"""PET is in SUV where the headers prove the factor, and is refused by the tag where they do not."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from dicom_files import Series, oblique_volume, write_series
from pet_headers import DAY, PLANTED, beds, pet, philips
from pydicom.datadict import tag_for_keyword

from volseg.errors import ScanError
from volseg.io.series import IN_SUV, split_marks, with_mark
from volseg.io.volumes import read_header, read_volume, scan_digest
from volseg.volume import Volume

SHARED = Path(__file__).parents[2].parent / "shared/data"
# 70 kg and 370 MBq of F-18 (6586.2 s); by hand: 70000 / 370e6 = 1.8918918919e-4, and after an hour
# 2^(3600/6586.2) = 1.4606367462 as much.
AT_INJECTION = 70_000 / 370e6
AFTER_AN_HOUR = 2.76336681717643e-4
SLOPES = tuple((0.5 + 0.25 * index, 0.0) for index in range(4))

VENDORS = {
    "GE: two beds, their starts": (pet(**beds(11 * 3600, middle=False)), AFTER_AN_HOUR),
    "Siemens: two beds, their middles": (pet(**beds(11 * 3600, middle=True)), AFTER_AN_HOUR),
    "Siemens: injection with a date": (
        pet(RadiopharmaceuticalStartTime=None, RadiopharmaceuticalStartDateTime=f"{DAY}100000.00"),
        AFTER_AN_HOUR,
    ),
    "Philips: counts to SUV": (philips("0.000713", "1.5"), 0.000713),
    "Philips: counts to activity": (philips("0", "1.5"), 1.5 * AFTER_AN_HOUR),
    "SUV already": (pet(Units="GML", PatientWeight=None), 1.0),
    "SUV already, and says so": (pet(Units="GML", SUVType="BW"), 1.0),
    "corrected to the injection": (pet(DecayCorrection="ADMIN"), AT_INJECTION),
    "over midnight": (
        pet(
            **dict.fromkeys(("SeriesTime", "AcquisitionTime"), "005000"),
            RadiopharmaceuticalStartTime="235000.0",
        ),
        AFTER_AN_HOUR,
    ),
    # SeriesTime is that of the reconstruction, an hour after the scan.
    "processed later": (
        pet(
            **beds(11 * 3600, middle=True),
            SeriesTime="120000",
        ),
        AFTER_AN_HOUR,
    ),
    # De-identification set all times to that of the series: the beds contradict each other.
    "times of the beds are lost": (
        pet(**beds(11 * 3600, middle=False) | {"AcquisitionTime": "110000"}),
        AFTER_AN_HOUR,
    ),
    "no factor to check with": (pet(DecayFactor=None), AFTER_AN_HOUR),
}
WRONG = {
    "no units": (pet(Units=None), "Units is missing"),
    "percent": (pet(Units="PCNT"), "Units is PCNT"),
    "not corrected for attenuation": (pet(CorrectedImage=["DECY"]), "CorrectedImage lacks ATTN"),
    "not corrected for decay": (pet(CorrectedImage=["ATTN"]), "CorrectedImage lacks DECY"),
    "no correction named": (pet(DecayCorrection=None), "DecayCorrection is missing"),
    "corrections contradict": (pet(DecayCorrection="NONE"), "DecayCorrection is NONE"),
    "no dose": (pet(RadionuclideTotalDose=None), "RadionuclideTotalDose is missing"),
    "dose in MBq": (pet(RadionuclideTotalDose="370"), "RadionuclideTotalDose is 370"),
    "no half-life": (pet(RadionuclideHalfLife=None), "RadionuclideHalfLife is missing"),
    "half-life in hours": (pet(RadionuclideHalfLife="1.83"), "RadionuclideHalfLife is 1.83"),
    "no weight": (pet(PatientWeight=None), "PatientWeight is missing"),
    "a weight of 0": (pet(PatientWeight="0"), "PatientWeight is 0"),
    "weight in g": (pet(PatientWeight="70000"), "PatientWeight is 70000"),
    "two numbers": (pet(PatientWeight=["70", "71"]), "PatientWeight is no number"),
    "no injection": (
        pet(RadiopharmaceuticalStartTime=None),
        "RadiopharmaceuticalStartDateTime and RadiopharmaceuticalStartTime are missing",
    ),
    "no drug": (pet(RadiopharmaceuticalInformationSequence=None), "Sequence is missing"),
    "injected after the scan": (
        pet(RadiopharmaceuticalStartTime=None, RadiopharmaceuticalStartDateTime=f"{DAY}113000"),
        "the time of injection contradicts",
    ),
    "injected on another day": (
        pet(RadiopharmaceuticalStartTime=None, RadiopharmaceuticalStartDateTime="20310131100000"),
        "the time of injection contradicts",
    ),
    "two times of injection": (
        pet(RadiopharmaceuticalStartDateTime=f"{DAY}093000"),
        "RadiopharmaceuticalStartDateTime contradicts RadiopharmaceuticalStartTime, by 1800 s",
    ),
    "another zone": (
        pet(
            RadiopharmaceuticalStartDateTime=f"{DAY}100000+0900",
            TimezoneOffsetFromUTC="+0100",
        ),
        "contradicts TimezoneOffsetFromUTC",
    ),
    "a zone beside times without one": (
        pet(RadiopharmaceuticalStartDateTime=f"{DAY}100000+0100"),
        "TimezoneOffsetFromUTC is missing",
    ),
    "no time of acquisition": (pet(AcquisitionTime=None), "AcquisitionTime is missing"),
    "no time of the series": (pet(SeriesTime=None), "SeriesTime is missing"),
    "no date of the series": (pet(SeriesDate=None), "SeriesDate is missing"),
    "beds contradict, and the series is later": (
        pet(**beds(11 * 3600, middle=True, moved_s=100.0), SeriesTime="113000"),
        "SeriesTime is 1800 s after AcquisitionTime",
    ),
    "the series is later, no factor": (
        pet(SeriesTime="113000", DecayFactor=None),
        "SeriesTime is 1800 s after AcquisitionTime",
    ),
    # Neither the start nor the middle of the bed: one of the two tags is wrong.
    "factor and reference contradict, the series is later": (
        pet(SeriesTime="113000", FrameReferenceTime="60000"),
        "SeriesTime is 1800 s after AcquisitionTime",
    ),
    "two weights": (
        pet(PatientWeight=lambda index: "70" if index else "71"),
        "PatientWeight differs between slices",
    ),
    "counts without a vendor": (pet(Units="CNTS"), "SUVScaleFactor (7053,1000)"),
    "counts of another vendor": (philips("0.5", None, "OTHER"), "SUVScaleFactor (7053,1000)"),
    "counts without factors": (philips("0", "0"), "missing or 0"),
    "lean body mass": (pet(Units="GML", SUVType="LBM"), "SUVType is LBM"),
    "no PET": (pet(Modality="CT"), "Modality is CT"),
}


def series(folder: Path, edit) -> tuple[Path, Volume]:
    volume = oblique_volume(shape=(9, 7, 4))
    return write_series(volume, folder / "pet", Series(edit=edit, slopes=SLOPES)), volume


@pytest.mark.parametrize("name", VENDORS)
def test_a_pet_is_its_activity_times_the_factor_by_hand(name, tmp_path):
    edit, factor = VENDORS[name]
    path, _ = series(tmp_path, edit)
    stored, suv = read_volume(path), read_volume(with_mark(path, IN_SUV))
    assert (stored.unit, suv.unit) == ("", "SUV")
    expected = stored.intensities().astype(np.float64) * factor
    np.testing.assert_allclose(suv.intensities(), expected, rtol=1e-6)


def test_the_expected_factor_is_that_of_other_numbers_too():
    # 70 kg, 370 MBq, 1 h, 5000 Bq/mL is an SUV of 1.3817 (a published example).
    assert math.isclose(5000 * AFTER_AN_HOUR, 1.3817, abs_tol=5e-5)
    assert math.isclose(AFTER_AN_HOUR, AT_INJECTION * 2 ** (3600 / 6586.2), rel_tol=1e-9)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_missing_or_contradicts_is_named(name, tmp_path):
    edit, problem = WRONG[name]
    path, _ = series(tmp_path, edit)
    read_volume(path)  # in its own unit it is a scan
    with pytest.raises(ScanError) as caught:
        read_header(with_mark(path, IN_SUV))
    assert caught.value.code == "E_SUV"
    text = str(caught.value).replace(str(tmp_path), "")
    assert problem in text
    assert not [date for date in PLANTED[:2] if date in text]


def test_the_note_has_the_factor_the_rule_and_seconds_but_no_moment(tmp_path):
    path, _ = series(tmp_path, pet(**beds(11 * 3600, middle=True)))
    header = read_header(with_mark(path, IN_SUV))
    (note,) = [warning.text for warning in header.warnings if warning.code == "N_SUV"]
    for part in ("0.0002763366817", "START", "SeriesTime", "weight_kg 70", "reference_s 3600"):
        assert part in note
    assert not [moment for moment in PLANTED if moment in note.replace("370000000", "")]


FREE = ("Units", "DecayCorrection", "SUVType", "CorrectedImage", "Modality")


@pytest.mark.parametrize("name", FREE)
def test_no_refusal_repeats_what_is_in_a_header(name, tmp_path):
    changes = {name: "SMITH JOHN"} | ({"Units": "GML"} if name == "SUVType" else {})
    path, _ = series(tmp_path, pet(**changes))
    with pytest.raises(ScanError) as caught:
        read_header(with_mark(path, IN_SUV))
    assert name in str(caught.value) and "SMITH" not in str(caught.value)


def test_two_drugs_are_refused(tmp_path):
    def edit(header, index):
        pet()(header, index)
        drugs = header.RadiopharmaceuticalInformationSequence
        header.RadiopharmaceuticalInformationSequence = [*drugs, *drugs]

    path, _ = series(tmp_path, edit)
    with pytest.raises(ScanError, match="Sequence has 2 items"):
        read_header(with_mark(path, IN_SUV))


def test_the_mark_is_part_of_the_digest_and_of_no_file(tmp_path):
    path, _ = series(tmp_path, pet())
    marked = with_mark(path, IN_SUV)
    assert scan_digest(marked) == f"{scan_digest(path)}#{IN_SUV}" == read_volume(marked).sha256
    assert split_marks(marked) == (path, (IN_SUV,)) and with_mark(marked, IN_SUV) == marked
    real = tmp_path / f"x#{IN_SUV}"
    real.mkdir()
    assert split_marks(real) == (real, ())


def test_another_format_cannot_be_converted(tmp_path):
    with pytest.raises(ScanError) as caught:
        read_volume(Path(f"sample_data/images/phantom_15.nii.gz#{IN_SUV}"))
    assert caught.value.code == "E_SUV" and "--unit SUV" in caught.value.fix


# Computed by hand from the headers: 71 kg, 388.777472 MBq, 6588 s, from 10:35:00 to 11:20:11.
REAL = {"pet_raw_ge": 71_000 / 388_777_472 * 2 ** (2711 / 6588), "sts002_pet": 1.0}


@pytest.mark.parametrize("name", REAL)
def test_real_series(name):
    folder = SHARED / "dicom" / name
    if not folder.exists():
        pytest.skip("shared/data/dicom is not here")
    stored, suv = read_volume(folder), read_volume(with_mark(folder, IN_SUV))
    np.testing.assert_allclose(
        suv.intensities(), stored.intensities().astype(np.float64) * REAL[name], rtol=1e-6
    )


def test_damaged_headers_are_read_or_refused_in_one_line(tmp_path):
    path, _ = series(tmp_path, pet())
    file = min(path.iterdir())
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    codes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(132, len(whole) - 126, 3):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            codes.add(read_header(with_mark(path, IN_SUV)).unit)
        except ScanError as error:
            codes.add(error.code)
            assert "\n" not in str(error)
    assert {"SUV", "E_SUV"} <= codes


@pytest.mark.parametrize("keyword", ["DecayCorrection", "Units", "PatientWeight", "CorrectedImage"])
def test_an_empty_value_of_an_unknown_type_is_refused_by_its_tag(keyword, tmp_path):
    path, _ = series(tmp_path, pet())
    for file in path.iterdir():
        tag = tag_for_keyword(keyword)
        assert tag is not None
        start = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        content = file.read_bytes()
        at = content.index(start) + len(start)
        (length,) = struct.unpack_from("<H", content, at + 2)
        file.write_bytes(content[:at] + b"CT\0\0" + content[at + 4 + length :])
    with pytest.raises(ScanError, match=keyword) as caught:
        read_volume(with_mark(path, IN_SUV))
    assert caught.value.code == "E_SUV"
