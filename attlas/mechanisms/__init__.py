"""One file per mechanism, in family folders. Importing this package registers every file in it."""

from importlib import import_module
from pkgutil import walk_packages

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)
