"""Where there is no GPU, Triton's kernels run in its interpreter."""

import importlib.util
import os
import sys

import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton compiles or interprets each function as it stood when its module was imported, its own library's too. All modules of tests are imported before the
    # first test runs and this file before its folder's, so that only a module at the top of another folder's tests could come first.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before tests/kernels/conftest.py could ask for its interpreter; import it late, or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"
