"""Ready-made tasks: good small defaults that need no code."""

from anyfit.tasks.hf import HuggingFace
from anyfit.tasks.image import Image
from anyfit.tasks.pca import PCA
from anyfit.tasks.shrunk import Morphed, Pruned, Quantized
from anyfit.tasks.tabular import Tabular
from anyfit.tasks.text import TextCNN, TextRNN, TextTransformer

__all__ = ["PCA", "READY", "HuggingFace", "Image", "Morphed", "Pruned", "Quantized", "Tabular", "TextCNN", "TextRNN", "TextTransformer"]

# What the command line knows by a short name.
READY = {
    "image": Image,
    "tabular": Tabular,
    "text-cnn": TextCNN,
    "text-rnn": TextRNN,
    "text-transformer": TextTransformer,
    "hf": HuggingFace,
    "pca": PCA,
}
