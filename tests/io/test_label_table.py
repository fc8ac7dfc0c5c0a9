from __future__ import annotations

import time

import nibabel
import numpy as np
import pytest

from volseg.io.label_table import parse_label_table, read_label_table


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('<Label Key="2" Red="1"><![CDATA[left kidney]]></Label>', {2: "left kidney"}),
        ("<Label Red='1' Key='7'>cyst &amp; stone</Label>", {7: "cyst & stone"}),
        ('<Label\n Key="3">\n <![CDATA[ spaced ]]>\n</Label>', {3: "spaced"}),
        (
            '<Label Key="1"><![CDATA[a </Label> b]]></Label><Label Key="2">c</Label>',
            {1: "a </Label> b", 2: "c"},
        ),
        ('<LabelTable Key="1"><Label Key="2">a</Label></LabelTable>', {2: "a"}),
        ('<Label Red="1">none</Label><Label Key="2">a</Label>', {2: "a"}),
        ('<Label Key="0">background</Label><Label Key="4"> </Label>', {}),
        ('<Label Key="-1">a</Label><Label Key="1.5">b</Label>', {}),
        ('<Label Key="1">first</Label><Label Key="1">last</Label>', {1: "last"}),
        ('<Label Key="1">a', {}),
        ('<Label Key="1"><![CDATA[a</Label>', {}),
        ("<Label", {}),
        ("<Label>", {}),
        ("", {}),
        ('<Label Key="' + "9" * 5000 + '">a</Label><Label Key="5">b</Label>', {5: "b"}),
        ('<Label Key="1">&#' + "9" * 5000 + ";</Label>", {1: "&#" + "9" * 5000 + ";"}),
    ],
)
def test_names_are_read_from_the_elements(text, names):
    assert parse_label_table(text) == names


ATTACKS = (
    "<Label ",
    "<Label>",
    '<Label Key="1">',
    '<Label Key="1" ',
    '<Label Key="1"><![CDATA[',
    "<Label Key=",
    'Key="1',
    '<Label Key="1"></Labe',
    '<Label Key="1">a</Label>',
    '<Label Key="1"> ',
    "<Label\n",
    "<![CDATA[",
    "]]>",
    "</Label>",
    "&#x",
    "&",
    '<Label Key="12345678901',
    " ",
    "\x00",
)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    "before", ["", '<Label Key="1">', '<Label Key="1"><![CDATA[', "<Label Key"]
)
@pytest.mark.parametrize("after", ["", "</Label>", ">"])
def test_a_megabyte_of_anything_is_read_within_half_a_second(attack, before, after):
    text = before + attack * (2**20 // len(attack)) + after
    start = time.process_time()
    parse_label_table(text)
    assert time.process_time() - start < 0.5


def test_a_mask_with_a_hostile_table_is_read_within_half_a_second(tmp_path):
    image = nibabel.nifti1.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    table = '<Label Key="3">liver</Label>' + "<Label " * 12_000  # 84 kB, took 80 seconds before
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, table.encode()))
    nibabel.nifti1.save(image, tmp_path / "mask.nii.gz")
    start = time.process_time()
    assert read_label_table(tmp_path / "mask.nii.gz") == {3: "liver"}
    assert time.process_time() - start < 0.5
