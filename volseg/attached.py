"""Classifiers inside the folder of a model that segments, `classifiers/<role>`, each a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from volseg.bundle import DESCRIPTION, ModelBundle
from volseg.errors import VolsegError
from volseg.evaluation.operating import sensitive_name
from volseg.image_bundle import SENSITIVITY_TO_KEEP, ImageBundle, load_image_bundle
from volseg.recipe import AUTO, TYPE, Role, RoleOfClassifier
from volseg.recipe.classification import CLASSES
from volseg.recipe.roles import INPUTS

FOLDER = "classifiers"


def role_folder(role: Role) -> str:
    """Return where the classifier with a role lies in the folder of a model."""
    return f"{FOLDER}/{role}"


def load_attached(bundle: ModelBundle, folder: Path | None) -> Mapping[Role, ImageBundle]:
    """Read and verify the classifiers of a model.

    Args:
        folder: of the model; None if it is not in a folder, and then it has no classifiers.

    Raises:
        VolsegError: one is missing, was changed, or does not fit its role.
    """
    loaded: dict[Role, ImageBundle] = {}
    for item in bundle.recipe.classifiers:
        if folder is None:
            raise VolsegError(
                f"model {bundle.recipe.name!r} names a {item.role}, which is not in memory",
                fix="load the model from its folder",
                code="E_CKPT",
            )
        path = folder / role_folder(item.role)
        classifier = load_image_bundle(path)
        if classifier.sha256 != bundle.classifiers_sha256[item.role]:
            raise VolsegError(
                f"{path / DESCRIPTION}: is not the classifier that was attached",
                fix="copy the model again",
                code="E_CKPT",
            )
        check_role(item, classifier, path)
        loaded[item.role] = classifier
    return loaded


def check_role(item: RoleOfClassifier, classifier: ImageBundle, folder: Path) -> None:
    """Refuse a classifier that cannot have its role.

    Args:
        folder: of the classifier, for messages.

    Raises:
        VolsegError: it sees something else, or lacks the class that stays.
    """
    data, needed = classifier.recipe.data, INPUTS[item.role]
    if data.input != needed or data.kind != CLASSES:
        raise VolsegError(
            f"{folder}: a {item.role} needs a classifier with input = {needed!r} and kind = "
            f"{CLASSES!r}, and this one has {data.input!r} and {data.kind!r}",
            fix=f"train one on {needed}s with classes",
            code="E_ROLE",
        )
    if item.role != TYPE and item.kept_class not in data.names:
        raise VolsegError(
            f"{folder}: has no class {item.kept_class!r}, which a {item.role} keeps; its classes "
            f"are {', '.join(data.names)}",
            fix="name the class that stays with `keeps`",
            code="E_ROLE",
        )


def closed_role(item: RoleOfClassifier, classifier: ImageBundle, folder: Path) -> RoleOfClassifier:
    """Return a role with the name of its classifier, and a number as threshold.

    Raises:
        VolsegError: as `check_role`, or the classifier says no threshold.
    """
    check_role(item, classifier, folder)
    changes = {"model": classifier.name}
    if item.role == TYPE:
        return item.model_copy(update=changes)
    threshold, kept = item.threshold, item.kept_class
    if threshold == AUTO:
        name = sensitive_name(SENSITIVITY_TO_KEEP)
        points = classifier.judgement.points
        matching = [p for p in points if (p.name, p.class_name) == (name, kept)]
        if not matching:
            raise VolsegError(
                f"{folder}: has no operating point {name} for {kept!r}",
                fix=f"train it with {kept!r} as the last of its classes, or give a threshold",
                code="E_ROLE",
            )
        threshold = min(matching[0].threshold, 1.0)
    return item.model_copy(update=changes | {"keeps": kept, "threshold": threshold})
