"""A causal language model of transformers, in this process, that says how well it knows documents."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from regrowth.data_pipeline.executors.cores import keep_to_share
from regrowth.data_pipeline.select.config import Losses
from regrowth.data_pipeline.select.record import model_mark
from regrowth.data_pipeline.select.windows import Window, windows
from regrowth.errors import UserError, need
from regrowth.files import fingerprint

# Numbers that are turned into losses at once, and tokens of a forward pass: as many as keep a GPU busy; as few as stay in a processor's cache.
_LOGITS_AT_ONCE, _LOGITS_IN_CACHE = 1 << 26, 1 << 18
_TOKENS_AT_ONCE, _TOKENS_IN_CACHE = 1 << 15, 1 << 11
_PROBE = "Untrained tokenizers' mergers, 1,234.56 of them, cut   white\n\tspace, naïve accents, 漢字 and 🙂 alike: reinstitutionalisation."


class Scored(NamedTuple):
    """Of each document: the nats of what was predicted, the characters that it stands for, and its tokens."""

    nats: np.ndarray  # float64 [n], NaN where nothing was predicted
    characters: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int64 [n]: that were predicted
    run: np.ndarray  # int64 [n]: that went through the model, those that were context again among them


class LossModel:
    """Sums of losses over whole documents.

    A document's first token is predicted from the token that begins documents (`bos`, else `eos`), as in training; a tokenizer with neither predicts from the second token on, and
    the characters of the first are not counted. No end is predicted. Documents never see each other.

    Args:
        key: of the config, that named the model.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer cannot say where tokens lie.
    """

    def __init__(self, path: str, config: Losses, key: str) -> None:
        self.path, self.config, self.key = path, config, key
        self.mark = model_mark(path)
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._tokenizer is None:
            transformers = need("transformers", "taking models' losses on documents")
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{self._where}: {' '.join(str(error).split())[:500]}") from error
            if not self._tokenizer.is_fast:
                raise UserError(
                    f"{self._where}: its tokenizer has no tokenizer.json (a fast tokenizer), so that characters cannot be told. Convert it."
                )
        return self._tokenizer

    @property
    def vocabulary(self) -> str:
        """A hash of the tokenizer: equal where tokens mean the same, a probe is cut alike, and documents begin alike."""
        cut = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        return fingerprint([sorted(self.tokenizer.get_vocab().items()), cut, self._first])

    @property
    def _first(self) -> int | None:
        """The token that stands before each document."""
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id

    @property
    def _where(self) -> str:
        return f"{self.key} = {self.path}{'' if Path(self.path).is_dir() else ' (no folder of this name is here)'}"

    def load(self) -> None:
        """Have the model in memory."""
        if self._model is not None:
            return
        keep_to_share()
        transformers = need("transformers", "taking models' losses on documents")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.config.device == "auto" else self.config.device
        transformers.utils.logging.disable_progress_bar()  # of a moment's loading, in the midst of ours
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=getattr(torch, self.config.dtype))
            self._model = model.to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._where}: {' '.join(str(error).split())[:500]}") from error
        self.parameters = sum(p.numel() for p in self._model.parameters())
        context = getattr(self._model.config, "max_position_embeddings", None) or self.config.window
        self.window = min(self.config.window, context)
        self.stride = max(1, self.config.stride * self.window // self.config.window)  # a window that is cut keeps its share of context
        self._vocabulary_size = self._model.config.get_text_config().vocab_size
        self.batch_tokens = self.config.batch_tokens or (_TOKENS_AT_ONCE if self._model.device.type == "cuda" else _TOKENS_IN_CACHE)
        with torch.no_grad():
            self._split = self._heads_alone()

    def close(self) -> None:
        """Free the model; it is loaded again when it is needed."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def score(self, texts: list[str]) -> Scored:
        """The losses of documents."""
        self.load()
        coded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        first = self._first
        ids = [([] if first is None else [first]) + tokens for tokens in coded["input_ids"]]
        skipped = [0 if first is not None or not offsets else offsets[0][1] for offsets in coded["offset_mapping"]]
        characters = np.array([len(text) - gone for text, gone in zip(texts, skipped, strict=True)], np.int64)
        tokens = np.array([max(len(one) - 1, 0) for one in ids], np.int64)
        nats, run = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        for batch in self._batches(ids):
            for (document, w), loss in zip(batch, self._losses(batch, ids), strict=True):
                nats[document] += loss
                run[document] += w.stop - w.begin
        return Scored(np.where((tokens > 0) & (characters > 0), nats, np.nan), characters, tokens, run)

    def _batches(self, ids: list[list[int]]) -> list[list[tuple[int, Window]]]:
        """Windows of like lengths together, the longest first: hardly any padding, and memory runs out at once or never."""
        every = [(document, w) for document, one in enumerate(ids) for w in windows(len(one), self.window, self.stride)]
        every.sort(key=lambda pair: (pair[1].begin - pair[1].stop, pair[1].begin - pair[1].scored))
        batches: list[list[tuple[int, Window]]] = []
        for pair in every:
            if batches and (len(batches[-1]) + 1) * (batches[-1][0][1].stop - batches[-1][0][1].begin) <= self.batch_tokens:
                batches[-1].append(pair)
            else:
                batches.append([pair])
        return batches

    def _losses(self, batch: list[tuple[int, Window]], ids: list[list[int]]) -> list[float]:
        """Nats of each window. Padding stands behind, where a causal model does not look back to it, so no mask is needed."""
        longest = max(w.stop - w.begin for _, w in batch)
        rows = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest - 1), -100, dtype=torch.long)
        for row, (document, w) in enumerate(batch):
            its = torch.tensor(ids[document][w.begin : w.stop])
            rows[row, : len(its)] = its
            labels[row, w.scored - w.begin - 1 : len(its) - 1] = its[w.scored - w.begin :]
        rows, labels = rows.to(self._model.device), labels.to(self._model.device)
        where = labels >= 0
        wanted = labels[where]
        losses = torch.empty(len(wanted), dtype=torch.float64, device=rows.device)
        if self._split:
            states = self._model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1][where]
        else:
            states = self._model(input_ids=rows, use_cache=False).logits[:, :-1][where]
        # A few at a time, so that their logits stay in the processor's cache.
        step = max(1, (_LOGITS_AT_ONCE if rows.device.type == "cuda" else _LOGITS_IN_CACHE) // self._vocabulary_size)
        for at in range(0, len(wanted), step):
            logits = self._model.get_output_embeddings()(states[at : at + step]) if self._split else states[at : at + step]
            losses[at : at + step] = torch.nn.functional.cross_entropy(logits.float(), wanted[at : at + step], reduction="none").double()
        of = where.nonzero()[:, 0]
        return torch.zeros(len(batch), dtype=torch.float64, device=rows.device).index_add_(0, of, losses).tolist()

    def _heads_alone(self) -> bool:
        """Whether last states times the output embeddings are the model's own logits; some models scale or bound them."""
        probe = torch.arange(8, device=self._model.device)[None] % self._vocabulary_size
        try:
            states = self._model.base_model(input_ids=probe, use_cache=False).last_hidden_state
            apart = self._model.get_output_embeddings()(states)
        except (AttributeError, TypeError):
            return False
        own = self._model(input_ids=probe, use_cache=False).logits
        return apart.shape == own.shape and bool(torch.equal(apart, own))
