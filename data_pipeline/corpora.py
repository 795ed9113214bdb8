"""Several corpora read as one: a run's own, and others that join with their domains."""

from pathlib import Path

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.remote import cache_root, open_remote
from regrowth.data_pipeline.sources.paths import is_remote
from regrowth.errors import UserError


def open_corpora(folder: Path, loader: LoaderConfig) -> Corpus:
    """The corpus in `folder`, with the domains of `loader.corpora` beside its own.

    Raises:
        UserError: one is not finished, has another tokenizer, or a domain of the same name.
    """
    corpus = Corpus.open(folder)
    if not loader.corpora:
        return corpus
    splits = {split: dict(corpus.manifest["splits"][split]) for split in SPLITS}
    owner = dict.fromkeys(corpus.domains, str(corpus.folder))
    for path in loader.corpora:
        remote = is_remote(path)
        other = open_remote(path, cache_root(loader.cache), loader.cache_gigabytes * 1e9) if remote else Corpus.open(Path(path))
        if other.tokenizer.hash != corpus.tokenizer.hash:
            raise UserError(f"loader.corpora: {path} was made with another tokenizer than {folder}. Prepare it with data.tokenizer.path = "
                            f"{corpus.folder / 'tokenizer'}.")  # fmt: skip
        for domain in other.domains:
            if domain in owner:
                raise UserError(f"loader.corpora: both {owner[domain]} and {path} have a domain {domain!r}. Prepare one of them with another `domain` in "
                                "its data.sources.")  # fmt: skip
            owner[domain] = path
        for split in SPLITS:
            for domain, rows in other.manifest["splits"][split].items():
                splits[split][domain] = rows if remote else [{**row, "path": str((Path(path) / row["path"]).resolve())} for row in rows]
    return Corpus(corpus.folder, {**corpus.manifest, "splits": splits})
