"""Whether a rephrase says what its source says, as models see it that are small beside the one that wrote it."""

from typing import Any

import numpy as np
import torch

from regrowth.data_pipeline.executors.cores import keep_to_share
from regrowth.data_pipeline.transform_config import Similarity
from regrowth.errors import UserError, need

_BATCH = 32


class SimilarityCheck:
    """How near rephrases are to their sources: the cosine of the means of a model's last states, or the chance that an NLI model gives to entailment.

    Raises:
        UserError: the model cannot be loaded, or knows no entailment.
    """

    def __init__(self, config: Similarity, key: str = "transforms.similarity.path") -> None:
        self.config = config
        transformers = need("transformers", "comparing rephrases with their sources")
        kind = transformers.AutoModel if config.kind == "embedding" else transformers.AutoModelForSequenceClassification
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        keep_to_share()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(config.path)
            self._model: Any = kind.from_pretrained(config.path).to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{key} = {config.path}: {' '.join(str(error).split())[:500]}") from error
        self.parameters = sum(p.numel() for p in self._model.parameters())
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # Some models (RoBERTa's kind) begin to count places behind that of padding.
        unused = [
            table.padding_idx + 1
            for name, table in self._model.named_modules()
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None
        ]
        self._longest = min(
            self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512) - max(unused, default=0)
        )
        if config.kind == "entailment":
            labels = {label.lower(): number for number, label in self._model.config.id2label.items()}
            if "entailment" not in labels:
                raise UserError(f"{key} = {config.path}: none of its labels ({', '.join(labels)}) is entailment; take an NLI model.")
            self._entailment = labels["entailment"]

    @torch.no_grad()
    def scores(self, pairs: list[tuple[str, str]]) -> list[float]:
        """For each (source, rephrase), a number that grows with what they have in common. What is longer than the model's context is judged by its beginning."""
        found: list[float] = []
        for begin in range(0, len(pairs), _BATCH):
            sources, texts = (list(column) for column in zip(*pairs[begin : begin + _BATCH], strict=True))
            if self.config.kind == "entailment":
                logits = self._model(**self._tokens(sources, texts)).logits.float()
                found += logits.softmax(-1)[:, self._entailment].tolist()
            else:
                found += torch.cosine_similarity(self._states(sources), self._states(texts)).tolist()
        return found

    @torch.no_grad()
    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [n, width]: the mean of each text's last states; of like lengths together, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        found: dict[int, np.ndarray] = {}
        for begin in range(0, len(order), _BATCH):
            some = order[begin : begin + _BATCH]
            found |= dict(zip(some, self._states([texts[place] for place in some]).cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(texts))])

    def _states(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokens(texts)
        states, mask = self._model(**tokens).last_hidden_state.float(), tokens["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    def _tokens(self, *texts: list[str]) -> Any:
        return self._tokenizer(*texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt").to(self._model.device)
