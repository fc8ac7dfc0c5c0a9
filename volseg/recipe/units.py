"""Units of intensity."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator

from volseg.inputs import shorten
from volseg.recipe.section import Name

HU, SUV, ARBITRARY = "HU", "SUV", "a.u."
SPELLINGS = {HU: ("hu", "hounsfield", "hounsfieldunit", "hounsfieldunits"), SUV: ("suv",)}
SPELLINGS |= {ARBITRARY: ("au", "arbitrary", "arbitraryunit", "arbitraryunits")}
UNITS = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in spellings}
MISSPELT = 0.75  # similarity to a long spelling from which a unit counts as misspelt
IN_SUV = "suvbw"  # a request: convert a PET to SUV by body weight
LONG = 6  # letters; shorter texts, such as SUVR or mHU, may be units of their own


def parse_unit(text: str) -> str:
    """Return HU, SUV or a.u. for any usual spelling of it, else the text itself.

    Raises:
        ValueError: the text looks like a misspelling of one of them.

    >>> parse_unit("Hounsfield units "), parse_unit("Bq/mL")
    ('HU', 'Bq/mL')
    """
    plain = _plain(text)
    long = [spelling for spelling in UNITS if min(len(spelling), len(plain)) >= LONG]
    near = difflib.get_close_matches(plain, long, n=1, cutoff=MISSPELT)
    if near and plain not in UNITS:
        unit = UNITS[near[0]]
        raise ValueError(f"{shorten(text)!r} is almost the unit {unit}: write {unit}")
    return UNITS.get(plain, text.strip())


def asks_for_suv(text: str | None) -> bool:
    """Check whether a stated unit is SUVbw, which converts a PET.

    >>> asks_for_suv("SUVbw"), asks_for_suv("SUV")
    (True, False)
    """
    return _plain(text or "") == IN_SUV


def _plain(text: str) -> str:
    return re.sub(r"[\s._-]", "", text.casefold())


IntensityUnit = Annotated[Name, AfterValidator(parse_unit)]
