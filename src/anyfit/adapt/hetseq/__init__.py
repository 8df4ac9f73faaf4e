"""HetSeq's classes as a task and its rows, by their methods alone: HetSeq itself, which no longer installs, is not imported.

What cannot be honoured is refused by name before anything starts.
"""

from anyfit.adapt.hetseq.optimizers import polynomial_decay
from anyfit.adapt.hetseq.options import Options, plan_of
from anyfit.adapt.hetseq.task import HetSeq, HetSeqRows, from_hetseq

__all__ = ["HetSeq", "HetSeqRows", "Options", "from_hetseq", "plan_of", "polynomial_decay"]
