"""One server: a request, and what may come of it, sorted by what to do about it."""

import json
import os
from typing import TYPE_CHECKING, Any

from regrowth.data_pipeline.document import sound_text
from regrowth.data_pipeline.rephrase.cache import Answer
from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.errors import UserError, need

if TYPE_CHECKING:
    import aiohttp

_MOST_BYTES = 8 << 20  # of an answer
_QUOTED = 300  # characters of a server's words in a letter


class Retry(Exception):
    """It may go well another time.

    Args:
        wait: seconds that the server asked to be left alone for.
        overloaded: whether fewer requests at once might help.
        busy: whether the server said no more than that it has too much to do: that is no failed attempt.
        lost: whether the server seems to be gone: then it is looked for before it is asked again.
        empty: whether it was a completion, but one without text.
        tokens: of prompt and completion, that it cost all the same.
    """

    def __init__(
        self,
        reason: str,
        wait: float = 0.0,
        overloaded: bool = False,
        busy: bool = False,
        lost: bool = False,
        empty: bool = False,
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(reason)
        self.wait, self.overloaded, self.busy, self.lost, self.empty, self.tokens = wait, overloaded or busy, busy, lost, empty, tokens


class Refused(Exception):
    """This request is refused, and will be again."""


class Endpoint:
    """A server behind one address.

    Raises:
        UserError: the key's environment variable is not set.
    """

    def __init__(self, url: str, config: ServerConfig, session: "aiohttp.ClientSession") -> None:
        self.url, self.config, self._session = url, config, session
        self.in_flight = 0
        self.lost_since: float | None = None
        self.last_words = ""  # of its last fault
        self._key = ""
        self._headers = {"content-type": "application/json"}
        if config.key_env:
            self._key = key = os.environ.get(config.key_env, "")
            if not key:
                raise UserError(
                    f'server.key_env = "{config.key_env}": this environment variable is not set. Export the key under this name.'
                )
            self._headers["authorization"] = f"Bearer {key}"

    async def ask(self, payload: dict[str, Any]) -> Answer:
        """A chat completion.

        Raises:
            Retry, Refused: see there.
            UserError: what no repetition mends: the key, the address, the model.
        """
        try:
            return await self._ask(payload)
        except (Retry, Refused) as fault:
            self.last_words = str(fault)
            raise

    async def _ask(self, payload: dict[str, Any]) -> Answer:
        aiohttp = need("aiohttp", "rephrasing by a server")
        self.in_flight += 1
        try:
            async with self._session.post(
                f"{self.url}/chat/completions", data=json.dumps(payload).encode(), headers=self._headers
            ) as response:
                body = await response.content.read(_MOST_BYTES + 1)
                while not response.content.at_eof() and len(body) <= _MOST_BYTES:
                    body += await response.content.read(_MOST_BYTES + 1 - len(body))
                if response.status != 200:
                    self._complain(response.status, response.headers.get("retry-after", ""), body)
                return self._answer(body, payload)
        except aiohttp.ConnectionTimeoutError as error:
            raise Retry("no connection (it takes too long)", lost=True) from error
        except TimeoutError as error:
            raise Retry(f"no answer within {self.config.timeout_seconds:g} s", overloaded=True) from error
        except aiohttp.ClientConnectorError as error:
            raise Retry(f"no connection ({error.os_error.strerror or error})", lost=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Retry(f"the connection broke ({type(error).__name__})") from error
        finally:
            self.in_flight -= 1

    def _complain(self, status: int, retry_after: str, body: bytes) -> None:
        words = body[:_QUOTED].decode("utf-8", "replace").strip()
        words = words.replace(self._key, "***") if self._key else words  # some servers say which key they refuse
        if status in (401, 403):
            source = f"in the environment variable {self.config.key_env}" if self.config.key_env else "none was sent; set server.key_env"
            raise UserError(f"{self.url}: the server refuses the key ({status}; the key is {source}). {words}")
        if status in (404, 405):
            raise UserError(
                f"{self.url}: nothing is served here for the model {self.config.model} ({status}). Check server.urls (up to /v1) and server.model. {words}"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            try:
                wait = min(max(float(retry_after), 0.0), self.config.timeout_seconds)
            except ValueError:  # none, or a date
                wait = 0.0
            raise Retry(f"status {status}", wait, overloaded=status == 504, busy=status in (429, 503), lost=status == 502)
        raise Refused(f"status {status}: {words}")

    def _answer(self, body: bytes, payload: dict[str, Any]) -> Answer:
        if len(body) > _MOST_BYTES:
            raise Refused(f"an answer of more than {_MOST_BYTES >> 20} MB")
        tokens = (0, 0)
        try:
            said = json.loads(body)
            usage = said.get("usage") or {}
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            choice, model = said["choices"][0], str(said.get("model", ""))
            text, finish = choice["message"]["content"], str(choice.get("finish_reason") or "")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Retry("an answer that is none (no choices, no text, or no JSON)", tokens=tokens) from error
        # Commercial servers name the version they chose (gpt-4o-2024-08-06), local ones may name a file.
        asked = payload["model"]
        if model and asked not in model and model not in asked:
            raise Retry(f'answered by the model "{model[:80]}", not "{asked}"', tokens=tokens)
        if payload.get("logprobs") and not choice.get("logprobs"):
            raise UserError(
                f"{self.url}: the server was asked for log-probabilities and gives none. Take one that does (vLLM, SGLang), or a method that needs none."
            )
        if text is None and finish == "length":  # all of it went into thinking
            text = ""
        if not isinstance(text, str):
            raise Retry("an answer that is none (no choices, no text, or no JSON)", empty=True, tokens=tokens)
        return Answer(sound_text(text), finish, prompt_tokens=tokens[0], completion_tokens=tokens[1])

    async def trial(self, busy_is_well: bool = True) -> Retry | Refused | None:
        """What is wrong with a tiny completion, if anything is; lists of models are no proof, for some servers have none.

        Args:
            busy_is_well: whether a server that has too much to do is taken for one that answers; some say so while they load their model.

        Raises:
            UserError: as `ask`.
        """
        tiny = {"model": self.config.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
        try:
            await self.ask(tiny)
        except (Retry, Refused) as fault:
            return None if isinstance(fault, Retry) and ((fault.busy and busy_is_well) or fault.empty) else fault
        return None

    async def look_again(self) -> None:
        """See whether a server that was lost is there again: whatever it has to say about a tiny completion."""
        fault = await self.trial()
        if fault is None or isinstance(fault, Refused):
            self.lost_since = None
