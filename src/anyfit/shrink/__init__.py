"""Making a trained network fit a device: prune, quantize, morph, count, export. Each verb takes a task and its state and gives both back.

opened (a task with its weights and rows) -> channels, prune, quantize, morph -> arena, resources -> c, compiled, onnx, export
"""

from anyfit.shrink.export import Artifact, export, program_of
from anyfit.shrink.prune import prune, sparsity_of
from anyfit.shrink.quantize import quantize
from anyfit.shrink.resources import Resources, resources

__all__ = ["Artifact", "Resources", "export", "program_of", "prune", "quantize", "resources", "sparsity_of"]
