"""`Trainer` as transformers has it, run by anyfit's engine: code written for it needs one changed import.

What cannot be honoured is refused by name before anything starts. Neither `transformers.Trainer` nor accelerate's loop is used.
"""

from anyfit.adapt.huggingface.task import TransformersTask, from_transformers
from anyfit.adapt.huggingface.trainer import Trainer

__all__ = ["Trainer", "TransformersTask", "from_transformers"]
