"""`ephemeral_gpu_offload`: where initialisation computes. The accelerator is a stand-in that counts."""

import pytest
import torch
from torch import nn
from veneer import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from veneer.core import offload

ON = LoraRuntimeConfig(ephemeral_gpu_offload=True)
CASES = [
    ({"use_dora": True}, 1),
    ({"init_lora_weights": "pissa"}, 1),
    ({"use_dora": True, "init_lora_weights": "olora"}, 2),
]


def build(**options) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], **options))


@pytest.fixture
def asked(monkeypatch) -> list[None]:
    found: list[None] = []

    def accelerator() -> torch.device:
        found.append(None)
        return torch.device("cpu")

    monkeypatch.setattr(offload, "accelerator", accelerator)
    return found


@pytest.mark.parametrize(("options", "times"), CASES)
def test_heavy_starts_go_to_the_accelerator_and_come_back(options, times, asked):
    plain = build(**options)
    assert not asked
    model = build(**options, runtime_config=ON)
    assert len(asked) == times
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize(("options", "times"), CASES)
def test_on_a_real_accelerator(options, times):
    plain, model = build(**options), build(**options, runtime_config=ON)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_it_is_never_saved(tmp_path):
    model = build(use_dora=True, runtime_config=ON)
    model.save_pretrained(tmp_path)
    assert "runtime_config" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert again.peft_config["default"].runtime_config == LoraRuntimeConfig()
