"""Ready-made tasks: good small defaults that need no code."""

from anyfit.tasks.image import Image
from anyfit.tasks.tabular import Tabular

__all__ = ["READY", "Image", "Tabular"]

READY = {"image": Image, "tabular": Tabular}  # what the command line knows by a short name
