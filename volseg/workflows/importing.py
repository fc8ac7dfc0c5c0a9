"""`volseg import-nnunet`: a trained nnU-Net v2 folder → a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.errors import VolsegError
from volseg.execute.cpu import total_memory
from volseg.store.outputs import OutputFolder
from volseg.workflows.batch import RunReport

MODEL_FILE = "model.json"

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.bundle import ModelBundle


def import_nnunet(
    folder: Path | str,
    *,
    out: Path | str,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> RunReport:
    """Convert a trained nnU-Net v2 folder to a model folder that `infer` runs without nnU-Net.

    Args:
        folder: `<trainer>__<plans>__<configuration>`, with plans.json, dataset.json and fold_*.
        folds: such as `("0", "1")` or `("all",)`; several become an ensemble. None takes every
            numbered fold, or `all` if there is none.
        checkpoint: name of the file in each fold's folder.

    Raises:
        VolsegError: files are missing or damaged, a checkpoint holds more than weights, or the
            model needs something that volseg does not support.
    """
    from volseg.bundle import bundle_files, load_bundle, save_bundle
    from volseg.infer.backends import export_bundle
    from volseg.infer.memory import check_patch, network_bytes
    from volseg.nnunet import read_nnunet

    out = Path(out)
    if (out / MODEL_FILE).exists():
        raise VolsegError(
            f"{out}: holds a finished model",
            fix="give another --out, or delete it first",
            code="E_EXISTS",
        )
    bundle = read_nnunet(Path(folder), folds=folds, checkpoint=checkpoint)
    check_patch(bundle, network_bytes(bundle), total_memory())
    with OutputFolder(out, "import-nnunet", inputs=[Path(folder)]) as outputs:
        outputs.refuse_foreign(bundle_files(bundle.weights))
        with outputs.staged() as commit:
            save_bundle(bundle, commit.folder)
            commit.finish(last=MODEL_FILE)
        bundle = load_bundle(out)
        with outputs.staged() as commit:
            export_bundle(bundle, commit.folder)
            commit.finish()
    return RunReport(
        out=out,
        done=[bundle.recipe.name],
        details={"model": _facts(bundle), "sha256": bundle.sha256},
    )


def _facts(bundle: ModelBundle) -> dict[str, str]:
    """Summarise the imported model, for people and for --json."""
    recipe, plan = bundle.recipe, bundle.plan
    folds, copies = len(bundle.weights), 2 ** len(recipe.infer.tta_axes)
    features = " ".join(map(str, recipe.network.settings["features"]))
    channels = [(name, recipe.preprocess.normalise_of(name)) for name in recipe.data.channels]
    spacing = " × ".join(f"{mm:g}" for mm in plan.spacing_mm)
    patch = " × ".join(map(str, plan.patch_shape))
    passes = f"{folds * copies}: {folds} folds × {copies} with test-time augmentation"
    facts = {
        "name": recipe.name,
        "network": f"{recipe.network.name}, {features} features",
        "channels": ", ".join(f"{name} ({normalise.method})" for name, normalise in channels),
        "labels": ", ".join(f"{name} = {value}" for value, name in recipe.data.label_names.items()),
        "spacing": f"{spacing} mm, patch {patch}",
        "networks per patch": passes,
    }
    if recipe.data.regions_class_order is not None:
        order = ", ".join(map(str, recipe.data.regions_class_order))
        facts["regions"] = f"overlapping; written in the order {order}"
    metrics = {name: f"{value:.4g}" for name, value in bundle.metrics.items()}
    return facts | dict(bundle.origin) | metrics
