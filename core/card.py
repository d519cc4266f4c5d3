"""The model card of a saved adapter: what the hub needs to find and load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import PeftConfig
from .files import write_text


def write_card(directory: Path, config: PeftConfig) -> None:
    """Write or complete `README.md`: library, base model and tags. What a card says already is kept."""
    from huggingface_hub import ModelCard, ModelCardData

    path, base = directory / "README.md", config.base_model_name_or_path
    if path.is_file():
        card = ModelCard.load(path)
    else:
        title = f"Adapter for {base}" if base else "Adapter"
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# {title}\n")
    method = str(config.to_dict()["peft_type"]).lower()
    data: Any = card.data
    data.library_name = "peft"
    if base and not Path(base).exists():
        data.base_model = data.get("base_model") or base
    tags = [*(data.get("tags") or []), method, *([f"base_model:adapter:{base}"] if base else [])]
    data.tags = list(dict.fromkeys(tags))
    write_text(path, str(card))
