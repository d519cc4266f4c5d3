"""Every registered method that changes layers trains in DreamBooth, and goes on exactly after a stop."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from veneer.core.config import config_classes
from veneer.diffusion import AdapterOptions, ConfigError, DreamBooth, Step

OWN = {"diag_oft": {"block_size": 4}, "oft": {"oft_block_size": 8}, "adalora": {"tinit": 1, "tfinal": 1}}
"""Options without which a method would not do here what it is for."""
UNFIT = {"trainable_tokens", "ln_tuning", "adaption_prompt"}
"""For embeddings, norms, and decoders of language models."""
METHODS = {kind.value.lower(): found for kind, found in config_classes().items() if not found.prompts}
METHODS = {name: found for name, found in METHODS.items() if name not in UNFIT}


def train(config, until: int | None = None) -> dict[str, torch.Tensor]:
    booth = DreamBooth(config)
    for event in booth.run():
        if isinstance(event, Step) and event.step == until:
            booth.stop()
    folder = config.output_dir if until is None else next((config.output_dir / "checkpoints").glob("step-*"))
    return load_file(folder / "unet" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes_exactly(make_config, tmp_path, method):
    rank = {"rank": 4} if hasattr(METHODS[method], "r") and method != "oft" else {}
    unet = AdapterOptions(
        method=method, learning_rate=1e-2, targets=("attn1.to_q",), options=OWN.get(method, {}), **rank
    )
    config = make_config(
        unet=unet, text_encoder=AdapterOptions(method="none"), max_train_steps=4, output_dir=tmp_path / "stopped"
    )
    before, after = train(config, until=2), train(config)
    straight = train(replace(config, output_dir=tmp_path / "straight"))
    assert any(not torch.equal(before[key], after[key]) for key in after)
    assert after.keys() == straight.keys()
    assert all(torch.equal(after[key], straight[key]) for key in after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ia3", "rank": 4}, "unet.rank: ia3 has no such option"),
        ({"method": "oft", "dropout": 0.1}, "unet.dropout: oft has no such option"),
        ({"method": "ia3", "alpha": 2.0}, "unet.alpha: ia3 has no such option"),
        ({"method": "prompt_tuning"}, "unet.method=prompt_tuning learns tokens before a language model's input"),
        ({"method": "lora", "options": {"bias": "some"}}, "bias"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(make_config, options, message):
    with pytest.raises(ConfigError, match=message):
        list(DreamBooth(make_config(unet=AdapterOptions(**options))).run())
