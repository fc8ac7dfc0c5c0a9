"""The page of classified images says of how many the model is not sure."""

from __future__ import annotations

import re

import pytest

from volseg.evaluation.class_rows import ClassRow
from volseg.pages.about import About
from volseg.pages.class_page import class_page

P = {"a": 0.7, "b": 0.3}


def n_unsure(pairs):
    """Return the number on the page, for rows of (class_name, confidence_set)."""
    rows = [
        ClassRow(case_id=str(n), class_name=name, confidence_set=left_open, probabilities=P)
        for n, (name, left_open) in enumerate(pairs)
    ]
    page = class_page(About.now("infer"), rows, target="t", coverage=0.9, pictures={})
    numbers = re.findall(r"of (\d+) it is not sure", page.sentence)
    return int(numbers[0]) if numbers else 0


@pytest.mark.parametrize(
    ("pairs", "n"),
    [
        ([("a", "a"), ("b", "a|b"), ("a", "a|b")], 2),
        ([("a", None), ("b", None)], 0),  # no sets are stated
        ([("a|b", "a|b"), ("a", "a"), ("", "")], 0),  # several labels, all of them sure
        ([("a|b", "a"), ("", "b"), ("a", "a"), (None, None)], 2),
    ],
)
def test_an_image_is_unsure_if_its_set_is_not_what_is_predicted(pairs, n):
    assert n_unsure(pairs) == n
