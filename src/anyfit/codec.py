"""What a vector looks like while it travels: whole, in half precision, in eight bits, or its largest entries alone.

Each codec is lossy in a known way: bf16 and fp16 round, int8 rounds at random so that its mean is right (QSGD, Alistarh et al.
2017), topk leaves entries out, which the site adds to its next update (Aji and Heafield 2017; Stich et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from anyfit.errors import InputError

__all__ = ["Codec"]

BLOCK = 1024  # entries of an int8 vector that share one scale
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("bf16", "fp16", "int8", "topk")


@dataclass(frozen=True)
class Codec:
    """How a vector travels; `share` is the part of its entries that topk sends."""

    kind: str
    share: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"compress (={self.kind!r}) must be one of {', '.join(KINDS)}; topk takes a share, e.g. topk:0.01")
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"compress (='topk:{self.share}') must name a share of the entries above 0 and at most 1, e.g. topk:0.01")

    @classmethod
    def of(cls, text: str | None) -> Self | None:
        """bf16, fp16, int8, topk or topk:SHARE; None is no codec."""
        if text is None:
            return None
        kind, colon, share = text.partition(":")
        try:
            return cls(kind, float(share)) if colon and kind == "topk" else cls(text)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"compress (={text!r}) must be one of {', '.join(KINDS)} or topk:SHARE") from error

    @property
    def forgets(self) -> bool:
        """Whether entries are left out, so that the site has to remember them."""
        return self.kind == "topk"

    def _kept(self, size: int) -> int:
        return max(1, round(self.share * size))

    def size(self, elements: int) -> int:
        """Bytes of an encoded vector."""
        if self.kind in HALVES:
            return 2 * elements
        return elements + 4 * -(-elements // BLOCK) if self.kind == "int8" else 8 * self._kept(elements)

    def encode(self, vector: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """(P,) -> what travels."""
        if self.kind in HALVES:
            return {"values": vector.to(HALVES[self.kind])}
        if self.kind == "topk":
            kept = vector.abs().topk(self._kept(vector.numel()), sorted=False).indices.sort().values
            return {"places": kept.to(torch.int32), "values": vector[kept].float()}
        padded = torch.nn.functional.pad(vector.float(), (0, -vector.numel() % BLOCK)).view(-1, BLOCK)
        scale = padded.abs().amax(1, keepdim=True) / 127
        chance = torch.rand(padded.shape, generator=generator, device="cpu").to(padded.device)
        whole = torch.floor(padded / torch.where(scale > 0, scale, 1.0) + chance).clamp_(-127, 127)
        return {"values": whole.to(torch.int8).view(-1)[: vector.numel()], "scale": scale[:, 0]}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """What travelled -> (P,)."""
        values = parts["values"]
        if self.kind == "topk":
            return torch.zeros(size, dtype=dtype, device=values.device).index_copy_(0, parts["places"].long(), values.to(dtype))
        if self.kind == "int8":
            return values.to(dtype) * parts["scale"].to(dtype).repeat_interleave(BLOCK)[:size]
        return values.to(dtype)
