"""Settings of the commands that make models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from volseg.options.declare import (
    Options,
    Range,
    amount,
    argument,
    callback,
    input_path,
    input_paths,
    listed_names,
    names,
    option,
    optional_input_path,
    optional_path,
    options,
    path,
    seconds,
)
from volseg.options.shared import (
    COUNT,
    DATASET,
    RESULTS,
    SEED,
    Announcing,
    OnDevice,
    Progressing,
    Seeded,
    Tilted,
)

if TYPE_CHECKING:
    from volseg.recipe import AnyRecipe


MAX_FOLDS = 20


@options
class CasesOptions(Options):
    """List which scans and masks belong together, as a table.

    Goes by the names of files and folders: images/ and labels/, one folder per patient, BIDS,
    nnU-Net, channels such as P1_t1 and P1_flair, masks such as P1_seg. The column `why` says how
    each case was recognised. Look at the table, edit it, and pass it to any other command.
    """

    folders: tuple[Path, ...] = argument("Folders of scans and masks.", converter=input_paths)
    out: Path = option(
        "CSV file to write; an existing one is not replaced.",
        default=Path("cases.csv"),
        converter=path,
        short="-o",
    )


@options
class PlanningOptions(OnDevice, Seeded, Tilted):
    """What planning needs."""

    memory: int | None = option(
        "Memory limit for training, e.g. 8G: GPU memory, or main memory on a CPU.",
        default=None,
        converter=amount,
        flag="--vram",
    )
    recipe: Path | str | AnyRecipe | None = option(
        "TOML file, such as a plan, or name of a shipped recipe; without it, everything is "
        "planned.",
        default=None,
        kind=str,
    )
    target: str | None = option(
        "Column to predict from images if there is no recipe; it holds classes, labels or numbers.",
        default=None,
    )


@options
class TimedOptions(PlanningOptions):
    time_budget_seconds: float | None = option(
        "Time limit for the whole command, e.g. 90s, 20m or 1.5h; the learning-rate schedule ends "
        "with it.",
        default=None,
        converter=seconds,
        flag="--time-budget",
    )
    folds: int | None = option(
        "Number of cross-validation folds: one network per fold, used as an ensemble.",
        default=None,
        values=Range(1, MAX_FOLDS),
    )


@options
class PreprocessOptions(PlanningOptions, Announcing):
    """Resample, crop and normalise a dataset for training.

    Writes a memory-mapped array and a JSON file per case, and prints the dataset's fingerprint.
    Skips the test split. A second call prepares only cases that are missing or have changed. If
    the recipe leaves network and patch size to the plan, --vram sets the memory they must fit.
    """

    dataset: Path = argument(DATASET, converter=input_path)
    out: Path = option(RESULTS, converter=path, short="-o")


@options
class PlanOptions(TimedOptions, Progressing):
    """Show the planned training settings, each with a reason.

    Covers spacing, intensities, patches and network; for a classifier also loss and schedule.
    Nothing is trained or prepared. With --out, the plan becomes a recipe, which you can edit and
    pass to `volseg train --recipe`.
    """

    dataset: Path = argument(DATASET, converter=input_path)
    out: Path | None = option(
        "Also write the plan to this TOML file, as a recipe with the reasons as comments.",
        default=None,
        converter=optional_path,
        short="-o",
    )


@options
class TrainOptions(TimedOptions, Announcing):
    """Train a model to segment scans or to classify images.

    A dataset of scans and masks gives a model that segments; images in a folder per class, a table
    with a column of classes or numbers, or a MedMNIST file give one that classifies or predicts a
    number (--target names the column if there are several). For scans, a coarse first pass and a
    lesion classifier are also trained if the recipe asks for them. The weights with the best
    validation score are saved in a model folder with a model card. Ctrl-C stops and keeps the best
    model so far; --resume continues. With --time-budget, the learning-rate schedule ends within the
    budget.
    """

    dataset: Path = argument(
        f"{DATASET} Or a folder made by `volseg preprocess`.", converter=input_path
    )
    out: Path = option("Folder for the model.", converter=path, short="-o")
    recipe: Path | str | AnyRecipe | None = option(
        "TOML file, such as a plan, or name of a shipped recipe; a prepared folder brings its own. "
        "Without a recipe, everything is planned, and a model that segments is cross-validated.",
        default=None,
        kind=str,
    )
    epochs: int | None = option(
        "Number of epochs; overrides the recipe.", default=None, values=COUNT
    )
    patience: int | None = option(
        "Stop after this many validations without a new best score.",
        default=None,
        values=COUNT,
    )
    resume: bool = option("Continue the interrupted run in --out.", default=False)
    init: Path | None = option(
        "Model folder whose weights training starts from; for a classifier also a file of weights "
        "(safetensors, or a torch state dict).",
        default=None,
        converter=optional_input_path,
    )
    prune: float | None = option(
        "With --init and a VGG: remove this fraction of each layer's channels, then fine-tune.",
        default=None,
        values=Range(0.0, below=1.0),
    )
    teacher: Path | None = option(
        "Trained classifier whose outputs the network also learns to reproduce (distillation).",
        default=None,
        converter=optional_input_path,
    )
    freeze: tuple[str, ...] = option(
        "Freeze the layers that match this pattern, e.g. 'downsamples.*'; repeatable.",
        default=(),
        converter=names,
    )
    fold: int | None = option(
        "Validate on this fifth of the patients, train on the others.",
        default=None,
        values=Range(0, 4),
    )
    devices: int = option(
        "Number of GPUs (on a CPU: processes) that share each batch; torchrun and SLURM set it "
        "themselves.",
        default=1,
        values=Range(1, 1024),
    )
    precision: str = option(
        "auto, fp32 or half; auto is half (bfloat16) on GPUs and on CPUs that support it.",
        default="auto",
        values=("auto", "fp32", "half"),
    )
    preview: bool = option(
        "Only prepare the data and draw augmented patches with masks.", default=False
    )
    spent_seconds: float = callback(
        "Seconds of the time budget already spent, such as on starting Python.", default=0.0
    )


@options
class PretrainOptions(OnDevice, Seeded, Announcing):
    """Pretrain the backbone of a 2D network without labels.

    The network learns to give two random views of an image the same embedding (SimSiam). Start
    training from the result with --init if few images have a label and many have none. Test images
    are not read.
    """

    dataset: Path = argument(
        "Images: a folder, a table with a column `image`, a MedMNIST file, or slices of volumes.",
        converter=input_path,
    )
    out: Path = option("Folder for the weights.", converter=path, short="-o")
    recipe: Path | str | AnyRecipe | None = option(
        "TOML file with a recipe of a classifier, for network and input; default: planned.",
        default=None,
        kind=str,
    )
    epochs: int | None = option(
        "Number of epochs; overrides the recipe.", default=None, values=COUNT
    )
    time_budget_seconds: float | None = option(
        "Time limit, e.g. 20m; the learning-rate schedule ends with it.",
        default=None,
        converter=seconds,
        flag="--time-budget",
    )


@options
class QuantiseOptions(Progressing):
    """Add an int8 network to a model, for faster CPU inference.

    Use it with `volseg infer --precision int8`; it is slightly less accurate. Prints the change in
    Dice on the validation cases (of a classifier: in AUC, or what training monitored) and stores it
    with the network. Needs volseg[cpu].
    """

    model: Path = argument(
        "Folder made by `volseg train`; the int8 network is added to it.", converter=input_path
    )
    dataset: Path = argument(
        "Dataset that the model was trained on, or its `volseg preprocess` folder.",
        converter=input_path,
    )
    cases: int | None = option(
        "Calibrate with at most this many training cases; default: 30 scans or 300 images.",
        default=None,
        values=COUNT,
    )
    seed: int = option(
        "Seed with which the model was trained; it selected the validation cases.",
        default=0,
        values=SEED,
    )


@options
class AttachOptions(Options):
    """Attach classifiers to a model that segments.

    Writes the model again with the classifiers in it, so that `volseg infer` needs one model. A
    gate is asked about every axial slice, and tiles in slices that hold nothing are not run. A
    filter is asked about every predicted lesion, and drops false ones (`volseg candidates` makes
    its dataset). A type gives every lesion its class, also in lesions.csv.
    """

    model: Path = argument("Folder of a model that segments.", converter=input_path)
    gate: Path | None = option(
        'Classifier of slices (input = "slice") with a class `with label`.',
        default=None,
        converter=optional_input_path,
    )
    filter: Path | None = option(
        'Classifier of lesions (input = "lesion") with a class `matched`.',
        default=None,
        converter=optional_input_path,
    )
    type: Path | None = option(
        "Classifier of lesions whose classes are the types of a lesion.",
        default=None,
        converter=optional_input_path,
    )
    gate_threshold: float | None = option(
        "Probability of `with label` below which a slice is skipped; default: the point at which "
        "the gate kept 99 % of the validation slices with a lesion.",
        default=None,
        values=Range(0.0, 1.0),
    )
    filter_threshold: float | None = option(
        "Probability of `matched` below which a lesion is dropped; default: the point at which the "
        "filter kept 99 % of the true validation lesions.",
        default=None,
        values=Range(0.0, 1.0),
    )
    out: Path = option("Folder for the model.", converter=path, short="-o")


@options
class CandidatesOptions(Progressing):
    """Make the dataset of a filter from predicted lesions.

    Compares the predicted lesions of results folders with the reference masks of a dataset, and
    writes a mask per predicted lesion and a cases.csv with the column `status`: matched, false, or
    empty for a second prediction on one reference lesion, which training leaves out.
    Use predictions for scans that the model was not trained on, such as those of a fold by a model
    of the other folds.
    """

    dataset: Path = argument(
        "Dataset of scans with reference masks, on which the results were predicted.",
        converter=input_path,
    )
    folders: tuple[Path, ...] = argument(
        "Results folders of `volseg infer`, one per fold.", converter=input_paths
    )
    out: Path = option("Folder for the dataset.", converter=path, short="-o")
    min_iou: float = option(
        "IoU with a reference lesion from which a predicted one is matched, from 0 to below 1; at "
        "0, one shared voxel is enough.",
        default=0.0,
        values=Range(0.0, below=1.0),
    )


@options
class ImportOptions(Options):
    """Convert a trained nnU-Net v2 model to a volseg model.

    Does not need nnU-Net. Run the result with `volseg infer --model MODEL`. Supports plain and
    residual-encoder U-Nets in 3D. Spacing, axes, normalisation, labels and test-time augmentation
    follow the model's plans; several folds become an ensemble. No code in the checkpoint is
    executed: a checkpoint that contains anything but weights is refused.
    """

    folder: Path = argument(
        "Folder <trainer>__<plans>__<configuration> of a trained model, with plans.json, "
        "dataset.json and fold_*.",
        converter=input_path,
    )
    out: Path = option("Folder for the model.", converter=path, short="-o")
    folds: tuple[str, ...] | None = option(
        "Folds to use as an ensemble, e.g. 0,1,2 or all; default: every numbered one.",
        default=None,
        converter=listed_names,
    )
    checkpoint: str = option(
        "Checkpoint file to take from each fold, e.g. checkpoint_best.pth.",
        default="checkpoint_final.pth",
    )
