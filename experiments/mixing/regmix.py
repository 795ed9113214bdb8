"""Loss as a function of the mixture (RegMix, Liu et al. 2024, arXiv 2407.01492): fitted on real runs, and a landscape to watch policies in.

The tables have one row for each real training run: 17 weights of Pile domains and validation losses. A gradient-boosted regression per
validation domain is fitted on 1M-parameter runs and judged by Spearman's rank correlation on other runs at 1M, 60M and 1B. Then policies draw in the
fitted landscape: at each step a domain's loss is what the regression predicts for the mixture read so far, above a floor that falls with the steps.

    python experiments/mixing/regmix.py --out regmix.json
"""

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.build import build_policy
from regrowth.data_pipeline.mixing.config import Mixing
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.errors import need
from regrowth.files import write_json

TABLES = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "tables"
TARGET = "pile_cc"  # what RegMix optimises
_STEPS, _UNITS, _SEEDS = 2000, 16, 5


def table(name: str) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Weights [runs, 17], losses [runs] by validation domain, and the names of the weights."""
    with (TABLES / f"regmix_{name}.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    trained = [key for key in rows[0] if key.startswith("train_")]
    judged = [key for key in rows[0] if key.startswith("metric/")]
    weights = np.array([[float(row[key]) for key in trained] for row in rows])
    losses = {key.removeprefix("metric/the_pile_").removesuffix("_val_loss"): np.array([float(row[key]) for row in rows]) for key in judged}
    return weights, losses, [key.removeprefix("train_the_pile_") for key in trained]


def regression(weights: np.ndarray, losses: np.ndarray) -> Any:
    """A boosted regression with RegMix's settings, the number of trees chosen by five-fold cross-validation."""
    lightgbm = need("lightgbm", "the regression of RegMix")
    settings = {
        "objective": "regression",
        "metric": "l2",
        "learning_rate": 1e-2,
        "verbosity": -1,
        "seed": 42,
        "num_threads": 2,
        "min_data_in_leaf": 10,
    }
    data = lightgbm.Dataset(weights, losses, free_raw_data=False)
    tried = lightgbm.cv(
        settings, data, num_boost_round=3000, nfold=5, stratified=False, seed=42, callbacks=[lightgbm.early_stopping(50, verbose=False)]
    )
    return lightgbm.train(settings, data, num_boost_round=len(tried["valid l2-mean"]))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    first, second = (np.argsort(np.argsort(x)) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def interval(a: np.ndarray, b: np.ndarray) -> list[float]:
    """95% of the rank correlation, by bootstrap over runs."""
    rng = np.random.default_rng(0)
    values = [spearman(a[i], b[i]) for i in rng.integers(0, len(a), (2000, len(a)))]
    return [round(float(q), 4) for q in np.quantile(values, [0.025, 0.975])]


def judge(models: dict[str, Any]) -> dict[str, Any]:
    """Rank correlations on the runs that were held back."""
    found: dict[str, Any] = {}
    for size in ("1m", "60m", "1B"):
        weights, losses, _ = table(f"test_{size}")
        each = {domain: spearman(models[domain].predict(weights), losses[domain]) for domain in models if domain in losses}
        target = models[TARGET].predict(weights), losses[TARGET]
        found[size] = {
            "runs": len(weights),
            TARGET: each[TARGET],
            "interval": interval(*target),
            "mean of domains": float(np.mean(list(each.values()))),
        }
    return found


POLICIES: dict[str, dict[str, Any]] = {
    "natural": {"policy": "static"},
    "uniform": {"policy": "static", "weights": "uniform"},
    "ODM, loss (paper)": {"policy": "odm", "initial": "natural"},
    "ODM, loss (released)": {"policy": "odm", "form": "released", "alpha": 0.5},
    "ODM, decrease": {"policy": "odm", "reward": "decrease"},
    "EXP3, loss": {"policy": "exp3"},
    "ADO": {"policy": "ado", "warmup_steps": 200, "refit_every": 100, "ignore_steps": 50},
}


def wander(models: dict[str, Any], names: list[str], natural: np.ndarray, policy: dict[str, Any], seed: int) -> np.ndarray:
    """The mixture [17] that a policy has read after all steps."""
    from pydantic import TypeAdapter

    config = TypeAdapter(Mixing).validate_python(policy)
    mixer = Mixer(build_policy(config, names, [int(1e9 * w) for w in natural]), names, _UNITS, 2, seed)
    rng, read = np.random.default_rng(seed), np.zeros(len(names))
    losses: dict[str, float] = {}
    for step in range(_STEPS):
        drawn = mixer.draw(step)
        read += np.bincount(drawn, minlength=len(names))
        if step % 20 == 0:
            losses = {domain: float(model.predict((read / read.sum())[None])[0]) for domain, model in models.items()}
        early = 1.0 + 1.5 * (1.0 + step) ** -0.35  # a run's losses begin high and fall by a power of the steps
        default = float(np.mean(list(losses.values())))  # domains that were trained on and never judged
        seen = {int(d): losses.get(names[d], default) * early + float(rng.normal(0, 0.05)) for d in np.unique(drawn)}
        mixer.observe(step, seen)
    return read / read.sum()


def best_mixture(models: dict[str, Any], natural: np.ndarray) -> np.ndarray:
    """RegMix's own answer: the mean of the 100 mixtures of 20,000 drawn ones that are predicted best for the target."""
    rng = np.random.default_rng(0)
    tried = rng.dirichlet(natural * 17 + 0.1, 20_000)
    return tried[np.argsort(models[TARGET].predict(tried))[:100]].mean(axis=0)


def landscape(models: dict[str, Any], names: list[str], natural: np.ndarray) -> dict[str, Any]:
    """Where each policy ends: predicted losses of the mixture it has read, and its largest shares."""
    found = {}
    ends = {name: [wander(models, names, natural, policy, seed) for seed in range(_SEEDS)] for name, policy in POLICIES.items()}
    ends["RegMix's optimum"] = [best_mixture(models, natural)]
    for name, mixtures in ends.items():
        target = [float(models[TARGET].predict(m[None])[0]) for m in mixtures]
        mean = [float(np.mean([model.predict(m[None])[0] for model in models.values()])) for m in mixtures]
        middle = np.mean(mixtures, axis=0)
        largest = {names[i]: round(float(middle[i]), 3) for i in np.argsort(-middle)[:4]}
        spread = [float(np.std(x)) for x in (target, mean)]
        found[name] = {TARGET: float(np.mean(target)), "all": float(np.mean(mean)), "spread over seeds": spread, "largest shares": largest}
    return found


def main() -> None:
    """Fit, judge, wander; what is in `--out` already is passed over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("regmix.json"))
    out = parser.parse_args().out
    if not TABLES.exists():
        print(f"skipped: needs the tables in {TABLES}")
        return
    done = json.loads(out.read_text()) if out.exists() else {}
    weights, losses, names = table("train_1m")
    models = {domain: regression(weights, values) for domain, values in losses.items()}
    for part, make in (("judged", lambda: judge(models)), ("landscape", lambda: landscape(models, names, weights.mean(axis=0)))):
        if part not in done:
            done[part] = make()
            write_json(out, done)
        print(part, json.dumps(done[part], indent=1))


if __name__ == "__main__":
    main()
