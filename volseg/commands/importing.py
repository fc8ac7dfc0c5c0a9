"""`volseg import-nnunet`: a trained nnU-Net v2 folder → a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volseg.errors import VolsegError
from volseg.options import ImportOptions, command
from volseg.reports import ImportReport
from volseg.store.outputs import OutputFolder
from volseg.words import format_count, format_sizes

MODEL_FILE = "model.json"

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.bundle import ModelBundle


@command(ImportOptions)
def import_nnunet(options: ImportOptions) -> ImportReport:
    """Convert a trained nnU-Net v2 folder to a model folder that `infer` runs without nnU-Net.

    Raises:
        VolsegError: files are missing or damaged, a checkpoint holds more than weights, or the
            model needs something that volseg does not support.

    Example:
        >>> import volseg
        >>> folder = "nnUNetTrainer__nnUNetPlans__3d_fullres"
        >>> result = volseg.import_nnunet(folder, out="imported")
        >>> volseg.check("imported")
        []
    """
    from volseg.bundle import bundle_files, load_bundle, save_bundle
    from volseg.inference.export import export_bundle, half_precision_hint
    from volseg.inference.memory import check_patch
    from volseg.nnunet import read_nnunet

    folder, out = options.folder, options.out
    if (out / MODEL_FILE).exists():
        raise VolsegError(
            f"{out}: holds a finished model",
            fix="give another --out, or delete it first",
            code="E_EXISTS",
        )
    bundle = read_nnunet(folder, folds=options.folds, checkpoint=options.checkpoint)
    check_patch(bundle)
    with OutputFolder(out, "import-nnunet", inputs=[folder]) as outputs:
        outputs.check_overwrites(bundle_files(bundle.weights))
        with outputs.staged() as commit:
            save_bundle(bundle, commit.folder)
            commit.finish(last=MODEL_FILE)
        bundle = load_bundle(out)
        with outputs.staged() as commit:
            export_bundle(bundle, commit.folder)
            commit.finish()
    return ImportReport(
        out=out,
        done=[bundle.recipe.name],
        model=_facts(bundle),
        sha256=bundle.sha256,
        hint=half_precision_hint(out),
    )


def _facts(bundle: ModelBundle) -> dict[str, str]:
    """Summarise the imported model, for people and for --json."""
    recipe = bundle.recipe
    folds, copies = len(bundle.weights), 2 ** len(recipe.infer.tta_axes)
    features = " ".join(map(str, recipe.network.settings["features"]))
    channels = [(name, recipe.preprocess.normaliser_of(name)) for name in recipe.data.channels]
    spacing = f"{format_sizes(recipe.spacing_mm)} mm"
    passes = (
        f"{folds * copies}: {format_count(folds, 'fold')} × {copies} with test-time augmentation"
    )
    facts = {
        "name": recipe.name,
        "network": f"{recipe.network.name}, {features} features",
        "channels": ", ".join(f"{name} ({normalise.method})" for name, normalise in channels),
        "labels": ", ".join(f"{name} = {value}" for value, name in recipe.data.label_names.items()),
        "spacing": f"{spacing}, patch {format_sizes(recipe.patch_shape)}",
        "networks per patch": passes,
    }
    if recipe.data.regions_class_order is not None:
        order = ", ".join(map(str, recipe.data.regions_class_order))
        facts["regions"] = f"overlapping; written in the order {order}"
    metrics = {name: f"{value:.4g}" for name, value in bundle.metrics.items()}
    return facts | dict(bundle.origin) | metrics
