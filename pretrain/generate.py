"""Sampling from a checkpoint, for a look at what it learned. The whole context is computed again for every token: fine for samples."""

from collections.abc import Iterator

import torch

from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.pretrain.model import Transformer


@torch.no_grad()
def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int, context: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:  # fmt: skip
    """Yield the continuation piece by piece; ends early where the model ends the document.

    Args:
        context: how many tokens the model looks back.
        temperature: 0 takes the likeliest token.
        top_p: nucleus of the probability mass to sample from (Holtzman et al. 2020).
    """
    ids = [tokenizer.end_of_text, *(tokenizer.encode_documents([prompt])[0][1:] if prompt else [])]
    generator = torch.Generator().manual_seed(seed)
    told = len(tokenizer.decode(ids))
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]])
        positions = torch.arange(window.shape[1])[None]
        logits = model(window, positions, torch.zeros_like(window))[0, -1].float().cpu()
        chosen = _sample(logits[: tokenizer.size], temperature, top_p, generator)
        if chosen == tokenizer.end_of_text:
            return
        ids.append(chosen)
        text = tokenizer.decode(ids)
        if not text.endswith("�"):  # a character may take several tokens
            yield text[told:]
            told = len(text)


def _sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    kept = torch.where(before < top_p, probabilities, torch.zeros_like(probabilities))
    kept[0] = probabilities[0]  # whatever top_p is, the likeliest token stays
    return int(order[torch.multinomial(kept, 1, generator=generator)])
