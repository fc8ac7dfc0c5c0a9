"""`volseg attach`: a model that segments, with classifiers that work on what it segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.commands.importing import MODEL_FILE
from volseg.errors import VolsegError
from volseg.inputs import read_bytes
from volseg.options import AttachOptions, command
from volseg.recipe import AUTO, FILTER, GATE, TYPE, Role, RoleOfClassifier, parse_recipe
from volseg.reports import AttachReport
from volseg.store.outputs import Commit, OutputFolder

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.bundle import ModelBundle

CARD, MAX_WEIGHT_BYTES = "card.md", 2**32


@command(AttachOptions)
def attach(options: AttachOptions) -> AttachReport:
    """Make a model that segments with a gate, a filter or a type of lesion.

    Raises:
        VolsegError: a classifier cannot have its role, or `out` holds a model.

    Example:
        >>> import volseg
        >>> result = volseg.attach("model", filter="lesion_filter", filter_threshold=0.1, out="f")
        >>> result.roles["filter"].partition(",")[0]
        "lesions are dropped below p = 0.1 of 'matched'"
    """
    from volseg.bundle import load_bundle

    roles = _requested(options)
    with OutputFolder(options.out, "attach", inputs=[options.model, *_folders(roles)]) as outputs:
        if (options.out / MODEL_FILE).exists():
            raise VolsegError(
                f"{options.out}: holds a finished model",
                fix="give another --out, or delete it first",
                code="E_EXISTS",
            )
        bundle = load_bundle(options.model)
        bundle = write_attached(bundle, roles, outputs, earlier=options.model)
    texts = {item.role: _text(item) for item in bundle.recipe.classifiers}
    return AttachReport(
        out=options.out, done=[bundle.recipe.name], roles=texts, sha256=bundle.sha256
    )


def _requested(options: AttachOptions) -> list[RoleOfClassifier]:
    """Return the roles that the options name.

    Raises:
        VolsegError: they name none, or a threshold without its classifier.
    """
    folders: dict[Role, Path | None] = {
        GATE: options.gate,
        FILTER: options.filter,
        TYPE: options.type,
    }
    thresholds = {GATE: options.gate_threshold, FILTER: options.filter_threshold}
    roles = []
    for role, folder in folders.items():
        threshold = thresholds.get(role)
        if folder is not None:
            limit = AUTO if threshold is None else threshold
            roles.append(RoleOfClassifier(role=role, model=str(folder), threshold=limit))
        elif threshold is not None:
            raise VolsegError(
                f"--{role}-threshold is given without --{role}",
                fix=f"add --{role} MODEL",
                code="E_USAGE",
            )
    if not roles:
        raise VolsegError(
            "nothing to attach", fix="add --gate, --filter or --type MODEL", code="E_USAGE"
        )
    return roles


def _folders(roles: Sequence[RoleOfClassifier]) -> list[Path]:
    return [Path(item.model) for item in roles]


def write_attached(
    bundle: ModelBundle,
    roles: Sequence[RoleOfClassifier],
    outputs: OutputFolder,
    *,
    earlier: Path,
) -> ModelBundle:
    """Write a model with classifiers, those it has and new ones; return it as read back.

    Args:
        roles: of the new classifiers; each replaces one with the same role.
        earlier: folder of the model without the new ones.

    Raises:
        VolsegError: a classifier cannot have its role.
    """
    from volseg.attached import load_attached, role_folder
    from volseg.bundle import load_bundle, save_bundle
    from volseg.inference.export import export_bundle

    load_attached(bundle, earlier)
    folders: dict[Role, Path] = {}
    for item in bundle.recipe.classifiers:
        folders[item.role] = earlier / role_folder(item.role)
    bundle, new = with_classifiers(bundle, roles)
    with outputs.staged() as commit:
        copy_classifiers(folders | new, commit)
        save_bundle(bundle, commit.folder)
        commit.finish(last=MODEL_FILE)
    written = load_bundle(outputs.path)
    load_attached(written, outputs.path)
    with outputs.staged() as commit:
        export_bundle(written, commit.folder)
        commit.finish()
    return written


def check_classifiers(roles: Sequence[RoleOfClassifier]) -> None:
    """Check the classifiers that a recipe names by their folders.

    Raises:
        VolsegError: one is no classifier, or cannot have its role.
    """
    from volseg.attached import closed_role
    from volseg.image_bundle import load_image_bundle

    for item in roles:
        closed_role(item, load_image_bundle(Path(item.model)), Path(item.model))


def with_classifiers(
    bundle: ModelBundle, roles: Sequence[RoleOfClassifier]
) -> tuple[ModelBundle, dict[Role, Path]]:
    """Return a model that names more classifiers, and the folder of each new one.

    Args:
        roles: `model` is a folder.

    Raises:
        VolsegError: a classifier cannot have its role.
    """
    from volseg.attached import closed_role
    from volseg.image_bundle import load_image_bundle

    items = {item.role: item for item in bundle.recipe.classifiers}
    hashes, folders = dict(bundle.classifiers_sha256), dict[Role, Path]()
    for item in roles:
        folder = folders[item.role] = Path(item.model)
        classifier = load_image_bundle(folder)
        items[item.role] = closed_role(item, classifier, folder)
        hashes[item.role] = classifier.sha256
    content = bundle.recipe.model_dump()
    content["classifiers"] = [item.model_dump() for item in items.values()]
    recipe = parse_recipe(content, where=f"model {bundle.recipe.name!r} with classifiers")
    return replace(bundle, recipe=recipe, classifiers_sha256=hashes), folders


def copy_classifiers(folders: Mapping[Role, Path], commit: Commit) -> None:
    """Copy the files of classifiers byte by byte, so that they stay the models that they are."""
    from volseg.attached import role_folder
    from volseg.image_bundle import load_image_bundle

    for role, folder in folders.items():
        weights = [f"{name}.safetensors" for name in load_image_bundle(folder).weights]
        for name in (*weights, CARD, MODEL_FILE):
            content = read_bytes(folder / name, max_bytes=MAX_WEIGHT_BYTES)
            commit.write(f"{role_folder(role)}/{name}", content)


def _text(item: RoleOfClassifier) -> str:
    if item.role == TYPE:
        return f"every lesion gets its class from {item.model}"
    what = "slices are skipped" if item.role == GATE else "lesions are dropped"
    return f"{what} below p = {item.threshold:.4g} of {item.kept_class!r}, by {item.model}"
