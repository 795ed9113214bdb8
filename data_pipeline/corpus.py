"""A corpus: a folder of shards by split and domain, with its tokenizer, its funnel and a manifest (`corpus.json`) written last.

    prepared/<name>-<fingerprint>/
      corpus.json  tokenizer/tokenizer.json  curated/  dropped/
      train/<domain>/00000.arrow + .json     heldout/<domain>/...

The fingerprint covers the config and the listing of the sources: another config or another input is another folder, and nothing is overwritten.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.shards import REMEDY, Shard
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.errors import UserError, nearest
from regrowth.files import fingerprint, read_json

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Corpus:
    """A finished corpus."""

    folder: Path
    manifest: dict[str, Any]
    address: str = ""  # where it is, if `folder` is only its cache

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open a finished corpus.

        Raises:
            UserError: the folder is not there or is not finished, or its tokenizer is not the one its shards were made with.
        """
        if not (folder / "corpus.json").exists():
            state = "is not finished" if folder.exists() else "does not exist"
            raise UserError(f"{folder}: this corpus {state}. Prepare it with `regrowth data prepare CONFIG`.")
        corpus = cls(folder, read_json(folder / "corpus.json"))
        if corpus.tokenizer.hash != corpus.manifest["tokenizer"]["hash"]:
            raise UserError(
                f"{corpus.tokenizer.path}: not the tokenizer this corpus was made with. Restore it or prepare the corpus again."
            )
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with."""
        return Tokenizer.load(self.folder / "tokenizer")

    @property
    def shown(self) -> str:
        """Where the corpus is, for people."""
        return self.address or str(self.folder)

    @property
    def remote(self) -> bool:
        """Whether any of it is at an address."""
        return any("cache" in row for by_domain in self.manifest["splits"].values() for rows in by_domain.values() for row in rows)

    @property
    def domains(self) -> list[str]:
        """Domains with training tokens, sorted; a domain's place here is its index everywhere."""
        return sorted(self.manifest["splits"]["train"])

    def tokens(self, split: str, domain: str) -> int:
        """Tokens of a domain in a split, document starts included."""
        return sum(shard["tokens"] for shard in self.manifest["splits"][split].get(domain, []))

    def rows(self, split: str, domain: str) -> list[dict[str, Any]]:
        """The manifest's lines of a domain's shards.

        Raises:
            UserError: the corpus has no such domain.
        """
        rows = self.manifest["splits"][split].get(domain)
        if rows is None and domain not in self.domains:
            raise UserError(f"{self.folder}: no domain {domain!r}; {nearest(domain, self.domains)}")
        return rows or []

    def shard(self, row: dict[str, Any]) -> Shard:
        """The shard of a line of the manifest, opened and checked for size."""
        shard = self._open(row)
        if shard.index.sha256 != row["sha256"]:
            raise UserError(f"{shard.path}: not the shard that {self.folder}/corpus.json lists (another sha256). {REMEDY}")
        counts = {"documents": shard.index.documents, "tokens": shard.index.tokens}
        if listed := [f"{what} = {row[what]}" for what, count in counts.items() if row[what] != count]:
            raise UserError(f"{self.folder}/corpus.json: {', '.join(listed)} for {row['path']}, whose index says {counts}. {REMEDY}")
        return shard

    def _open(self, row: dict[str, Any]) -> Shard:
        if "cache" not in row:
            return Shard(self.folder / row["path"])
        from regrowth.data_pipeline.remote import RemoteShard

        return RemoteShard(row["cache"], row)

    def shards(self, split: str, domain: str) -> list[Shard]:
        """The shards of a domain, opened and checked for size."""
        return [self.shard(row) for row in self.rows(split, domain)]

    def identity(self, domain: str) -> str:
        """A hash of a domain's training shards: equal where they hold the same documents in the same order."""
        return fingerprint([row["sha256"] for row in self.rows("train", domain)])

    def missing(self) -> list[Path]:
        """Shards and indexes that the manifest lists and the disk does not have."""
        listed = [self.folder / row["path"] for split in SPLITS for rows in self.manifest["splits"][split].values() for row in rows]
        return [path for shard in listed for path in (shard, shard.with_suffix(".json")) if not path.exists()]

    def verify(self) -> int:
        """Check every shard against its sha256; returns how many there are.

        Raises:
            UserError: naming the first shard that is damaged.
        """
        count = 0
        for split in SPLITS:
            for domain in sorted(self.manifest["splits"][split]):
                for shard in self.shards(split, domain):
                    shard.verify()
                    count += 1
        return count
