"""Unicode and white space: one spelling for equal text, so that hashes, tokens and bytes agree."""

import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.transforms.base import Mapper

# C0 and C1 controls except tab and newline, DEL, byte-order marks, and the noncharacters U+FFFE/U+FFFF. Null bytes are among them.
_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}\x{feff}\x{fffe}\x{ffff}]"


class NormaliseText(Mapper):
    """NFC, LF line ends, no control characters, no trailing spaces, at most two blank lines in a row.

    NFC rather than NFKC: compatibility folding would change source code and mathematics.
    """

    name = "normalise"

    def rewrite(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """The normalised texts."""
        texts = pc.replace_substring_regex(texts, pattern=r"\r\n?", replacement="\n")
        texts = pc.replace_substring_regex(texts, pattern=_CONTROL, replacement="")
        texts = pc.utf8_normalize(texts, form="NFC")
        texts = pc.replace_substring_regex(texts, pattern=r"[ \t]+\n", replacement="\n")
        texts = pc.replace_substring_regex(texts, pattern=r"\n{4,}", replacement="\n\n\n")
        return pc.utf8_trim_whitespace(texts)
