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
SILENT_SECONDS = 20  # after which a line says that something is not over yet
SECONDS_PER_LINE = 15  # of progress, where stderr is no terminal

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")
]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if it is not there.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu or cuda; auto takes the GPU where there is one.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seed of everything random: same seed, same batches."),
]
Figures = Annotated[
    bool, typer.Option("--figures", help="Also write a PNG per scan with its lesions outlined.")
]
Pages = Annotated[
    bool,
    typer.Option(
        "--report/--no-report",
        help="Write report.html and a page per scan that shows its lesions, or do not.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory that training may take, such as 8G: the GPU's, or the host's on a CPU."
    ),
]
TimeBudget = Annotated[
    str | None,
    typer.Option(
        help="Such as 90s, 20m or 1.5h: of everything, and the learning rate ends with it."
    ),
]
Folds = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=20,
        help="Train so many networks, each validated on its share of the patients, as an ensemble.",
    ),
]
DATASET_HELP = "A CSV table, a folder with cases.csv or with images/ and labels/, or an nnU-Net raw or Decathlon folder."


def main() -> None:
    """Run the command that `sys.argv` names."""
    try:
        with printing():
            _run()
    except VolsegError as error:  # of stdout itself
        _fail(error)


def _run() -> None:
    """Run the command that was asked for, and turn what ends it into a line and an exit code."""
    try:
        app(standalone_mode=True)
    except VolsegError as error:
        _fail(error)
    except (OSError, MemoryError) as error:
        _fail(problem_of(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def volseg(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Turn 3D CT and MRI scans into lesions, and lesions into numbers that a study can defend.

    Start with `volseg infer scan.nii.gz`, which uses the model that ships with volseg, or train your own with
    `volseg train DATASET --recipe RECIPE --out MODEL`. Every command has its own --help.
    """


@app.command()
def preprocess(
    dataset: Annotated[Path, typer.Argument(help=DATASET_HELP)],
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(help="A TOML file or a shipped name; without one everything is planned."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A file of `volseg plan --out`, edited or not.")
    ] = None,
    vram: Memory = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Resample, crop and normalise a dataset once, so that training starts at once.

    Writes memory-mapped arrays and a JSON per case, and prints the dataset's fingerprint. Cases of the test split are left
    alone. A second call prepares only what is missing or has changed. Where the recipe leaves the network and its patches to the plan, --vram
    says what training may take.
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
    dataset: Annotated[Path, typer.Argument(help=DATASET_HELP)],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A TOML file or a shipped name, whose values stay; without one all is planned."
        ),
    ] = None,
    vram: Memory = None,
    time_budget: TimeBudget = None,
    folds: Folds = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSON file for the plan, which `volseg train --plan` takes."),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say what training would do with a dataset, with a reason per line: spacing, intensities, patches, network.

    Nothing is trained and nothing prepared. With --out the plan becomes a JSON file that may be edited and passed back.
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
        Path, typer.Argument(help=f"{DATASET_HELP} Or a folder made by `volseg preprocess`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A TOML file or a shipped name; a prepared folder brings its own. Without one everything is planned and cross-validated."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A file of `volseg plan --out`, edited or not.")
    ] = None,
    time_budget: TimeBudget = None,
    vram: Memory = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Instead of the recipe's number.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Stop after so many epochs without a better Dice."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run in --out stopped.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option(help="A model folder whose weights to start from.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of layers that stay as they are, such as 'downsamples.*'; may be repeated."
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            min=0, max=4, help="Validate on this fifth of the patients, train on the others."
        ),
    ] = None,
    folds: Folds = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            help="GPUs, or processes on a CPU, that share each batch; torchrun and SLURM set the number themselves.",
        ),
    ] = 1,
    precision: Annotated[
        str,
        typer.Option(
            help="auto, fp32 or half; auto is half (bfloat16) on GPUs and on CPUs with instructions for it."
        ),
    ] = "auto",
    preview: Annotated[
        bool,
        typer.Option(
            "--preview", help="Only prepare the data and draw augmented patches with their masks."
        ),
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a segmentation model, and a coarse first pass and a classifier where the recipe asks for them.

    The weights with the best validation Dice become a model folder with a card to read. Ctrl-C ends with the best model so far; add
    --resume to go on. With --time-budget the learning rate falls to its end within the budget.
    """
    with _progress("Starting") as show:
        from volseg import workflows  # takes seconds, in which a line is due too

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
        return  # under torchrun or SLURM rank 0 speaks for all
    if report.details.get("interrupted"):
        if as_json:
            _print_json(
                {"out": str(report.out)} | dict(report.details) | {"exit_code": EXIT_INTERRUPTED}
            )
        else:
            _print_metrics(report)
        typer.echo("interrupted: this is the best model so far; add --resume to go on", err=True)
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
        list[Path], typer.Argument(help="NIfTI files, folders of them, or tables of cases.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder made by `volseg train`; without it the model that ships with volseg."
        ),
    ] = None,
    out: Out = Path("volseg_results"),
    device: Device = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="auto, torch or openvino; auto takes openvino on a CPU where it is installed."
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="auto, fp32, fp16 (half precision, where the chip has it) or int8 (see `volseg quantise`); "
            "auto is fp16 on a GPU and fp32 on a CPU."
        ),
    ] = "auto",
    overlap: Annotated[
        float | None,
        typer.Option(
            help="Overlap of tiles, from 0 to 0.9, instead of the recipe's; 0.5 takes 8 times as long as 0."
        ),
    ] = None,
    tta: Annotated[
        bool,
        typer.Option(
            "--tta/--no-tta",
            help="Test-time augmentation: average over flipped copies if the recipe does; each axis doubles the time.",
        ),
    ] = True,
    inside: Annotated[
        str | None,
        typer.Option(
            help="Where tiles are run, instead of the recipe's choice: scan (everywhere), or only in the box of the body. "
            "Either one leaves out the coarse first pass of a recipe with [roi]."
        ),
    ] = None,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Budget of main memory, such as 4G; a scan that does not fit becomes a failed row."
        ),
    ] = None,
    max_vram: Annotated[
        str | None, typer.Option(help="Budget of the GPU's memory, such as 8G.")
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Resample linearly where the recipe says cubic: quicker, a little less exact.",
        ),
    ] = False,
    accept_mismatch: Annotated[
        bool,
        typer.Option(
            "--accept-mismatch",
            help="Also segment scans of another modality than in training, without density or class.",
        ),
    ] = False,
    figures: Figures = False,
    pages: Pages = True,
    as_json: Json = False,
) -> None:
    """Segment scans and measure every lesion: masks, lesions.csv, cases.csv.

    Masks come back on the scan's own grid. Connected voxels (26 neighbours) of one label are one lesion; lesion 1 is the
    largest. A scan that cannot be used becomes a failed row with its reason and does not stop the others. A second call does
    only what is missing or has changed. A mask corrected by hand is kept; `volseg measure RESULTS` measures it.
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
        Path, typer.Argument(help="Folder made by `volseg train`; the int8 network is put into it.")
    ],
    dataset: Annotated[
        Path,
        typer.Argument(
            help="The dataset that it was trained on, or the folder `volseg preprocess` made of it."
        ),
    ],
    cases: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Training cases to look at, at most.")
    ] = 30,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="The seed of training, which drew the validation cases."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make an int8 copy of a model's network for `volseg infer --precision int8`: faster on a CPU, a little less accurate.

    Prints the Dice that it costs on the validation cases and stores it beside the copy. Needs volseg[cpu].
    """
    from volseg import workflows

    with _progress() as show:
        report = workflows.quantise(model, dataset, cases=cases, seed=seed, progress=show)
    _finish(report, as_json, lambda: _print_quantised(report))


@app.command()
def measure(
    results: Annotated[
        Path | None,
        typer.Argument(
            help="Results of `volseg infer`; masks in it that were corrected by hand are measured again."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The scan that the mask was drawn on, or a folder of scans.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Its mask, on the same grid, or a folder of masks with equal file names."
        ),
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(help="Instead of a pair: a table or dataset with scans and masks."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results, by default volseg_results; made if it is not there."
        ),
    ] = None,
    objects: Annotated[
        str,
        typer.Option(
            help="components: each connected part is a lesion. labels: each value of the mask is one."
        ),
    ] = "components",
    label_names: Annotated[
        Path | None,
        typer.Option(
            help="JSON object or CSV (columns label and name) that names the mask's values; else the table in the mask's file."
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="Unit of the intensities: HU, SUV, a.u.; guessed from the scan otherwise."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe whose label names, unit and [measure] section hold."),
    ] = None,
    organ: Annotated[
        str | None,
        typer.Option(
            help="Label (name or value) of the organ round the lesions; `burden` is their share."
        ),
    ] = None,
    lymph_node: Annotated[
        list[str] | None,
        typer.Option(
            help="Label of lymph nodes, measured along their short axis; may be repeated."
        ),
    ] = None,
    calcium: Annotated[
        bool, typer.Option("--calcium", help="Agatston, volume and mass score, too.")
    ] = False,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Budget of main memory, such as 4G; a pair that may not fit becomes a failed row."
        ),
    ] = None,
    figures: Figures = False,
    pages: Pages = True,
    as_json: Json = False,
) -> None:
    """Measure masks on their scans, without any model: volume, density, form, diameters, position of every lesion.

    Give --image and --mask, or --cases, or a results folder of `volseg infer` whose masks were corrected by hand.

    `volseg columns` says what each number means and where its definition comes from; `volseg selftest` checks them against
    published values.
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
        Path, typer.Option(help="Folder of reference masks, or a dataset whose labels they are.")
    ],
    predicted: Annotated[
        Path, typer.Option(help="Folder of masks, or a results folder of `volseg infer`.")
    ],
    out: Out,
    min_iou: Annotated[
        float,
        typer.Option(
            help="Overlap from which a lesion counts as found; 0: one common voxel is enough."
        ),
    ] = 0.0,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Budget of main memory, such as 4G; a pair that may not fit becomes a failed row."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare predicted masks with reference masks: overlap, surface distances, volumes and which lesions were found.

    Writes evaluation.csv (a row per case and label: Dice, IoU, HD95, surface Dice at 1 and 2 mm, volume error), detections.csv (a row
    per lesion, matched one to one), summary.json (means with 95 % intervals over patients), agreement.png (Bland-Altman and
    correlation of volumes) and, for the results of a model, froc.png. docs/evaluation.md defines each number.
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
        Path,
        typer.Argument(help="Results of `volseg infer` or `volseg measure` on the earlier scans."),
    ],
    followup: Annotated[Path, typer.Argument(help="Results on the later scans.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder for comparison.csv and response.csv; made if it is not there."),
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="A CSV with columns patient, baseline and followup, which hold case ids: a line per pair of scans, several lines for a patient with "
            "several scans at a time; without it the same id is the same patient."
        ),
    ] = None,
    baseline_scans: Annotated[
        Path | None,
        typer.Option(help="Folder in which to look for the earlier scans by their file names."),
    ] = None,
    followup_scans: Annotated[
        Path | None,
        typer.Option(help="Folder in which to look for the later scans by their file names."),
    ] = None,
    registration: Annotated[
        bool,
        typer.Option(
            "--registration/--no-registration",
            help="Find out how the patient lies in the later scan, or take world coordinates as they are, which needs no scans.",
        ),
    ] = True,
    max_distance: Annotated[
        float,
        typer.Option(
            help="Largest distance in mm of the centroids of two lesions that do not overlap and are still one."
        ),
    ] = 10.0,
    lymph_node: Annotated[
        list[str] | None,
        typer.Option(
            help="Label of lymph nodes, which count by their short axis; may be repeated. Without it those that were measured as such."
        ),
    ] = None,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures",
            help="Also write a PNG per patient of the lesion that changed most, at both times.",
        ),
    ] = False,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Budget of main memory, such as 4G; a patient who may not fit becomes a failed row."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the lesions of patients at two time points: what became of each, and the response by RECIST 1.1.

    The later scan is registered to the earlier one (rigidly), then lesions are matched one to one, by overlap and else by distance. comparison.csv
    has a row per pair, new, gone, merged or split lesion; response.csv a row per patient, with the rule that decided. A scan without a
    partner and a patient who cannot be compared are rows too. A second call does only what is missing or has changed.
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
        Path, typer.Argument(help="The --out folder of `volseg infer` or `volseg measure`.")
    ],
    as_json: Json = False,
) -> None:
    """Make report.html and the page of each scan again from a results folder.

    A scan that is no longer where it was keeps its earlier page, and report.html says so.
    """
    from volseg import workflows

    with _progress() as show:
        done = workflows.report(results, progress=show)
    _finish(
        done, as_json, lambda: typer.echo(f"{len(done.done)} pages made → {done.details['page']}")
    )


@app.command("import-nnunet")
def import_nnunet(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A trained <trainer>__<plans>__<configuration>, with plans.json, dataset.json and fold_*."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    folds: Annotated[
        str | None,
        typer.Option(help="Such as 0,1,2 or all; without it every numbered fold, as one ensemble."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Which of a fold's checkpoints, such as checkpoint_best.pth.")
    ] = "checkpoint_final.pth",
    as_json: Json = False,
) -> None:
    """Make a volseg model of a trained nnU-Net v2 model, without nnU-Net: then `volseg infer --model MODEL` runs it.

    Plain and residual-encoder U-Nets in 3D. Spacing, axes, normalisation, labels and test-time augmentation are those of its plans; several
    folds become an ensemble. Nothing in the checkpoint is run: one that asks for other objects than weights is refused.
    """
    from volseg import workflows

    report = workflows.import_nnunet(
        folder, out=out, folds=None if folds is None else folds.split(","), checkpoint=checkpoint
    )
    _finish(report, as_json, lambda: _print_imported(report))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A dataset, a scan, a recipe or a model folder.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="For which a dataset is to be fit: its channels and label values are looked at too."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Report every problem of a dataset, scan, recipe or model at once, each with its fix.

    Exit code 0 if it can be used, 2 if something has to be mended.
    """
    from volseg import workflows

    problems = workflows.check(path, recipe)
    errors = [problem for problem in problems if problem["code"].startswith("E_")]
    if as_json:
        _print_json({"path": str(path), "problems": problems})
    for problem in [] if as_json else problems:
        fix = f"; to fix: {problem['fix']}" if problem["fix"] else ""
        typer.echo(one_line(f"{problem['where']}: [{problem['code']}] {problem['problem']}{fix}"))
    if not as_json:
        typer.echo(
            one_line(
                f"{path}: {len(errors)} problem{'s' * (len(errors) != 1)} found"
                if problems
                else f"{path}: no problem found"
            )
        )
    raise typer.Exit(2 if errors else 0)


@app.command()
def columns(as_json: Json = False) -> None:
    """List every column of the tables that volseg writes, with its unit, its meaning and where its definition comes from."""
    from volseg import workflows

    tables = workflows.table_columns()
    if as_json:
        _print_json(
            {
                name: [dict(zip(("name", "unit", "meaning", "source"), line)) for line in lines]
                for name, lines in tables.items()
            }
        )
        return
    for name, lines in tables.items():
        table = Table("column", "unit", "meaning", "source", title=name, title_justify="left")
        for line in lines:
            table.add_row(*line)
        _print_table(table)


@app.command()
def selftest(as_json: Json = False) -> None:
    """Measure bodies whose measures are known, and compare: the IBSI digital phantom, balls, rods and a calcified plaque.

    Exit code 0 if every number lies within its tolerance, else 1: then do not trust the numbers of this installation.
    """
    from volseg import workflows

    checks = workflows.selftest()
    n_failed = sum(not check.is_passed for check in checks)
    if as_json:
        _print_json(
            {
                "failed": n_failed,
                "checks": [asdict(check) | {"passed": check.is_passed} for check in checks],
            }
        )
    else:
        table = Table("body", "measure", "expected", "±", "found", "")
        for check in checks:
            numbers = (f"{value:.6g}" for value in (check.expected, check.tolerance, check.found))
            table.add_row(
                check.body, check.measure, *numbers, "pass" if check.is_passed else "FAIL"
            )
        _print_table(table)
        typer.echo(f"{len(checks) - n_failed} of {len(checks)} measures lie within their tolerance")
    raise typer.Exit(1 if n_failed else 0)


@contextmanager
def _progress(first: str = "") -> Iterator[Callable[[str, float, str], None]]:
    """A progress callback that draws a bar per stage on stderr; where that is no terminal, a line from time to time.

    `first` is what goes on before the first call.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with _Lines(first) as lines:
            yield lines.show
        return
    shape = (
        TextColumn("{task.description}", markup=False),  # a path such as a[/b] is no markup
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*shape, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, share: float, detail: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, detail="")
            elif share == 0:
                progress.reset(bars[stage])  # what is left is reckoned from this beginning
            progress.update(bars[stage], completed=share, detail=one_line(detail))

        yield show


class _Lines:
    """Progress for the log of a job: what goes on, how far it is and how long it will still take, some times a minute.

    With `with`, a line also says that a step is not over yet where it takes long.
    """

    def __init__(self, stage: str = "") -> None:
        self._stage, self._began, self._first = stage, time.monotonic(), 0.0
        self._said = self._heard = self._began
        self._detail, self._over = "loading packages", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="volseg-progress", daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic()
            if self._stage and now - self._said >= SILENT_SECONDS:
                self._said = now
                waited = timedelta(seconds=round(now - self._heard))
                _announce(f"{self._stage}: still running after {waited}, {self._detail}")

    def show(self, stage: str, share: float, detail: str) -> None:
        now = time.monotonic()
        self._heard, self._detail = now, detail
        if stage != self._stage or share == 0:
            self._stage, self._began, self._first = stage, now, share
        if now - self._said < SECONDS_PER_LINE:
            return
        self._said = now
        gained = share - self._first  # a stage may begin with what an earlier call did of it
        seconds = round((now - self._began) * (1 - share) / gained) if gained > 0 else None
        left = "" if seconds is None else f", {timedelta(seconds=seconds)} left"
        _announce(f"{stage}: {share:.0%}{left}, {detail}")


def _finish(
    report: RunReport, as_json: bool, show: Callable[[], None], *, has_warned: bool = False
) -> None:
    """Print what was done, and warnings that were not printed yet, and leave with the report's exit code."""
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
    kept = f", {len(report.kept)} were complete already" if report.kept else ""
    typer.echo(f"{len(report.done)} done{kept}, {len(report.failed)} failed")
    if "computed_with" in report.details:
        computed = report.details["computed_with"]
        typer.echo(f"computed with: {computed['backend']}, {computed['precision']}")
    if report.details["objects"] == "components":
        typer.echo("lesions: connected components of each label, 26 neighbours, 1 = largest")
    else:
        typer.echo("lesions: one per value of the mask, in ascending order")
    for name in (
        "lesions.csv",
        "cases.csv",
        *(("report.html",) if report.details["pages"] else ()),
    ):
        typer.echo(f"  {report.out / name}")


def _print_fingerprint(report: RunReport) -> None:
    found: Mapping[str, Any] = report.details["fingerprint"]
    spacing = " × ".join(f"{value:g}" for value in found["median_spacing_mm"])
    shape = " × ".join(str(value) for value in found["median_shape"])
    wanted = " × ".join(f"{value:g}" for value in found["resampled_to_mm"])
    typer.echo(
        f"{found['n_cases']} training cases; median spacing {spacing} mm, median shape {shape} (R × A × S)"
    )
    for channel, values in found["foreground"].items():
        text = (
            f"{channel} under the labels: mean {values['mean']:.4g}, deviation {values['sd']:.4g}, "
            f"0.5 to 99.5 percentile {values['p00_5']:.4g} to {values['p99_5']:.4g}"
        )
        typer.echo(one_line(text))
    voxels = ", ".join(f"{label}: {count}" for label, count in found["label_voxels"].items())
    typer.echo(one_line(f"voxels per label: {voxels}; resampled to {wanted} mm"))
    typer.echo(
        f"{len(report.done)} prepared, {len(report.kept)} were complete already → {report.out}"
    )


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
    for found in report.details["labels"].values():
        cells = [
            _mean_and_interval(found["metrics"][name], decimals)
            for name, (_, decimals) in shown.items()
        ]
        named = f"{one_line(found['name'])}\nn = {found['n']}"
        table.add_row(named, *cells, _mean_and_interval(found["detection"]["f1"], 2))
    _print_table(table)
    typer.echo(
        f"means with 95 % intervals over {report.details['n_patients']} patients ({report.details['patients']}); "
        "volume mL: predicted − reference"
    )
    for reason in _reasons_without_interval(report.details["labels"].values(), shown):
        typer.echo(f"(none): no interval; {reason}")
    without = {
        found["name"]: found["n_missed"]
        for found in report.details["labels"].values()
        if found["n_missed"]
    }
    for name, n in without.items():
        _announce(f"{name}: missed in {n} cases, which have no HD95")
    missing = report.details["not_predicted"]
    if missing:
        _announce(f"{len(missing)} reference masks have no prediction, such as {missing[0]}")
    for name, what in (
        ("evaluation.csv", "a row per case and label"),
        ("detections.csv", "a row per lesion"),
        ("summary.json", "every mean, interval and limit of agreement"),
        ("agreement.png", "Bland-Altman and correlation of volumes"),
        ("froc.png", "sensitivity against false positives per scan"),
    ):
        if (report.out / name).is_file():
            typer.echo(f"{what} → {report.out / name}")


def _mean_and_interval(found: Mapping[str, Any], decimals: int) -> str:
    """A mean over its interval; nothing where it is unknown."""
    if found["mean"] is None:
        return ""
    if found["mean_95"] is None:
        low_and_high = "(none)"
    else:
        low_and_high = "({:.{d}f}, {:.{d}f})".format(*found["mean_95"], d=decimals)
    return f"{found['mean']:.{decimals + 1}f}\n{low_and_high}"


def _reasons_without_interval(
    labels: Iterable[Mapping[str, Any]], metrics: Iterable[str]
) -> list[str]:
    """Why means of the table have no interval, each reason once."""
    means = [
        mean
        for label in labels
        for mean in (*(label["metrics"][name] for name in metrics), label["detection"]["f1"])
    ]
    return sorted({mean["no_mean_95"] for mean in means if mean["mean"] is not None} - {""})


def _print_comparison(report: RunReport) -> None:
    table = Table(
        "patient",
        "response",
        "sum %",
        "new",
        "gone",
        "merged",
        "split",
        "volume %",
        title="RECIST 1.1",
    )
    for row in report.details["patients"]:
        if row["status"] != "done":
            continue
        counts = (str(row[f"n_{status}"]) for status in ("new", "gone", "merged", "split"))
        sums, volume = (
            "" if row[name] is None else f"{row[name]:+.1f}"
            for name in ("change_sum_percent", "change_volume_percent")
        )
        table.add_row(one_line(row["patient"]), row["response"] or "", sums, *counts, volume)
    _print_table(table)
    typer.echo(
        "sum: of the target diameters; response.csv holds the rule that decided for each patient"
    )
    for patient, reason in report.details["unpaired"].items():
        typer.echo(f"unpaired: {patient}: {reason}", err=True)
    kept = f", {len(report.kept)} were complete already" if report.kept else ""
    alone = len(report.details["unpaired"])
    typer.echo(
        f"{len(report.done)} compared{kept}, {len(report.failed)} failed, {alone} without a partner"
    )
    for name in ("comparison.csv", "response.csv", "report.html"):
        typer.echo(f"  {report.out / name}")


def _announce_shipped_model() -> None:
    from volseg import workflows

    name, use, limits = workflows.shipped_model()
    typer.echo(
        f"using the model that ships with volseg: {name}. For: {use} Limits: {limits}", err=True
    )


def _print_table(table: Table) -> None:
    """Print a table whose cells are plain text: a label may be called `[/b]` or `:x:`."""
    Console(markup=False, emoji=False).print(table)


def _announce(text: str) -> None:
    typer.echo(one_line(text), err=True)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, ensure_ascii=not takes_unicode()))


def _seconds(text: str) -> float:
    """`90s`, `20m`, `1.5h` or plain seconds → seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise VolsegError(
            f"time budget {text!r} is not a duration",
            fix="write it like 90s, 20m or 1.5h",
            code="E_USAGE",
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _fail(error: VolsegError) -> None:
    with suppress(OSError):  # stderr may be full too
        typer.echo(one_line(f"error: [{error.code}] {error}"), err=True)
    sys.exit(error.exit_code)
