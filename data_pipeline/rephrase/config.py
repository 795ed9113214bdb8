"""Which servers answer, and how they are asked."""

from typing import Annotated

from pydantic import Field, field_validator

from regrowth.settings import Settings


class ServerConfig(Settings):
    """One or more servers that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, transformers serve, commercial ones) and have the same model."""

    urls: Annotated[list[str], Field(min_length=1)]  # up to /v1, as http://127.0.0.1:8000/v1
    model: Annotated[str, Field(min_length=1)]
    key_env: str | None = None  # the environment variable that holds the key; keys themselves are in no file of this project
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
