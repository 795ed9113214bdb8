"""A recipe's rephrasing tried on a few documents, and what all of it would cost, before anything is made."""

import collections
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.document import to_batches
from regrowth.data_pipeline.phases.base import new_funnel
from regrowth.data_pipeline.phases.curate import through
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.rephrase.config import Price
from regrowth.data_pipeline.rephrase.transform import Job, Rephraser
from regrowth.data_pipeline.sources.base import Item
from regrowth.data_pipeline.sources.registry import build_source
from regrowth.data_pipeline.transform_config import GlobalTransform, Rephrase
from regrowth.data_pipeline.transforms.base import Transform
from regrowth.data_pipeline.transforms.registry import build_transforms
from regrowth.errors import UserError

_BATCH_BYTES = 1 << 18
_MESSAGE_TOKENS = 8  # that a chat template adds to each message, about


@dataclass(frozen=True)
class Shown:
    """A chunk before and after."""

    document: str
    source_name: str
    style: str
    source: str
    text: str
    reason: str  # why it would be dropped; "" if it would not
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Estimate:
    """What a sample of the input comes to, in tokens as `counter` counts them."""

    documents: int = 0
    rephrased: int = 0
    requests: dict[str, int] = field(default_factory=dict)  # by style
    prompt_tokens: int = 0
    source_tokens: int = 0
    most_completion_tokens: int = 0
    sampled_bytes: int = 0
    total_bytes: int = 0

    def add(self, batch: pa.RecordBatch, rephraser: Rephraser) -> None:
        """Count what would be asked about some documents."""
        self.documents += len(batch)
        for job in rephraser.jobs(batch):
            prompt, count = job.prompt, rephraser.count_tokens
            self.rephrased += bool(job.chunks)
            self.requests[prompt.name] = self.requests.get(prompt.name, 0) + len(job.chunks)
            around = count(prompt.system) + count(prompt.template) + _MESSAGE_TOKENS * (1 + bool(prompt.system))
            tokens = [count(text) for text in job.sources()]
            self.source_tokens += sum(min(size, prompt.max_tokens) for size in tokens)
            self.prompt_tokens += sum(tokens) + around * len(tokens)
            self.most_completion_tokens += prompt.max_tokens * len(tokens)

    @property
    def scale(self) -> float:
        """How many times the sample the whole is."""
        return max(1.0, self.total_bytes / max(self.sampled_bytes, 1))

    def cost(self, price: Price) -> tuple[float, float]:
        """(if answers are as long as their sources, if they are as long as they may be)."""
        return tuple(price.of(self.prompt_tokens, tokens) * self.scale for tokens in (self.source_tokens, self.most_completion_tokens))  # pyright: ignore[reportReturnType]


def rephrase_config(config: DataConfig) -> Rephrase:
    """The recipe's rephrasing.

    Raises:
        UserError: it has none.
    """
    found = next((t for t in config.transforms if isinstance(t, Rephrase)), None)
    if found is None:
        raise UserError('data.transforms: none of them is of the kind "rephrase".')
    return found


def preview(config: DataConfig, count: int) -> Iterator[Shown]:
    """Chunks of the first documents that would be rephrased, asked for through the recipe's cache: what is shown is paid for once.

    Deduplications are left out.

    Raises:
        UserError: as the run would.
    """
    rephraser = Rephraser(rephrase_config(config))
    left = count
    try:
        transforms = _transforms_before(config)
        for batch in _in_turns(_before_rephrasing(config, transforms, number, item) for number, item in Pipeline.plan_of(config).items):
            jobs = list(itertools.islice((job for job in rephraser.jobs(batch) if job.chunks), left))
            answers = iter(rephraser.engine.answers([request for job in jobs for request in job.requests()]))
            for job in jobs:
                yield from _shown(rephraser, job, [next(answers) for _ in job.chunks])
            left -= len(jobs)
            if left <= 0:
                return
    finally:
        rephraser.close()


def _shown(rephraser: Rephraser, job: Job, answers: list) -> Iterator[Shown]:  # type: ignore[type-arg]
    for source, answer, (text, reason) in zip(job.sources(), answers, rephraser.judge(job, answers), strict=True):
        yield Shown(
            job.document["id"],
            job.document["source"],
            job.prompt.name,
            source,
            text,
            reason,
            answer.prompt_tokens,
            answer.completion_tokens,
        )


def estimate(config: DataConfig, documents: int, report: Callable[[int], None] = lambda documents: None) -> Estimate:
    """What rephrasing would ask for; nothing is asked. Whole items of the input are read, in a random order, until there are as many documents; the rest is reckoned by its
    bytes. Deduplications are left out, so that it may be less."""
    rephraser = Rephraser(rephrase_config(config).model_copy(update={"similarity": None, "language": "any"}))  # no answer is judged
    transforms = _transforms_before(config)
    items = Pipeline.plan_of(config).items
    found = Estimate(total_bytes=sum(item.size for _, item in items))
    for number, item in random.Random(0).sample(items, len(items)):
        for batch in _before_rephrasing(config, transforms, number, item):
            found.add(batch, rephraser)
            report(found.documents)
        found.sampled_bytes += item.size
        if found.documents >= documents:
            break
    rephraser.close()
    return found


def _transforms_before(config: DataConfig) -> list[Transform]:
    first = next(n for n, t in enumerate(config.transforms) if isinstance(t, Rephrase))
    return build_transforms([t for t in config.transforms[:first] if not isinstance(t, GlobalTransform)])


def _before_rephrasing(config: DataConfig, transforms: list[Transform], number: int, item: Item) -> Iterator[pa.RecordBatch]:
    """An item's documents as they would come to be rephrased."""
    source = config.sources[number]
    batches = (batch for batch, _ in to_batches(build_source(source).read(item), _BATCH_BYTES, level=source.level))
    yield from through(transforms, batches, new_funnel(), lambda dropped: None)


def _in_turns(streams: Iterable[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """A batch of each, again and again: a few documents are then of all the input."""
    open_ = collections.deque(streams)
    while open_:
        if (batch := next(open_[0], None)) is None:
            open_.popleft()
        else:
            open_.rotate(-1)
            yield batch
