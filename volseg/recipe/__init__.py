"""Recipes: one frozen model per stage, read from TOML. They hold names and numbers, never code."""

from volseg.recipe.classification import ClassifyRecipe
from volseg.recipe.classify import Classify
from volseg.recipe.data import MOST_LABELS, Data
from volseg.recipe.load import (
    AnyRecipe,
    Recipe,
    as_any_recipe,
    as_recipe,
    listed,
    load_any_recipe,
    load_recipe,
    parse_image_recipe,
    parse_recipe,
    shipped_recipes,
    validation_messages,
)
from volseg.recipe.normalise import Normaliser, Scale, Window, ZScore
from volseg.recipe.preprocess import Preprocess
from volseg.recipe.roles import FILTER, GATE, ROLES, TYPE, Role, RoleOfClassifier
from volseg.recipe.section import AUTO, Intensity, LabelValue, Name, Text
from volseg.recipe.segment import PLANNED_LAYERS, Measure, Roi, Step
from volseg.recipe.train import Augment, Loss, Network, Train
from volseg.recipe.units import ARBITRARY, HU, SUV, UNITS, asks_for_suv, parse_unit

__all__ = [
    "ARBITRARY",
    "AUTO",
    "FILTER",
    "GATE",
    "HU",
    "MOST_LABELS",
    "PLANNED_LAYERS",
    "ROLES",
    "SUV",
    "TYPE",
    "UNITS",
    "AnyRecipe",
    "Augment",
    "Classify",
    "ClassifyRecipe",
    "Data",
    "Intensity",
    "LabelValue",
    "Loss",
    "Measure",
    "Name",
    "Network",
    "Normaliser",
    "Preprocess",
    "Recipe",
    "Roi",
    "Role",
    "RoleOfClassifier",
    "Scale",
    "Step",
    "Text",
    "Train",
    "Window",
    "ZScore",
    "as_any_recipe",
    "as_recipe",
    "asks_for_suv",
    "listed",
    "load_any_recipe",
    "load_recipe",
    "parse_image_recipe",
    "parse_recipe",
    "parse_unit",
    "shipped_recipes",
    "validation_messages",
]
