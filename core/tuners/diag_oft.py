r"""OFT and BOFT on the rows of the weight, as LyCORIS and kohya train them: $W' = R W$, R orthogonal, bias untouched.

OFT (Qiu et al. 2023, arXiv:2306.07280): R is block-diagonal, each block the Cayley transform of a skew-symmetric Q.
BOFT (Liu et al. 2023, arXiv:2311.06243): R is a product of m such, the i-th mixing features 2^i apart. With `rescaled`
the rows are multiplied by trained numbers afterwards. PEFT's OFT acts on the input instead: that is `oft.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import Folded, Inner, method
from ..config import LayeredConfig, PeftType
from ..sites import Site


@dataclass
class DiagOFTConfig(LayeredConfig):
    """Options of row-side OFT; PEFT has no such method."""

    peft_type: PeftType | str | None = PeftType.DIAG_OFT
    block_size: int = 4
    """Rows that a block turns together; divides the rows of every layer."""
    butterflies: int = 0
    """Factors of the rotation (BOFT), each over its own pairs of half-blocks; 0 is plain OFT."""
    constraint: float = 0.0
    """Largest norm of Q in multiples of the number of rows; 0 for none."""
    rescaled: bool = False
    """Scale the rows too."""
    init_weights: bool = True
    """True starts as the identity; False random, for tests."""


@method(DiagOFTConfig)
class DiagOFT(Folded):
    views = ("oft_blocks", "rescale")

    def __init__(self, config: DiagOFTConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        size, stages = config.block_size, config.butterflies
        if site.out % (size * 2 ** max(stages - 1, 0)) or (stages and size % 2):
            raise ValueError(
                f"{path}: block_size={size} with butterflies={stages} does not divide a layer of {site.out} rows"
            )
        shape = (site.out // size, size, size)
        self.oft_blocks = self.new(*([stages] if stages else []), *shape)
        if config.rescaled:
            self.rescale = self.new(site.out)

    def reset(self) -> None:
        nn.init.zeros_(self.oft_blocks)
        if self.config.rescaled:
            nn.init.ones_(self.rescale)
        if not self.config.init_weights:
            for parameter in self.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)

    def rotation(self) -> Tensor:
        """(I + Q)(I - Q)^-1 of every block."""
        q = self.oft_blocks - self.oft_blocks.mT
        if self.config.constraint:
            limit = self.config.constraint * self.site.out
            q = q * (limit / (q.norm() + 1e-8)).clamp(max=1)
        eye = torch.eye(self.config.block_size, dtype=q.dtype, device=q.device).expand_as(q)
        return torch.linalg.solve(eye - q, eye + q, left=False)

    def turn(self, y: Tensor) -> Tensor:
        """R y on the last axis, (..., out)."""
        blocks = self.rotation().to(y.dtype)
        size = self.config.block_size
        if not self.config.butterflies:
            y = torch.einsum("...kn,knm->...km", y.unflatten(-1, (-1, size)), blocks).flatten(-2)
        for stage, block in enumerate(blocks if self.config.butterflies else ()):
            apart = 2**stage * size // 2
            pairs = y.unflatten(-1, (-1, 2, apart)).mT.flatten(-3).unflatten(-1, (-1, size))
            turned = torch.einsum("...kj,kij->...ki", pairs, block)
            y = turned.flatten(-2).unflatten(-1, (-1, apart, 2)).mT.flatten(-3)
        return y * self.rescale.to(y.dtype) if self.config.rescaled else y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(weight.T).T, bias

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        if self.site.groups > 1:  # rows of different groups see different inputs: only the weight can be turned
            return super().forward(x, inner)
        y, bias, channel = inner(x), inner.weights()[1], self.site.channel
        along = None if bias is None else self.site.along_output(bias.to(y.dtype))
        turned = self.turn((y if along is None else y - along).movedim(channel, -1)).movedim(-1, channel)
        return turned if along is None else turned + along
