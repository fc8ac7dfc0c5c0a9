"""Scans with lesions for tests of what is measured."""

from __future__ import annotations

from volseg.measurement.scan import SegmentedScan
from volseg.measurement.units import Unit


def segmented(image, lesions, *, unit="HU", doubt="", **options):
    """Return a scan with its lesions, in HU unless said otherwise."""
    options = {"case_id": "scan", "label_names": {}} | options
    return SegmentedScan(image=image, lesions=lesions, unit=Unit(name=unit, doubt=doubt), **options)
