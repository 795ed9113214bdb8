"""A model in this process: what is asked goes through transformers' `generate`, in batches of requests of like lengths."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from regrowth.data_pipeline.executors.cores import keep_to_share
from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
from regrowth.data_pipeline.rephrase.config import LocalModelConfig
from regrowth.data_pipeline.rephrase.engine import Engine, Report, Request
from regrowth.errors import UserError, need


class LocalModel(Engine):
    """Answers as a server would; the model is loaded when the first request is not in the cache.

    Sampling is seeded by the requests of a batch: the same batch gets the same answers.
    """

    def __init__(self, config: LocalModelConfig, cache: RequestCache, budget_tokens: int | None = None, retry_errors: bool = False) -> None:
        super().__init__(config.model, cache, budget_tokens, retry_errors)
        self.config = config
        self._waiting: dict[str, Request] = {}
        self._batch_tokens = config.batch_tokens
        self._model: Any = None
        self._tokenizer: Any = None

    def _load(self) -> None:
        if self._model is not None:
            return
        transformers = need("transformers", "rephrasing by a model in this process")
        keep_to_share()
        config, where = self.config, f"transforms.local.path = {self.config.path}"
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(config.path, padding_side="left")
            model = transformers.AutoModelForCausalLM.from_pretrained(config.path, dtype=config.dtype)
            self._model = model.to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            found = "" if Path(config.path).is_dir() else " (no folder of this name is here)"
            raise UserError(f"{where}{found}: {' '.join(str(error).split())[:500]}") from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: its tokenizer has no chat template, so it is no model to give instructions to. Take an instruct model."
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def close(self) -> None:
        """Free the model."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take_up(self, requests: dict[str, Request]) -> None:
        self._waiting.update(requests)

    def _wait_for(self, keys: set[str], report: Report) -> dict[str, Answer]:
        self._load()
        wanted = {key: request for key, request in self._waiting.items() if key in keys}
        prompts = {key: self._prompt(request) for key, request in wanted.items()}
        spent = sum(self.cache.spent())
        answers = self.cache.find(keys - wanted.keys())  # whoever asked for the same before has had them made
        # What is asked alike is generated together; the longest first, so that memory runs out at once or never.
        left = sorted(wanted, key=lambda key: (self._sampling(wanted[key]), len(prompts[key])), reverse=True)
        while left:
            self._refuse_more(spent)
            batch = self._next_batch(left, wanted, prompts)
            try:
                some = self._generate(batch, wanted, prompts)
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if len(batch) == 1:
                    raise UserError(
                        f'transforms.local: not even one request fits into the GPU\'s memory ({error}). Take a smaller model, dtype = "bfloat16", or a server.'
                    ) from error
                self._batch_tokens = sum(len(prompts[key]) + wanted[key].payload["max_tokens"] for key in batch) // 2
                continue
            self._record(some.items())
            answers |= some
            spent += sum(answer.prompt_tokens + answer.completion_tokens for answer in some.values())
            left = left[len(batch) :]
            for key in batch:
                del self._waiting[key]
            report(len(answers))
        return answers

    def _prompt(self, request: Request) -> list[int]:
        messages = request.payload["messages"]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: some refuse system messages
            if messages[0]["role"] != "system":
                raise UserError(
                    f"transforms.local.path = {self.config.path}: its chat template takes no such message ({error})."
                ) from error
            system, user, *rest = messages
            return self._prompt(
                replace(
                    request,
                    payload={**request.payload, "messages": [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]},
                )
            )
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @staticmethod
    def _sampling(request: Request) -> tuple[float, float, int]:
        return tuple(float(request.payload.get(key, default)) for key, default in (("temperature", 1.0), ("top_p", 1.0), ("max_tokens", 0)))  # pyright: ignore[reportReturnType]

    def _next_batch(self, left: list[str], requests: dict[str, Request], prompts: dict[str, list[int]]) -> list[str]:
        first = left[0]
        each = len(prompts[first]) + requests[first].payload["max_tokens"]
        most = min(self.config.batch_requests, max(1, self._batch_tokens // each))
        alike = (key for key in left[:most] if self._sampling(requests[key]) == self._sampling(requests[first]))
        return list(alike)

    @torch.no_grad()
    def _generate(self, batch: list[str], requests: dict[str, Request], prompts: dict[str, list[int]]) -> dict[str, Answer]:
        first = requests[batch[0]].payload
        longest, context = len(prompts[batch[0]]), getattr(self._model.config, "max_position_embeddings", None)
        if context and longest + first["max_tokens"] > context:
            refused = (
                f"context too small: {longest} tokens of prompt and {first['max_tokens']} of answer are more than the model's {context}"
            )
            return (
                {batch[0]: Answer(error=refused)}
                if len(batch) == 1
                else {key: self._generate([key], requests, prompts)[key] for key in batch}
            )
        padded = self._tokenizer.pad({"input_ids": [prompts[key] for key in batch]}, return_tensors="pt").to(self._model.device)
        temperature = first.get("temperature", 1.0)
        chance = {"do_sample": True, "temperature": temperature, "top_p": first.get("top_p", 1.0)} if temperature else {"do_sample": False}
        torch.manual_seed(xxhash.xxh3_64_intdigest("".join(batch).encode()) >> 1)
        out = self._model.generate(**padded, max_new_tokens=first["max_tokens"], pad_token_id=self._tokenizer.pad_token_id, **chance)
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self._tokenizer.eos_token_id}
        answers = {}
        for key, tokens in zip(batch, out[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((place for place, token in enumerate(tokens) if token in ends), None)
            text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
            made = len(tokens) if length is None else length + 1
            answers[key] = Answer(text, "length" if length is None else "stop", prompt_tokens=len(prompts[key]), completion_tokens=made)
        return answers
