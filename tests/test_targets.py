"""What a column of a table is, what its cells mean, and how a recipe of images is closed."""

from __future__ import annotations

import pytest

from volseg.errors import VolsegError
from volseg.io.targets import TargetCells, count_classes, value_of
from volseg.planning.images import ImageFingerprint, SeenImages, close_images
from volseg.recipe.classification import ClassifyRecipe, Target


def cells(*texts):
    return TargetCells("t", {str(n): text for n, text in enumerate(texts)})


@pytest.mark.parametrize(
    ("texts", "kind", "names"),
    [
        (["b", "a", "", "B"], "classes", ("a", "b")),
        (["10", "9", "10.0"], "classes", ("9", "10")),
        (["0.5", "1", "2"], "number", ()),
        ([str(n) for n in range(30)], "number", ()),
        (["x|y", "y", "x | z"], "labels", ("x", "y", "z")),
        (["61.5", "nan", "58.5", "unknown", "70.5"], "number", ()),
        (["0", "1", "nan", "N/A", "1"], "classes", ("0", "1")),
        ([str(n // 2) for n in range(40)], "classes", tuple(map(str, range(20)))),
    ],
)
def test_the_cells_say_what_a_column_is(texts, kind, names):
    described = cells(*texts).describe(Target(target="t"))
    assert (described.kind, described.names) == (kind, names)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["", " "], "is blank"),
        (["007", "7"], "holds only '7'"),
        (["nan", "nan"], "is blank"),
        ([f"note {n}" for n in range(150)], "150 different texts"),
    ],
)
def test_a_column_that_is_no_target_is_refused(texts, problem):
    with pytest.raises(VolsegError, match=problem):
        cells(*texts).describe(Target(target="t"))


def test_ranges_of_numbers_are_classes_without_a_kind():
    column = cells("1.5", "9.25", "30.5")
    described = column.describe(Target(target="t", classes={"low": (0, 10), "high": (25, 100)}))
    assert (described.kind, described.names) == ("classes", ("low", "high"))
    assert column.values(described) == ({"0": 0, "1": 0, "2": 1}, [])


@pytest.mark.parametrize("text", ["1e31", "-1e300", "1e400"])
def test_a_number_that_float32_cannot_learn_is_a_mistake_of_its_cell(text):
    column = cells("1.5", text, "3.5")
    values, mistakes = column.values(column.describe(Target(target="t")))
    assert values == {"0": 1.5, "2": 3.5} and len(mistakes) == 1 and repr(text) in mistakes[0]


def test_a_recipe_decides_kind_order_and_ranges():
    stated = Target(target="t", kind="classes", classes=("malignant", "benign"))
    assert value_of("BENIGN", stated) == 1 and value_of(" ", stated) is None
    with pytest.raises(ValueError, match="'normal' is not one of the classes malignant, benign"):
        value_of("normal", stated)
    ranges = Target(target="t", kind="classes", classes={"low": (1, 2), "high": (4, 5)})
    assert [value_of(text, ranges) for text in ("1", "3", "4.5")] == [0, None, 1]
    with pytest.raises(ValueError, match="'5,5' is not a number: write a decimal point"):
        value_of("5,5", Target(target="t", kind="number"))
    labels = Target(target="t", kind="labels", classes=("a", "b", "c"))
    assert value_of("c|a", labels) == (0, 2)
    assert count_classes([(0, 2), (0,)], labels) == {"a": 2, "b": 0, "c": 1}


def test_an_unknown_value_is_a_mistake_and_no_class():
    for texts in (("0", "1", "nan", "1"), ("61.5", "58.5", "nan", "70.5"), ("a", "b", "NaN", "a")):
        described = cells(*texts).describe(Target(target="t"))
        values, (mistake,) = cells(*texts).values(described)
        assert mistake.startswith("2: column t: ")
        assert mistake.endswith(": leave the cell empty where the value is unknown")
        assert sorted(values) == ["0", "1", "3"]


def test_a_class_whose_name_holds_the_separator_of_labels_is_refused():
    with pytest.raises(
        VolsegError, match=r"holds the class 'a\|b', and \| separates several labels"
    ):
        cells("a|b", "c", "c").describe(Target(target="t", kind="classes"))
    with pytest.raises(ValueError, match=r"contains '\|', which separates labels"):
        Target(target="t", kind="classes", classes=("a|b", "c"))
    labels = Target(target="t", kind="labels", classes=("a", "b"))
    assert value_of("|", labels) == () and value_of("", labels) is None


def test_a_number_that_never_differs_is_refused():
    with pytest.raises(VolsegError, match="holds only '5'; to fix: add images with other numbers"):
        cells("5", "5", "5").describe(Target(target="t", kind="number"))


def test_mistakes_name_the_case_and_the_column():
    described = Target(target="t", kind="classes", classes=("a", "b"))
    values, mistakes = cells("a", "x", "").values(described)
    assert values == {"0": 0, "2": None}
    assert mistakes == ["1: column t: 'x' is not one of the classes a, b"]


def fingerprint(**facts):
    usual = {
        "n_images": 1000,
        "n_patients": 1000,
        "n_validation": 200,
        "sizes": ((50, 80), (60, 100), (64, 64)),
        "channels": 1,
        "kind": "classes",
        "counts": {"a": 800, "b": 200},
        "low": 3.0,
        "high": 250.0,
    }
    return ImageFingerprint.model_validate(usual | facts)


def open_recipe(**sections):
    content = {
        "task": "classify",
        "name": "r",
        "description": "",
        "data": {"target": "t"},
        "images": {"normalise": {"method": "window"}},
        "network": {"name": "cnn_small", "features": "auto"},
    }
    return ClassifyRecipe.model_validate(content | sections)


@pytest.mark.parametrize("seen", [None, SeenImages()])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"kind": "number", "counts": {}, "mean": 60.0, "sd": 9.0},
        {"kind": "labels", "channels": 3, "n_images": 20},
    ],
)
def test_a_plan_closes_every_key_with_a_reason(facts, seen):
    recipe = open_recipe()
    closed = close_images(recipe, fingerprint(**facts), seen=seen)
    assert closed.recipe.open_keys == []
    not_of_this_target = (
        {"data.classes"} if closed.recipe.data.kind == "number" else {*("data.mean", "data.sd")}
    )
    expected = [key for key in recipe.open_keys if key not in not_of_this_target]
    assert [line.key for line in closed.reasons] == expected
    assert all(line.reason for line in closed.reasons)


def test_the_plan_follows_the_images():
    closed = close_images(open_recipe(), fingerprint()).recipe
    assert closed.images.pixels == 80 and closed.images.channels == 1
    assert closed.train.balance == "weights" and closed.train.monitor == "auc"
    assert closed.images.normalise.low == 3.0
    small = close_images(open_recipe(), fingerprint(n_images=20, sizes=((28, 28),))).recipe
    assert small.images.pixels == 28 and small.train.batch_size < 32
    facts = fingerprint(sizes=((28, 28),))
    assert close_images(open_recipe(), facts, seen=SeenImages()).recipe.images.pixels == 56
    assert close_images(open_recipe(), facts, seen=SeenImages(None, 40)).recipe.images.pixels == 40
    fixed = open_recipe(images={"pixels": 28})
    assert close_images(fixed, facts, seen=SeenImages()).recipe.images.pixels == 28
    stated = open_recipe(train={"batch_size": 10})
    assert close_images(stated, fingerprint()).recipe.train.steps_per_epoch == 100
