"""How each data set is built: one file per source, each with a table ``RECIPES`` of the data sets it makes."""

import pkgutil
from importlib import import_module

from recipes.common import Recipe

RECIPES: dict[str, Recipe] = {}
for _found in pkgutil.iter_modules(__path__):
    RECIPES |= getattr(import_module(f"{__name__}.{_found.name}"), "RECIPES", {})
