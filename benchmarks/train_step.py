"""Tokens per second and peak memory of one training step: ours beside Hugging Face's, litgpt's and a nanoGPT-style loop of equal size, in one run.

All in fp32 with fused AdamW, SDPA and clipping, with the same threads and batch shape, each in a process of its own as its users run it; rounds
take turns, so that whatever else the machine does falls on all alike. Ours is the trainer's whole step: packed documents through the loader, the
document mask, per-domain accounting, metrics and logs. `regrowth, bare` is the same model in a plain loop over one batch of whole sequences, without
any of that; the peers, too, get one batch of random tokens for nothing. All run eagerly. Our processes ask the allocator to keep freed memory;
`--allocator-for-all` does it for the peers as well. litgpt is no dependency: `pip install litgpt` beside it, and it takes part.

    python benchmarks/train_step.py --quick
    python benchmarks/train_step.py --size 50m
"""

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.mixing.config import StaticMixing
from regrowth.data_pipeline.prepare import prepare
from regrowth.parallel.heartbeat import Heartbeat
from regrowth.pretrain.build import build_model
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.conformance import Shape, made_up_batch
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.loss import to_tensors
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.session import keep_freed_memory, prepare_process
from regrowth.pretrain.trainer import Trainer

_COMMON = {"vocabulary": 4096, "head_dim": 64, "qk_norm": False, "tied": False}
SHAPES = {
    "10m": ModelConfig(**_COMMON, width=320, layers=6, heads=5, kv_heads=5, ffn_width=896),
    "50m": ModelConfig(**_COMMON, width=640, layers=9, heads=10, kv_heads=10, ffn_width=1728),
}
SHAPE = SHAPES["10m"]


def corpus_for_timing(folder: Path) -> Corpus:
    """Some real text of this installation."""
    source = {"kind": "installed", "max_megabytes": 2}
    return prepare(DataConfig.model_validate({"out": str(folder), "sources": [source], "tokenizer": {"vocabulary": 4096}, "workers": 1}))


def run_config(shape: ModelConfig, corpus: Corpus, batch: int, length: int, threads: int) -> RunConfig:
    """A run that neither evaluates nor saves while it is timed."""
    never = 1 << 30
    values = {
        "run": {"threads": threads, "folder": corpus.folder.parent / "runs", "steps": never},
        "data": corpus.manifest["config"],
        "loader": LoaderConfig(sequence_length=length, global_batch=batch, unit_sequences=1),
        "model": shape,
        "mixing": StaticMixing(),
        "parallel": {"micro_batch": batch},
        "checkpoint": {"every": never},
        "evaluation": {"every": never},
    }
    return RunConfig.model_validate(values)


def ours(corpus: Corpus, batch: int, length: int, threads: int) -> Callable[[], None]:
    """One step of the trainer, in a process set up as a rank is."""
    config = run_config(SHAPE, corpus, batch, length, threads)
    prepare_process(config, 1)
    run = RunFolder.create(config)
    trainer = Trainer(run, config, corpus, torch.device("cpu"), 0, lambda: False, Heartbeat(run.path / "logs", 0, 1))
    step = iter(range(1 << 30))
    return lambda: trainer.train_step(next(step))


def bare(corpus: Corpus, batch: int, length: int, threads: int) -> Callable[[], None]:
    """Our model in a plain loop: what is left when the loader, the engine, the loop and its logs are taken away."""
    prepare_process(run_config(SHAPE, corpus, batch, length, threads), 1)
    model = build_model(SHAPE, torch.device("cpu")).to_empty(device="cpu")
    initialise(dict(model.named_parameters()), SHAPE, seed=0)
    x = to_tensors(made_up_batch(0, SHAPE.vocabulary, Shape(length, batch)), torch.device("cpu"))
    x["doc_ids"].zero_()
    x["positions"].copy_(torch.arange(length))
    x["loss_weight"].fill_(1.0)
    tokens = float(x["loss_weight"].sum())
    return _plain_loop(
        model,
        lambda model, _: model(x["tokens"], x["positions"], x["doc_ids"], x["labels"], x["loss_weight"])[0].sum() / tokens,
        batch,
        length,
    )


def hugging_face(batch: int, length: int) -> Callable[[], None]:
    """The loop that its documentation shows: model(input_ids, labels=...), AdamW, clip."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.width, intermediate_size=SHAPE.ffn_width, num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads, max_position_embeddings=length, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return _plain_loop(transformers.LlamaForCausalLM(config), lambda model, x: model(input_ids=x, labels=x).loss, batch, length)


class NanoBlock(nn.Module):
    """Pre-norm attention and a GELU MLP with fused qkv, as in nanoGPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time_, width = x.shape
        q, k, v = (t.view(batch, time_, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, dim=2))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Nano(nn.Module):
    """A GPT-2 shape of the same width and depth: learned positions, tied head. Its MLP of 4 x width with two matrices has our FFN's size."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(SHAPE.vocabulary, SHAPE.width), nn.Embedding(length, SHAPE.width)
        self.blocks = nn.ModuleList(NanoBlock(SHAPE.width, SHAPE.heads) for _ in range(SHAPE.layers))
        self.norm = nn.LayerNorm(SHAPE.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        return functional.linear(self.norm(hidden), self.tokens.weight)


def nano(batch: int, length: int) -> Callable[[], None]:
    """A nanoGPT-style loop."""

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    return _plain_loop(Nano(length), loss, batch, length)


def litgpt(batch: int, length: int) -> Callable[[], None]:
    """litgpt's GPT in the same Llama shape, with its own cross entropy."""
    from litgpt.model import GPT, Config  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    config = Config(
        n_layer=SHAPE.layers, n_head=SHAPE.heads, n_query_groups=SHAPE.kv_heads, n_embd=SHAPE.width, vocab_size=SHAPE.vocabulary,
        padded_vocab_size=SHAPE.vocabulary, block_size=length, intermediate_size=SHAPE.ffn_width, rotary_percentage=1.0, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", bias=False, parallel_residual=False, norm_eps=1e-6,
    )  # fmt: skip

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(model(x)[:, :-1], x[:, 1:], chunk_size=0)

    return _plain_loop(GPT(config), loss, batch, length)


def _plain_loop(model: nn.Module, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor], batch: int, length: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x = torch.randint(0, SHAPE.vocabulary, (batch, length))

    def run() -> None:
        loss(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run.parameters = sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
    return run


def _serve(name: str, size: str, folder: str, batch: int, length: int, threads: int, allocator: bool, pipe: Connection) -> None:
    """A loop in its own process: a round of steps for each request, answered with the seconds of each step; then the peak of its memory."""
    global SHAPE
    SHAPE = SHAPES[size]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if allocator:
        keep_freed_memory()
    own = OURS.get(name)
    run = own(corpus_for_timing(Path(folder)), batch, length, threads) if own else PEERS[name](batch, length)
    run()
    pipe.send(getattr(run, "parameters", SHAPE.parameters))
    while steps := pipe.recv():
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        pipe.send(seconds)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


OURS = {"regrowth": ours, "regrowth, bare": bare}
PEERS = {"Hugging Face Llama": hugging_face, "litgpt": litgpt, "nanoGPT style": nano}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds")
    parser.add_argument("--size", choices=list(SHAPES), default="10m")
    parser.add_argument("--batch", type=int, help="sequences of 256 tokens in a step")
    parser.add_argument("--allocator-for-all", action="store_true", help="peers keep freed memory as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    batch, length, rounds = (4, 256, 4) if arguments.quick else (8, 256, 12)
    batch = arguments.batch or batch
    names = [*OURS, *(name for name in PEERS if name != "litgpt" or importlib.util.find_spec("litgpt"))]
    if arguments.quick or arguments.size != "10m":
        names.remove("nanoGPT style")
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {}
    parameters, pipes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        corpus_for_timing(Path(folder))
        for name in names:
            pipes[name], there = context.Pipe()
            context.Process(
                target=_serve,
                args=(name, arguments.size, folder, batch, length, arguments.threads, arguments.allocator_for_all, there),
                daemon=True,
            ).start()
            parameters[name], seconds[name] = pipes[name].recv(), []
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(2)
                seconds[name] += pipe.recv()
        memory = {}
        for name, pipe in pipes.items():
            pipe.send(0)
            memory[name] = pipe.recv()
    title = f"training step, {batch} x {length} tokens, fp32, {arguments.threads} threads, median of {2 * rounds}"
    title += ", the same allocator setting for all" * arguments.allocator_for_all
    table = Table("loop", "parameters", "tokens/s", "regrowth is", "peak memory", title=title)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, count in parameters.items():
        table.add_row(
            name,
            f"{count:,}",
            f"{batch * length / median[name]:,.0f}",
            f"{median[name] / median['regrowth']:.2f} x as fast",
            f"{memory[name] / 2**20:,.0f} MiB",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
