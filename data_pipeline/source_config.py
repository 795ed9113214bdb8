"""What can be said of a source. Paths are local or any that fsspec opens (s3://, gs://, hf://, https://, ...)."""

from typing import Annotated, Literal

from pydantic import Field

from regrowth.settings import Settings

Positive = Annotated[float, Field(gt=0)]


class SourceSettings(Settings):
    """What every source has."""

    # How far its text has been processed before it comes here (Data Darwinism): 0 acquired, 1 normalised, 2 filtered and deduplicated by
    # rules, 3 selected by a classifier, 4 refined by a model, 5 reasoning made explicit, up to 9.
    level: Annotated[int, Field(ge=0, le=9)] = 0


class InstalledSource(SourceSettings):
    """The text that this Python installation carries: three domains (code, docs, reference), offline, on every machine."""

    kind: Literal["installed"]
    max_megabytes: Positive | None = None  # per domain, None for all there is


class TextSource(SourceSettings):
    """A folder of text files, one document a file, or one text file."""

    kind: Literal["text"]
    path: str
    domain: str | None = None  # None: the name of the folder just below `path`
    suffixes: list[str] = [".txt", ".md", ".rst"]


class JsonlSource(SourceSettings):
    """JSON lines, plain or packed (.gz, .zst, .xz, .bz2), one document a line; a file, a folder or a glob."""

    kind: Literal["jsonl"]
    path: str
    text_key: str = "text"
    domain: str | None = None  # None: the row's `domain_key`, else the file's name
    domain_key: str = "domain"
    max_megabytes: Positive | None = None  # of text, per file
    max_line_megabytes: Positive = 16.0  # a longer line is dropped, by name
    max_unpack_ratio: Positive = 200.0  # unpacked over packed bytes, from 256 MB on; beyond it the file is a bomb and the rest is left


class TableSource(SourceSettings):
    """What parquet and Arrow sources share."""

    kind: str
    path: str
    text_key: str = "text"
    domain: str | None = None
    domain_key: str = "domain"
    max_document_megabytes: Positive = 64.0  # a larger one is dropped, by name


class ParquetSource(TableSource):
    """Parquet files, one document a row; a file, a folder or a glob."""

    kind: Literal["parquet"]


class ArrowSource(TableSource):
    """Arrow IPC files, stream or file format, one document a row; a file, a folder or a glob."""

    kind: Literal["arrow"]


class DatasetsSource(SourceSettings):
    """A dataset that Hugging Face `datasets` can load: a hub name, or a folder saved with `save_to_disk`."""

    kind: Literal["datasets"]
    path: str
    name: str | None = None
    split: str = "train"
    text_key: str = "text"
    domain: str | None = None
    domain_key: str = "domain"
    max_documents: Annotated[int, Field(gt=0)] | None = None
    max_document_megabytes: Positive = 64.0


class WebSettings(SourceSettings):
    """How pages become text."""

    path: str
    domain: str = "web"
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    main_content: bool = True  # without navigation, headers and footers
    max_page_megabytes: Positive = 16.0


class WarcSource(WebSettings):
    """Web archives: .warc, .wet and .arc, plain or packed (.gz). HTML is extracted; WET and text records are taken as they are."""

    kind: Literal["warc"]


class HtmlSource(WebSettings):
    """A folder of .html files, one document a file."""

    kind: Literal["html"]


class MegatronSource(SourceSettings):
    """Megatron-LM's indexed datasets (.bin and .idx): token ids, decoded with the tokenizer they were made with."""

    kind: Literal["megatron"]
    path: str  # the .idx or .bin file, the prefix of both, or a folder of them; local
    tokenizer: str  # a tokenizer.json
    domain: str | None = None


Source = Annotated[
    InstalledSource | TextSource | JsonlSource | ParquetSource | ArrowSource | DatasetsSource | WarcSource | HtmlSource | MegatronSource,
    Field(discriminator="kind"),
]
