"""What each dim of a canonical weight stands for: the one place that operators in width ask."""

from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.model_config import ModelConfig

# The last dim of a matrix is what it reads, the one before what it writes.
_DIMS: dict[str, tuple[str, ...]] = {
    "embed.weight": ("vocabulary", "width"),
    "head.weight": ("vocabulary", "width"),
    "norm.weight": ("width",),
    "attn_norm.weight": ("width",),
    "ffn_norm.weight": ("width",),
    "attn.wq.weight": ("queries", "width"),
    "attn.wk.weight": ("keys", "width"),
    "attn.wv.weight": ("keys", "width"),
    "attn.wo.weight": ("width", "queries"),
    "attn.q_norm.weight": ("head_dim",),
    "attn.k_norm.weight": ("head_dim",),
    "ffn.w_gate.weight": ("ffn", "width"),
    "ffn.w_up.weight": ("ffn", "width"),
    "ffn.w_down.weight": ("width", "ffn"),
    "ffn.router.weight": ("experts", "width"),
    "ffn.router.bias": ("experts",),
    "ffn.experts.w_gate": ("experts", "expert", "width"),
    "ffn.experts.w_up": ("experts", "expert", "width"),
    "ffn.experts.w_down": ("experts", "width", "expert"),
    "ffn.shared.w_gate.weight": ("shared", "width"),
    "ffn.shared.w_up.weight": ("shared", "width"),
    "ffn.shared.w_down.weight": ("width", "shared"),
}


def dims(name: TensorName) -> tuple[str, ...]:
    """The kind of each dim of a weight."""
    return _DIMS[name.rest]


def size_of(kind: str, config: ModelConfig) -> int:
    """How many entries a dim of a kind has."""
    moe = config.moe
    return {
        "vocabulary": config.vocabulary,
        "width": config.width,
        "queries": config.heads * config.head_dim,
        "keys": config.kv_width,
        "head_dim": config.head_dim,
        "ffn": config.ffn_width,
        "experts": moe.experts if moe else 0,
        "expert": moe.expert_width if moe else 0,
        "shared": moe.shared_width if moe else 0,
    }[kind]


def resized(config: ModelConfig, **changes: int | float | None) -> ModelConfig:
    """A config with other sizes, checked as a whole; keys of `model.moe` may stand among them. None: as it is.

    Raises:
        ValueError: the sizes do not fit together.
    """
    values = config.model_dump()
    for key, value in changes.items():
        if value is None:
            continue
        if key in values:
            values[key] = value
        elif values["moe"] is not None:
            values["moe"][key] = value
    return ModelConfig.model_validate(values)
