"""`volseg report --scan`: every number of a report is the value of the cell that it names."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
from image_sets import table_of_images
from laws import ball, centre_mm, grid_around, oblique, real_data
from markdown_it import MarkdownIt
from PIL import Image

import volseg
from volseg.bundle import shipped_bundle
from volseg.errors import VolsegError
from volseg.io.volumes import write_volume
from volseg.volume import Volume

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
# numbers that are words of a sentence: a rule, a percentile, the level of an interval
WORDS = ("RECIST 1.1", "0.5 to 99.5 percentile", "95 % interval", "(below 0.85)")
HOSTILE = "<script>alert(1)</script>|*a*[x](y)"


# ---- what the files hold, read without volseg


class Cells:
    """The values that keys name."""

    def __init__(self, *folders):
        self.tables, self.files = defaultdict(list), {}
        for folder in folders:
            is_model = (folder / "model.json").is_file()
            for path in [] if is_model else sorted(folder.glob("*.csv")):
                with path.open(newline="", encoding="utf-8") as file:
                    self.tables[path.name] += csv.DictReader(file)
            for name in ("run.json", "model.json", "summary.json"):
                if (folder / name).is_file() and name not in self.files:
                    self.files[name] = json.loads((folder / name).read_text(encoding="utf-8"))

    def value(self, key):
        where, _, path = key.partition(": ")
        name, *which = where.split(", ")
        if name in self.files:
            value = self.files[name]
            for part in re.findall(r'"(?:[^"\\]|\\.)*"|[^."]+', path):
                part = json.loads(part) if part.startswith('"') else part
                value = value[int(part) if isinstance(value, list) else part]
            return value
        return parsed(self.row(name, *which)[path])

    def row(self, name, case_id, lesion="", gone=""):
        """Return the row of a table that a key names."""
        number, time = lesion.removeprefix("lesion "), "baseline" if gone else "followup"
        columns = {"comparison.csv": (f"{time}_case", f"{time}_lesion_id")}
        columns["response.csv"] = ("followup_case", "")
        columns["explain.csv"] = ("case_id", "method")
        case, lesion_id = columns.get(name, ("case_id", "lesion_id"))
        rows = [row for row in self.tables[name] if row[case] == case_id]
        rows = [row for row in rows if not number or row[lesion_id] == number]
        (row,) = rows
        return row


def parsed(text):
    try:
        return float(text)
    except ValueError:
        return text.removeprefix("'")


def is_rounded(shown, value):
    """Check whether a printed number is the value, rounded as printed."""
    mantissa, _, power = shown.lstrip("+").partition("e")
    digits = len(mantissa.partition(".")[2]) - int(power or 0)
    return abs(float(shown) - value) <= 0.5 * 10.0**-digits * (1 + 1e-9)


# ---- the page


class Page(HTMLParser):
    """The texts of a page, each with its sources and its rule; and those without a source."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.rest, self.tags, self._open = [], [], [], []
        self.by_source, self.content = defaultdict(list), []
        self.feed(text)
        self.plain = " ".join("".join(self.content).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append((tag, dict(attrs)))
        if "data-sources" in dict(attrs):
            self._sentence = []

    def handle_endtag(self, tag):
        closed, attrs = self._open.pop()
        assert closed == tag
        if "data-sources" in attrs:
            for key in attrs["data-sources"].split(" | "):
                self.by_source[key].append("".join(self._sentence))
        if tag in ("p", "td", "th", "h1", "h2", "figcaption"):
            self.content.append("\n")

    def handle_data(self, data):
        names = [tag for tag, _ in self._open]
        if "body" not in names or "script" in names:
            return
        if "footer" not in names:
            self.content.append(data)
        if hasattr(self, "_sentence"):
            self._sentence.append(data)
        attrs = self._open[-1][1]
        if "data-source" in attrs:
            sources = attrs["data-source"].split(" | ")
            self.spans.append((data, sources, attrs.get("data-rule", "")))
            for key in sources:
                self.by_source[key].append(data)
        else:
            self.rest.append(data)


def expected(values, rule):
    """Return the numbers that stand for the values of a span, by the rules of this test."""
    if rule == "extent":
        low, high = values
        return [high - low]
    if len(values) > 1:
        return [sum(values)]
    (value,) = values
    if isinstance(value, list) and value and isinstance(value[0], list):
        ends = [(min(axis), max(axis)) for axis in zip(*value, strict=True)]
        # Ends that are equal but for rounding are one number.
        return [n for low, high in ends for n in ([low] if high - low < 1e-6 else [low, high])]
    return list(value) if isinstance(value, list) else [value]


def is_traced(text, sources, rule, cells):
    text = without_words(text)
    values = [cells.value(key) for key in sources]
    shown = NUMBER.findall(text)
    if isinstance(values[0], str):
        return all(number in values[0].replace(",", " ") for number in shown)
    if isinstance(values[0], bool) or not shown:
        return not shown
    numbers = [100 * n if text.endswith("%") else n for n in expected(values, rule)]
    return len(numbers) == len(shown) and all(map(is_rounded, shown, numbers))


def without_words(text):
    for phrase in WORDS:
        text = text.replace(phrase, "")
    return text


def check_page(path, *folders):
    """Assert that each number of a page is the value of the cells that it names."""
    page, cells = Page(path.read_text(encoding="utf-8")), Cells(*folders)
    assert [span for span in page.spans if not is_traced(*span, cells)] == []
    assert NUMBER.findall(without_words(" ".join(page.rest))) == []
    return page


def check_markdown(path, page, *folders):
    """Assert that each block of a text is traced by its footnotes, and says what the page says."""
    cells, text = Cells(*folders), path.read_text(encoding="utf-8")
    notes = {}
    for number, keys in re.findall(r"^\[\^(\d+)\]: (.*)$", text, flags=re.MULTILINE):
        keys = re.sub(r"\\(.)", r"\1", keys)
        notes[number] = [
            f"{name}: {part}"
            for name, parts in (group.split(": ", 1) for group in keys.split("; "))
            for part in parts.split(", ")
        ]
    body = text.partition("\n[^1]: ")[0]
    shown = []
    for block in re.split(r"\n+", re.sub(r"!\[.*?\]\(.*?\)", "", body)):
        keys = [key for number in re.findall(r"\[\^(\d+)\]", block) for key in notes[number]]
        block = re.sub(r"\\(.)", r"\1", re.sub(r"\[\^\d+\]", "", block))
        values = [cells.value(key) for key in keys]
        texts = " ".join(value for value in values if isinstance(value, str)).replace(",", " ")
        numbers = [n for v in values for n in leaves(v)]
        numbers += [b - a for a in numbers for b in numbers] if "extends over" in block else []
        for number in NUMBER.findall(without_words(block)):
            ok = number in texts or any(
                is_rounded(number, n * scale) for n in numbers for scale in (1, 100)
            )
            assert ok, (number, block)
        shown += NUMBER.findall(block)
    assert sorted(shown) == sorted(NUMBER.findall(page.plain))


def leaves(value):
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, int | float):
        yield value


def reported(results, case_id, *folders, **options):
    """Write both reports of a case, check them, and return the page."""
    for suffix in ("html", "md"):
        volseg.report(results, scan=case_id, format=suffix, **options)
    paths = [results / "reports" / f"{case_id}.{suffix}" for suffix in ("html", "md")]
    page = check_page(paths[0], results, *folders)
    check_markdown(paths[1], page, results, *folders)
    return page


# ---- results


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Return a folder of a scan with two balls, one of them cut, an empty one and a damaged one."""
    folder = tmp_path_factory.mktemp("scans")
    geometry = grid_around(14, oblique((1.0, 1.2, 2.0)))
    rng, middle = np.random.default_rng(0), centre_mm(geometry)
    two = ball(6, geometry, middle) | ball(4, geometry, middle + [-14, -11, 0])
    lines = ["subject,image,label"]
    for name, mask in (("two", two), ("none", np.zeros(geometry.shape)), ("bad", two)):
        mask = mask.astype(np.uint8)
        array = (rng.normal(-80, 10, geometry.shape) + mask * 120).astype(np.int16)
        write_volume(Volume(array, geometry), folder / f"{name}.nii.gz")
        write_volume(Volume(mask, geometry), folder / f"{name}_mask.nii.gz")
        lines.append(f"{name},{name}.nii.gz,{name}_mask.nii.gz")
    path = folder / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def measured(scans, tmp_path_factory):
    """Return the results of measuring them."""
    out = tmp_path_factory.mktemp("measured") / "out"
    volseg.measure(cases=scans / "cases.csv", out=out, intensity_unit="HU")
    return out


@pytest.fixture(scope="module")
def segmented(model, dataset, tmp_path_factory):
    """Return the results of a model for two scans."""
    out = tmp_path_factory.mktemp("segmented") / "out"
    paths = sorted((dataset / "images").glob("*.nii.gz"))[:2]
    volseg.infer(paths, model=model, out=out, device="cpu", overlap=0.0)
    return out


@pytest.fixture
def results(measured, tmp_path):
    """Return a copy of the measured results that a test may change."""
    return shutil.copytree(measured, tmp_path / "out", ignore=shutil.ignore_patterns("reports"))


def changed_table(path, change):
    """Rewrite a table with `change(row)`, which changes rows in place."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---- tests


def test_every_number_of_a_measured_scan_is_that_of_its_cell(measured):
    page = reported(measured, "two")
    with (measured / "lesions.csv").open(newline="", encoding="utf-8") as file:
        lesions = list(csv.DictReader(file))
    assert len(page.spans) > 20
    sources = {key for _, keys, _ in page.spans for key in keys}
    for lesion in lesions:
        at = f"lesions.csv, two, lesion {lesion['lesion_id']}: "
        for column in ("volume_ml", "long_axis_mm", "intensity_mean", "intensity_unit"):
            assert at + column in sources
    assert "2 lesions were found" in page.plain
    cut = [lesion["lesion_id"] for lesion in lesions if lesion["touches_border"] == "true"]
    named = f"Lesion{'s' * (len(cut) > 1)} {', '.join(cut)}"
    assert cut and f"{named}: cut by the edge" in page.plain
    assert "No model of volseg made this mask" in page.plain
    assert "Compared with the training data" not in page.plain
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 and all(image["alt"] for image in images)


def test_every_number_of_a_models_result_is_that_of_its_cell(segmented, model):
    page = reported(segmented, "scan_0", model)
    description = json.loads((model / "model.json").read_text(encoding="utf-8"))
    assert f"Intended use: {description['recipe']['intended_use']}" in page.plain
    assert f"Limits: {description['recipe']['limits']}" in page.plain
    dice = description["metrics"]["validation_dice_lesion"]
    assert f"{dice:.3f}" in page.plain
    assert "the labelled voxels of training have a median of" in page.plain
    assert "the median of the lesions of training is" in page.plain
    assert "no confidence sets for these classes" in page.plain


def test_changing_a_cell_changes_what_names_it(results, scans):
    """The scan is moved away, so that a report takes no time for pictures."""
    before = reported(results, "two")
    record = json.loads((results / ".volseg" / "two.json").read_text(encoding="utf-8"))
    record["source"]["scan"] = str(scans / "gone.nii.gz")
    (results / ".volseg" / "two.json").write_text(json.dumps(record), encoding="utf-8")
    keys = [key for key in before.by_source if ".csv, " in key]
    assert len(keys) > 25
    for key in keys:
        where, _, column = key.partition(": ")
        table, _, *lesion = where.split(", ")
        number = lesion[0].removeprefix("lesion ") if lesion else ""
        original = (results / table).read_bytes()

        def change(row, column=column, number=number):
            if row["case_id"] == "two" and row.get("lesion_id", "") in ("", number):
                row[column] = other(row[column])

        changed_table(results / table, change)
        try:
            volseg.report(results, scan="two")
        except VolsegError as refused:  # no such case, or another number of lesions than rows
            assert column in ("case_id", "n_lesions"), key
            assert refused.code in ("E_USAGE", "E_ROW")
        else:
            after = Page((results / "reports" / "two.html").read_text(encoding="utf-8"))
            assert after.by_source.get(key) != before.by_source[key], key
            assert f"{table} was changed since volseg wrote it" in after.plain
        (results / table).write_bytes(original)


def other(text):
    """Return another cell of the same kind."""
    if text in ("true", "false"):
        return "false" if text == "true" else "true"
    try:
        value = float(text)
    except ValueError:
        return f"{text}x"
    return str(int(value) + 5) if value == int(value) else f"{value * 1.7:.6g}"


def test_an_empty_mask_of_no_model_says_that_nothing_was_found(measured):
    page = reported(measured, "none")
    assert "Nothing was found: the mask of this scan holds no lesion." in page.plain
    assert "model misses" not in page.plain


def test_a_scan_without_a_finding_says_how_little_that_proves(results, tmp_path, scans):
    """The rows of an empty mask say that a model made it."""

    def by_a_model(row):
        row["model"] = "net@0123456789ab"

    changed_table(results / "cases.csv", by_a_model)
    page = reported(results, "none")
    assert "How many lesions the model misses is not known here" in page.plain
    assert "Intended use: Not stated with these results." in page.plain
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("two", "none"):
        shutil.copy(scans / f"{name}_mask.nii.gz", masks / f"{name}.nii.gz")
    volseg.evaluate(reference=masks, predicted=masks, out=tmp_path / "e")
    page = reported(results, "none", tmp_path / "e", facts=tmp_path / "e")
    assert page.plain.count("2 of 2 lesions of label label_1 were found") == 1
    assert "no proof that there is none" in page.plain
    assert "not known here, so" not in page.plain
    assert "Mean Dice on 2 scans: 1.000" in page.plain


def test_a_failed_scan_has_a_report_with_its_reason_and_without_its_path(measured, scans):
    page = reported(measured, "bad")
    assert "This scan has no result" in page.plain
    assert "Reason: E_" in page.plain
    assert str(scans) not in (measured / "reports" / "bad.html").read_text(encoding="utf-8")


def test_reports_of_several_scans_and_of_none(measured):
    report = volseg.report(measured, scan=["two", "n*"])
    assert report.done == ["two", "none"]
    assert str(report.headline).startswith("2 reports → ")
    assert volseg.report(measured, scan="*").done == ["bad", "none", "two"]
    with pytest.raises(VolsegError, match="no such case; they have bad, none, two"):
        volseg.report(measured, scan="other")
    for ignored in ({"format": "md"}, {"facts": measured}):
        with pytest.raises(VolsegError, match="no --scan is given"):
            volseg.report(measured, **ignored)


def test_the_page_has_no_script_and_forbids_all_requests(measured):
    volseg.report(measured, scan="two")
    page = Page((measured / "reports" / "two.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'; script-src 'none';" in policy


def test_names_that_look_like_markup_stay_text(results):
    def attack(row):
        if row["case_id"] == "two":
            row["label_name"] = HOSTILE

    changed_table(results / "lesions.csv", attack)
    page = reported(results, "two")
    assert HOSTILE in page.plain
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(
            (results / "reports" / "two.md").read_text(encoding="utf-8").partition("\n[^1]: ")[0]
        )
    )
    inline = [child for token in tokens for child in token.children or ()]
    assert not {"html_block", "html_inline", "em_open"} & {
        token.type for token in (*tokens, *inline)
    }
    assert "".join(child.content for child in inline).count(HOSTILE) == 2


def test_a_table_that_lost_rows_is_refused(results):
    lines = (results / "lesions.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (results / "lesions.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(VolsegError, match=r"1 lesions of two, and cases\.csv says 2"):
        volseg.report(results, scan="two")
    assert not (results / "reports").exists()


def test_a_scan_that_is_gone_leaves_the_picture_that_was_made(scans, tmp_path):
    shutil.copytree(scans, tmp_path / "scans")
    table = tmp_path / "scans" / "cases.csv"
    for pages in (True, False):
        out = tmp_path / str(pages)
        volseg.measure(cases=table, out=out, intensity_unit="HU", pages=pages)
    (tmp_path / "scans" / "two.nii.gz").unlink()
    for pages, n_pictures in ((True, 1), (False, 0)):
        page = reported(tmp_path / str(pages), "two")
        assert sum(tag == "img" for tag, _ in page.tags) == n_pictures
        assert ("There is no picture" in page.plain) == (not pages)


def test_a_rejected_lesion_is_reported_as_rejected(results):
    with (results / "lesions.csv").open(newline="", encoding="utf-8") as file:
        sizes = {row["lesion_id"]: row["n_voxels"] for row in csv.DictReader(file)}
    head = "case_id,lesion_id,verdict,comment,n_voxels,reviewed_at\n"
    text = f"{head}two,1,rejected,,{sizes['1']},\ntwo,2,rejected,,{int(sizes['2']) + 1},\n"
    (results / "review.csv").write_text(text, encoding="utf-8")
    page = reported(results, "two")
    assert "Lesion 1: rejected by a reader" in page.plain  # the other was another mask


@pytest.mark.slow
def test_the_change_since_an_earlier_scan_is_told(scans, tmp_path):
    geometry = grid_around(14, oblique((1.0, 1.2, 2.0)))
    middle = centre_mm(geometry)
    later = ball(7.5, geometry, middle).astype(np.uint8)
    array = np.random.default_rng(1).normal(-80, 10, geometry.shape) + later * 120
    write_volume(Volume(array.astype(np.int16), geometry), tmp_path / "later.nii.gz")
    write_volume(Volume(later, geometry), tmp_path / "later_mask.nii.gz")
    one = {"image": scans / "two.nii.gz", "mask": scans / "two_mask.nii.gz"}
    two = {"image": tmp_path / "later.nii.gz", "mask": tmp_path / "later_mask.nii.gz"}
    for name, files in (("before", one), ("after", two)):
        volseg.measure(**files, out=tmp_path / name, intensity_unit="HU", pages=False)
    (tmp_path / "pairs.csv").write_text("patient,baseline,followup\nJane Doe,two,later\n")
    volseg.compare(
        tmp_path / "before", tmp_path / "after", pairs=tmp_path / "pairs.csv", out=tmp_path / "c"
    )
    page = reported(tmp_path / "after", "later", tmp_path / "c", facts=tmp_path / "c")
    assert "Earlier scan: two." in page.plain
    assert re.search(r"matched, \+\d+ % volume, \+", page.plain)
    assert re.search(r"Lesion 2 of two is gone; it had [\d.]+ mL", page.plain)
    assert "Sum of diameters:" in page.plain
    assert "Jane" not in page.plain


def explained(folder, name, results):
    """Write maps of an image: one whose method failed its checks, an empty one, one of another."""
    (folder / "maps").mkdir(parents=True)
    table = next(
        path for path in (results / "classes.csv", results / "values.csv") if path.exists()
    )
    with table.open(newline="", encoding="utf-8") as file:
        model = next(csv.DictReader(file))["model"]
    head = "case_id,method,class_name,is_empty,is_reliable,doubt,model,status"
    rows = [
        f"{name},lime,disc,false,false,random 2 of 3,{model},done",
        f"{name},gradcam,disc,true,true,,{model},done",
        f"{name},occlusion,disc,false,true,,other@0,done",
    ]
    (folder / "explain.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    for method in ("lime", "gradcam", "occlusion"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "maps" / f"{name}_{method}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", ["shape", "area", "labels"])
def test_every_number_of_an_image_is_that_of_its_cell(target, tmp_path):
    data = table_of_images(tmp_path / "data", n=32)
    volseg.train(data, target=target, out=tmp_path / "m", device="cpu", epochs=1)
    volseg.infer(data / "cases.csv", model=tmp_path / "m", out=tmp_path / "r", device="cpu")
    volseg.evaluate(reference=data, predicted=tmp_path / "r", out=tmp_path / "e", target=target)
    names = sorted(path.stem for path in (data / "images").glob("*.png"))[:3]
    maps = explained(tmp_path / "x", names[0], tmp_path / "r")
    for name in names:
        folders = (tmp_path / "m", tmp_path / "e", maps)
        page = reported(tmp_path / "r", name, *folders, facts=folders[1:])
        assert "p0" not in page.plain  # its patient
        sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
        kinds = [source.partition(";")[0] for source in sources]
        assert kinds == ["data:image/jpeg"] + ["data:image/png"] * (name == names[0])
        assert ("UNRELIABLE with this model: random 2 of 3" in page.plain) == (name == names[0])
        assert "training" in page.plain


@pytest.mark.slow
def test_the_shipped_model_on_a_real_scan(tmp_path):
    scan = real_data("lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz")
    volseg.infer(scan, out=tmp_path / "r", device="cpu", pages=False)
    page = reported(tmp_path / "r", "LIDC-IDRI-0001_R_1", shipped_bundle())
    assert "Malignancy is the opinion of radiologists" in page.plain
