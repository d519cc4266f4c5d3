"""Default target modules per transformers model type: facts of the ecosystem, the same as PEFT's tables."""

from __future__ import annotations

_LORA = {
    "q v": "t5 mt5",
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "q v q_proj v_proj": "blip-2",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
_IA3 = {  # before the bar: scaled on the output; after it: feed-forward layers, scaled on the input
    "k v | wo": "t5",
    "k v wi_1 |": "mt5",
    "c_attn | mlp.c_proj": "gpt2 gpt_bigcode",
    "query_key_value | mlp.dense_4h_to_h": "bloom",
    "query_key_value | dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
    "key value | output.dense": "bert roberta",
    "q_proj k_proj | fc2": "opt",
    "q_proj v_proj | fc2": "bart phi",
    "q_proj v_proj | fc_out": "gptj",
    "q_proj v_proj | c_proj": "gpt_neo",
    "k_proj v_proj | down_proj": "llama mistral",
    "k_proj v_proj | w2": "mixtral",
    "q_proj v_proj | down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "key_proj value_proj | output.dense": "deberta-v2",
    "in_proj | output.dense": "deberta",
}
_ADALORA = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox",
    "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "query value": "bert",
    "query key value dense": "roberta",
    "query_proj key_proj value_proj dense": "deberta-v2",
    "in_proj": "deberta",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
}
_NORMS = {
    "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
    "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
    "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    "layer_norm final_layer_norm": "t5 mt5",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "ln_1 ln_2 ln_f": "gpt2",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "ln_1 ln_f": "gptj",
    "input_layernorm final_layernorm": "phi",
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": (
        "gemma2 gemma3_text"
    ),
    "post_attention_layernorm": "qwen2 qwen3",
}
_TABLES = {"ADALORA": _ADALORA, "LN_TUNING": _NORMS}
"""Methods with targets of their own; the others take LoRA's."""
_OTHER_THAN_LORA = {("VERA", "phi"): "q_proj v_proj"}
_NO_REGEX = {"LN_TUNING"}
_REGEX = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def _find(table: dict[str, str], model_type: str | None) -> str | None:
    return next((targets for targets, types in table.items() if model_type in types.split()), None)


def targets_for(method: str | None, model_type: str | None) -> set[str] | str | None:
    """Suffixes (or a regex) of the layers that `method` adapts in models of `model_type`; None without a default."""
    if method == "IA3":
        row = _find(_IA3, model_type)
        return None if row is None else set(row.replace("|", " ").split())
    row = _OTHER_THAN_LORA.get((str(method), model_type or "")) or _find(_TABLES.get(str(method), _LORA), model_type)
    if row is None and method not in _NO_REGEX:
        return _REGEX.get(model_type or "")
    return None if row is None else set(row.split())


def feedforward_for(model_type: str | None) -> set[str] | None:
    """Suffixes of the feed-forward layers, which IA3 scales on their input."""
    row = _find(_IA3, model_type)
    return None if row is None else set(row.partition("|")[2].split())
