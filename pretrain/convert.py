"""Canonical checkpoints to Hugging Face folders: `LlamaForCausalLM`, or `Qwen3ForCausalLM` where q and k are normed.

Names are translated, values are not touched: with rotate-half RoPE and unfused projections the two agree tensor by tensor. Writing needs only
safetensors; `transformers` is needed to load the result, by whoever does.
"""

import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from regrowth.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from regrowth.errors import UserError
from regrowth.files import disk_full_is_a_letter, fsync_path, make_folder, write_json
from regrowth.mpi import Alone
from regrowth.pretrain.checkpoint import canonical_shapes, read_state, verify
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.tensor_files import TensorReader

_FILE_BYTES = 4_000_000_000

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
        UserError: the shape is one that transformers refuses to build, or has experts.
    """
    if config.expert_count:
        raise UserError(
            f"model.expert_count = {config.expert_count}: this version exports dense models only; one with experts stays in its own format."
        )
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


def export_hf(
    checkpoint: Path,
    out: Path,
    tokenizer: Tokenizer | None,
    sequence_length: int,
    ranks: Alone | None = None,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Write a checkpoint as a folder that `transformers` loads, with its tokenizer if there is one; file by file, shared out over ranks.

    Args:
        file_bytes: of a file with weights, at most, if no tensor is larger.

    Raises:
        UserError: the checkpoint is refused, or `out` exists.
        RunFailed: the disk is full; what was written is removed.
    """
    ranks = ranks or Alone()

    def begin() -> Path:
        if out.exists():
            raise UserError(f"{out}: exists already; an export never overwrites. Remove it or choose another folder.")
        verify(checkpoint)
        hf_config(read_state(checkpoint).model, sequence_length, None)  # a shape that cannot be is refused before anything is written
        partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
        make_folder(partial)
        return partial

    def write_own() -> None:
        read = TensorReader(checkpoint / "model")
        for number, (name, tensors) in enumerate(files.items()):
            if number % ranks.size == ranks.rank:
                with disk_full_is_a_letter(out):
                    save_file({hf_name(tensor): read(tensor).contiguous() for tensor in tensors}, partial / name, metadata={"format": "pt"})
                    fsync_path(partial / name)

    def finish() -> None:
        write_beside(partial, model, files, tokenizer, sequence_length)
        fsync_path(partial)
        partial.rename(out)
        fsync_path(out.parent)

    partial = ranks.first(begin)
    try:
        model = read_state(checkpoint).model
        files = files_of(model, file_bytes)
        ranks.together(write_own)
        ranks.first(finish)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def files_of(model: ModelConfig, file_bytes: int) -> dict[str, list[str]]:
    """The files of an export, and the canonical names of what is in each, in the model's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in canonical_shapes(model).items():
        if groups[-1] and size + 4 * shape.numel() > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 4 * shape.numel()
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, start=1)}


def write_beside(folder: Path, model: ModelConfig, files: dict[str, list[str]], tokenizer: Tokenizer | None, sequence_length: int) -> None:
    """The files of an export beside its weights."""
    if len(files) > 1:
        total = sum(4 * shape.numel() for shape in canonical_shapes(model).values())
        index = {hf_name(name): file for file, names in files.items() for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    end = tokenizer.end_of_text if tokenizer else None
    write_json(folder / "config.json", hf_config(model, sequence_length, end))
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True, "temperature": 0.8})
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "model_max_length": sequence_length}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
