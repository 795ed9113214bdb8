"""A chat model of a few thousand parameters, made here: it answers gibberish, and ends its answers by chance."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def build(folder: Path, context: int = 512, seed: int = 0, text: str = "", begin: bool = True, width: int = 32) -> Path:
    """Save a Llama with random weights, and a byte-level tokenizer, as transformers does.

    Args:
        text: to learn some merges from.
        begin: whether the tokenizer knows a token that ends (and so begins) documents.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=400)
    tokenizer.train_from_iterator([text] if text else [], trainer)
    ends = {"eos_token": "<|end|>"} if begin else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATE, **ends).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=context, eos_token_id=0, bos_token_id=None, initializer_range=0.5)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return folder
