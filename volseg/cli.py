"""The command line: parse, call one workflow, print, pick the exit code."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer import Argument, Option

from volseg import __version__
from volseg.errors import VolsegError
from volseg.execute.time_budget import process_age
from volseg.terminal import one_line, printing, problem_of, takes_unicode

if TYPE_CHECKING:
    from volseg.workflows import RunReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

EXIT_INTERRUPTED = 130
SILENT_SECONDS = 20  # after which a line says that a step is still running
SECONDS_PER_LINE = 15  # of progress, where stderr is not a terminal
MAX_SEED, MAX_COUNT = 2**32 - 1, 1_000_000

Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout instead of text.")]
Out = Annotated[Path, Option(help="Folder for the results; created if missing.")]
Device = Annotated[str, Option(help="auto, cpu or cuda; auto uses a GPU if there is one.")]
Seed = Annotated[
    int,
    Option(
        min=0,
        max=MAX_SEED,
        help="Seed of every random choice, e.g. of validation cases and batches.",
    ),
]
Figures = Annotated[
    bool, Option("--figures", help="Also write a PNG per scan with its lesions outlined.")
]
Pages = Annotated[
    bool,
    Option(
        "--report/--no-report", help="Write report.html and a page per scan that shows its lesions."
    ),
]
RecipeName = Annotated[
    str | None,
    Option(
        help="TOML file or name of a shipped recipe, which overrides the plan; "
        "without it, everything is planned."
    ),
]
PlanFile = Annotated[
    Path | None, Option(help="Plan written by `volseg plan --out`; you may edit it first.")
]
TrainingMemory = Annotated[
    str | None,
    Option(help="Memory limit for training, e.g. 8G: GPU memory, or main memory on a CPU."),
]
MaxRam = Annotated[
    str | None,
    Option(help="Main memory limit, e.g. 4G; a case that does not fit becomes a failed row."),
]
TimeBudget = Annotated[
    str | None,
    Option(
        help="Time limit for the whole command, e.g. 90s, 20m or 1.5h; "
        "the learning-rate schedule ends with it."
    ),
]
Folds = Annotated[
    int | None,
    Option(
        min=1,
        max=20,
        help="Number of cross-validation folds: one network per fold, used as an ensemble.",
    ),
]
DATASET_HELP = (
    "Dataset: CSV table, folder with cases.csv, folder with images/ and labels/, "
    "nnU-Net raw folder or Decathlon folder."
)


def main() -> None:
    """Run the command that `sys.argv` names."""
    try:
        with printing():
            _run()
    except VolsegError as error:  # from stdout itself
        _fail(error)


def _run() -> None:
    """Run the command; report an error in one line and exit with its code."""
    try:
        app(standalone_mode=True)
    except VolsegError as error:
        _fail(error)
    except (OSError, MemoryError) as error:
        _fail(problem_of(error))


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def volseg(
    version: Annotated[
        bool,
        Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Segment lesions in 3D CT and MRI scans, and measure each of them.

    Start with `volseg infer scan.nii.gz`, which uses the model that ships with volseg, or train
    your own with `volseg train DATASET --out MODEL`. `volseg COMMAND --help` explains a command.
    """


@app.command()
def preprocess(
    dataset: Annotated[Path, Argument(help=DATASET_HELP)],
    out: Out,
    recipe: RecipeName = None,
    plan: PlanFile = None,
    vram: TrainingMemory = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Resample, crop and normalise a dataset for training.

    Writes a memory-mapped array and a JSON file per case, and prints the dataset's fingerprint.
    Skips the test split. A second call prepares only cases that are missing or have changed. If
    the recipe leaves network and patch size to the plan, --vram sets the memory they must fit.
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.preprocess(
            dataset,
            recipe=recipe,
            out=out,
            seed=seed,
            plan=None if plan is None else workflows.read_plan(plan),
            budget=workflows.budget_of(device, vram),
            progress=show,
        )
    _finish(report, as_json, lambda: _print_fingerprint(report))


@app.command()
def plan(
    dataset: Annotated[Path, Argument(help=DATASET_HELP)],
    recipe: RecipeName = None,
    vram: TrainingMemory = None,
    time_budget: TimeBudget = None,
    folds: Folds = None,
    out: Annotated[
        Path | None, Option(help="Also write the plan to this JSON file, for --plan.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show the planned training settings, each with a reason.

    Covers spacing, intensities, patches and network. Nothing is trained or prepared. With --out,
    the plan becomes a JSON file that you can edit and pass to `volseg train --plan`.
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.plan(
            dataset,
            recipe=recipe,
            memory=vram,
            time_budget_seconds=None if time_budget is None else _seconds(time_budget),
            folds=folds,
            device=device,
            seed=seed,
            out=out,
            progress=show,
        )
    _finish(report, as_json, lambda: _print_plan(report, out))


@app.command()
def train(
    dataset: Annotated[
        Path, Argument(help=f"{DATASET_HELP} Or a folder made by `volseg preprocess`.")
    ],
    out: Annotated[Path, Option(help="Folder for the model.")],
    recipe: Annotated[
        str | None,
        Option(
            help="TOML file or name of a shipped recipe; a prepared folder brings its own. "
            "Without a recipe, everything is planned and the model is cross-validated."
        ),
    ] = None,
    plan: PlanFile = None,
    time_budget: TimeBudget = None,
    vram: TrainingMemory = None,
    epochs: Annotated[
        int | None, Option(min=1, max=MAX_COUNT, help="Number of epochs; overrides the recipe.")
    ] = None,
    patience: Annotated[
        int | None,
        Option(min=1, max=MAX_COUNT, help="Stop after this many epochs without a new best Dice."),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue the interrupted run in --out.")
    ] = False,
    init: Annotated[
        Path | None, Option(help="Start from the weights of this model folder.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        Option(help="Freeze the layers that match this pattern, e.g. 'downsamples.*'; repeatable."),
    ] = None,
    fold: Annotated[
        int | None,
        Option(min=0, max=4, help="Validate on this fifth of the patients, train on the others."),
    ] = None,
    folds: Folds = None,
    devices: Annotated[
        int,
        Option(
            min=1,
            max=1024,
            help="Number of GPUs (on a CPU: processes) that share each batch; "
            "torchrun and SLURM set it themselves.",
        ),
    ] = 1,
    precision: Annotated[
        str,
        Option(
            help="auto, fp32 or half; auto is half (bfloat16) on GPUs and on CPUs that support it."
        ),
    ] = "auto",
    preview: Annotated[
        bool,
        Option("--preview", help="Only prepare the data and draw augmented patches with masks."),
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a segmentation model on scans and masks.

    Also trains a coarse first pass and a lesion classifier if the recipe asks for them. The
    weights with the best validation Dice are saved in a model folder with a model card. Ctrl-C
    stops and keeps the best model so far; --resume continues. With --time-budget, the
    learning-rate schedule ends within the budget.
    """
    with _progress("Starting") as show:
        from volseg import workflows  # takes seconds, so `show` must already be running

        report = workflows.train(
            dataset,
            recipe=recipe,
            plan=plan,
            out=out,
            time_budget_seconds=None if time_budget is None else _seconds(time_budget),
            spent_seconds=process_age(),
            memory=vram,
            epochs=epochs,
            patience=patience,
            resume=resume,
            init=init,
            freeze=freeze or (),
            fold=fold,
            folds=folds,
            devices=devices,
            precision=precision,
            preview=preview,
            device=device,
            seed=seed,
            progress=show,
            announce=_announce,
        )
    if "rank" in report.details:
        return  # under torchrun or SLURM, only rank 0 prints
    if report.details.get("interrupted"):
        if as_json:
            _print_json(
                {"out": str(report.out)} | dict(report.details) | {"exit_code": EXIT_INTERRUPTED}
            )
        else:
            _print_metrics(report)
        typer.echo("interrupted: this is the best model so far; add --resume to continue", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    _finish(
        report,
        as_json,
        lambda: _print_preview(report) if preview else _print_metrics(report),
        has_warned=True,
    )


@app.command()
def infer(
    scans: Annotated[
        list[Path], Argument(help="NIfTI files, folders of them, or tables of cases.")
    ],
    model: Annotated[
        Path | None,
        Option(help="Folder made by `volseg train`; default: the model that ships with volseg."),
    ] = None,
    out: Out = Path("volseg_results"),
    device: Device = "auto",
    backend: Annotated[
        str,
        Option(help="auto, torch or openvino; auto uses OpenVINO on a CPU if it is installed."),
    ] = "auto",
    precision: Annotated[
        str,
        Option(
            help="auto, fp32, fp16 (half precision, if the hardware supports it) or int8 "
            "(see `volseg quantise`); auto is fp16 on a GPU and fp32 on a CPU."
        ),
    ] = "auto",
    overlap: Annotated[
        float | None,
        Option(
            help="Overlap of neighbouring tiles, 0 to 0.9; default: the recipe's. "
            "0.5 takes 8 times as long as 0."
        ),
    ] = None,
    tta: Annotated[
        bool,
        Option(
            "--tta/--no-tta",
            help="Test-time augmentation: average over flipped copies if the recipe does; "
            "each axis doubles the time.",
        ),
    ] = True,
    inside: Annotated[
        str | None,
        Option(
            help="Where to run tiles: scan (everywhere) or body (its bounding box only); default: "
            "the recipe's. Either value skips the coarse first pass of a recipe with [roi]."
        ),
    ] = None,
    max_ram: MaxRam = None,
    max_vram: Annotated[str | None, Option(help="GPU memory limit, e.g. 8G.")] = None,
    fast: Annotated[
        bool,
        Option(
            "--fast",
            help="Resample linearly where the recipe says cubic: faster, slightly less accurate.",
        ),
    ] = False,
    accept_mismatch: Annotated[
        bool,
        Option(
            "--accept-mismatch",
            help="Also segment scans that differ in modality from the training scans, "
            "without density or class.",
        ),
    ] = False,
    figures: Figures = False,
    pages: Pages = True,
    as_json: Json = False,
) -> None:
    """Segment scans and measure every lesion.

    Writes masks, lesions.csv and cases.csv. Each mask has the voxel grid of its scan. A lesion is a
    group of connected voxels (26 neighbours) of one label; lesion 1 is the largest. A scan that
    cannot be used becomes a failed row with the reason; the others are still processed. A second
    call processes only scans that are missing or have changed. Masks that you corrected by hand are
    kept; `volseg measure RESULTS` measures them.
    """
    from volseg import workflows

    if model is None:
        _announce_shipped_model()
    with _progress() as show:
        report = workflows.infer(
            scans,
            model=model,
            out=out,
            device=device,
            backend=backend,
            precision=precision,
            overlap=overlap,
            tta=tta,
            inside=inside,
            fast=fast,
            max_ram=max_ram,
            max_vram=max_vram,
            accept_mismatch=accept_mismatch,
            figures=figures,
            pages=pages,
            progress=show,
            announce=_announce,
        )
    _finish(report, as_json, lambda: _print_results(report))


@app.command()
def quantise(
    model: Annotated[
        Path, Argument(help="Folder made by `volseg train`; the int8 network is added to it.")
    ],
    dataset: Annotated[
        Path,
        Argument(help="Dataset that the model was trained on, or its `volseg preprocess` folder."),
    ],
    cases: Annotated[
        int, Option(min=1, max=MAX_COUNT, help="Calibrate with at most this many training cases.")
    ] = 30,
    seed: Annotated[
        int,
        Option(min=0, max=MAX_SEED, help="Seed of training, which selected the validation cases."),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Add an int8 network to a model, for faster CPU inference.

    Use it with `volseg infer --precision int8`; it is slightly less accurate. Prints the change in
    Dice on the validation cases and stores it with the network. Needs volseg[cpu].
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.quantise(model, dataset, cases=cases, seed=seed, progress=show)
    _finish(report, as_json, lambda: _print_quantised(report))


@app.command()
def measure(
    results: Annotated[
        Path | None,
        Argument(help="Results of `volseg infer`; masks corrected by hand are measured again."),
    ] = None,
    image: Annotated[
        Path | None, Option(help="Scan on which the mask was drawn, or a folder of scans.")
    ] = None,
    mask: Annotated[
        Path | None,
        Option(help="Mask on the grid of the scan, or a folder of masks with equal file names."),
    ] = None,
    cases: Annotated[
        Path | None,
        Option(help="Table or dataset with scans and masks, instead of --image and --mask."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for the results (default: volseg_results); created if missing."),
    ] = None,
    objects: Annotated[
        str,
        Option(help="components: each connected part is a lesion. labels: each mask value is one."),
    ] = "components",
    label_names: Annotated[
        Path | None,
        Option(
            help="JSON object or CSV (columns label and name) that names the mask values; "
            "default: the table in the mask file."
        ),
    ] = None,
    unit: Annotated[
        str | None,
        Option(help="Unit of the intensities: HU, SUV or a.u.; default: guessed from the scan."),
    ] = None,
    recipe: Annotated[
        str | None, Option(help="Take label names, unit and [measure] settings from this recipe.")
    ] = None,
    organ: Annotated[
        str | None,
        Option(
            help="Label (name or value) of the organ that contains the lesions; "
            "`burden` is the fraction of its volume that they fill."
        ),
    ] = None,
    lymph_node: Annotated[
        list[str] | None,
        Option(help="Label of lymph nodes, measured along their short axis; repeatable."),
    ] = None,
    calcium: Annotated[
        bool, Option("--calcium", help="Also compute Agatston, volume and mass scores.")
    ] = False,
    max_ram: MaxRam = None,
    figures: Figures = False,
    pages: Pages = True,
    as_json: Json = False,
) -> None:
    """Measure the lesions in existing masks, without a model.

    Reports volume, density, shape, diameters and position of every lesion. Give --image and --mask,
    or --cases, or a results folder of `volseg infer` whose masks you corrected by hand.

    `volseg columns` explains each number and gives its source; `volseg selftest` checks the
    numbers against published values.
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.measure(
            results,
            image=image,
            mask=mask,
            cases=cases,
            out=out,
            objects=objects,
            label_names=None if label_names is None else workflows.read_label_names(label_names),
            intensity_unit=unit,
            recipe=recipe,
            organ=organ,
            lymph_nodes=lymph_node or (),
            calcium=calcium,
            figures=figures,
            pages=pages,
            max_ram=max_ram,
            progress=show,
            announce=_announce,
        )
    _finish(report, as_json, lambda: _print_results(report))


@app.command()
def evaluate(
    reference: Annotated[
        Path, Option(help="Folder of reference masks, or a dataset that has them as labels.")
    ],
    predicted: Annotated[
        Path, Option(help="Folder of predicted masks, or a results folder of `volseg infer`.")
    ],
    out: Out,
    min_iou: Annotated[
        float,
        Option(help="Minimum IoU of a detected lesion; at 0, one shared voxel is enough."),
    ] = 0.0,
    max_ram: MaxRam = None,
    as_json: Json = False,
) -> None:
    """Compare predicted masks with reference masks.

    Writes evaluation.csv (a row per case and label: Dice, IoU, HD95, surface Dice at 1 and 2 mm,
    volume error), detections.csv (a row per lesion, matched one to one), summary.json (means with
    95 % intervals over patients), agreement.png (Bland-Altman and correlation of volumes) and, for
    results of a model, froc.png. docs/evaluation.md defines each number.
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.evaluate(
            reference=reference,
            predicted=predicted,
            out=out,
            min_iou=min_iou,
            max_ram=max_ram,
            progress=show,
            announce=_announce,
        )
    _finish(report, as_json, lambda: _print_evaluation(report))


@app.command()
def compare(
    baseline: Annotated[
        Path, Argument(help="Results of `volseg infer` or `volseg measure` on the earlier scans.")
    ],
    followup: Annotated[Path, Argument(help="Results on the later scans.")],
    out: Annotated[
        Path, Option(help="Folder for comparison.csv and response.csv; created if missing.")
    ],
    pairs: Annotated[
        Path | None,
        Option(
            help="CSV with the columns patient, baseline and followup (case ids), one line per "
            "pair of scans; a patient may have several. Default: equal ids are the same patient."
        ),
    ] = None,
    baseline_scans: Annotated[
        Path | None, Option(help="Folder with the earlier scans, found by file name.")
    ] = None,
    followup_scans: Annotated[
        Path | None, Option(help="Folder with the later scans, found by file name.")
    ] = None,
    registration: Annotated[
        bool,
        Option(
            "--registration/--no-registration",
            help="Register the later scan to the earlier one, or rely on their world coordinates, "
            "which needs no scans.",
        ),
    ] = True,
    max_distance: Annotated[
        float,
        Option(
            help="Largest distance in mm between the centroids of two lesions that are matched "
            "although they do not overlap."
        ),
    ] = 10.0,
    lymph_node: Annotated[
        list[str] | None,
        Option(
            help="Label of lymph nodes, which count by their short axis; repeatable. "
            "Default: the labels measured as lymph nodes."
        ),
    ] = None,
    figures: Annotated[
        bool,
        Option(
            "--figures",
            help="Also write a PNG per patient: the lesion that changed most, at both times.",
        ),
    ] = False,
    max_ram: MaxRam = None,
    as_json: Json = False,
) -> None:
    """Match lesions at two time points and apply RECIST 1.1.

    Registers the later scan to the earlier one (rigidly), then matches lesions one to one, by
    overlap, else by distance. comparison.csv has a row per matched, new, gone, merged or split
    lesion; response.csv a row per patient with the rule that decided. Scans without a partner and
    patients that cannot be compared have a row too. A second call compares only what is missing
    or has changed.
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.compare(
            baseline,
            followup,
            out=out,
            pairs=pairs,
            baseline_scans=baseline_scans,
            followup_scans=followup_scans,
            registration=registration,
            max_distance_mm=max_distance,
            lymph_nodes=lymph_node or None,
            figures=figures,
            max_ram=max_ram,
            progress=show,
            announce=_announce,
        )
    _finish(report, as_json, lambda: _print_comparison(report))


@app.command()
def report(
    results: Annotated[
        Path, Argument(help="Results folder of `volseg infer` or `volseg measure`.")
    ],
    as_json: Json = False,
) -> None:
    """Rebuild report.html and the scan pages of a results folder.

    A scan that is no longer at its path keeps its earlier page, and report.html says so.
    """
    from volseg import workflows

    with _progress() as show:
        done = workflows.report(results, progress=show)
    _finish(
        done,
        as_json,
        lambda: typer.echo(f"{len(done.done)} pages written → {done.details['page']}"),
    )


@app.command("import-nnunet")
def import_nnunet(
    folder: Annotated[
        Path,
        Argument(
            help="Folder <trainer>__<plans>__<configuration> of a trained model, "
            "with plans.json, dataset.json and fold_*."
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the model.")],
    folds: Annotated[
        str | None,
        Option(help="Folds to use as an ensemble, e.g. 0,1,2 or all; default: every numbered one."),
    ] = None,
    checkpoint: Annotated[
        str, Option(help="Checkpoint file to take from each fold, e.g. checkpoint_best.pth.")
    ] = "checkpoint_final.pth",
    as_json: Json = False,
) -> None:
    """Convert a trained nnU-Net v2 model to a volseg model.

    Does not need nnU-Net. Run the result with `volseg infer --model MODEL`. Supports plain and
    residual-encoder U-Nets in 3D. Spacing, axes, normalisation, labels and test-time augmentation
    follow the model's plans; several folds become an ensemble. No code in the checkpoint is
    executed: a checkpoint that contains anything but weights is refused.
    """
    from volseg import workflows

    report = workflows.import_nnunet(
        folder, out=out, folds=None if folds is None else folds.split(","), checkpoint=checkpoint
    )
    _finish(report, as_json, lambda: _print_imported(report))


@app.command()
def check(
    path: Annotated[Path, Argument(help="Dataset, scan, recipe or model folder.")],
    recipe: Annotated[
        str | None,
        Option(
            help="Also check that the dataset has the channels and label values of this recipe."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List all problems of a dataset, scan, recipe or model.

    Each problem comes with its fix. The exit code is 0 if it can be used, 2 if something must be
    fixed.
    """
    from volseg import workflows

    problems = workflows.check(path, recipe)
    errors = [problem for problem in problems if problem["code"].startswith("E_")]
    if as_json:
        _print_json({"path": str(path), "problems": problems})
    else:
        for problem in problems:
            fix = f"; to fix: {problem['fix']}" if problem["fix"] else ""
            line = f"{problem['where']}: [{problem['code']}] {problem['problem']}{fix}"
            typer.echo(one_line(line))
        count = f"{len(errors)} problem{'s' * (len(errors) != 1)}" if problems else "no problem"
        typer.echo(one_line(f"{path}: {count} found"))
    raise typer.Exit(2 if errors else 0)


@app.command()
def columns(as_json: Json = False) -> None:
    """List every column of the tables that volseg writes.

    Each column has a unit, a meaning and, if it is not volseg's own, the source of its definition.
    """
    from volseg import workflows

    tables = workflows.table_columns()
    if as_json:
        keys = ("name", "unit", "meaning", "source")
        _print_json(
            {name: [dict(zip(keys, line)) for line in lines] for name, lines in tables.items()}
        )
        return
    for name, lines in tables.items():
        table = Table("column", "unit", "meaning", "source", title=name, title_justify="left")
        for line in lines:
            table.add_row(*line)
        _print_table(table)


@app.command()
def selftest(as_json: Json = False) -> None:
    """Check measurements against objects of known size.

    These are the IBSI digital phantom, balls, rods and a calcified plaque. The exit code is 0 if
    every number is within its tolerance, else 1: then do not trust the measurements of this
    installation.
    """
    from volseg import workflows

    checks = workflows.selftest()
    n_failed = sum(not check.is_passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.is_passed} for check in checks]
        _print_json({"failed": n_failed, "checks": rows})
    else:
        table = Table("body", "measure", "expected", "±", "measured", "")
        for check in checks:
            numbers = (f"{value:.6g}" for value in (check.expected, check.tolerance, check.found))
            verdict = "pass" if check.is_passed else "FAIL"
            table.add_row(check.body, check.measure, *numbers, verdict)
        _print_table(table)
        typer.echo(f"{len(checks) - n_failed} of {len(checks)} numbers are within their tolerance")
    raise typer.Exit(1 if n_failed else 0)


@contextmanager
def _progress(first_stage: str = "") -> Iterator[Callable[[str, float, str], None]]:
    """Yield a progress callback that draws a bar per stage, or logs lines, on stderr.

    Lines are for a stderr that is not a terminal. `first_stage` runs before the first call.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with _Lines(first_stage) as lines:
            yield lines.show
        return
    layout = (
        TextColumn("{task.description}", markup=False),  # a path such as a[/b] is not markup
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*layout, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, fraction: float, detail: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, detail="")
            elif fraction == 0:
                progress.reset(bars[stage])  # the remaining time is estimated from here
            progress.update(bars[stage], completed=fraction, detail=one_line(detail))

        yield show


class _Lines:
    """Progress for a log file: stage, percentage and remaining time, a few times a minute.

    As a context manager, it also reports a step that takes long and is still running.
    """

    def __init__(self, stage: str = "") -> None:
        self._stage, self._began, self._first = stage, time.monotonic(), 0.0
        self._last_line = self._last_update = self._began
        self._detail, self._is_over = "loading packages", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="volseg-progress", daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(1.0):
            now = time.monotonic()
            if self._stage and now - self._last_line >= SILENT_SECONDS:
                self._last_line = now
                waited = timedelta(seconds=round(now - self._last_update))
                _announce(f"{self._stage}: still running after {waited}, {self._detail}")

    def show(self, stage: str, fraction: float, detail: str) -> None:
        now = time.monotonic()
        self._last_update, self._detail = now, detail
        if stage != self._stage or fraction == 0:
            self._stage, self._began, self._first = stage, now, fraction
        if now - self._last_line < SECONDS_PER_LINE:
            return
        self._last_line = now
        gained = fraction - self._first  # an earlier call may have done part of the stage
        seconds = round((now - self._began) * (1 - fraction) / gained) if gained > 0 else None
        left = "" if seconds is None else f", {timedelta(seconds=seconds)} left"
        _announce(f"{stage}: {fraction:.0%}{left}, {detail}")


def _finish(
    report: RunReport, as_json: bool, show: Callable[[], None], *, has_warned: bool = False
) -> None:
    """Print the report and, unless `has_warned`, its warnings; exit with its exit code."""
    if as_json:
        content = {
            "out": str(report.out),
            "done": list(report.done),
            "kept": list(report.kept),
            "failed": dict(report.failed),
        }
        _print_json(content | dict(report.details) | {"exit_code": report.exit_code})
    else:
        show()
        for warning in () if has_warned else report.details.get("warnings", ()):
            typer.echo(one_line(f"warning: {warning}"), err=True)
        for case, reason in report.failed.items():
            typer.echo(one_line(f"failed: {case}: {reason}"), err=True)
    raise typer.Exit(report.exit_code)


def _print_results(report: RunReport) -> None:
    typer.echo(f"{len(report.done)} done{_kept(report)}, {len(report.failed)} failed")
    if "computed_with" in report.details:
        computed = report.details["computed_with"]
        typer.echo(f"computed with: {computed['backend']}, {computed['precision']}")
    if report.details["objects"] == "components":
        typer.echo("lesions: connected components of each label, 26 neighbours, 1 = largest")
    else:
        typer.echo("lesions: one per mask value, in ascending order")
    pages = ("report.html",) if report.details["pages"] else ()
    for name in ("lesions.csv", "cases.csv", *pages):
        typer.echo(f"  {report.out / name}")


def _kept(report: RunReport) -> str:
    return f", {len(report.kept)} already complete" if report.kept else ""


def _print_fingerprint(report: RunReport) -> None:
    fingerprint: Mapping[str, Any] = report.details["fingerprint"]
    spacing = " × ".join(f"{value:g}" for value in fingerprint["median_spacing_mm"])
    shape = " × ".join(str(value) for value in fingerprint["median_shape"])
    target = " × ".join(f"{value:g}" for value in fingerprint["resampled_to_mm"])
    typer.echo(
        f"{fingerprint['n_cases']} training cases; median spacing {spacing} mm, "
        f"median shape {shape} (R × A × S)"
    )
    for channel, values in fingerprint["foreground"].items():
        text = (
            f"{channel} in labelled voxels: mean {values['mean']:.4g}, "
            f"standard deviation {values['sd']:.4g}, "
            f"0.5 to 99.5 percentile {values['p00_5']:.4g} to {values['p99_5']:.4g}"
        )
        typer.echo(one_line(text))
    voxels = ", ".join(f"{label}: {count}" for label, count in fingerprint["label_voxels"].items())
    typer.echo(one_line(f"voxels per label: {voxels}; resampled to {target} mm"))
    typer.echo(f"{len(report.done)} prepared{_kept(report)} → {report.out}")


def _print_plan(report: RunReport, out: Path | None) -> None:
    table = Table("setting", "value", "why")
    for line in report.details["plan"]["lines"]:
        table.add_row(*(one_line(line[name]) for name in ("setting", "value", "reason")))
    _print_table(table)
    if out is not None:
        typer.echo(f"plan → {out}")


def _print_preview(report: RunReport) -> None:
    typer.echo(f"augmented patches with their masks → {report.details['preview']}")


def _print_metrics(report: RunReport) -> None:
    for name, value in report.details["metrics"].items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"model → {report.out}")


def _print_quantised(report: RunReport) -> None:
    validation, seconds = report.details["validation"], report.details["seconds_per_patch"]
    headings = (one_line(f"Dice {label}") for label in validation["dice"])
    table = Table("precision", *headings, "s per patch", "× as fast")
    for name in seconds:
        scores = (
            ""
            if values[name] is None
            else f"{values[name]:.4f} ({values[name] - values['fp32']:+.4f})"
            for values in validation["dice"].values()
        )
        table.add_row(
            name, *scores, f"{seconds[name]:.3g}", f"{seconds['fp32'] / seconds[name]:.1f}"
        )
    _print_table(table)
    typer.echo(f"mean over {validation['cases']} validation cases; seconds on this machine")
    typer.echo(f"int8 network → {report.out}; use it with `volseg infer --precision int8`")


def _print_imported(report: RunReport) -> None:
    for name, value in report.details["model"].items():
        typer.echo(one_line(f"{name}: {value}"))
    typer.echo(f"model → {report.out}")


def _print_evaluation(report: RunReport) -> None:
    shown = {  # column of evaluation.csv → its heading and the decimals of an interval
        "dice": ("Dice", 2),
        "hd95_mm": ("HD95 mm", 1),
        "nsd_1mm": ("NSD 1 mm", 2),
        "nsd_2mm": ("NSD 2 mm", 2),
        "volume_error_ml": ("volume mL", 1),
    }
    headings = ["label", *(heading for heading, _ in shown.values()), "lesion F1"]
    table = Table(*headings, box=SIMPLE, padding=(0, 1, 0, 0))
    labels = report.details["labels"].values()
    for label in labels:
        cells = [
            _mean_and_interval(label["metrics"][name], decimals)
            for name, (_, decimals) in shown.items()
        ]
        heading = f"{one_line(label['name'])}\nn = {label['n']}"
        table.add_row(heading, *cells, _mean_and_interval(label["detection"]["f1"], 2))
    _print_table(table)
    typer.echo(
        f"means with 95 % intervals over {report.details['n_patients']} patients "
        f"({report.details['patients']}); volume mL: predicted − reference"
    )
    for reason in _reasons_without_interval(labels, shown):
        typer.echo(f"(none): no interval; {reason}")
    n_missed = {label["name"]: label["n_missed"] for label in labels if label["n_missed"]}
    for name, n in n_missed.items():
        _announce(f"{name}: missed in {n} cases, which have no HD95")
    missing = report.details["not_predicted"]
    if missing:
        _announce(f"{len(missing)} reference masks have no prediction, such as {missing[0]}")
    for name, content in (
        ("evaluation.csv", "a row per case and label"),
        ("detections.csv", "a row per lesion"),
        ("summary.json", "every mean, interval and limit of agreement"),
        ("agreement.png", "Bland-Altman and correlation of volumes"),
        ("froc.png", "sensitivity against false positives per scan"),
    ):
        if (report.out / name).is_file():
            typer.echo(f"{content} → {report.out / name}")


def _mean_and_interval(metric: Mapping[str, Any], decimals: int) -> str:
    """Format a mean above its interval; an unknown mean is empty."""
    if metric["mean"] is None:
        return ""
    if metric["mean_95"] is None:
        interval = "(none)"
    else:
        interval = "({:.{d}f}, {:.{d}f})".format(*metric["mean_95"], d=decimals)
    return f"{metric['mean']:.{decimals + 1}f}\n{interval}"


def _reasons_without_interval(
    labels: Iterable[Mapping[str, Any]], metrics: Iterable[str]
) -> list[str]:
    """Return the distinct reasons why means of the table have no interval."""
    means = [
        mean
        for label in labels
        for mean in (*(label["metrics"][name] for name in metrics), label["detection"]["f1"])
    ]
    return sorted({mean["no_mean_95"] for mean in means if mean["mean"] is not None} - {""})


def _print_comparison(report: RunReport) -> None:
    statuses = ("new", "gone", "merged", "split")
    headings = ("patient", "response", "sum %", *statuses, "volume %")
    table = Table(*headings, title="RECIST 1.1")
    for row in report.details["patients"]:
        if row["status"] != "done":
            continue
        counts = (str(row[f"n_{status}"]) for status in statuses)
        sums, volume = (
            "" if row[name] is None else f"{row[name]:+.1f}"
            for name in ("change_sum_percent", "change_volume_percent")
        )
        table.add_row(one_line(row["patient"]), row["response"] or "", sums, *counts, volume)
    _print_table(table)
    typer.echo("sum: of the target diameters; response.csv has the deciding rule for each patient")
    for patient, reason in report.details["unpaired"].items():
        typer.echo(f"unpaired: {patient}: {reason}", err=True)
    typer.echo(
        f"{len(report.done)} compared{_kept(report)}, {len(report.failed)} failed, "
        f"{len(report.details['unpaired'])} without a partner"
    )
    for name in ("comparison.csv", "response.csv", "report.html"):
        typer.echo(f"  {report.out / name}")


def _announce_shipped_model() -> None:
    from volseg import workflows

    name, use, limits = workflows.shipped_model()
    _announce(f"using the model that ships with volseg: {name}. For: {use} Limits: {limits}")


def _print_table(table: Table) -> None:
    """Print a table of plain text, as a label may be named `[/b]` or `:x:`."""
    Console(markup=False, emoji=False).print(table)


def _announce(text: str) -> None:
    typer.echo(one_line(text), err=True)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, ensure_ascii=not takes_unicode()))


def _seconds(text: str) -> float:
    """Parse `90s`, `20m`, `1.5h` or plain seconds into seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise VolsegError(
            f"--time-budget must be a duration over 0, got {text!r}",
            fix="write it like 90s, 20m or 1.5h",
            code="E_USAGE",
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _fail(error: VolsegError) -> None:
    with suppress(OSError):  # stderr may be full too
        typer.echo(one_line(f"error: [{error.code}] {error}"), err=True)
    sys.exit(error.exit_code)
