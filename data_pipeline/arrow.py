"""`pyarrow.compute` under one name. Its functions are made at import time, where type checkers cannot see them."""

import importlib
from typing import Any

pc: Any = importlib.import_module("pyarrow.compute")
