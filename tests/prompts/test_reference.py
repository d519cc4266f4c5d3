"""Numbers against `peft`, from equal weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from .conftest import CONFIGS, MODELS, SEQ2SEQ, align, batch, ours, theirs

TOKENS = ("prompt", "p-mlp", "p-lstm", "multitask")


CLASSIFY = [name for name, (_, task, _) in MODELS.items() if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]
BROKEN = {
    *((kind, model) for kind in ("prefix", "projected") for model in CLASSIFY),
    ("multitask", "bert-answers"),
    ("multitask", "bert-features"),
}
"""Pairs that PEFT cannot run: it looks for an argument that transformers has renamed, or loses `task_ids`."""


def _pair(kind, model, **changes):
    if model in SEQ2SEQ:
        changes["num_transformer_submodules"] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs(kind, model, **changes)
    mine = ours(kind, model, **changes)
    align(mine, reference)
    return mine, reference


def _scores(output):
    names = ("logits", "start_logits", "last_hidden_state")
    return next(output[n] for n in names if output.get(n) is not None)


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_outputs(kind, model):
    if (kind, model) in BROKEN:
        pytest.skip("PEFT fails")
    mine, reference = _pair(kind, model)
    inputs = batch(model)
    if kind == "multitask":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
    with torch.no_grad(), warnings.catch_warnings():
        y = _scores(mine(**inputs))
        warnings.simplefilter("ignore")
        inputs = (
            {k: v for k, v in inputs.items() if "label" not in k and "positions" not in k}
            if "bert" in model
            else inputs
        )
        expected = _scores(reference(**inputs))
    print(y.shape, expected.shape)
    if MODELS[model][1] != "SEQ_CLS":
        expected = expected[:, -y.shape[1] :]
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)
