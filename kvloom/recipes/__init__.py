"""One file per published system: its card and its composition. A file dropped in here is a recipe."""

from importlib import import_module
from pkgutil import iter_modules

__all__ = ["load"]


def load() -> None:
    """Imports every recipe, which registers itself by name."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
