"""A model as a graph: what `predict(model, inputs)` does for one row, by torch.export. Parameters keep the names that the model gives them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from anyfit.errors import AnyfitError, TaskError
from anyfit.tree import first_tensor

__all__ = ["Traced", "trace"]


@dataclass(frozen=True)
class Traced:
    """The nodes in their order, and which placeholders are parameters, buffers or constants (by the model's names) and which inputs.

    `node.meta["val"]` has the shape and type of each value; the first dimension of activations is the batch, of 1.
    """

    nodes: tuple[fx.Node, ...]  # calls only
    tensors: Mapping[str, Tensor]  # placeholder -> the parameter, buffer or constant that it stands for
    names: Mapping[str, str]  # placeholder -> its name in the model; constants have names of their own
    inputs: Mapping[str, str]  # placeholder -> the name of the batch's entry ("input" for a single tensor)
    outputs: tuple[fx.Node, ...]


class _Predicting(nn.Module):
    def __init__(self, predict: Callable[[nn.Module, Any], Any], model: nn.Module) -> None:
        super().__init__()
        self.model, self._predict = model, predict

    def forward(self, batch: Any) -> Any:
        return self._predict(self.model, batch)


def trace(predict: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> Traced:
    """What `predict(model, batch)` does in evaluation mode; `batch` is one row without its target, in a batch of 1."""
    rows = first_tensor(batch).shape[0]
    if rows != 1:
        raise TaskError(f"batch (of {rows} rows) must have one row to trace a model with")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")  # of torch.export about itself
            exported = torch.export.export(_Predicting(predict, model), (batch,), strict=False)
    except AnyfitError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and any(name in str(error) for name in ("target", "labels")):
            raise TaskError(
                f"the model cannot run without its target ({error}), so there is nothing to predict with; define predict(self, model, batch)"
            ) from error
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TaskError(
            f"predict of this task cannot be traced ({type(error).__name__}: {first.strip()[:300]}); it must compute the same operations for every "
            "row, without branches on values and without shapes that follow them"
        ) from error
    finally:
        for module in training:
            module.training = True
    for node in exported.graph.nodes:
        shapes = [value.shape for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
        if any(not isinstance(size, int) for shape in shapes for size in shape):
            raise TaskError(
                f"the shape of what {node.name} gives follows the values of a row (it is dynamic), so neither its memory nor its code can be laid "
                "out; give every row the same shapes, with a mask or padding"
            )
    signature = exported.graph_signature
    state = {**exported.state_dict, **exported.constants}
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors, names = {}, {}
    for kind in (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
        for placeholder, target in kind.items():
            name = target.removeprefix("model.")
            tensors[placeholder] = own[name] if name in own else state[target]
            names[placeholder] = name
    entries = [_entry(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    given = [name for name in signature.user_inputs if isinstance(name, str)]
    (out,) = [node for node in exported.graph.nodes if node.op == "output"]
    found = [node for node in pytree.tree_leaves(out.args[0]) if isinstance(node, fx.Node)]
    return Traced(
        tuple(node for node in exported.graph.nodes if node.op == "call_function"),
        tensors,
        names,
        dict(zip(given, entries, strict=True)),
        tuple(found),
    )


def _entry(path: Sequence[Any]) -> str:
    """The name of a batch's entry by its place: that of a mapping, "input0" of a sequence, "input" of a tensor alone."""
    if not path:
        return "input"
    if len(path) > 1:
        raise TaskError("a batch within a batch cannot be traced; give a tensor, a tuple or a dict of tensors")
    return str(path[0].key) if hasattr(path[0], "key") else f"input{path[0].idx}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What torch.export prints and logs of a model that it cannot follow says less than the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
