"""The shape of a model, with exact counts of parameters and FLOPs. The checkpoint owns it: growth changes it in mid-run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from regrowth.settings import Settings


class MoEConfig(Settings):
    """A mixture of experts in the place of some layers' feed-forward."""

    experts: Annotated[int, Field(ge=2)] = 8
    top_k: Annotated[int, Field(ge=1)] = 2
    expert_width: Annotated[int, Field(ge=1)] = 128  # hidden width of one expert
    shared_width: Annotated[int, Field(ge=0)] = 0  # hidden width of the shared experts together, which every token passes
    pattern: Annotated[list[Literal["dense", "moe"]], Field(min_length=1)] = ["moe"]  # repeated over the layers
    gate: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # let the chosen experts' weights sum to one
    scale: Annotated[float, Field(gt=0)] = 1.0  # of the routed experts' output
    balance_loss: Annotated[float, Field(ge=0)] = 0.01  # coefficient of the load-balancing loss, per sequence
    bias_rate: Annotated[float, Field(ge=0)] = 0.0  # how far an expert's bias moves in a step (balancing without a loss)
    z_loss: Annotated[float, Field(ge=0)] = 0.0  # coefficient of the router's z-loss
    capacity: Annotated[float, Field(gt=0)] | None = (
        None  # places of an expert in a sequence, as a multiple of its even share; None: no limit
    )

    @model_validator(mode="after")
    def _chooses_some(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(f"model.moe.top_k = {self.top_k} is more than model.moe.experts = {self.experts}")
        return self


class ModelConfig(Settings):
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU or a mixture of experts."""

    vocabulary: Annotated[int, Field(ge=2)] = 4096
    width: Annotated[int, Field(ge=2)] = 192
    layers: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 6
    kv_heads: Annotated[int, Field(ge=1)] = 2
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    ffn_width: Annotated[int, Field(ge=1)] = 512
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    qk_norm: bool = True
    tied: bool = True  # one matrix for embedding and head
    init_std: Annotated[float, Field(gt=0)] = 0.02
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _heads_group_evenly(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            allowed = ", ".join(str(d) for d in range(1, self.heads + 1) if self.heads % d == 0)
            raise ValueError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}; choose kv_heads from {allowed}"
            )
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.moe is not None and self.moe.pattern[layer % len(self.moe.pattern)] == "moe"

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def expert_count(self) -> int:
        """Experts of a layer that has them; 0 in a dense model."""
        return self.moe.experts if self.moe and any(self.is_moe(i) for i in range(self.layers)) else 0

    @property
    def hidden_widths(self) -> dict[str, int]:
        """Hidden widths of the feed-forwards, by config key: what tensor parallelism cuts."""
        widths = {} if all(self.is_moe(i) for i in range(self.layers)) else {"model.ffn_width": self.ffn_width}
        if self.moe and self.expert_count:
            widths["model.moe.expert_width"] = self.moe.expert_width
            if self.moe.shared_width:
                widths["model.moe.shared_width"] = self.moe.shared_width
        return widths

    def layer_matrix_parameters(self, layer: int, active: bool = False) -> int:
        """Parameters of a layer's matrices; `active`: of those that one token passes."""
        attention = self.width * self.head_dim * (self.heads + 2 * self.kv_heads) + self.heads * self.head_dim * self.width
        if not self.is_moe(layer):
            return attention + 3 * self.width * self.ffn_width
        assert self.moe is not None
        experts = self.moe.top_k if active else self.moe.experts
        return attention + self.width * (3 * experts * self.moe.expert_width + 3 * self.moe.shared_width + self.moe.experts)

    def _matrix_parameters(self, active: bool = False) -> int:
        return sum(self.layer_matrix_parameters(i, active) for i in range(self.layers))

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once, all experts counted."""
        norms = self.layers * (2 * self.width + (2 * self.head_dim if self.qk_norm else 0)) + self.width
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self._matrix_parameters() + norms + embeddings

    @property
    def active_parameters(self) -> int:
        """Those that one token passes."""
        return self.parameters - self._matrix_parameters() + self._matrix_parameters(active=True)

    @property
    def non_embedding_parameters(self) -> int:
        """All parameters but the embedding and the head: the N of scaling laws."""
        return self.parameters - self.vocabulary * self.width * (1 if self.tied else 2)

    def layer_flops_per_token(self, layer: int, sequence_length: int) -> int:
        """Forward matrix FLOPs of one layer: 2 per multiply-add, full attention."""
        return 2 * (self.layer_matrix_parameters(layer, active=True) + 2 * sequence_length * self.heads * self.head_dim)

    @property
    def head_flops_per_token(self) -> int:
        """Forward matrix FLOPs of the head."""
        return 2 * self.vocabulary * self.width

    def train_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward matrix FLOPs per token: backward twice the forward.

        Full (not causal-half) attention, the head counted, the embedding look-up not; the convention of Narayanan et al. 2021
        (arXiv 2104.04473, eq. 3, without recomputation). Of experts, those that a token passes.
        """
        layers = sum(self.layer_flops_per_token(i, sequence_length) for i in range(self.layers))
        return 3 * (layers + self.head_flops_per_token)
