"""`volseg evaluate` for classes and numbers: from tables to metrics, figures and a page."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, roc_auc_score
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.commands.judgement import Judgement
from volseg.errors import VolsegError
from volseg.evaluation.calibration import apply_temperature
from volseg.evaluation.class_rows import BaselineRow, ClassRow, ValueRow, class_columns, joined
from volseg.evaluation.classes import ClassPredictions
from volseg.evaluation.operating import OperatingPoint
from volseg.pages.classification_figures import roc_png
from volseg.store.tables import class_table, read_class_rows, table

NAMES = ["benign", "malignant", "no lesion"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        content(file)


def write_cases(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def class_rows(seed, n=60, *, skill=1.5, model="net"):
    """Return true class indices and the rows of a classifier for them."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % 3
    logits = np.random.default_rng(seed + 1).normal(size=(n, 3))
    logits[np.arange(n), targets] += skill
    p = apply_temperature(logits, 1).round(6)
    rows = [
        ClassRow(
            case_id=f"case {number}",
            class_name=NAMES[int(line.argmax())],
            class_probability=float(line.max()),
            confidence_set=joined([name for name, value in zip(NAMES, line) if value > 0.2]),
            out_of_distribution=bool(rng.random() < 0.1),
            model=model,
            probabilities=dict(zip(NAMES, line.tolist())),
        )
        for number, line in enumerate(p)
    ]
    return targets, p, rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reference with classes, patients, sex and age, and results of two models; no figures."""
    monkeypatch.setattr(Judgement, "pictures", lambda judgement: {})  # they take seconds
    return make_tables(tmp_path)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The same, judged."""
    folder = make_tables(tmp_path_factory.mktemp("judged"))
    return folder, judge(folder)


def make_tables(tmp_path):
    targets, _, rows = class_rows(0)
    cases = [
        {
            "image": f"images/case {number}.png",
            "patient": f"p{number // 2}",
            "split": "test",
            "diagnosis": NAMES[target],
            "sex": "fm"[number % 2],
            "age": number + 20,
        }
        for number, target in enumerate(targets)
    ]
    write_cases(tmp_path / "data" / "cases.csv", cases)
    write(tmp_path / "one" / "classes.csv", class_table(NAMES, rows))
    weaker = class_rows(0, skill=0.3, model="weak")[2]
    write(tmp_path / "two" / "classes.csv", class_table(NAMES, weaker))
    return tmp_path


def judge(folder, **options):
    given = {"reference": folder / "data", "predicted": folder / "one", "out": folder / "out"}
    return volseg.evaluate(**given | options)


def by_case(folder):
    with (folder / "out" / "evaluation.csv").open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def test_metrics_are_those_of_the_tables(judged):
    folder, report = judged
    targets, p, _ = class_rows(0)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    expected = roc_auc_score(targets, p / p.sum(axis=1, keepdims=True), multi_class="ovr")
    auc = summary["metrics"]["macro"]["auc"]
    assert auc["value"] == pytest.approx(expected, abs=1e-6)
    assert auc["value_95"][0] < auc["value"] < auc["value_95"][1]
    accuracy = balanced_accuracy_score(targets, p.argmax(axis=1))
    assert summary["metrics"]["overall"]["balanced_accuracy"]["value"] == pytest.approx(accuracy)
    assert (summary["n_cases"], summary["n_patients"]) == (60, 30)
    assert summary["target"] == "diagnosis"  # the only column whose cells are the classes
    assert np.sum(summary["confusion"]) == 60
    assert summary["confidence_sets"]["n"] == 60
    assert summary["out_of_distribution"]["n"] == 60
    assert report.exit_code == 0 and report.summary == summary
    assert f"AUC {expected:.3f}" in report.headline
    metrics = volseg.read_table(folder / "out" / "metrics.csv")
    shown = metrics[(metrics.metric == "auc") & (metrics.average == "macro")]
    assert shown.value.tolist() == pytest.approx([expected], abs=1e-5)


def test_every_case_has_a_row_that_says_what_was_right(judged):
    folder, _ = judged
    targets, p, rows = class_rows(0)
    table_rows = by_case(folder)
    assert len(table_rows) == 60
    for row, target, line in zip(rows, targets, p):
        cells = table_rows[row.case_id]
        assert cells["reference"] == NAMES[target] and cells["predicted"] == row.class_name
        assert (cells["is_right"] == "true") == (row.class_name == NAMES[target])
        assert float(cells["reference_probability"]) == pytest.approx(line[target], abs=1e-6)
        assert (cells["is_covered"] == "true") == (line[target] > 0.2)
    typed = volseg.read_table(folder / "out" / "evaluation.csv")
    assert typed["is_right"].dtype == "boolean"
    assert typed["reference_probability"].dtype == "float64"


def test_figures_and_page_are_written_and_the_page_loads_nothing(judged):
    folder, _ = judged
    out = folder / "out"
    for name in ("roc", "precision_recall", "calibration", "confusion", "decision"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "volseg evaluated the classes that net predicted for 60 cases of 30 patients" in page
    assert page.count("data:image/png;base64,") == 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:' in page and "default-src &#39;none&#39;" in page


def test_failed_cases_are_rows_and_come_first_on_the_page(folder):
    _, _, rows = class_rows(0)
    failed = ClassRow(case_id="case 3", status="failed", error="E_READ: the file is cut off")
    incomplete = ClassRow(case_id="case 5", probabilities={"benign": 1.0})
    kept = [row for row in rows if row.case_id not in ("case 3", "case 5")]
    write(folder / "one" / "classes.csv", class_table(NAMES, [failed, incomplete, *kept]))
    report = judge(folder)
    assert report.exit_code == 3
    reasons = {"case 3": "E_READ: the file is cut off", "case 5": "E_ROW: has 1 of 3 probabilities"}
    assert report.failed == reasons
    cells = by_case(folder)["case 3"]
    assert (cells["status"], cells["reason"]) == ("failed", reasons["case 3"])
    assert report.summary["n_cases"] == 58
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("the file is cut off") < page.index('aria-labelledby="metrics-title"')


def test_subgroups_and_a_second_model(folder):
    summary = judge(folder, by=("sex", "age"), against=folder / "two").summary
    assert set(summary["subgroups"]["sex"]) == {"f", "m"}
    assert [*summary["subgroups"]["age"]] == ["up to 39", "over 39 to 59", "over 59"]
    targets, p, _ = class_rows(0)
    women = np.arange(60) % 2 == 0
    expected = balanced_accuracy_score(targets[women], p[women].argmax(axis=1))
    of_women = summary["subgroups"]["sex"]["f"]["overall"]["balanced_accuracy"]
    assert of_women["value"] == pytest.approx(expected) and of_women["n"] == 30
    difference = summary["difference"]["net − weak"]["macro"]["auc"]
    weak = class_rows(0, skill=0.3)[1]
    aucs = [
        roc_auc_score(targets, part / part.sum(axis=1, keepdims=True), multi_class="ovr")
        for part in (p, weak)
    ]
    assert difference["value"] == pytest.approx(aucs[0] - aucs[1], abs=1e-6)
    assert difference["value_95"][0] > 0 and difference["p_value"] < 0.05


def test_the_target_that_the_results_state_is_used(folder):
    file = folder / "data" / "cases.csv"
    lines = file.read_text(encoding="utf-8").splitlines()
    second = [lines[0].replace("diagnosis", "first reader") + ",second reader"]
    second += [f"{line},{line.split(',')[3]}" for line in lines[1:]]
    file.write_text("\n".join(second), encoding="utf-8")
    with pytest.raises(VolsegError, match="first reader, second reader all fit"):
        judge(folder)
    (folder / "one" / "run.json").write_text(json.dumps({"target": "second reader"}))
    assert judge(folder).summary["target"] == "second reader"
    assert judge(folder, target="first reader").summary["target"] == "first reader"


def test_the_order_of_classes_and_rows_of_the_second_model_does_not_matter(folder):
    for name in ("one", "two"):  # fewer cases: only the pairing is tested
        names, rows = read_class_rows(folder / name / "classes.csv")
        write(folder / name / "classes.csv", class_table(names, rows[:24]))
    expected = judge(folder, against=folder / "two").summary["difference"]
    names, rows = read_class_rows(folder / "two" / "classes.csv")
    write(folder / "two" / "classes.csv", class_table(names[::-1], rows[::-1]))
    assert judge(folder, against=folder / "two").summary["difference"] == expected


def test_operating_points_of_the_model_are_judged(folder):
    point = OperatingPoint("youden", "malignant", 0.4, 0.9, 0.9)
    content = json.dumps({"operating_points": [asdict(point)]})
    (folder / "one" / "run.json").write_text(content)
    of_class = judge(folder).summary["metrics_by_class"]["malignant"]
    targets, p, _ = class_rows(0)
    called = p[:, 1] >= 0.4
    expected = called[targets == 1].mean()
    assert of_class["sensitivity at youden"]["value"] == pytest.approx(expected)
    assert of_class["specificity at youden"]["value"] == pytest.approx(
        (~called[targets != 1]).mean()
    )


def test_rates_at_an_operating_point_have_intervals(folder):
    point = OperatingPoint("youden", "malignant", 0.4, 0.9, 0.9)
    elsewhere = OperatingPoint("youden", "of another model", 0.4, 0.9, 0.9)
    content = {"operating_points": [asdict(point), asdict(elsewhere)]}
    (folder / "one" / "run.json").write_text(json.dumps(content))
    of_class = judge(folder).summary["metrics_by_class"]["malignant"]
    targets, p, _ = class_rows(0)
    called = p[:, 1] >= 0.4
    for kind, expected in (
        ("precision", (targets[called] == 1).mean()),
        ("accuracy", (called == (targets == 1)).mean()),
    ):
        entry = of_class[f"{kind} at youden"]
        assert entry["value"] == pytest.approx(expected)
        assert entry["value_95"][0] < expected < entry["value_95"][1]


def test_several_labels_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Judgement, "pictures", lambda judgement: {})
    rng = np.random.default_rng(0)
    truth = rng.random((40, 3)) < 0.4
    truth[:, 0] |= ~truth.any(axis=1)
    p = np.clip(0.6 * truth + 0.4 * rng.random((40, 3)), 0, 1)
    cases = [
        {"subject": f"c{n}", "findings": "|".join(np.array(NAMES)[row])}
        for n, row in enumerate(truth)
    ]
    write_cases(tmp_path / "data" / "cases.csv", cases)
    rows = [
        ClassRow(case_id=f"c{n}", probabilities=dict(zip(NAMES, line.tolist())))
        for n, line in enumerate(p)
    ]
    write(tmp_path / "one" / "classes.csv", class_table(NAMES, rows))
    summary = judge(tmp_path).summary
    assert summary["confusion"] is None and summary["target"] == "findings"
    assert summary["confidence_sets"] is None  # none is stated
    stated = [
        replace(row, confidence_set=joined([NAMES[k] for k in np.flatnonzero(line > 0.9)]))
        for row, line in zip(rows, p)
    ]
    write(tmp_path / "one" / "classes.csv", class_table(NAMES, stated))
    sets = judge(tmp_path, out=tmp_path / "sets").summary["confidence_sets"]
    assert sets["coverage"] == pytest.approx((p > 0.9)[truth].mean())
    assert any(not row.confidence_set for row in stated)  # an empty set is one, not unknown
    assert sets["n"] == 40
    expected = (truth == (p >= 0.5)).all(axis=1).mean()
    assert summary["metrics"]["overall"]["accuracy"]["value"] == pytest.approx(expected)
    assert by_case(tmp_path)["c0"]["reference"] == cases[0]["findings"]


def state(folder, **data):
    """Write the run.json of results, which describes what the model predicts."""
    content = {"target": data["target"], "data": data}
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_truth_is_read_as_training_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Judgement, "pictures", lambda judgement: {})
    numbers = ["3", "61", "40.5", "99"]
    write_cases(
        tmp_path / "data" / "cases.csv",
        [
            {"subject": f"c{n}", "grade": text, "size": numbers[n], "findings": labels}
            for n, (text, labels) in enumerate(
                zip(["LOW", "High ", "high", ""], ["a|b", "|", "A", ""])
            )
        ],
    )
    rows = [
        ClassRow(case_id=f"c{n}", probabilities={"low": 0.9 - 0.2 * n, "high": 0.1 + 0.2 * n})
        for n in range(4)
    ]
    write(tmp_path / "one" / "classes.csv", class_table(("low", "high"), rows))
    state(tmp_path / "one", target="grade", kind="classes", classes=["low", "high"])
    assert judge(tmp_path).summary["left_out"] == {"c3": "the cell of the truth is empty"}
    assert [row["reference"] for row in by_case(tmp_path).values()] == ["low", "high", "high"]

    ranges = {"low": [0, 50], "high": [55, 70]}
    state(tmp_path / "one", target="size", kind="classes", classes=ranges)
    left_out = judge(tmp_path).summary["left_out"]
    assert left_out == {"c3": "the truth lies outside the ranges of all classes"}
    assert [row["reference"] for row in by_case(tmp_path).values()] == ["low", "high", "low"]

    labels = [ClassRow(case_id=f"c{n}", probabilities={"a": 0.5, "b": 0.2 * n}) for n in range(4)]
    write(tmp_path / "one" / "classes.csv", class_table(("a", "b"), labels))
    state(tmp_path / "one", target="findings", kind="labels", classes=["a", "b"])
    assert judge(tmp_path).summary["left_out"] == {"c3": "the cell of the truth is empty"}
    assert [row["reference"] for row in by_case(tmp_path).values()] == ["a|b", "", "a"]


def test_numbers(tmp_path):
    rng = np.random.default_rng(0)
    ages = rng.uniform(60, 90, 50).round(1)
    predicted = ages + rng.normal(0, 4, 50)
    cases = [
        {"image": f"{n}.png", "patient": f"p{n}", "age": age, "sex": "fm"[n % 2]}
        for n, age in enumerate(ages)
    ]
    cases[7]["age"] = ""
    write_cases(tmp_path / "data" / "cases.csv", cases)
    rows = [
        ValueRow(case_id=str(n), value=value, value_low=value - 8, value_high=value + 8)
        for n, value in enumerate(predicted.tolist())
    ]
    write(tmp_path / "one" / "values.csv", table(ValueRow, rows))
    report = judge(tmp_path, target="age", by="sex")
    kept = np.arange(50) != 7
    overall = report.summary["metrics"]["overall"]
    error = mean_absolute_error(ages[kept], predicted[kept])
    assert overall["mae"]["value"] == pytest.approx(error, abs=1e-3)
    assert overall["mae"]["value_95"][0] < error < overall["mae"]["value_95"][1]
    inside = np.abs(ages - predicted)[kept] <= 8
    assert report.summary["intervals"]["coverage"] == pytest.approx(inside.mean())
    assert report.summary["agreement"]["n"] == 49
    assert report.summary["left_out"] == {"7": "the cell of the truth is empty"}
    assert any("W_LEFT_OUT: 1 case" in text for text in report.warnings)
    assert f"MAE {error:.3f}" in report.headline
    assert (tmp_path / "out" / "agreement.png").is_file()
    assert not (tmp_path / "out" / "roc.png").exists()
    assert "volseg evaluated the numbers" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_folder_per_class_and_a_medmnist_file_are_references(tmp_path, monkeypatch):
    monkeypatch.setattr(Judgement, "pictures", lambda judgement: {})
    targets, p, _ = class_rows(0, n=24)
    pixels = np.zeros((24, 8, 8), np.uint8)
    for number, target in enumerate(targets):
        folder = tmp_path / "folders" / "test" / NAMES[target]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / f"n{number}.png")
    labels = targets[:, None].astype(np.uint8)
    np.savez(tmp_path / "medmnist.npz", test_images=pixels, test_labels=labels)
    expected = balanced_accuracy_score(targets, p.argmax(axis=1))
    for reference, prefix, names in (
        ("folders", "n", NAMES),
        ("medmnist.npz", "test_", ["0", "1", "2"]),
    ):
        rows = [
            ClassRow(case_id=f"{prefix}{n}", probabilities=dict(zip(names, line.tolist())))
            for n, line in enumerate(p)
        ]
        write(tmp_path / reference[:4] / "classes.csv", class_table(names, rows))
        # The model may have learned a column of another name.
        state(tmp_path / reference[:4], target="diagnosis", kind="classes", classes=list(names))
        given = {"reference": tmp_path / reference, "predicted": tmp_path / reference[:4]}
        summary = judge(tmp_path, **given).summary
        assert summary["n_cases"] == 24 and not summary["not_predicted"]
        accuracy = summary["metrics"]["overall"]["balanced_accuracy"]["value"]
        assert accuracy == pytest.approx(expected)


def test_what_puts_the_numbers_in_doubt_is_a_warning(folder):
    file = folder / "data" / "cases.csv"
    text = file.read_text(encoding="utf-8")
    lines = text.replace("test", "train", 2).replace("benign", "cyst", 1).splitlines()
    lines[3] = lines[3].replace("p1", "", 1)
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(VolsegError, match="no column fits"):
        judge(folder)
    report = judge(folder, target="diagnosis")
    codes = [text.partition(":")[0] for text in report.warnings]
    assert codes == ["W_LEFT_OUT", "W_TRAINING", "W_PATIENT"]
    assert "'cyst' is not one of the classes benign" in report.warnings[0]
    assert report.summary["n_cases"] == 59


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target": "grade"}, "has no column 'grade'"),
        ({"by": "site"}, "has no column 'site'"),
        ({"min_iou": 0.5}, "--min-iou is for masks"),
        ({"target": "sex"}, "no case can be judged by column 'sex'"),
        ({"target": "patient"}, "'p0' is not one of the classes benign"),
    ],
)
def test_a_request_that_cannot_be_met_names_the_problem(folder, options, problem):
    with pytest.raises(VolsegError, match=problem):
        judge(folder, **options)
    assert not (folder / "out" / "summary.json").exists()


def test_cases_of_one_table_only_are_counted(folder):
    """An interrupted infer has predicted a part, which need not be like the rest."""
    file = folder / "one" / "classes.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-20]), encoding="utf-8")
    cases = folder / "data" / "cases.csv"
    text = cases.read_text(encoding="utf-8").splitlines(keepends=True)
    text[1] = text[1].replace("case 0", "case 0b")
    cases.write_text("".join(text), encoding="utf-8")
    warnings = {text.partition(":")[0]: text for text in judge(folder).warnings}
    assert "21 of 60 cases with a truth were not predicted" in warnings["W_NOT_PREDICTED"]
    assert "1 of 40 predicted cases are not in the reference (case 0)" in warnings["W_NO_TRUTH"]
    for number in (1, *range(41, 61)):  # those that were not predicted are of another split
        text[number] = text[number].replace(",test,", ",val,")
    cases.write_text("".join(text), encoding="utf-8")
    assert [text.partition(":")[0] for text in judge(folder).warnings] == ["W_NO_TRUTH"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("probability_benign", "p_benign", "has no column 'probability_benign'"),
        ("\ncase 1,", "\ncase 0,", "names case 'case 0' twice"),
        ("case_id", "id", "has no column 'case_id'"),
    ],
)
def test_a_table_of_predictions_that_was_changed_is_refused(old, new, problem, folder):
    file = folder / "one" / "classes.csv"
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(VolsegError, match=problem):
        judge(folder, target="diagnosis")


@pytest.mark.parametrize("cell", ["nan", "1.5", "-0.1", ""])
def test_a_case_without_probabilities_is_a_failed_row(cell, folder):
    file = folder / "one" / "classes.csv"
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    rows[3]["probability_benign"] = cell
    write_cases(file, rows)
    report = judge(folder)
    assert list(report.failed) == ["case 3"] and report.failed["case 3"].startswith("E_ROW")
    assert report.summary["n_cases"] == 59


@pytest.mark.parametrize("cell", ["nan", "1e300", "-inf", ""])
def test_a_case_without_a_number_is_a_failed_row(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(Judgement, "pictures", lambda judgement: {})
    truths = [{"image": f"{n}.png", "age": n} for n in range(8)]
    write_cases(tmp_path / "data" / "cases.csv", truths)
    rows = [ValueRow(case_id=str(n), value=n + 0.5) for n in range(8)]
    write(tmp_path / "one" / "values.csv", table(ValueRow, rows))
    file = tmp_path / "one" / "values.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("3.5", cell), encoding="utf-8")
    report = judge(tmp_path, target="age")
    assert list(report.failed) == ["3"] and report.summary["n_cases"] == 7


def test_tables_that_name_cases_differently_are_shown_a_name_of_each(folder):
    file = folder / "data" / "cases.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("case ", "00"), encoding="utf-8")
    with pytest.raises(VolsegError, match="cases such as '000', and the predictions 'case 0'"):
        judge(folder, target="diagnosis")


def test_tables_that_are_none_are_refused(folder):
    bad = folder / "bad" / "classes.csv"
    for content, problem in (
        ("case_id,score\na,1\n", "has neither the columns"),
        ("case_id,class_name\na,b\n", "has no column of probabilities"),
        ("case_id,class_name,probability_x\na,b,c\n", "could not convert"),
    ):
        bad.parent.mkdir(exist_ok=True)
        bad.write_text(content)
        with pytest.raises(VolsegError, match=problem):
            judge(folder, predicted=bad.parent)
    _, _, rows = class_rows(0)
    wrong = [ClassRow(case_id=row.case_id, probabilities=dict.fromkeys(NAMES, 2.0)) for row in rows]
    write(bad, class_table(NAMES, wrong))
    with pytest.raises(VolsegError, match="from 0 to 1"):
        judge(folder, predicted=bad)
    for name in ("target", "by", "against"):
        with pytest.raises(VolsegError, match=f"--{name} is for classes and numbers"):
            judge(folder, predicted=folder / "data", **{name: str(folder / "two")})


@pytest.mark.slow
def test_masks_and_classes_may_share_an_output_folder(folder):
    labels = "sample_data/labels"
    volseg.evaluate(reference=labels, predicted=labels, out=folder / "out")
    assert (folder / "out" / "detections.csv").is_file()
    judge(folder)
    assert not (folder / "out" / "detections.csv").exists()
    volseg.evaluate(reference=labels, predicted=labels, out=folder / "out")
    assert not (folder / "out" / "metrics.csv").exists()
    assert not (folder / "out" / "report.html").exists()


def test_the_header_is_the_contract():
    assert class_columns(["a", "b"]) == [
        *("case_id", "patient", "class_name", "class_probability"),
        *("probability_a", "probability_b", "top_classes", "confidence_set"),
        "out_of_distribution",
        *("model", "status", "error"),
    ]
    with pytest.raises(VolsegError, match="separates classes"):
        joined(["a|b"])


def test_a_table_of_classes_survives_the_file(tmp_path):
    _, _, rows = class_rows(0)
    rows[0] = ClassRow(case_id="=x", error="a, b", status="failed")
    write(tmp_path / "classes.csv", class_table(NAMES, rows))
    names, again = read_class_rows(tmp_path / "classes.csv")
    assert names == NAMES
    assert again == rows
    frame = volseg.read_table(tmp_path / "classes.csv")
    assert frame["probability_no lesion"].dtype == "float64"


def test_the_command_line_prints_the_metrics(folder):
    arguments = ["evaluate", "--reference", folder / "data", "--predicted", folder / "one"]
    arguments += ["--out", folder / "out"]
    with_other = [*arguments, "--by", "sex", "--against", folder / "two"]
    result = CliRunner().invoke(app, [str(argument) for argument in with_other])
    assert result.exit_code == 0, result.output
    assert "malignant" in result.output and "balanced_accuracy" in result.output
    for name in ("AUC", "accuracy", "log_loss"):
        assert f"net − weak: {name} " in result.output
    arguments.append("--json")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert json.loads(result.stdout)["task"] == "classes"


def baseline_table(folder, predicted):
    """Write baselines.csv of name → case id → {class: probability}."""
    rows = [
        BaselineRow(case_id=case, baseline=name, class_name=one, probability=p)
        for name, cases in predicted.items()
        for case, probabilities in cases.items()
        for one, p in probabilities.items()
    ]
    write(folder / "one" / "baselines.csv", table(BaselineRow, rows))


def test_baselines_are_judged_on_the_same_cases_as_any_model(folder):
    """A baseline with the predictions of another model has that model's metrics and intervals."""
    weak = {row.case_id: row.probabilities for row in class_rows(0, skill=0.3, model="weak")[2]}
    shares = {name: dict.fromkeys(NAMES, 1 / 3) for name in weak}
    short = dict(list(weak.items())[:-3])
    baseline_table(folder, {"majority": shares, "weak_one": weak, "short": short})
    report = judge(folder)
    assert [text for text in report.warnings if "W_BASELINES" in text] == [
        "W_BASELINES: short did not predict 3 judged cases, and is left out"
    ]
    summary = report.summary
    expected = judge(folder, predicted=folder / "two", out=folder / "weak").summary
    assert summary["baselines"]["weak_one"] == {
        kind: expected[kind] for kind in ("metrics", "metrics_by_class")
    }
    guess = summary["baselines"]["majority"]["metrics"]
    assert guess["macro"]["auc"]["value"] == 0.5
    assert guess["overall"]["log_loss"]["value"] == pytest.approx(np.log(3))
    (folder / "one" / "baselines.csv").unlink()
    without = judge(folder, out=folder / "without").summary
    for kind in ("metrics", "metrics_by_class", "headline", "confusion"):
        assert without[kind] == summary[kind]
    rows = volseg.read_table(folder / "out" / "metrics.csv")
    assert set(rows.baseline.dropna()) == {"majority", "weak_one"}
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("beside-title") < page.index("metrics-title")
    assert "weak one" in page and "majority" in page
    assert "beside-title" not in (folder / "without" / "report.html").read_text("utf-8")


def test_a_baseline_of_numbers_is_judged_and_a_table_that_is_none_is_a_warning(tmp_path):
    ages = np.linspace(60, 90, 20)
    write_cases(
        tmp_path / "data" / "cases.csv", [{"subject": n, "age": a} for n, a in enumerate(ages)]
    )
    rows = [ValueRow(case_id=str(n), value=float(age) + n % 3) for n, age in enumerate(ages)]
    write(tmp_path / "one" / "values.csv", table(ValueRow, rows))
    mean = [BaselineRow(case_id=str(n), baseline="mean", value=75.0) for n in range(20)]
    write(tmp_path / "one" / "baselines.csv", table(BaselineRow, mean))
    overall = judge(tmp_path, target="age").summary["baselines"]["mean"]["metrics"]["overall"]
    assert overall["mae"]["value"] == pytest.approx(mean_absolute_error(ages, np.full(20, 75)))
    assert overall["r2"]["value"] == pytest.approx(0)
    (tmp_path / "one" / "baselines.csv").write_text("case_id,baseline,value\n1,mean,much\n")
    report = judge(tmp_path, target="age")
    assert any("baselines.csv: cannot be used" in text for text in report.warnings)
    assert not report.summary["baselines"]


def test_the_curve_of_a_baseline_is_drawn_beside_that_of_two_classes(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.dirichlet((1, 1), 60)
    targets = (rng.random(60) < p[:, 1]).astype(int)
    model = ClassPredictions(p, targets, ("a", "b"))
    constant = ClassPredictions(np.full((60, 2), 0.5), targets, ("a", "b"))
    other = ClassPredictions(p[::-1], targets, ("a", "b"))
    assert roc_png(model, {}, (), {"majority": constant}) == roc_png(model, {})
    assert roc_png(model, {}, (), {"other": other}) != roc_png(model, {})
