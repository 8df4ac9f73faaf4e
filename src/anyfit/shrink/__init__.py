"""Making a trained network fit a device. Each verb takes a task and its state and gives both back, so that they chain by calling.

opened (a task with its weights and rows) -> labels, channels, prune, morph, quantize -> arena, resources ->
places, calls, c, compiled, onnx, export -> stages, pipeline (all of it, measured before and after)
"""

from anyfit.shrink.channels import keep
from anyfit.shrink.export import Artifact, export, program_of
from anyfit.shrink.morph import morph, morphs
from anyfit.shrink.pipeline import Shrunk, shrink
from anyfit.shrink.prune import prune, sparsity_of
from anyfit.shrink.quantize import quantize
from anyfit.shrink.resources import Resources, resources

__all__ = [
    "Artifact",
    "Resources",
    "Shrunk",
    "export",
    "keep",
    "morph",
    "morphs",
    "program_of",
    "prune",
    "quantize",
    "resources",
    "shrink",
    "sparsity_of",
]
