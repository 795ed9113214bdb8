"""Minutes long: compiled blocks, and lm-eval tasks on an export."""

import json
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from regrowth.data_pipeline.corpus import Corpus
from regrowth.pretrain.checkpoint import verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from tests.launch.helpers import regrowth
from tests.pretrain.helpers import Ranks, go, losses, new_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("plan", [{"micro_batch": 4}, {"dp_shard": 2, "micro_batch": 2}], ids=["1 rank", "2 shards"])
def test_compiled_blocks_compute_the_same_losses(plan: dict, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    ranks(plan.get("dp_shard", 1)).timeout = 500
    eager = go(new_run(corpus, tmp_path / "eager", parallel=plan), corpus, ranks)
    compiled = go(new_run(corpus, tmp_path / "compiled", parallel={**plan, "compile": True}), corpus, ranks)
    assert_allclose(losses(compiled), losses(eager), rtol=1e-5)


def test_deterministic_mode_repeats_itself_bit_for_bit(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    first, second = (
        go(new_run(corpus, tmp_path / name, run={"deterministic": True}, parallel={"dp_shard": 2, "micro_batch": 2}), corpus, ranks)
        for name in "ab"
    )
    assert losses(first) == losses(second)
    ids = [verify(list_checkpoints(run.path)[-1])["id"] for run in (first, second)]
    assert ids[0] == ids[1], "weights and moments, to the last bit"


def test_lm_eval_scores_an_export_on_local_files(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra: pip install -e '.[eval]'")
    rows = [{"query": "The old stone", "choices": ["river", "model"], "gold": i % 2} for i in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    run = go(new_run(corpus, tmp_path / "runs"), corpus, ranks)
    done = regrowth("evaluate", run.path, "--task", "local_choice", "--task-path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout and "0.5000" in done.stdout, "the two choices are right in turn"
    done = regrowth("evaluate", run.path, "--task", "no_such_task", "--task-path", tmp_path)
    assert done.returncode == 2 and "lm-eval knows no such task" in done.stderr
