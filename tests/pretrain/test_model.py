"""The model: equal to transformers' own classes on exported weights, blind to other documents, and counted exactly."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from regrowth.data_pipeline.batch import Batch
from regrowth.errors import UserError
from regrowth.parallel.dtensor import full_tensor
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.attention import Attend, Flex, Sdpa, Varlen, bands, choose_attention, visible
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.config import RunSettings
from regrowth.pretrain.conformance import Setting
from regrowth.pretrain.convert import files_of, hf_name, write_beside
from regrowth.pretrain.initialise import initialise, weight_std
from regrowth.pretrain.loss import training_report
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.model_config import ModelConfig
from tests.pretrain.helpers import Ranks

SHAPES = {
    "plain": ModelConfig(vocabulary=97, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_width=48, qk_norm=False, tied=False),
    "gqa": ModelConfig(
        vocabulary=131, width=48, layers=3, heads=6, kv_heads=2, head_dim=16, ffn_width=72, qk_norm=False, tied=False, rope_theta=5e5
    ),
    "gqa tied": ModelConfig(
        vocabulary=64, width=48, layers=2, heads=8, kv_heads=1, head_dim=6, ffn_width=96, qk_norm=False, tied=True, norm_eps=1e-5
    ),
    "qk-norm": ModelConfig(vocabulary=97, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=64, qk_norm=True, tied=False),
    "qk-norm tied": ModelConfig(
        vocabulary=200, width=64, layers=4, heads=4, kv_heads=2, head_dim=32, ffn_width=128, qk_norm=True, tied=True
    ),
}


def build(config: ModelConfig, seed: int = 0, attend: Any = None) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, attend or Sdpa())
    model.to_empty(device="cpu")
    initialise(weights_of(model), config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # gains that are not one, so that a norm left out would show
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            else:
                p.mul_(3.0)
    return model.eval()


def weights_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def inputs(config: ModelConfig, time: int = 24, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, config.vocabulary, (batch, time), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(time).expand(batch, time), torch.zeros(batch, time, dtype=torch.long)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_own_classes(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = SHAPES[shape]
    model = build(config)
    save_file({hf_name(n): p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_beside(tmp_path, config, files_of(config, 1 << 40), None, 64)
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    tokens, positions, documents = inputs(config)
    with torch.no_grad():
        expected, got = theirs.eval()(tokens).logits, model(tokens, positions, documents)
    assert expected.std() > 0.25
    assert (got - expected).abs().max() < 1e-5


def test_a_document_sees_nothing_of_its_neighbours() -> None:
    """Packed documents give the logits that each gives alone."""
    config = SHAPES["gqa"]
    model = build(config)
    parts = [torch.randint(0, config.vocabulary, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 1, 12)]
    tokens = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(len(p)) for p in parts])[None]
    documents = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])[None]
    with torch.no_grad():
        packed = model(tokens, positions, documents)[0].split([len(p) for p in parts])
        alone = [model(p[None], torch.arange(len(p))[None], torch.zeros(1, len(p), dtype=torch.long))[0] for p in parts]
    for a, b in itertools.zip_longest(packed, alone):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_token_sees_nothing_of_its_future() -> None:
    config = SHAPES["qk-norm"]
    model = build(config)
    tokens, positions, documents = inputs(config)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % config.vocabulary
    with torch.no_grad():
        a, b = model(tokens, positions, documents), model(changed, positions, documents)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.allclose(a[:, 15:], b[:, 15:])


def test_flex_attention_computes_what_sdpa_computes() -> None:
    config = SHAPES["gqa"].model_copy(update={"head_dim": 16, "heads": 4, "kv_heads": 2})
    tokens, positions, documents = inputs(config, time=128, batch=1)
    documents = torch.where(torch.arange(128) < 70, 0, 1)[None]
    positions = torch.where(torch.arange(128) < 70, torch.arange(128), torch.arange(128) - 70)[None]
    with torch.no_grad():  # on the CPU it has no backward pass
        got, expected = (build(config, attend=attend)(tokens, positions, documents) for attend in (Flex(), Sdpa()))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(UserError, match=r'run\.attention = "flex" trains on GPUs only'):
        choose_attention("flex", torch.device("cpu"))


def test_documents_as_sequences_of_variable_length_give_the_same_values_and_gradients() -> None:
    """The boundaries are those that the loader's batch tells, padding at the end included."""
    config = SHAPES["gqa"]
    tokens, _, _ = inputs(config, time=48, batch=2)
    documents = torch.stack([torch.arange(48) // 17, torch.where(torch.arange(48) < 40, 3, -1)])
    positions = torch.stack([torch.arange(48) % 17, torch.arange(48) % 40])
    columns = {name: documents.numpy() for name in ("tokens", "labels", "positions", "doc_ids", "loss_weight", "domain", "sample_id")}
    starts, longest = Batch(**columns).boundaries()
    assert Varlen().mask(documents, positions).starts.tolist() == starts.tolist() == [0, 17, 34, 48, 88, 96] and longest == 40
    real, found = documents >= 0, []
    for attend in (Sdpa(), Varlen()):
        model = build(config, attend=attend).double()
        logits = model(tokens, positions, documents)[real]
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a kernel of GPUs")
def test_the_kernel_for_variable_length_computes_what_sdpa_computes() -> None:
    q, k, v = torch.randn(3, 2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(0))
    documents = (torch.arange(256, device="cuda") // 100).expand(2, 256)
    positions = (torch.arange(256, device="cuda") % 100).expand(2, 256)

    def attended(attend: Attend) -> torch.Tensor:
        return attend(q, k, v, attend.mask(documents, positions))

    got, expected = attended(Varlen()), attended(Sdpa())
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class SpelledOut(Sdpa):
    """Attention as two plain products, which the counter sees."""

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        return visible(doc_ids_BT, positions_BT, doc_ids_BT, positions_BT)[:, None]

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q_BHTd.shape[1] // x.shape[1], dim=1) for x in (k_BHTd, v_BHTd))
        scores = (q_BHTd @ k.transpose(-1, -2)) * q_BHTd.shape[-1] ** -0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_attention_in_bands_is_attention_under_the_dense_mask(heads: int, shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    docs = torch.tensor([[0] * 70 + [1] * 60 + [-1] * 20, [0] * 20 + [1] * 5 + [2] * 125])
    positions = torch.cat([torch.arange(n) for n in (70, 60, 20, 20, 5, 125)]).view(2, 150)
    if shuffled:  # as an exchange between ranks may deliver them
        order = torch.randperm(150, generator=generator)
        docs, positions = docs[:, order], positions[:, order]
    seen = visible(docs, positions, docs, positions)
    q, k, v = (torch.randn(2, h, 150, 8, generator=generator, requires_grad=True) for h in (4, heads, heads))
    grad = torch.randn(2, 4, 150, 8, generator=generator)
    found = bands(seen)
    assert len(found) == 3 and (shuffled or sum((b.end - b.begin) * (b.last - b.first) for b in found) < 0.75 * 150 * 150)
    results = []
    for mask in (found, seen[:, None]):
        out = Sdpa()(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_counted_exactly(shape: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = SHAPES[shape]
    model = build(config, attend=SpelledOut())
    assert sum(p.numel() for p in model.parameters()) == config.parameters
    head = config.vocabulary * config.width
    assert config.parameters - config.non_embedding_parameters == (head if config.tied else 2 * head)
    tokens, positions, documents = inputs(config, time=32)
    with FlopCounterMode(display=False) as counter:
        model(tokens, positions, documents).sum().backward()
    assert counter.get_total_flops() == config.train_flops_per_token(32) * tokens.numel()


def test_flops_agree_with_the_published_formula() -> None:
    """72 B s l h^2 (1 + s/6h + V/12lh) of Narayanan et al. holds for an FFN of 8/3 h with three matrices, which has the size of theirs."""
    h, layers, s, v = 768, 12, 1024, 32000
    config = ModelConfig(vocabulary=v, width=h, layers=layers, heads=12, kv_heads=12, head_dim=64, ffn_width=8 * h // 3)
    published = 72 * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert config.train_flops_per_token(s) * s == pytest.approx(published, rel=1e-6)


def test_initial_weights_have_their_standard_deviation_and_depend_on_name_and_seed() -> None:
    config = ModelConfig(vocabulary=512, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn_width=512, tied=False)
    with torch.device("meta"):
        model = Transformer(config, Sdpa())
    model.to_empty(device="cpu")
    initialise(weights_of(model), config, seed=1)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, p in first.items():
        std = weight_std(name, config)
        assert (p == 1).all() if std is None else abs(p.std().item() / std - 1) < 0.03
    assert first["layers.0.attn.wo.weight"].std() < 0.6 * first["layers.0.attn.wq.weight"].std()
    assert not torch.equal(first["layers.0.ffn.w_up.weight"], first["layers.1.ffn.w_up.weight"])
    initialise(weights_of(model), config, seed=2)
    assert not torch.equal(first["embed.weight"], dict(model.named_parameters())["embed.weight"])


def sharded_weights(values: dict, plan: ParallelPlan) -> dict[str, torch.Tensor]:
    """Initial weights of a model under a plan, gathered."""
    mesh = Mesh(plan, torch.device("cpu"))
    recipe = Setting(run=RunSettings(seed=4), parallel=plan)
    engine = build_engine(recipe, ModelConfig.model_validate(values), mesh)
    return {name: full_tensor(p) for name, p in engine.weights().items()}


@pytest.mark.parametrize("plan", [{"dp_shard": 2}, {"dp_shard": 4}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_every_split_starts_from_the_same_bits(plan: dict, ranks: Ranks) -> None:
    config = SHAPES["qk-norm"]  # 97 vocabulary rows do not divide evenly
    if "tp" in plan:
        config = config.model_copy(update={"vocabulary": 98})
    with torch.device("meta"):
        model = Transformer(config, Sdpa())
    model.to_empty(device="cpu")
    initialise(weights_of(model), config, seed=4)
    expected, seen = weights_of(model), set()
    parallel = ParallelPlan(**plan, micro_batch=4)
    for gathered in ranks(parallel.world_size).run(sharded_weights, config.model_dump(), parallel):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in gathered.items())
        seen |= set(gathered)
    assert seen == set(expected)


def test_z_loss_is_the_squared_log_partition_and_is_not_reported() -> None:
    config = SHAPES["plain"]
    model = build(config)
    tokens, positions, documents = inputs(config)
    weight = torch.ones(tokens.shape)
    weight[0, 5:] = 0
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "positions": positions, "doc_ids": documents, "loss_weight": weight}
    plain, nll = model(tokens, positions, documents, batch["labels"], weight)
    model.z_loss = 0.1
    with_z, same = model(tokens, positions, documents, batch["labels"], weight)
    log_z = torch.logsumexp(model(tokens, positions, documents), dim=-1)
    torch.testing.assert_close(with_z - plain, 0.1 * (log_z**2 * weight).sum()[None])
    report = training_report(nll, batch)
    assert torch.equal(report, training_report(same, batch))
    assert report[0, 1] == 5 and report[:, 0].sum().item() == pytest.approx(plain.item(), rel=1e-6)
