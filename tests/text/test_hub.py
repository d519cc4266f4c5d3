"""Adapters from the hub and to it, against a local server that speaks its routes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import LlamaForCausalLM
from veneer import LoraConfig, PeftConfig, PeftModel, get_peft_model, text
from veneer.core import AdapterFileError

from .hub_server import TOKEN, Hub

BASE = "some/base"
# what huggingface_hub 2.4 makes of httpx when it uploads a file
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # the base is not in the cache when its adapter is saved
    pytest.mark.filterwarnings("ignore:Could not find a config file in some/base"),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


def adapted(llama_directory) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(llama_directory)
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    config.base_model_name_or_path = BASE
    return model


@pytest.fixture
def saved(llama_directory, tmp_path):
    model = adapted(llama_directory)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def test_an_adapter_comes_from_the_hub_and_then_from_the_cache(hub, saved, llama_directory, tokens):
    hub.publish("some/adapter", saved[0])
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_directory), "some/adapter")
    assert torch.equal(model(tokens).logits, saved[1](tokens).logits)
    asked = len(hub.asked)
    config = PeftConfig.from_pretrained("some/adapter", local_files_only=True)
    assert config.base_model_name_or_path == BASE
    model.load_adapter("some/adapter", "again", local_files_only=True)
    assert len(hub.asked) == asked


def test_base_and_adapter_from_one_id(hub, saved, llama_directory, tokens):
    hub.publish(BASE, llama_directory)
    hub.publish("some/adapter", saved[0])
    assert torch.equal(text.load_model("some/adapter")(tokens).logits, saved[1](tokens).logits)


def test_revisions_and_subfolders(hub, saved):
    hub.publish("some/adapter", saved[0].parent, revision="v2")
    hub.publish("some/adapter", saved[0])
    assert PeftConfig.from_pretrained("some/adapter", revision="v2", subfolder="saved").peft_type == "LORA"
    with pytest.raises(AdapterFileError, match=r"'adapter_config.json' at 'some/adapter' at.*no revision 'v3'"):
        PeftConfig.from_pretrained("some/adapter", revision="v3")
    with pytest.raises(AdapterFileError, match=rf"'inner/adapter_config.json'.*at {hub.url}: the repository is there"):
        PeftConfig.from_pretrained("some/adapter", subfolder="inner")


def test_a_private_repository_takes_its_token(hub, saved, tmp_path):
    hub.publish("some/secret", saved[0], private=True)
    for token in (None, "hf_wrong"):
        with pytest.raises(AdapterFileError, match=r"'some/secret'.*private one, which takes a `token`"):
            PeftConfig.from_pretrained("some/secret", token=token)
    assert PeftConfig.from_pretrained("some/secret", token=TOKEN, cache_dir=tmp_path / "elsewhere").peft_type == "LORA"
    assert (tmp_path / "elsewhere" / "models--some--secret").is_dir()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("no/adapter", "no such repository"), ("not an id", "no hub id either"), ("some/cold", "not in the cache")],
)
def test_what_is_nowhere_is_named_with_where_it_was_looked_for(hub, saved, source, reason):
    hub.publish("some/cold", saved[0])
    with pytest.raises(AdapterFileError, match=rf"'adapter_config.json' at '{source}'.*no local directory.*{reason}"):
        PeftConfig.from_pretrained(source, local_files_only=source == "some/cold")


@pytest.mark.parametrize("kind", ["PeftModel", "attached"])
def test_pushing_makes_a_repository_that_loads(hub, saved, llama_directory, tokens, kind):
    model = saved[1] if kind == "PeftModel" else text.attach(LlamaForCausalLM.from_pretrained(llama_directory))
    if kind == "attached":
        model.load_adapter(saved[0], "mine")
    address = model.push_to_hub("me/new", token=TOKEN, private=True, tags=["pirate"])
    assert address.startswith(f"{hub.url}/me/new/commit/")
    files = hub.repos["me/new"].revisions["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.repos["me/new"].private
    base = LlamaForCausalLM.from_pretrained(llama_directory)
    again = PeftModel.from_pretrained(base, "me/new", token=TOKEN)
    assert torch.equal(again(tokens).logits, saved[1](tokens).logits)
    card = ModelCard(files["README.md"].decode())
    assert {"lora", "pirate", f"base_model:adapter:{BASE}"} <= set(card.data.tags)


def test_pushing_to_a_branch_keeps_the_card_that_is_there(hub, saved, tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# By hand\n")
    hub.publish("me/old", tmp_path / "card")
    saved[1].push_to_hub("me/old", token=TOKEN, revision="v2", commit_message="second")
    card = ModelCard(hub.repos["me/old"].revisions["v2"]["README.md"].decode())
    assert card.data.license == "mit"
    assert {"mine", "lora"} <= set(card.data.tags)
    assert "# By hand" in card.content
    assert set(hub.repos["me/old"].revisions["main"]) == {"README.md"}


def test_without_the_right_token_nothing_is_pushed(hub, saved):
    with pytest.raises(HfHubHTTPError, match="401"):
        saved[1].push_to_hub("me/new", token="hf_wrong")
    assert not hub.repos


CHILD = """
import sys, torch
from transformers import AutoModelForCausalLM
from veneer import text
text.install()
model = AutoModelForCausalLM.from_pretrained("some/adapter", token=sys.argv[1] or None)
print(model.active_adapters(), model(torch.arange(1, 7)[None]).logits.double().sum().item())
"""


def test_transformers_opens_the_id_by_environment_and_offline(hub, saved, llama_directory, tmp_path):
    """`HF_ENDPOINT` and `HF_HUB_OFFLINE` are read when a process starts."""
    hub.publish(BASE, llama_directory)
    hub.publish("some/adapter", saved[0], private=True)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    expected = saved[1](torch.arange(1, 7)[None]).logits.double().sum().item()
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        command = [sys.executable, "-c", CHILD, "" if more else TOKEN]
        child = subprocess.run(command, capture_output=True, text=True, env=environment | more, cwd=os.sep)
        assert child.returncode == 0, child.stderr[-3000:]
        assert child.stdout.startswith("['default']")
        assert float(child.stdout.split()[-1]) == pytest.approx(expected, abs=1e-6)
