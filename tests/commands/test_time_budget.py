"""A time budget holds, or is refused at once with advice that works."""

import re
import shlex
import time
from importlib import import_module
from itertools import pairwise

import nibabel
import numpy as np
import pytest
from laws import real_data
from typer.testing import CliRunner

import volseg
from volseg.bundle import load_bundle
from volseg.cli import app
from volseg.commands import time_plan, training_networks
from volseg.commands.automatic_recipe import MASKS
from volseg.commands.earlier import cached_recipe
from volseg.commands.forecast import GUARDED_SECONDS, STAGES, Forecast, Guard
from volseg.commands.preparing import PREPARING, read_header
from volseg.commands.training_cases import ANALYSING
from volseg.errors import VolsegError
from volseg.recipe import ZScore


class Recorder:
    """A progress callback that records when it was called, and can be slow."""

    def __init__(self, slow=lambda stage: 0.0):
        self.began, self.calls, self.slow = time.monotonic(), [], slow

    def __call__(self, stage, share, detail):
        self.calls.append((time.monotonic(), stage))
        time.sleep(self.slow(stage))

    @property
    def silence(self):
        moments = [self.began, *(moment for moment, _ in self.calls), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(moments))


@pytest.mark.slow
def test_a_short_budget_is_refused_after_the_first_case_which_is_kept(
    dataset, tiny_recipe, tmp_path
):
    recorder = Recorder()
    # With a z-score per scan the plan of one case is that of all; a common window would differ.
    preprocess = tiny_recipe.preprocess.model_copy(update={"normalise": ZScore(method="zscore")})
    recipe = tiny_recipe.model_copy(update={"preprocess": preprocess, "classify": None})
    options = {"recipe": recipe, "out": tmp_path / "m", "device": "cpu", "time_budget_seconds": 2}
    with pytest.raises(VolsegError, match="the time budget of 2 s is too short") as caught:
        volseg.train(dataset, progress=recorder, **options)
    assert caught.value.code == "E_BUDGET"
    assert {stage for _, stage in recorder.calls} <= {"Starting", "Timing the first case"}
    kept = tmp_path / "m" / ".training" / "prepared"
    assert f"are kept in {kept}" in caught.value.fix
    cases = {path.parent.name for path in (kept / "cases").glob("*/case.json")}
    assert len(cases) >= 1
    report = volseg.preprocess(dataset, recipe=recipe, out=kept)  # as the next call does
    assert set(report.kept) == cases
    volseg.train(dataset, recipe=recipe, out=tmp_path / "m", device="cpu", epochs=1)
    assert load_bundle(tmp_path / "m").segmentation_network() is not None


@pytest.mark.parametrize("out", [".", "..", "m/", "../."])
def test_a_folder_without_a_name_of_its_own_is_refused_a_short_budget_too(
    out, dataset, tiny_recipe, tmp_path, monkeypatch
):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setattr(time_plan, "PREPARE_FIRST_FRACTION", 0.0)  # always suggest preparing first
    with pytest.raises(VolsegError, match="is too short") as caught:
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", time_budget_seconds=2)
    apart = re.search(r"volseg preprocess .+ --out (\S+), and then", caught.value.fix)[1]
    expected = {".": "a/b_prepared", "m/": "a/b/m_prepared"}.get(out, "a_prepared")
    assert apart == str(tmp_path / expected)


def test_the_network_that_is_timed_is_that_of_all_lesions_not_of_the_first_case(
    tmp_path, monkeypatch
):
    """The median lesion decides the patch size; the first case may have a much smaller one."""
    rng, timed = np.random.default_rng(0), []
    for n, width in enumerate((4, 24, 24, 24, 24)):
        mask = np.zeros((40, 40, 40), np.uint8)
        mask[8 : 8 + width, 8 : 8 + width, 8 : 8 + width] = 1
        scan = (rng.normal(0, 10, mask.shape) + 100 * mask).astype(np.int16)
        for folder, array in (("images", scan), ("labels", mask)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(
                nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "data" / folder / f"c{n}.nii"
            )

    def seconds_per_step(objective, team, **_):
        timed.append(objective.recipe.patch_shape)
        return 1e9

    monkeypatch.setattr(
        import_module("volseg.training.speed"), "seconds_per_step", seconds_per_step
    )
    with pytest.raises(VolsegError, match="too short"):
        volseg.train(tmp_path / "data", out=tmp_path / "m", device="cpu", time_budget_seconds=60)
    (patch,) = timed
    assert min(patch) >= 24


def test_the_masks_are_read_once_until_a_file_changes(dataset, tmp_path):
    recorder = Recorder()
    (tmp_path / "work").mkdir()
    first = cached_recipe(dataset, tmp_path / "work", recorder)
    n = len(recorder.calls)
    assert n > 0
    assert cached_recipe(dataset, tmp_path / "work", recorder) == first
    assert len(recorder.calls) == n
    (tmp_path / "work" / "recipe.json").write_text("{}")
    assert cached_recipe(dataset, tmp_path / "work", recorder) == first
    assert len(recorder.calls) > n


@pytest.mark.slow
def test_the_suggestions_of_a_refusal_work(dataset, tmp_path):
    """Both work: the two commands that prepare first, and the longer budget."""
    runner = CliRunner()
    out = tmp_path / "a model"
    refused = runner.invoke(
        app, ["train", str(dataset), "--out", str(out), "--time-budget", "3s", "--device", "cpu"]
    )
    fix = refused.exception.fix
    # Preparing first is only suggested if it takes much of the time.
    commands = re.findall(r"volseg (preprocess .+?), and then volseg (train .+?); what was", fix)
    for command in commands[0] if commands else ():
        done = runner.invoke(app, [*shlex.split(command), "--device", "cpu"])
        assert done.exit_code == 0, (command, done.output, done.exception)
        assert "is too short" not in done.output
    longer = re.search(r"give --time-budget (\S+) or more", fix)[1]
    done = runner.invoke(
        app,
        [
            "train",
            str(dataset),
            "--out",
            str(tmp_path / "n"),
            "--time-budget",
            longer,
            "--device",
            "cpu",
        ],
    )
    assert done.exit_code == 0, (longer, done.output, done.exception)


@pytest.mark.slow
def test_preprocess_plans_without_a_recipe_and_train_cross_validates_it(dataset, tmp_path):
    volseg.preprocess(dataset, out=tmp_path / "p")
    header = read_header(tmp_path / "p")
    assert header["is_auto"]
    recorder = Recorder()
    messages, options = [], {"device": "cpu", "epochs": 1, "time_budget_seconds": 25}
    volseg.train(
        tmp_path / "p", out=tmp_path / "m", progress=recorder, announce=messages.append, **options
    )
    bundle = load_bundle(tmp_path / "m")
    stages = {stage for _, stage in recorder.calls}
    assert "Training fold 1 of 5" in stages or any(
        "instead of 5 folds" in text for text in messages
    )
    assert bundle.fingerprint.lesion_extent_mm is not None
    lesion = bundle.fingerprint.lesion_extent_mm
    edges = [
        n * mm for n, mm in zip(bundle.recipe.patch_shape, bundle.recipe.spacing_mm, strict=True)
    ]
    assert all(edge >= length - 1e-3 for edge, length in zip(edges, lesion, strict=True))


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_the_budget_holds_on_a_machine_that_slows_down(delay, dataset, tiny_recipe, tmp_path):
    recorder = Recorder(
        lambda stage: delay if stage.startswith(("Training", "Exporting", "Drawing")) else 0.0
    )
    messages, seconds = [], 12
    endless = tiny_recipe.model_copy(
        update={
            "train": tiny_recipe.train.model_copy(update={"steps_per_epoch": 10}),
            "classify": None,
        }
    )
    options = {"recipe": endless, "device": "cpu", "epochs": 199, "folds": 2, "progress": recorder}
    began = time.monotonic()
    try:
        volseg.train(
            dataset,
            out=tmp_path / "m",
            time_budget_seconds=seconds,
            announce=messages.append,
            **options,
        )
    except VolsegError as error:  # on a busy machine
        assert error.code == "E_BUDGET"
    assert time.monotonic() - began <= 1.1 * seconds + 5
    assert recorder.silence < 30


@pytest.mark.slow
def test_a_fold_with_too_few_steps_is_skipped_with_a_warning(dataset, tiny_recipe, tmp_path):
    quick = {"steps_per_epoch": 5, "batch_size": 1}
    recipe = tiny_recipe.model_copy(
        update={"train": tiny_recipe.train.model_copy(update=quick), "classify": None}
    )
    recorder = Recorder(lambda stage: 4.0 if stage == "Training fold 1 of 3" else 0.0)
    messages = []
    options = {"recipe": recipe, "folds": 3, "epochs": 60, "device": "cpu", "progress": recorder}
    try:
        volseg.train(
            dataset, out=tmp_path / "m", time_budget_seconds=20, announce=messages.append, **options
        )
    except VolsegError as error:  # on a busy machine
        assert error.code == "E_BUDGET"
        return
    assert any(
        text.startswith("warning: W_FEW_STEPS: a network was trained for") for text in messages
    )
    assert "W_FEW_STEPS" in load_bundle(tmp_path / "m").metrics["warnings"]


@pytest.mark.slow
def test_the_classifier_leaves_time_for_export_and_pictures(
    dataset, tiny_recipe, tmp_path, monkeypatch
):
    kept, train_classifier = [], training_networks.train_classifier
    messages, budget, began = [], 600, time.monotonic()

    def keep(*args, seconds, **settings):
        kept.append(budget - (time.monotonic() - began) - seconds)
        return train_classifier(*args, seconds=seconds, **settings)

    monkeypatch.setattr(training_networks, "train_classifier", keep)
    options = {
        "recipe": tiny_recipe,
        "device": "cpu",
        "epochs": 1,
        "folds": 1,
        "announce": messages.append,
    }
    volseg.train(dataset, out=tmp_path / "m", time_budget_seconds=budget, **options)
    assert kept == pytest.approx([budget * time_plan.FINISHING_FRACTION], abs=2)
    assert not any("no time was left" in text for text in messages)


def test_the_fingerprint_of_the_model_that_ships_is_still_read():
    from volseg.commands.checking import shipped_model_text

    assert shipped_model_text()


def forecast(**stages):
    return Forecast(n_cases=10, stages=dict.fromkeys(STAGES, 0.0) | stages, step=0.1, flops=None)


def guarded(ends, least, ahead, share_per_second):
    """Return the seconds after which a guard refuses a stage of this pace, and those ahead."""
    now, refusals = [0.0], []

    def refuse(seconds):
        refusals.append((now[0], seconds))
        raise VolsegError("too short", fix="more", code="E_BUDGET")

    guard = Guard(lambda *call: None, ahead, ends, least, refuse, clock=lambda: now[0])
    try:
        while now[0] * share_per_second < 1:
            now[0] += 1
            guard.show(ANALYSING, min(1.0, now[0] * share_per_second), "case")
    except VolsegError:
        return refusals[0]
    return None


def test_a_stage_is_ended_as_soon_as_its_pace_is_known_to_be_too_slow():
    assert guarded(200, 50, forecast(**{PREPARING: 40.0}), 0.01) is None  # 100 + 40 + 50 s
    when, ahead = guarded(180, 50, forecast(**{PREPARING: 40.0}), 0.01)
    assert when == GUARDED_SECONDS
    assert ahead == pytest.approx(95 + 40)
    assert forecast(**{MASKS: 1.0, ANALYSING: 2.0, PREPARING: 4.0}).after(MASKS) == 6.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msd_hippocampus", "lgg_mri_flair"])
def test_real_data_train_in_two_minutes_or_are_refused_in_half_a_minute(name, tmp_path):
    recorder, messages = Recorder(), []
    try:
        volseg.train(real_data(name), out=tmp_path / "m", time_budget_seconds=120, device="cpu",
                     progress=recorder, announce=messages.append)  # fmt: skip
    except VolsegError as error:
        assert error.code == "E_BUDGET"
        assert time.monotonic() - recorder.began <= 30
    else:
        assert time.monotonic() - recorder.began <= 1.1 * 120 + 20
    assert recorder.silence <= 30
