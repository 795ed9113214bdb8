"""Whether a rephrase is in the language that it should be in."""

from regrowth.data_pipeline.transform_config import Language
from regrowth.data_pipeline.transforms.choosing import LanguageFilter

_FEWEST_WORDS = 12  # of which a language is told with some certainty
_CERTAIN = 0.9


class LanguageCheck:
    """Whether texts are in the language that they should be in.

    Args:
        wanted: "same" as the source's, or a code.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self._filter = LanguageFilter(Language(kind="language"))

    def wrong(self, source: str, text: str) -> bool:
        """Whether a text is surely in another language; where either is short or unclear, it is not."""
        found, certain = self._sure(text)
        if not certain:
            return False
        if self.wanted != "same":
            return found != self.wanted
        expected, known = self._sure(source)
        return known and found != expected

    def _sure(self, text: str) -> tuple[str, bool]:
        if len(text.split(maxsplit=_FEWEST_WORDS)) < _FEWEST_WORDS and len(text.encode()) < 8 * _FEWEST_WORDS:
            return "", False
        ((code, score),) = self._filter.identify([text])
        return code, score >= _CERTAIN
