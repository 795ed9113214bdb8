"""Several corpora read as one: a run's own, and others that join with their domains."""

from pathlib import Path

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.remote import cache_root, open_remote
from regrowth.data_pipeline.sources.paths import is_remote
from regrowth.errors import UserError


def open_corpora(place: str | Path, loader: LoaderConfig) -> Corpus:
    """The corpus in a folder or at an address, with the domains of `loader.corpora` beside its own.

    Raises:
        UserError: one is not finished, has another tokenizer, or a domain of the same name.
        RunFailed: an address does not answer.
    """
    corpus = _open(str(place), loader)
    if not loader.corpora:
        return corpus
    splits = {split: dict(corpus.manifest["splits"][split]) for split in SPLITS}
    owner = dict.fromkeys(corpus.domains, str(place))
    for path in loader.corpora:
        remote, other = is_remote(path), _open(path, loader)
        if other.tokenizer.hash != corpus.tokenizer.hash:
            raise UserError(f"loader.corpora: {path} was made with another tokenizer than {place}. Prepare it with data.tokenizer.path = "
                            f"{corpus.folder / 'tokenizer'}.")  # fmt: skip
        for domain in other.domains:
            if domain in owner:
                raise UserError(f"loader.corpora: both {owner[domain]} and {path} have a domain {domain!r}. Prepare one of them with another `domain` in "
                                "its data.sources.")  # fmt: skip
            owner[domain] = path
        for split in SPLITS:
            for domain, rows in other.manifest["splits"][split].items():
                splits[split][domain] = rows if remote else [{**row, "path": str((Path(path) / row["path"]).resolve())} for row in rows]
    return Corpus(corpus.folder, {**corpus.manifest, "splits": splits}, corpus.address)


def _open(place: str, loader: LoaderConfig) -> Corpus:
    if is_remote(place):
        return open_remote(place, cache_root(loader.cache), loader.cache_gigabytes * 1e9)
    return Corpus.open(Path(place))
