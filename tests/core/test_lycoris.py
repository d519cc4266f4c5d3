"""LoHa's and LoKr's deltas are those of LyCORIS, from equal factors and at scale 1."""

from __future__ import annotations

import pytest
import torch
from lycoris.functional.loha import diff_weight
from lycoris.functional.lokr import kron_weight

from .conftest import KINDS, build

LAYERS = [k for k in KINDS if k not in ("embedding", "gpt2", "conv2d-groups")]


def factors(adapter, kernel: tuple[int, ...], *names: str) -> list[torch.Tensor | None]:
    """The adapter's tensors by name; the (k, 1) of a 1d Tucker core as the (k,) that LyCORIS multiplies with."""
    found = [getattr(adapter, name, None) for name in names]
    return [t[..., 0] if t is not None and len(kernel) == 1 and t.ndim == 4 else t for t in found]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_loha(kind, variant):
    model, _ = build("LOHA", variant, kind, "a")
    adapter = model.model.layer.adapters["a"]
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
    given = factors(adapter, adapter.site.kernel, *names)
    theirs = diff_weight(*given, gamma=torch.tensor(1.0), backend="torch")
    torch.testing.assert_close(adapter.delta(), theirs.flatten(1))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("variant", [0, 1, 2, 3])
def test_lokr(kind, variant):
    model, _ = build("LOKR", variant, kind, "a")
    adapter = model.model.layer.adapters["a"]
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    theirs = kron_weight(*factors(adapter, adapter.site.kernel, *names), backend="torch")
    torch.testing.assert_close(adapter.delta(), theirs.flatten(1))
