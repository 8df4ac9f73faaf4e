"""A LightningModule as a task, by its methods alone: neither `lightning` nor `pytorch_lightning` is imported.

What cannot be honoured is refused by name when the task is made, not skipped while it trains.
"""

from anyfit.adapt.lightning.task import LightningTask, from_lightning

__all__ = ["LightningTask", "from_lightning"]
