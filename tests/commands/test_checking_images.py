"""`volseg check` of images names planted duplicates, leaks, blanks and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

import volseg
from volseg.cli import app


def speckle(seed: int, size: int = 80) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 2)
    return np.clip(128 + 250 * noise, 9, 255).astype(np.uint8)


@pytest.fixture
def images(tmp_path) -> Path:
    """Return a data set without a problem: two splits of two classes, four images each."""
    seed = 0
    for split in ("train", "test"):
        for name in ("benign", "malignant"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                path = tmp_path / split / name / f"{split}_{name}_{number}.png"
                Image.fromarray(speckle(seed)).save(path)
                seed += 1
    return tmp_path


def findings(dataset: Path) -> list[tuple[str, str]]:
    problems = volseg.check(dataset)
    assert all(problem["fix"] or problem["code"][0] in "WN" for problem in problems)
    assert not any("\n" in problem["problem"] for problem in problems)
    return [(p["code"], p["where"]) for p in problems if p["code"] != "N_FOLDERS"]


def test_a_good_data_set_of_images_has_no_problem(images):
    assert findings(images) == []
    result = CliRunner().invoke(app, ["check", str(images)])
    assert result.exit_code == 0
    image = images / "train" / "benign" / "train_benign_0.png"
    assert volseg.check(image) == []
    image.write_bytes(image.read_bytes()[:200])
    assert [problem["code"] for problem in volseg.check(image)] == ["E_DAMAGED"]


def reencoded(picture: Image.Image, path: Path) -> None:
    picture.save(path.with_suffix(".jpg"), quality=50)


def halved(picture: Image.Image, path: Path) -> None:
    picture.resize((40, 40)).save(path)


COPIES = {
    "exact": (lambda picture, path: picture.save(path), "have the same pixels"),
    "other file format": (
        lambda picture, path: picture.save(path.with_suffix(".bmp")),
        "have the same pixels",
    ),
    "re-encoded": (reencoded, "are nearly equal"),
    "resized": (halved, "are nearly equal"),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(
    ("home", "code", "fields"),
    [
        ("test/benign", "W_LEAK", "'train_benign_1' (train) and 'copy' (test)"),
        ("train/malignant", "W_DUPLICATE", "'train_benign_1' (benign) and 'copy' (malignant)"),
        ("train/benign", None, ""),
    ],
)
def test_a_planted_copy_is_named_if_it_is_in_another_split_or_class(
    images, copy, home, code, fields
):
    save, words = COPIES[copy]
    with Image.open(images / "train/benign/train_benign_1.png") as picture:
        save(picture, images / home / "copy.png")
    problems = {problem["code"]: problem for problem in volseg.check(images)}
    expected = {code, "N_SIMILAR", *(["N_SIZES"] if copy == "resized" else [])} - {None}
    assert problems.keys() - {"N_FOLDERS"} == expected
    assert (
        "1 group of equal or nearly equal images hold 2 of 17 images"
        in (problems["N_SIMILAR"]["problem"])
    )
    if code is not None:
        assert words in problems[code]["problem"]
        pair = [fields, " and ".join(reversed(fields.split(" and ")))]
        assert any(text in problems[code]["problem"] for text in pair)


def test_copies_of_a_copy_are_one_finding(images):
    with Image.open(images / "train/benign/train_benign_1.png") as picture:
        for home in ("test/benign/1.png", "test/malignant/2.png", "train/malignant/3.png"):
            picture.save(images / home)
    problems = volseg.check(images)
    codes = [problem["code"] for problem in problems]
    assert codes.count("W_LEAK") == codes.count("W_DUPLICATE") == 1
    assert "4 such images in all" in problems[codes.index("W_LEAK")]["problem"]


def test_blank_damaged_and_unlike_images_are_named_and_the_others_still_checked(images):
    Image.fromarray(np.full((80, 80), 7, np.uint8)).save(images / "train/benign/blank.png")
    Image.fromarray(np.full((80, 80), 7, np.uint8)).save(images / "test/benign/blank2.png")
    content = (images / "train/benign/train_benign_0.png").read_bytes()
    (images / "train/benign/corrupt.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(speckle(1)).save(images / "test/malignant/copy.png")
    colour = np.stack([speckle(90, 64), speckle(91, 64), speckle(92, 64)], axis=-1)
    Image.fromarray(colour).save(images / "test/malignant/colour.png")
    places = findings(images)
    assert {("E_DAMAGED", "corrupt"), ("W_BLANK", "blank"), ("W_BLANK", "blank2")} <= {*places}
    assert sorted(code for code, _ in places) == [
        *("E_DAMAGED", "N_SIMILAR", "N_SIZES"),
        *("W_BLANK", "W_BLANK", "W_CHANNELS", "W_DUPLICATE", "W_LEAK"),
    ]
    assert CliRunner().invoke(app, ["check", str(images)]).exit_code == 2


def test_a_class_of_one_split_only_is_named(images):
    for path in (images / "test" / "malignant").iterdir():
        path.unlink()
    assert findings(images) == [("W_CLASS_SPLIT", str(images))]


def test_many_blank_images_are_one_finding(images):
    for number in range(40):
        picture = Image.fromarray(np.full((80, 80), number, np.uint8))
        picture.save(images / "train" / "benign" / f"blank_{number}.png")
    assert findings(images) == [("W_BLANK", str(images))]


def test_the_case_of_letters_makes_no_class_of_its_own(images):
    """Training reads Benign as benign."""
    (images / "test" / "benign").rename(images / "test" / "Benign")
    assert findings(images) == []
    content = (images / "train" / "benign" / "train_benign_0.png").read_bytes()
    (images / "test" / "Benign" / "copy.png").write_bytes(content)
    assert [code for code, _ in findings(images)] == ["W_LEAK", "N_SIMILAR"]


def test_empty_cells_and_a_patient_in_two_splits_are_named_with_their_line(tmp_path):
    rows = []
    for number in range(8):
        Image.fromarray(speckle(number)).save(tmp_path / f"{number}.png")
        split = "train" if number < 5 else "test"
        rows.append(f"{number}.png,P{number},{split},{('a', 'b')[number % 2]}")
    rows[3] = "3.png,P3,train,"
    rows[7] = "7.png,P0,test,b"
    table = tmp_path / "cases.csv"
    table.write_text("\n".join(["image,patient,split,class", *rows]))
    for dataset in (tmp_path, table):
        problems = volseg.check(dataset)
        assert [problem["code"] for problem in problems] == ["E_DATASET", "W_NO_TARGET"]
        assert "line 9: patient 'P0' is in split 'test'" in problems[0]["problem"]
        assert problems[1]["problem"] == "cases.csv line 5: the cell of 'class' is empty"


def test_neighbouring_slices_of_a_patient_may_differ_in_class(tmp_path):
    lines = ["image,patient,class"]
    for number in range(6):
        name = f"{number}.png"
        Image.fromarray(speckle(0) - np.uint8(number)).save(tmp_path / name)
        lines.append(f"{name},P1,{('a', 'b')[number // 5]}")
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    assert [code for code, _ in findings(tmp_path)] == ["N_SIMILAR"]
    (tmp_path / "cases.csv").write_text("\n".join(lines).replace("5.png,P1", "5.png,P2"))
    assert [code for code, _ in findings(tmp_path)] == ["W_DUPLICATE", "N_SIMILAR"]
