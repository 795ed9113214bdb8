"""Canonical checkpoints to Hugging Face folders: `LlamaForCausalLM`, or `Qwen3ForCausalLM` where q and k are normed.

Names are translated, values are not touched: with rotate-half RoPE and unfused projections the two agree tensor by tensor. Writing needs only
safetensors; `transformers` is needed to load the result, by whoever does.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from regrowth.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from regrowth.errors import UserError
from regrowth.files import atomic_path, write_json
from regrowth.pretrain.checkpoint import load_plain
from regrowth.pretrain.model_config import ModelConfig

_WITHIN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wk.weight": "self_attn.k_proj.weight",
    "attn.wv.weight": "self_attn.v_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w_gate.weight": "mlp.gate_proj.weight",
    "ffn.w_up.weight": "mlp.up_proj.weight",
    "ffn.w_down.weight": "mlp.down_proj.weight",
}
_OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}


def hf_name(name: str) -> str:
    """A canonical name in Hugging Face's spelling."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_WITHIN_LAYER[rest]}"


def hf_config(config: ModelConfig, sequence_length: int, end_of_text: int | None) -> dict[str, Any]:
    """The config.json of the exported model.

    Raises:
        UserError: the shape is one that transformers refuses to build.
    """
    qwen = config.qk_norm
    if not qwen and config.width % config.heads:
        raise UserError(
            f"model.width = {config.width} is not a multiple of model.heads = {config.heads}: transformers' Llama refuses such a shape "
            "(its Qwen3, which qk_norm = true exports to, does not)."
        )
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def export_hf(checkpoint: Path, out: Path, tokenizer: Tokenizer | None, sequence_length: int) -> None:
    """Write a checkpoint as a folder that `transformers` loads, with its tokenizer if there is one.

    Raises:
        UserError: the checkpoint is refused, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; an export never overwrites. Remove it or choose another folder.")
    state, weights, _ = load_plain(checkpoint)
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        write_hf(partial, state.model, weights, tokenizer, sequence_length)


def write_hf(
    folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer | None, sequence_length: int
) -> None:
    """The files of an export."""
    tensors = {hf_name(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.end_of_text if tokenizer else None
    write_json(folder / "config.json", hf_config(config, sequence_length, end))
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True, "temperature": 0.8})
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "model_max_length": sequence_length}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
