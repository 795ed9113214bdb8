"""Which servers answer, and how they are asked."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from regrowth.settings import Settings


class StartConfig(Settings):
    """A server that each process starts for itself, and stops: an array task its own on the GPUs that it was given."""

    command: Annotated[
        list[str], Field(min_length=1)
    ]  # with {model} and {port}, which are filled in, as ["vllm", "serve", "{model}", "--port", "{port}"]
    env: dict[str, str] = {}
    wait_seconds: Annotated[float, Field(gt=0)] = 1800.0  # until it answers
    stop_seconds: Annotated[float, Field(gt=0)] = 30.0  # that it has to end by itself
    starts: Annotated[int, Field(ge=1)] = 3  # of a process, before the run fails
    log: Path | None = None  # where it writes; None: beside the cache of answers

    @field_validator("command")
    @classmethod
    def _has_a_port(cls, command: list[str]) -> list[str]:
        if not any("{port}" in word for word in command):
            raise ValueError('no word of it has "{port}" in it: the server has to listen where it is looked for')
        return command


class Price(Settings):
    """Of a million tokens, in whatever currency."""

    prompt: Annotated[float, Field(ge=0)]
    completion: Annotated[float, Field(ge=0)]

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


class ServerConfig(Settings):
    """One or more servers that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, transformers serve, commercial ones) and have the same model."""

    urls: list[str] = []  # up to /v1, as http://127.0.0.1:8000/v1
    start: StartConfig | None = None  # instead of urls
    model: Annotated[str, Field(min_length=1)]
    key_env: str | None = None  # the environment variable that holds the key; keys themselves are in no file of this project
    extra: dict[
        str, Any
    ] = {}  # sent with every request, for what a server wants beside or instead: {chat_template_kwargs = {enable_thinking = false}}
    price: Price | None = None
    max_in_flight: Annotated[int, Field(ge=1)] = 512  # requests under way at once, of a process
    first_in_flight: Annotated[int, Field(ge=1)] = 8  # from where it rises as long as that brings more
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0  # of a request, its answer included
    attempts: Annotated[int, Field(ge=1)] = 6  # of a request, before it is recorded as failed
    first_wait_seconds: Annotated[float, Field(gt=0)] = (
        1.0  # before the second attempt; doubled before each further one, and never exactly so long
    )
    give_up_seconds: Annotated[float, Field(gt=0)] = 600.0  # without any server that answers, before the run fails (and can go on)

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f'"{url}" is no address; write it with http:// or https://, up to /v1')
        return [url.rstrip("/") for url in urls]

    @model_validator(mode="after")
    def _is_somewhere(self) -> "ServerConfig":
        if bool(self.urls) == bool(self.start):
            raise ValueError("name the servers (urls = [...]), or say how each process starts its own (start.command = [...])")
        return self


class LocalModelConfig(Settings):
    """A model in this process, by transformers: for small ones."""

    path: Annotated[str, Field(min_length=1)]  # a folder, or a name on the Hub
    device: str = "auto"  # "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # "float32", "bfloat16"
    batch_tokens: Annotated[int, Field(ge=1)] = 16384  # of prompts and answers together, at once
    batch_requests: Annotated[int, Field(ge=1)] = 64
    price: Price | None = None

    @property
    def model(self) -> str:
        """Its name."""
        return self.path
