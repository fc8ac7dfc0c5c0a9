"""Standardised uptake values of a PET series, only where its headers prove the factor.

Whatever is missing or contradicts is refused with the name of the tag. No date leaves this file:
what is reported are seconds between two moments.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

from volseg.io.gzip_stream import refusal

TAGS: Mapping[str, int] = MappingProxyType(
    {
        "SeriesDate": 0x0008_0021,
        "AcquisitionDate": 0x0008_0022,
        "SeriesTime": 0x0008_0031,
        "AcquisitionTime": 0x0008_0032,
        "Modality": 0x0008_0060,
        "TimezoneOffsetFromUTC": 0x0008_0201,
        "PatientWeight": 0x0010_1030,
        "RadiopharmaceuticalStartTime": 0x0018_1072,
        "RadionuclideTotalDose": 0x0018_1074,
        "RadionuclideHalfLife": 0x0018_1075,
        "RadiopharmaceuticalStartDateTime": 0x0018_1078,
        "ActualFrameDuration": 0x0018_1242,
        "CorrectedImage": 0x0028_0051,
        "RadiopharmaceuticalInformationSequence": 0x0054_0016,
        "Units": 0x0054_1001,
        "SUVType": 0x0054_1006,
        "DecayCorrection": 0x0054_1102,
        "FrameReferenceTime": 0x0054_1300,
        "DecayFactor": 0x0054_1321,
        "the creator of the block (7053,10xx)": 0x7053_0010,
        "SUVScaleFactor (7053,1000)": 0x7053_1000,
        "ActivityConcentrationScaleFactor (7053,1009)": 0x7053_1009,
    }
)
DRUG = "RadiopharmaceuticalInformationSequence"
CREATOR, SUV_FACTOR, ACTIVITY_FACTOR = list(TAGS)[-3:]
PHILIPS = "Philips PET Private Group"
CORRECTIONS = ("ATTN", "DECY")
TERMS = {  # of the standard, which messages may show
    *("AU", "CR", "CT", "DX", "MG", "MR", "NM", "OT", "PT", "US", "XA"),
    *("CNTS", "NONE", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING"),
    *("MLG", "1CM", "UMOLML", "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"),
    *("BSA", "BW", "LBM", "LBMJANMA", "LBMJAMES128", "IBW", "START", "ADMIN"),
}
# A number beyond these is in another unit, such as a dose in MBq or a weight in g.
WEIGHT_KG, DOSE_BQ, HALF_LIFE_S = (0.01, 500.0), (1e5, 1e11), (60.0, 1e6)
FACTOR = (1e-12, 1e12)  # of Philips: any but 0
MOST_HALF_LIVES = 10  # from injection to the reference; a thousandth of the dose is left then
DAY_S = 86_400.0
SAME_S = 1.0  # times that are equal
TIME = re.compile(r"(\d\d):?(\d\d)?:?(\d\d(?:\.\d{0,6})?)?")
DATE = re.compile(r"(\d{4})[.]?(\d\d)[.]?(\d\d)")
MOMENT = re.compile(r"(\d{8})(\d{6}(?:\.\d{0,6})?)([+-]\d{4})?")
FIX = "give the original series, or measure it in its stored unit, with --unit a.u."


class _Unproved(Exception):
    """The factor is not proved; the text names the tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suv:
    """How a PET becomes SUV by body weight (g/mL): intensity × factor.

    Args:
        rule: what proves the factor, and at which time the activity was as stored.
        numbers: those it was computed from; times are in seconds after the injection.
    """

    factor: float
    rule: str
    numbers: Mapping[str, float]

    def __str__(self) -> str:
        facts = "".join(f", {name} {number:.10g}" for name, number in self.numbers.items())
        return f"SUVbw is the stored intensity × {self.factor:.10g}: {self.rule}{facts}"


def suv_of(files: Sequence[Path], path: Path) -> Suv:
    """Return how the intensities of a PET series become SUV by body weight.

    Args:
        files: of its slices. path: of the series, for messages.

    Raises:
        ScanError: a tag that proves the factor is missing or contradicts another (`E_SUV`).

    Source: DICOM PS3.3 C.8.9.1 and C.8.9.2; the pseudo-code of QIBA for SUV by vendor
    """
    try:
        return _suv([_read(file) for file in files])
    except _Unproved as error:
        raise refusal(path, "E_SUV", f"SUV is not proved: {error}", FIX) from error


def _suv(headers: Sequence[Any]) -> Suv:
    modality = _shared(headers, "Modality")
    if modality != ("PT",):
        raise _Unproved(f"Modality is {_shown(modality)}, not PT")
    corrections = _shared(headers, "CorrectedImage")
    missing = [name for name in CORRECTIONS if name not in corrections]
    if missing:
        raise _Unproved(f"CorrectedImage lacks {' and '.join(missing)}")
    units = _shared(headers, "Units")
    if units == ("GML",):
        kind = _shared(headers, "SUVType", is_needed=False)
        if kind not in ((), ("BW",)):
            raise _Unproved(f"SUVType is {_shown(kind)}, not BW")
        return Suv(factor=1.0, rule="Units is GML", numbers={})
    if units == ("BQML",):
        return _of_activity(headers, 1.0, "Units is BQML")
    if units == ("CNTS",):
        return _of_counts(headers)
    raise _Unproved(f"Units is {_shown(units)}, not BQML, CNTS or GML")


def _of_counts(headers: Sequence[Any]) -> Suv:
    """Return the conversion of counts, for which Philips stores factors of its own."""
    if not " ".join(_shared(headers, CREATOR, is_needed=False)).startswith(PHILIPS):
        raise _Unproved(f"Units is CNTS, but {SUV_FACTOR} and {ACTIVITY_FACTOR} are missing")
    for name in (SUV_FACTOR, ACTIVITY_FACTOR):
        if _shared(headers, name, is_needed=False) and _any_number(headers, name) != 0:
            factor = _number(headers, name, FACTOR)
            rule = f"Units is CNTS, {name}"
            if name == SUV_FACTOR:
                return Suv(factor=factor, rule=rule, numbers={})
            return _of_activity(headers, factor, rule)
    raise _Unproved(f"Units is CNTS, but {SUV_FACTOR} and {ACTIVITY_FACTOR} are missing or 0")


def _of_activity(headers: Sequence[Any], bq_ml: float, rule: str) -> Suv:
    """Return the conversion of an activity; `bq_ml` is that of an intensity of 1."""
    weight_kg = _number(headers, "PatientWeight", WEIGHT_KG)
    drugs = [_drug(header) for header in headers]
    dose_bq = _number(drugs, "RadionuclideTotalDose", DOSE_BQ)
    half_life_s = _number(drugs, "RadionuclideHalfLife", HALF_LIFE_S)
    numbers = {"weight_kg": weight_kg, "dose_bq": dose_bq, "half_life_s": half_life_s}
    correction = _shared(headers, "DecayCorrection")
    elapsed_s = 0.0
    if correction == ("START",):
        reference_s, why = _reference(headers, half_life_s)
        elapsed_s = reference_s - _injected(headers, drugs, reference_s)
        if not -SAME_S <= elapsed_s <= MOST_HALF_LIVES * half_life_s:
            raise _Unproved(
                f"the time of injection contradicts that of the scan, which is {elapsed_s:.0f} s "
                f"later, with a RadionuclideHalfLife of {half_life_s:g} s"
            )
        rule = f"{rule}, DecayCorrection is START, {why}"
        numbers["reference_s"] = elapsed_s
    elif correction == ("ADMIN",):
        rule = f"{rule}, DecayCorrection is ADMIN"
    else:
        raise _Unproved(f"DecayCorrection is {_shown(correction)}, not START or ADMIN")
    left_bq = dose_bq * 2 ** (-elapsed_s / half_life_s)
    return Suv(factor=bq_ml * 1000 * weight_kg / left_bq, rule=rule, numbers=numbers)


# ---- times, in seconds since a day long ago


def _reference(headers: Sequence[Any], half_life_s: float) -> tuple[float, str]:
    """Return the moment to which all slices were corrected, and what says so."""
    series_s = _day(headers, "SeriesDate") + _time(headers, "SeriesTime")
    acquired_s = [_acquired(header, series_s) for header in headers]
    offsets_s = [_offset(header, half_life_s) for header in headers]
    starts_s = [
        acquired - offset
        for acquired, offset in zip(acquired_s, offsets_s, strict=True)
        if offset is not None
    ]
    is_whole = len(starts_s) == len(headers)
    if is_whole and max(starts_s) - min(starts_s) <= SAME_S:
        start_s = sum(starts_s) / len(starts_s)
        if abs(start_s - series_s) <= SAME_S:
            return series_s, "SeriesTime, as AcquisitionTime and DecayFactor say in every slice"
        return start_s, "AcquisitionTime less the time in DecayFactor, equal in every slice"
    if series_s > min(acquired_s):
        raise _Unproved(
            f"SeriesTime is {series_s - min(acquired_s):.0f} s after AcquisitionTime, and "
            "AcquisitionTime less the time in DecayFactor and FrameReferenceTime is not the same "
            "in every slice"
        )
    return series_s, "SeriesTime, not after AcquisitionTime of any slice"


def _acquired(header: Any, series_s: float) -> float:
    """Return when a slice was acquired; without a date of its own, within 12 h of the series."""
    time_s = _time([header], "AcquisitionTime")
    if _words(header, "AcquisitionDate"):
        return _day([header], "AcquisitionDate") + time_s
    days = round((series_s - time_s) / DAY_S)
    return days * DAY_S + time_s


def _offset(header: Any, half_life_s: float) -> float | None:
    """Return the seconds from the reference to the start of a slice; None if it is not known.

    DecayFactor = e^(λ t) · λT / (1 - e^(-λT)) for a start t and a duration T. FrameReferenceTime
    is the time of the mean activity, or with some vendors the start; one of them must hold.
    """
    values = [
        _numbers(header, name)
        for name in ("DecayFactor", "ActualFrameDuration", "FrameReferenceTime")
    ]
    if not all(len(value) == 1 for value in values):
        return None
    factor, duration_ms, middle_ms = (value[0] for value in values)
    rate = math.log(2) / half_life_s
    x = rate * duration_ms / 1000
    if factor <= 0 or not 0 < x < 100:
        return None
    during = x / -math.expm1(-x)
    start_s = math.log(factor / during) / rate
    middle_s = start_s + math.log(during) / rate
    is_known = min(abs(middle_ms / 1000 - time_s) for time_s in (start_s, middle_s)) <= SAME_S
    return start_s if is_known else None


def _injected(headers: Sequence[Any], drugs: Sequence[Any], reference_s: float) -> float:
    """Return when the drug was given; without a date, on the day before if it must be."""
    moment, time = "RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalStartTime"
    (stated,) = _shared(drugs, moment, is_needed=False)[:1] or ("",)
    if not stated:
        if not _shared(drugs, time, is_needed=False):
            raise _Unproved(f"{moment} and {time} are missing")
        given_s = _day(headers, "SeriesDate") + _time(drugs, time)
        return given_s - DAY_S if given_s > reference_s + SAME_S else given_s
    parts = MOMENT.fullmatch(stated)
    if parts is None:
        raise _Unproved(f"{moment} is no date with a time")
    zone = parts[3]
    if zone and _shared(headers, "TimezoneOffsetFromUTC") != (zone,):
        raise _Unproved(f"{moment} contradicts TimezoneOffsetFromUTC")
    given_s = _seconds_of_day(parts[2], moment)
    if _shared(drugs, time, is_needed=False):
        off_s = abs(_time(drugs, time) - given_s)
        if min(off_s, DAY_S - off_s) > SAME_S:
            raise _Unproved(f"{moment} contradicts {time}, by {off_s:.0f} s")
    return _seconds_of_date(parts[1], moment) + given_s


def _day(headers: Sequence[Any], name: str) -> float:
    return _seconds_of_date(_shared(headers, name)[0], name)


def _time(headers: Sequence[Any], name: str) -> float:
    return _seconds_of_day(_shared(headers, name)[0], name)


def _seconds_of_date(text: str, name: str) -> float:
    parts = DATE.fullmatch(text)
    try:
        if parts is not None:
            return date(*map(int, parts.groups())).toordinal() * DAY_S
    except ValueError:
        pass
    raise _Unproved(f"{name} is no date")


def _seconds_of_day(text: str, name: str) -> float:
    parts = TIME.fullmatch(text)
    if parts is not None:
        hours, minutes, seconds = (float(part or 0) for part in parts.groups())
        if hours < 24 and minutes < 60 and seconds < 61:
            return 3600 * hours + 60 * minutes + seconds
    raise _Unproved(f"{name} is no time")


# ---- values of a header, which may be anything


def _read(file: Path) -> Any:
    from pydicom import dcmread

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are not used
            return dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS.values()))
    except Exception as error:  # pydicom raises many types on damaged headers
        raise _Unproved(f"a header cannot be read ({type(error).__name__})") from error


def _drug(header: Any) -> Any:
    """Return the data set of the one drug that was given."""
    try:
        items = list(header[TAGS[DRUG]].value or ()) if TAGS[DRUG] in header else []
    except Exception as error:  # as above
        raise _Unproved(f"{DRUG} cannot be read") from error
    if len(items) != 1:
        raise _Unproved(f"{DRUG} is missing" if not items else f"{DRUG} has {len(items)} items")
    return items[0]


def _words(header: Any, name: str) -> tuple[str, ...]:
    """Return the texts of an element; none if it is absent or empty."""
    try:
        element = header.get_item(TAGS[name])  # converts a value that was left out before
    except Exception as error:  # as above
        raise _Unproved(f"{name} cannot be read") from error
    value: Any = () if element is None or element.value is None else element.value
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        value = [value]  # converted before
    words = (str(word).strip(" \0") for word in value)
    return tuple(word for word in words if word)


def _shared(headers: Sequence[Any], name: str, *, is_needed: bool = True) -> tuple[str, ...]:
    """Return the texts of an element that is equal in all slices."""
    stated = {_words(header, name) for header in headers}
    if len(stated) > 1:
        raise _Unproved(f"{name} differs between slices")
    (words,) = stated
    if not words and is_needed:
        raise _Unproved(f"{name} is missing")
    return words


def _numbers(header: Any, name: str) -> list[float]:
    try:
        numbers = [float(word) for word in _words(header, name)]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def _any_number(headers: Sequence[Any], name: str) -> float:
    _shared(headers, name)
    numbers = _numbers(headers[0], name)
    if len(numbers) != 1:
        raise _Unproved(f"{name} is no number")
    return numbers[0]


def _number(headers: Sequence[Any], name: str, limits: tuple[float, float]) -> float:
    number, (low, high) = _any_number(headers, name), limits
    if not low <= number <= high:
        raise _Unproved(f"{name} is {number:g}, not from {low:g} to {high:g}")
    return number


def _shown(words: Sequence[str]) -> str:
    """Return terms of the standard; other text may be anything, a name too, and is not shown."""
    return "/".join(words) if words and TERMS.issuperset(words) else "unknown"
