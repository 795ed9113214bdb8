"""Transforms that mend or mask text: encoding repair, page furniture, personal data."""

import ipaddress
import json
import re

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.transform_config import Boilerplate, FixUnicode, MaskPii
from regrowth.data_pipeline.transforms.base import Filter, Mapper, Verdict, part, replaced, with_columns
from regrowth.errors import UserError, need


class UnicodeRepair(Mapper):
    """ftfy over the texts that could need it: ASCII without entities, escapes or carriage returns is left alone."""

    name = "fix_unicode"

    def __init__(self, config: FixUnicode) -> None:
        self._ftfy = need("ftfy", "the fix_unicode transform")
        self._config = self._ftfy.TextFixerConfig(**config.model_dump(exclude={"kind"}))

    def rewrite(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """The repaired texts."""
        suspects = pc.or_(pc.invert(pc.string_is_ascii(texts)), pc.match_substring_regex(texts, r"[&\r\x1b\x00-\x08]"))
        if not pc.any(suspects).as_py():
            return texts
        values = texts.to_pylist()
        for row in np.flatnonzero(suspects.to_numpy(zero_copy_only=False)):
            values[row] = self._ftfy.fix_text(values[row], self._config)
            self.counts["repaired"] += values[row] != texts[row].as_py()
        return pa.array(values, pa.large_string())


# Lines that are a page's furniture. RE2, without case; a line that holds one and is short goes.
_FURNITURE = (
    r"^(skip|jump) to (main |page )?(content|navigation|search)",
    r"\bcookies?\b.*\b(accept|consent|policy|settings|preferences|use)\b|\b(accept|use)\b.*\bcookies\b",
    r"^(sign|log) ?(in|up|out)( now| here| with.*)?$|^(register|subscribe)( now| here| today)?[.!]?$",
    r"^(share|tweet|pin|email|print|like)( this)?( (on|to|via) .*| (page|post|article|story))?$",
    r"\ball rights reserved\b|^(©|copyright\b).*\d{4}",
    r"^(read|show|view|load|see|learn) (more|less|all)\b.{0,30}$|^continue reading\b",
    r"^(home|menu|search|login|contact( us)?|about( us)?|faq|sitemap|site map|privacy( policy)?|terms( (of|and) .*)?|help|next|previous|back( to top)?)$",
    r"^(leave a (comment|reply)|post a comment|no comments( yet)?|\d+ comments?|reply|report( abuse| this)?)$",
    r"^(posted|filed|published|tagged|categori[sz]ed) (by|in|on|under|with)\b",
    r"^(click|tap) here\b|^add to (cart|basket|wish ?list|favou?rites)$|^(buy|shop|order) now$",
    r"^(powered by|designed by|hosted by|theme by)\b|\bjavascript\b.*\b(enable|disabled|required)\b|\benable javascript\b",
    r"^(follow|find|join) us (on|at)\b|^related (articles|posts|stories|links)\b",
)  # fmt: skip


class BoilerplateLines(Filter):
    """Removes short lines that are furniture, counts them, and drops with: mostly_boilerplate."""

    name = "boilerplate"

    def __init__(self, config: Boilerplate) -> None:
        self.config = config
        self.pattern = "|".join(f"(?:{p})" for p in (*_FURNITURE, *config.patterns))
        try:
            pc.match_substring_regex(pa.array([""]), self.pattern, ignore_case=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"data.transforms.patterns: not a regular expression of RE2: {error}.") from error

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        texts = batch.column("text")
        split = pc.split_pattern(texts, "\n")
        document = pc.list_parent_indices(split).to_numpy(zero_copy_only=False)
        every = pc.list_flatten(split)
        trimmed = pc.utf8_trim_whitespace(every)
        words = pc.count_substring_regex(trimmed, r"\S+").to_numpy(zero_copy_only=False)
        furniture = (words > 0) & (words <= self.config.max_line_words)
        places = np.flatnonzero(furniture)
        if len(places):
            matched = pc.match_substring_regex(trimmed.take(pa.array(places)), self.pattern, ignore_case=True)
            furniture[places] = matched.to_numpy(zero_copy_only=False)
        self.counts["lines"] += int(furniture.sum())
        spoken = np.bincount(document[words > 0], minlength=len(texts))
        removed = np.bincount(document[furniture], minlength=len(texts))
        verdict = Verdict.keep_all(len(texts))
        verdict.drop(removed / np.maximum(spoken, 1) > self.config.max_removed_fraction, "mostly_boilerplate")
        if removed.any():
            from regrowth.data_pipeline.text.characters import buffers
            from regrowth.data_pipeline.text.lines import keep_units
            from regrowth.data_pipeline.transforms.prose import text_array

            firsts = np.concatenate([[0], np.cumsum(np.bincount(document, minlength=len(texts)))])
            data, offsets, _ = keep_units(*buffers(texts), firsts, ~furniture, False)
            trimmed = pc.utf8_trim(text_array(data, offsets), characters="\n")
            batch = replaced(batch, trimmed, f"{self.name}@{self.version}", self.level)
        return part(batch, verdict, self.name, self.level)


_EMAIL = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)+"
# Dotted quads, not inside a longer dotted number.
_IP = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]*\d)")
# +49 30 1234567, (555) 123-4567, 555-123-4567, 555.123.4567: grouped numbers of 7 to 15 digits with a plus, brackets, or three groups.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})(?![\w-]|\.\d)"
)


class MaskPersonalData(Mapper):
    """E-mail addresses, public IP addresses and telephone numbers become stand-ins; `meta.pii` counts what was replaced."""

    name = "mask_pii"

    def __init__(self, config: MaskPii) -> None:
        self.config = config

    def rewrite(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """The masked texts."""
        return self._mask(texts)[0]

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        texts, counts = self._mask(batch.column("text"))
        met = np.flatnonzero(counts.sum(axis=1))
        for name, count in zip(("emails", "ips", "phones"), counts.sum(axis=0).tolist(), strict=True):
            self.counts[name] += count
        if len(met):
            meta = batch.column("meta").to_pylist()
            for row in met:
                found = {name: int(n) for name, n in zip(("emails", "ips", "phones"), counts[row], strict=True) if n}
                meta[row] = json.dumps({**json.loads(meta[row]), "pii": found})
            batch = with_columns(batch, meta=pa.array(meta, pa.string()))
        return replaced(batch, texts, f"{self.name}@{self.version}", self.level), None

    def _mask(self, texts: pa.LargeStringArray) -> tuple[pa.LargeStringArray, np.ndarray]:
        c, counts = self.config, np.zeros((len(texts), 3), dtype=np.int64)
        if c.emails:
            rows = np.flatnonzero(pc.match_substring(texts, "@").to_numpy(zero_copy_only=False))
            if len(rows):
                some = texts.take(pa.array(rows))
                counts[rows, 0] = pc.count_substring_regex(some, _EMAIL).to_numpy(zero_copy_only=False)
                masked = pc.replace_substring_regex(some, _EMAIL, c.email_stand_in.replace("\\", "\\\\"))
                keep = np.zeros(len(texts), dtype=bool)
                keep[rows] = True
                texts = pc.replace_with_mask(texts, pa.array(keep), masked)
        # Python's expressions look around, which RE2 cannot; a cheap RE2 pattern chooses the few texts to show them.
        rough = (r"\d\.\d{1,3}\.\d{1,3}\.\d" if c.ips else "", r"\+\d|\(\d{3}\) ?\d{3}|\d{3}[.-]\d{3}[.-]\d{4}" if c.phones else "")
        rough_pattern = "|".join(p for p in rough if p)
        if rough_pattern:
            rows = np.flatnonzero(pc.match_substring_regex(texts, rough_pattern).to_numpy(zero_copy_only=False))
            if len(rows):
                values = texts.take(pa.array(rows)).to_pylist()
                for place, row in enumerate(rows):
                    if c.ips:
                        values[place], counts[row, 1] = self._ips(values[place])
                    if c.phones:
                        values[place], counts[row, 2] = _PHONE.subn(lambda _: c.phone_stand_in, values[place])
                keep = np.zeros(len(texts), dtype=bool)
                keep[rows] = True
                texts = pc.replace_with_mask(texts, pa.array(keep), pa.array(values, pa.large_string()))
        return texts, counts

    def _ips(self, text: str) -> tuple[str, int]:
        count = 0

        def stand_in(match: re.Match[str]) -> str:
            nonlocal count
            try:
                public = ipaddress.ip_address(match[0]).is_global
            except ValueError:  # leading zeros
                public = False
            count += public
            return self.config.ip_stand_in if public else match[0]

        return _IP.sub(stand_in, text), count
