"""Models with another recipe."""

from dataclasses import replace


def with_recipe(bundle, **sections):
    """Return a bundle whose recipe has other values in these sections: `infer={"margin": 2}`."""
    changes = {
        name: getattr(bundle.recipe, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return replace(bundle, recipe=bundle.recipe.model_copy(update=changes))
