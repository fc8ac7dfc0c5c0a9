"""Models with another recipe, and classifiers with random weights."""

from dataclasses import replace

import torch

from volseg.image_bundle import ImageBundle, Judgement, classifier_name, save_image_bundle
from volseg.networks import build_images
from volseg.planning.images import ImageFingerprint
from volseg.recipe import ClassifyRecipe


def with_recipe(bundle, **sections):
    """Return a bundle whose recipe has other values in these sections: `infer={"margin": 2}`."""
    changes = {
        name: getattr(bundle.recipe, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return replace(bundle, recipe=bundle.recipe.model_copy(update=changes))


def random_classifier(folder, kind, classes, *, seed=0, points=(), fusion=None):
    """Save a classifier of lesions or slices with random weights, whose outputs differ.

    Args:
        kind: `lesion` or `slice`. fusion: of two classes of lesions with measurements.
    """
    section = {} if fusion is None else {"fusion": {"measurements": fusion.names}}
    recipe = ClassifyRecipe.model_validate(
        section
        | {
            "name": f"random_{kind}",
            "description": "Random weights.",
            "data": {"input": kind, "target": "x", "kind": "classes", "classes": classes}
            | {"mean": 0.0, "sd": 1.0},
            "images": {"pixels": 16, "channels": 1, "field_of_view_mm": 32}
            | {"normalise": {"method": "window", "low": -200, "high": 300}},
            "network": {"name": "cnn_small", "features": [4, 8]},
            "train": {"batch_size": 4, "steps_per_epoch": 1, "epochs": 1, "learning_rate": 1e-3}
            | {"monitor": "auc", "balance": "none", "loss": {"name": "cross_entropy"}},
        }
    )
    assert not recipe.open_keys
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_images(recipe)
    with torch.no_grad():
        network.head.weight.mul_(20)
    counts = dict.fromkeys(classes, 1)
    facts = ImageFingerprint(
        n_images=2, n_patients=2, n_validation=2, sizes=((16, 16),), channels=1, kind="classes",
        counts=counts, low=-200, high=300,
    )  # fmt: skip
    weights = {classifier_name(0): network.state_dict()}
    judgement = Judgement(points=points, fusion=fusion)
    return save_image_bundle(ImageBundle(recipe, facts, weights, judgement), folder)
