r"""OFT (Qiu et al. 2023, arXiv:2306.07280; on the input, arXiv:2506.19847): $W' = W R^T$, R a block-diagonal rotation.

Each block is the Cayley transform of a skew-symmetric Q, of which the strict upper triangle is trained: exactly
$(I - Q)(I + Q)^{-1}$, or, with `use_cayley_neumann`, a truncated series of $(I + Q)(I - Q)^{-1}$, which needs no solve.
The two turn in opposite senses, as in PEFT, whose files say which is meant.

An embedding is rotated on its output. A convolution rotates its unfolded patch (input channels times kernel), so that
forward and merge agree for every kernel size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapter import Factor, Transform, method, wide
from ..config import LayeredConfig, PeftType
from ..errors import PeftWarning
from ..sites import Embedding, Site


@dataclass
class OFTConfig(LayeredConfig):
    """Options of OFT; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.OFT
    r: int = 0
    """Number of blocks per layer; give this or `oft_block_size`, and 0 for the other."""
    oft_block_size: int = 32
    """Features per block; a size that does not divide the layer's features is moved to the nearest that does."""
    module_dropout: float = 0.0
    """Share of blocks left unrotated in a training step."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; the layer's class already tells how its weight is stored."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Which biases of the base model are trained along."""
    init_weights: bool = True
    """True starts as the identity; False random, for tests."""
    coft: bool = False
    """Constrain the rotation (COFT): Q stays within a ball of radius eps."""
    eps: float = 6e-5
    """Radius of that ball, for one block."""
    block_share: bool = False
    """Use one block for all of a layer's features."""
    use_cayley_neumann: bool = True
    """Truncated series instead of an exact solve: faster, not exactly orthogonal."""
    num_cayley_neumann_terms: int = 5
    """Terms of that series."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(f"give r or oft_block_size, and 0 for the other; got {self.r} and {self.oft_block_size}")


def nearest_divisor(features: int, wanted: int) -> int:
    """The divisor of `features` nearest to `wanted`, the smaller of two."""
    return min((d for d in range(1, features + 1) if features % d == 0), key=lambda d: (abs(d - wanted), d))


@method(OFTConfig)
class OFT(Transform):
    side = "input"
    views = ("oft_R", "oft_embedding_R", "oft_block_size", "r")

    def __init__(self, config: OFTConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        embedding = isinstance(site, Embedding)
        self.side = "output" if embedding else "input"
        features = site.out if embedding else site.cols
        wanted = config.r or config.oft_block_size
        share = nearest_divisor(features, wanted)
        if share != wanted:
            name = "r" if config.r else "oft_block_size"
            warnings.warn(
                f"{path}: {name}={wanted} does not divide {features} features; using {share}", PeftWarning, stacklevel=2
            )
        self.r, self.oft_block_size = (share, features // share) if config.r else (features // share, share)
        size = self.oft_block_size
        self.factor = "oft_embedding_R" if embedding else "oft_R"
        self.add_module(self.factor, Factor(self.new(1 if config.block_share else self.r, size * (size - 1) // 2)))

        # on the layer's own device, since `device` is the meta device where tensors are to be assigned
        self.register_buffer("upper", torch.triu_indices(size, size, 1, device=site.device), persistent=False)

    upper: Tensor
    """Rows and columns of the strict upper triangle, (2, size (size - 1) / 2)."""

    @property
    def angles(self) -> Tensor:
        """Upper triangles of Q: (blocks, size (size - 1) / 2)."""
        return getattr(self, self.factor).weight

    def reset(self) -> None:
        if self.config.init_weights:
            nn.init.zeros_(self.angles)
        else:
            nn.init.normal_(self.angles, std=0.1)

    def skew(self) -> Tensor:
        """Q (blocks, size, size)."""
        angles, size = self.angles, self.oft_block_size
        q = angles.new_zeros(len(angles), size, size)
        q[:, self.upper[0], self.upper[1]] = angles
        q = q - q.mT
        if self.config.coft:  # projected in value, with the gradient of the unprojected
            radius = self.config.eps / len(q) ** 0.5
            norm = q.detach().norm(dim=(1, 2), keepdim=True)
            q = q + (q * (radius / norm.clamp(min=radius)) - q).detach()
        return q

    def rotation(self) -> Tensor:
        """R (blocks, size, size)."""
        q = self.skew()
        eye = torch.eye(self.oft_block_size, dtype=q.dtype, device=q.device).expand_as(q)
        if not self.config.use_cayley_neumann:
            return torch.linalg.solve(wide(eye + q), wide(eye - q), left=False)  # there is no solve in half precision
        # (I + Q)(I - Q)^-1 = I + 2Q + 2Q^2 + ..., cut as PEFT cuts it: the last power counts once.
        terms = self.config.num_cayley_neumann_terms
        if terms < 3:
            return eye + 2 * q if terms == 2 else eye
        total, power = torch.add(eye, q, alpha=2), q
        for i in range(2, max(3, terms - 1) + 1):
            power = power @ q
            total = torch.add(total, power, alpha=1 if i == max(3, terms - 1) else 2)
        return total

    def blocks(self) -> Tensor:
        """R with shared and dropped blocks resolved: (r, size, size)."""
        rotation = self.rotation().expand(self.r, -1, -1)
        if self.training and self.config.module_dropout and self.r > 1:
            dropped = torch.rand(self.r, device=rotation.device).argsort() < int(self.config.module_dropout * self.r)
            eye = torch.eye(self.oft_block_size, dtype=rotation.dtype, device=rotation.device)
            rotation = torch.where(dropped[:, None, None], eye, rotation)
        return rotation

    def map(self, x: Tensor) -> Tensor:
        return self._rotate(x, self.blocks())

    def pull(self, weight: Tensor) -> Tensor:
        return self._rotate(weight, self.blocks().mT)

    def _rotate(self, x: Tensor, blocks: Tensor) -> Tensor:
        x_blocks = x.unflatten(-1, (self.r, self.oft_block_size))
        return torch.einsum("...rb,rbc->...rc", x_blocks, blocks.to(x.dtype)).flatten(-2)
