"""fastText's training, in a process of its own: `python -m regrowth.data_pipeline.select.fasttext_process '{"input": ..., "model": ..., ...}'`.

With one thread fastText 0.9.3 sets only the first tenth of its input matrix to random numbers and leaves the rest as the allocator gave it. Memory that is fresh from the kernel is
zero, which trains well and the same each time; memory that was used before holds anything, NaN among it. So training has a process of its own, told to take all but small
pieces of memory fresh from the kernel.
"""

import json
import os
import subprocess
import sys
from typing import Any

from regrowth.errors import UserError, need

_FRESH = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"}


def train_in_process(arguments: dict[str, Any], model: str, quantised: str | None) -> None:
    """Train with `arguments` of `train_supervised` and write the model, and if wanted a quantised copy.

    Raises:
        UserError: fastText is missing, or fails.
    """
    need("fasttext", "training a fastText classifier")
    told = json.dumps({"arguments": arguments, "model": model, "quantised": quantised})
    done = subprocess.run([sys.executable, "-m", __name__, told], env={**os.environ, **_FRESH}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"fastText cannot learn this: {last} Look at the examples, and at training.lr (now {arguments['lr']}): a lower one is steadier."
        )


def main(told: str) -> None:
    """Train and save."""
    import fasttext

    wanted = json.loads(told)
    model = fasttext.train_supervised(**wanted["arguments"])
    model.save_model(wanted["model"])
    if wanted["quantised"]:
        model.quantize(input=wanted["arguments"]["input"], retrain=False, qnorm=True)
        model.save_model(wanted["quantised"])


if __name__ == "__main__":
    main(sys.argv[1])
