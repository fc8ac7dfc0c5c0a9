"""`volseg methods`: every number of the text and the checklist is that of the key it names."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path
from string import Formatter

import pytest
from command_line import run
from image_sets import table_of_images
from laws import real_data
from markdown_it import MarkdownIt
from nnunet_folder import write_model

import volseg
from volseg.bundle import shipped_bundle
from volseg.errors import VolsegError
from volseg.manuscript import of_models, of_results
from volseg.manuscript.claim import ITEMS
from volseg.manuscript.formats import clean
from volseg.manuscript.text import escape_markdown

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)")
FILES = ("model.json", "run.json", "summary.json")
TABLES = (
    *(getattr(of_models, name) for name in ("PURPOSE", "CASES", "PREPROCESSING", "ARCHITECTURE")),
    *(getattr(of_results, name) for name in ("SUBJECT", "TILING", "OUTCOME", "COMPARED")),
    of_models.FITTING,
    of_results.ERRORS,
)
HOSTILE = (
    "a|b\n\n# c <script>x</script> [l](javascript:1) `d` *e* _f_ \x1b[31m {recipe.name} \\| &lt;"
)


# ---- what the files hold, read without volseg


def stored(*folders):
    """Return name of a file → its content, for the files that keys name."""
    content = {}
    for folder in map(Path, folders):
        for name in FILES:
            if (folder / name).is_file():
                content[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        if (folder / "history.csv").is_file():
            with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
                epochs = [row["epoch"] for row in csv.DictReader(file)]
            content["history.csv"] = {"epoch": epochs}
        if (folder / "model.json").is_file():
            digest = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
            content["SHA-256 of files"] = {"model.json": digest}
    columns = json.loads(run("columns", "--json").stdout)
    sources = {line["name"]: {"source": line["source"]} for line in columns["lesions.csv"]}
    return content | {"volseg columns": {"lesions.csv": sources}}


def parts_of(path):
    """Return the names in a key; one with other characters than letters is quoted."""
    return [
        json.loads(quoted) if quoted else plain
        for quoted, plain in re.findall(r'("(?:[^"\\]|\\.)*")|([^."]+)', path)
    ]


def value_of(content, key):
    """Return what is stored under a key such as `model.json: recipe.name`."""
    name, _, path = key.partition(": ")
    value = content[name]
    for part in parts_of(path):
        value = value[part]
    return value


def leaves(value):
    """Yield every text and number below a value, and the number of entries of what holds them."""
    if isinstance(value, dict | list):
        yield len(value)
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
        if isinstance(value, dict):
            yield from value
    elif value is not None:
        yield value


def is_shown(number, values):
    """Check whether a printed number is one of the values, rounded as printed, or as percentage."""
    digits = len(number.partition(".")[2])
    shown = float(number)
    return any(
        abs(value * scale - shown) <= 0.5 * 10**-digits * (1 + 1e-9) + 5e-6 * abs(shown)
        for value in values
        for scale in (1, 100)
    )


def untraced(sentence, content):
    """Return the numbers of a sentence that are no value under its keys."""
    values = [value_of(content, key) for key in sentence["keys"]]
    texts = [text for value in values for text in leaves(value) if isinstance(text, str)]
    texts = [text for text in texts if not NUMBER.fullmatch(text)]
    text = sentence["text"].replace("SHA-256", "")
    for part in sorted(map(clean, texts), key=len, reverse=True):
        for form in (part, part.rstrip(". "), part.replace("_", " ")):
            text = text.replace(form, " ") if form else text
    numbers = [n for value in values for n in leaves(value) if type(n) in (int, float)]
    numbers.append(sum(len(value) for value in values if isinstance(value, list | dict)))
    for value in values:
        if isinstance(value, dict):
            numbers.append(sum(name.startswith("segmentation") for name in value))
    has_interval = any(key.endswith("_95") for key in sentence["keys"])
    return [
        number
        for number in NUMBER.findall(text)
        if not is_shown(number, numbers) and not (number == "95" and has_interval)
    ]


def check_traced(report, *folders):
    """Assert that each number of the text and of the answers is a value under a key it names."""
    content = stored(*folders)
    sentences = report.as_json()["sentences"]
    assert [(s["text"], untraced(s, content)) for s in sentences if untraced(s, content)] == []
    texts = [sentence["text"] for sentence in sentences]
    for paragraph in report.paragraphs:
        for text in texts:
            paragraph = paragraph.replace(text, "")
        assert not paragraph.strip()
    of_text = {sentence["text"]: sentence["keys"] for sentence in sentences}
    for row in report.as_json()["checklist"]:
        answer = re.sub(r"See items? [\d, ]+\.$", "", row["answer"])
        for text, keys in of_text.items():
            if text in answer:
                assert set(keys) <= set(row["keys"]), (row["number"], text)
                answer = answer.replace(text, "", 1)
        assert answer.strip() in ("", "author"), row
    assert len(texts) == len(set(texts))


# ---- folders


@pytest.fixture(scope="module")
def evaluation(dataset, tmp_path_factory):
    """Return an evaluation of masks that lie one voxel off those of the dataset."""
    import nibabel
    import numpy as np

    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "masks").mkdir()
    for path in sorted((dataset / "labels").glob("*.nii.gz")):
        image = nibabel.nifti1.load(path)
        shifted = np.roll(np.asanyarray(image.dataobj), 1, axis=0)
        nibabel.nifti1.save(
            nibabel.nifti1.Nifti1Image(shifted, image.affine), folder / "masks" / path.name
        )
    volseg.evaluate(reference=dataset / "labels", predicted=folder / "masks", out=folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def measured(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "out"
    scan, mask = (dataset / kind / "scan_0.nii.gz" for kind in ("images", "labels"))
    volseg.measure(image=scan, mask=mask, out=out, pages=False)
    return out


@pytest.fixture
def description(model, tmp_path):
    """Return a function that writes a model folder with a changed model.json."""

    def write(change, name="changed"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = json.loads((model / "model.json").read_text(encoding="utf-8"))
        change(content)
        (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")
        shutil.copy(model / "history.csv", folder)
        return folder

    return write


# ---- laws


def test_a_model_with_an_evaluation_answers_twenty_items_with_traced_numbers(model, evaluation):
    report = volseg.methods([model, evaluation])
    check_traced(report, model, evaluation)
    assert len(ITEMS) - len(report.left_to_author) >= 20
    text = " ".join(report.paragraphs)
    metrics = json.loads((model / "model.json").read_text(encoding="utf-8"))["metrics"]
    assert f"{metrics['steps']} steps" in text
    assert f"{metrics['validation_dice_lesion']:.3f}" in text


def test_the_shipped_model_and_measured_masks_are_traced(measured):
    for folder in (shipped_bundle(), measured):
        check_traced(volseg.methods(folder), folder)
    text = " ".join(volseg.methods(measured).paragraphs)
    assert "26 neighbours" in text
    assert "IBSI YEKZ" in text


@pytest.mark.slow
def test_results_find_their_model_and_an_evaluation_of_other_cases_is_refused(
    model, dataset, evaluation, measured, tmp_path
):
    scans = sorted((dataset / "images").glob("*.nii.gz"))[:2]
    volseg.infer(scans, model=model, out=tmp_path / "r", device="cpu", pages=False, overlap=0.25)
    report = volseg.methods([tmp_path / "r", evaluation])
    check_traced(report, model, tmp_path / "r", evaluation)
    assert len(ITEMS) - len(report.left_to_author) >= 24
    assert "overlap by 25 %" in " ".join(report.paragraphs)
    with pytest.raises(VolsegError, match="not of this model"):
        volseg.methods([tmp_path / "r", shipped_bundle()])
    shutil.copytree(evaluation, tmp_path / "other")
    summary = json.loads((evaluation / "summary.json").read_text(encoding="utf-8"))
    summary["masks"] = {"elsewhere": ["", ""]}
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(VolsegError, match="none of the cases"):
        volseg.methods([tmp_path / "r", tmp_path / "other"])
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "r", moved)
    described = json.loads((moved / "run.json").read_text(encoding="utf-8"))
    described["settings"]["model"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(described), encoding="utf-8")
    alone = volseg.methods(moved)
    check_traced(alone, moved)
    assert "give its folder too" in alone.remark


@pytest.mark.slow
@pytest.mark.parametrize("target", ["shape", "area", "labels"])
def test_what_classifies_labels_or_predicts_a_number_is_traced(target, tmp_path):
    data = table_of_images(tmp_path / "data", n=32)
    volseg.train(data, target=target, out=tmp_path / "m", device="cpu", epochs=1)
    volseg.infer(data / "cases.csv", model=tmp_path / "m", out=tmp_path / "r", device="cpu")
    volseg.evaluate(reference=data, predicted=tmp_path / "r", out=tmp_path / "e", target=target)
    report = volseg.methods([tmp_path / name for name in "re"])
    check_traced(report, *(tmp_path / name for name in "mre"))
    assert len(ITEMS) - len(report.left_to_author) >= 20
    verb = {"shape": "classified", "area": "predicted", "labels": "labelled"}[target]
    assert verb in report.paragraphs[0]
    assert "W_TRAINING" in report.paragraphs[-1]  # training images were evaluated too


@pytest.mark.slow
def test_results_of_the_shipped_model_on_a_real_scan_are_traced(tmp_path):
    scan = real_data("lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz")
    volseg.infer(scan, out=tmp_path / "r", device="cpu", pages=False)
    report = volseg.methods(tmp_path / "r")
    check_traced(report, shipped_bundle(), tmp_path / "r")
    assert "LIDC-IDRI" in report.paragraphs[0]


def changed(value):
    """Return another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.25
    if isinstance(value, list):
        are_names = all(isinstance(item, str) for item in value)
        return [*value, "x"] if are_names else [changed(item) for item in value]
    return {f"{name}x": changed(item) for name, item in value.items()} or {"x": 1}


@pytest.mark.parametrize(
    ("folder", "name", "least"),
    [("model", "model.json", 40), ("evaluation", "summary.json", 25), ("measured", "run.json", 8)],
)
def test_changing_what_a_key_holds_changes_its_sentences(folder, name, least, tmp_path, request):
    text = (request.getfixturevalue(folder) / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text, encoding="utf-8")
    before = volseg.methods(tmp_path).sentences
    keys = {key for sentence in before for key in sentence.keys if key.startswith(f"{name}: ")}
    assert len(keys) > least
    n_refused = 0
    for key in sorted(keys):
        content = json.loads(text)
        *path, last = parts_of(key.partition(": ")[2])
        holder = value_of({name: content}, f"{name}: {'.'.join(path)}")
        value, unchanged = holder[last], {line.text for line in before if key in line.keys}
        n_before = len(unchanged)
        for other in (changed(value), None):  # some sentences only need that it is there
            holder[last] = other
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
            try:
                unchanged &= {line.text for line in volseg.methods(tmp_path).sentences}
            except VolsegError as refused:  # no recipe any more, or results of no command
                assert refused.code in ("E_RECORD", "E_USAGE")
                n_refused += other is not None
                unchanged = set()
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            assert len(unchanged) < n_before or not is_number, key
        assert not unchanged, key
    assert n_refused < len(keys) / 2


def test_what_is_unknown_is_left_out_and_left_to_the_author(description):
    def forget(content):
        content["recipe"]["intended_use"] = ""
        del content["metrics"]["best_epoch"], content["metrics"]["steps"]

    report = volseg.methods(description(forget))
    text = " ".join(report.paragraphs)
    assert {3, 26} <= set(report.left_to_author)
    assert "epoch" not in text
    assert "steps" not in text
    assert "None" not in text


@pytest.mark.slow
def test_settings_of_training_are_not_told_of_an_imported_model(tmp_path):
    volseg.import_nnunet(write_model(tmp_path), out=tmp_path / "model")
    report = volseg.methods(tmp_path / "model")
    check_traced(report, tmp_path / "model")
    text = " ".join(report.paragraphs)
    assert "The model was imported: nnU-Net dataset" in text
    for word in ("optimiser", "Augmentation", "steps", "trained", "No patient", "loss"):
        assert word not in text, word


def test_texts_of_a_stranger_stay_within_their_cells(description, tmp_path):
    def attack(content):
        for name in ("description", "intended_use", "limits", "data_source"):
            content["recipe"][name] = HOSTILE
        content["metrics"]["validation_dice_{recipe.name}|<b>"] = 0.5
        content["metrics"]["stopped"] = HOSTILE

    report = volseg.methods(description(attack), out=tmp_path / "m.md")
    page = (tmp_path / "m.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    cells = [
        tokens[index + 1].content
        for index, token in enumerate(tokens)
        if token.type in ("td_open", "th_open")
    ]
    assert len(cells) == 6 * (1 + len(ITEMS))
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "text_special", "em_open", "em_close"}
    assert [t.type for t in tokens].count("heading_open") == 2
    assert not {"html_block", "fence", "hr"} & {token.type for token in tokens}
    text = "".join(child.content for child in inline)
    assert f"Limits of the model: {clean(HOSTILE)}" in text
    assert "Mean Dice of {recipe.name}|<b>" in text
    assert all(paragraph.isprintable() for paragraph in report.paragraphs)
    volseg.methods(description(attack), out=tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {6}
    assert [row[0] for row in rows[1:]] == [str(item.number) for item in ITEMS]


def test_a_model_of_a_newer_volseg_is_refused_as_such(description):
    def renew(content):
        content["format_version"] += 1
        content["recipe"]["novelty"] = 1

    with pytest.raises(VolsegError, match="newer than this volseg reads") as refused:
        volseg.methods(description(renew))
    assert refused.value.code == "E_VERSION"


@pytest.mark.parametrize("text", ["a_b", "_a_", "1*2|3", "<b>", "&amp;", "`x`", "~~y~~", "[z](w)"])
def test_escaped_markdown_renders_as_the_text(text):
    (block,) = (t for t in MarkdownIt("commonmark").parse(escape_markdown(text)) if t.children)
    assert "".join(child.content for child in block.children) == text
    assert all(child.type.startswith("text") for child in block.children)


def test_the_checklist_has_44_items_and_every_sentence_belongs_to_one():
    assert [item.number for item in ITEMS] == list(range(1, 45))
    assert len({item.asked for item in ITEMS}) == len(ITEMS)
    for table in TABLES:
        for sentence in table:
            assert set(sentence.items) <= set(range(1, 45))
            assert sentence.items
            for clause in sentence.clauses:
                words = "".join(part for part, *_ in Formatter().parse(clause.text))
                assert NUMBER.findall(words.replace("SHA-256", "").replace("95 %", "")) == []


# ---- the command


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "holds no model"),
        ({"model.json": "{"}, "damaged"),
        ({"model.json": "[]"}, "damaged"),
        ({"model.json": '{"recipe": {"task": "segment"}}'}, "damaged"),
        ({"model.json": '{"recipe": 3}'}, "damaged"),
        ({"run.json": '{"command": "compare"}'}, "holds no model"),
        ({"run.json": '{"command": NaN}'}, "damaged"),
        ({"summary.json": '{"a": 1}'}, "holds no model"),
    ],
)
def test_other_folders_are_refused_in_one_line(content, problem, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    done = run("methods", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert problem in done.stderr
    assert str(tmp_path) in done.stderr


def test_odd_values_under_the_keys_are_left_out(measured, tmp_path):
    content = json.loads((measured / "run.json").read_text(encoding="utf-8"))
    for odd in (None, [], {}, "x", -1, 1e300, [[1], "a"], {"a": {"b": None}}):
        folder = tmp_path / str(abs(hash(str(odd))))
        folder.mkdir()
        described = dict.fromkeys(content, odd) | {"command": "measure"}
        (folder / "run.json").write_text(json.dumps(described), encoding="utf-8")
        assert volseg.methods(folder).paragraphs[0].endswith(".")


def test_two_models_and_a_file_that_exists_are_refused(model, tmp_path):
    done = run("methods", model, shipped_bundle())
    assert done.returncode == 2
    assert "both hold a model" in done.stderr
    out = tmp_path / "new" / "methods.md"
    assert run("methods", model, "--out", out).returncode == 0
    edited = out.read_text(encoding="utf-8") + "mine\n"
    out.write_text(edited, encoding="utf-8")
    again = run("methods", model, "--out", out)
    assert again.returncode == 2
    assert "E_EXISTS" in again.stderr
    assert out.read_text(encoding="utf-8") == edited
    other = run("methods", model, "--out", tmp_path / "methods.docx")
    assert other.returncode == 2
    assert "E_USAGE" in other.stderr


def test_the_command_prints_the_text_what_is_left_and_the_file(model, tmp_path):
    out = tmp_path / "methods.md"
    done = run("methods", model, "--out", out)
    report = volseg.methods(model)
    printed = " ".join(done.stdout.split())
    for paragraph in report.paragraphs:
        assert paragraph in printed
    assert f"left to the author: {', '.join(map(str, report.left_to_author))}" in printed
    assert done.stdout.splitlines()[-1].endswith(f"in part → {out}")
    content = json.loads(run("methods", model, "--json").stdout)
    assert content["paragraphs"] == report.paragraphs
    assert len(content["checklist"]) == len(ITEMS)
    assert content["counts"]["left_to_author"] == len(report.left_to_author)


def test_a_number_that_no_key_holds_is_noticed(measured):
    content = stored(measured)
    sentence = {"text": "Lesions have 26 neighbours.", "keys": ["run.json: connectivity"]}
    assert untraced(sentence, content) == []
    for text in ("Lesions have 27 neighbours.", "A 95 % interval of 26.", "26.1 and 26"):
        assert len(untraced(sentence | {"text": text}, content)) == 1
