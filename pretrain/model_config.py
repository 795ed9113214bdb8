"""The shape of a model, with exact counts of parameters and FLOPs. The checkpoint owns it: growth changes it in mid-run."""

from typing import Annotated

from pydantic import Field, model_validator

from regrowth.settings import Settings


class ModelConfig(Settings):
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

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

    @model_validator(mode="after")
    def _heads_group_evenly(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            allowed = ", ".join(str(d) for d in range(1, self.heads + 1) if self.heads % d == 0)
            raise ValueError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}; choose kv_heads from {allowed}"
            )
        return self

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.width * self.head_dim * (self.heads + 2 * self.kv_heads) + self.heads * self.head_dim * self.width
        return attention + 3 * self.width * self.ffn_width

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        norms = self.layers * (2 * self.width + (2 * self.head_dim if self.qk_norm else 0)) + self.width
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * self.layer_matrix_parameters + norms + embeddings

    @property
    def non_embedding_parameters(self) -> int:
        """All parameters but the embedding and the head: the N of scaling laws."""
        return self.parameters - self.vocabulary * self.width * (1 if self.tied else 2)

    def train_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward matrix FLOPs per token: 2 per multiply-add, backward twice the forward.

        Full (not causal-half) attention, the head counted, the embedding look-up not; the convention of Narayanan et al. 2021
        (arXiv 2104.04473, eq. 3, without recomputation).
        """
        matrices = self.layers * self.layer_matrix_parameters + self.vocabulary * self.width
        attention = self.layers * 2 * sequence_length * self.heads * self.head_dim  # scores and their product with v
        return 6 * (matrices + attention)
