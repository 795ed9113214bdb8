"""Schedules, decay groups and the config's checks."""

import math
import tomllib
from pathlib import Path

import pytest
import torch

from regrowth.errors import UserError
from regrowth.pretrain.config import OptimizerConfig, RunConfig, ScheduleConfig, load_config
from regrowth.pretrain.optim import build_optimizer
from regrowth.pretrain.schedule import base_factor, lr_factor
from regrowth.settings import parse_overrides, recipes, to_toml


def test_wsd_warms_up_holds_and_falls() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    factors = [base_factor(config, s, 100) for s in range(100)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([0.1 + 0.9 * (100 - s) / 20 for s in range(80, 100)])


def test_cosine_is_half_a_cosine() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, final_fraction=0.1)
    assert base_factor(config, 10, 110) == 1.0
    assert base_factor(config, 60, 110) == pytest.approx(0.55)
    assert base_factor(config, 85, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi)))


def test_growth_warms_up_again_from_its_own_step() -> None:
    config = ScheduleConfig(warmup_steps=0, decay_fraction=0, rewarm_steps=4)
    factors = [lr_factor(config, s, 100, [10, 50]) for s in range(100)]
    assert factors[9:15] == [1, 0.25, 0.5, 0.75, 1, 1] and factors[49:54] == [1, 0.25, 0.5, 0.75, 1]


def test_matrices_decay_and_gains_and_the_embedding_do_not() -> None:
    shapes = {"embed.weight": (4, 2), "layers.0.attn.wq.weight": (2, 2), "layers.0.attn_norm.weight": (2,), "head.weight": (4, 2)}
    named = {n: torch.nn.Parameter(torch.ones(s)) for n, s in shapes.items()}
    optimizer = build_optimizer(list(named.items()), OptimizerConfig(lr=0.1, weight_decay=0.5))
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {n: round(p.flatten()[0].item(), 6) for n, p in named.items()} == {
        "embed.weight": 1.0, "layers.0.attn.wq.weight": 0.95, "layers.0.attn_norm.weight": 1.0, "head.weight": 0.95}  # fmt: skip


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.rl=3", r'unknown key "optimizer.rl"; did you mean "lr"\?'),
        ("optimiser.lr=3", r'unknown key "optimiser"; did you mean "optimizer"\?'),
        ("optimizer.lr=-1", r"optimizer.lr = -1: input should be greater than 0"),
        ("optimizer.lr=fast", r"optimizer.lr = 'fast': input should be a valid number"),
        ("data.transforms.1.min_character=3", r'unknown key "data.transforms.1.min_character"; did you mean "min_characters"\?'),
        ("data.sources.0.kind=instaled", r'data.sources.0.kind = "instaled": no such kind; did you mean "installed"\?'),
        ("mixing.policy=omd", r'mixing.policy = "omd": no such policy; did you mean "odm"\?'),
        ("model.kv_heads=4", r"model.heads = 6 is not a multiple of model.kv_heads = 4; choose kv_heads from 1, 2, 3, 6"),
        ("model.vocabulary=1000", r"model.vocabulary = 1000 is smaller than data.tokenizer.vocabulary = 4096"),
        ("parallel.tp=4", r"model.heads = 6 is not divisible by parallel.tp = 4"),
        ("loader.global_batch=7", r"global_batch = 7 is not a multiple of unit_sequences = 2"),
        ("parallel.dp_shard=3", r"cannot be shared evenly .* = 3 ranks; the nearest batch that can is 9"),
        ("growth.0.at_step=5000", r"at_step = 5000 is not before the end of the run"),
        ("precision.recipe=fp4_papr", r'did you mean "fp4_paper"\?'),
        ("growth.factor=9", r"override growth.factor: growth is a list, and its entries are addressed by number \(0 to 0\)"),
        ("growth.1.at_step=3", r"override growth.1: growth is a list"),
        ("precision.recipe=fp4_paper_block", r"model.width = 192 is not a multiple of the precision recipe's blocks of 128"),
        ("novalue", r"write it as section.key=value"),
    ],
)
def test_a_wrong_value_names_file_key_value_and_remedy(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        load_config("quickstart", [override])
    if not told.startswith(("override", "write")):  # those name the override, which is in no file
        assert "quickstart.toml" in str(error.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_config("quickstart", ["optimizer.rl=3", "model.width=-1", "schedule.kind=linear"])
    assert len(str(error.value).splitlines()) == 3


def test_overrides_are_toml_and_lie_over_the_file() -> None:
    config = load_config(
        "quickstart",
        [
            "optimizer.lr=1e-4",
            "run.name=mine",
            'mixing={policy="static", weights="uniform"}',
            "growth.0.operators.0.factor=3",
            "model.tied=false",
        ],
    )
    assert config.optimizer.lr == 1e-4 and config.run.name == "mine" and config.mixing.policy == "static"
    assert config.growth[0].model_dump()["operators"][0]["factor"] == 3 and config.growth[0].at_step == 240 and config.model.tied is False
    assert parse_overrides(["a.b=[1, 2]", "a.c=x y"]) == {"a": {"b": [1, 2], "c": "x y"}}


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_loads_and_survives_being_written_out(recipe: str) -> None:
    config = load_config(recipe)
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_missing_and_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor a recipe; did you mean"):
        load_config("quikstart")
    (tmp_path / "broken.toml").write_text("[run\nsteps = 3")
    with pytest.raises(UserError, match=r"broken.toml: not valid TOML: .*line 1"):
        load_config(str(tmp_path / "broken.toml"))
    with pytest.raises(UserError, match="there is no such config"):
        load_config(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(str(tmp_path / "latin.toml"))
