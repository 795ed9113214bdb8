"""What can go wrong, sorted by who can mend it; the command line turns each kind into its exit code.

0 done, 1 the run failed, 2 the user's input, 75 stopped and resumable (EX_TEMPFAIL of sysexits.h, which schedulers requeue on).
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class RegrowthError(Exception):
    """Base of the errors whose message is a letter to a person: one paragraph that names the thing and the remedy."""

    exit_code = 1


class RunFailed(RegrowthError):
    """The run itself broke (a lost worker, a full disk); its input was fine."""

    exit_code = 1


class RankLost(RunFailed):
    """A process of the run was killed, hung, or ended for a reason that need not come again: the same run, started again, may well go on."""


class UserError(RegrowthError):
    """The input has to change: a key, a value, a path, a file."""

    exit_code = 2


class Exhausted(UserError):
    """There is no more data to train on, on any rank: the run has to be told to end here, or be given more."""


class Stopped(RegrowthError):
    """Stopped on request, with everything needed to go on written down."""

    exit_code = 75


# How each optional package is installed; the seven packages the project is built around are all here or in the core dependencies.
_EXTRAS = {
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "mpi4py": "mpi",
    "fasttext": "fasttext",
    "numba": "curation",
    "fastwarc": "curation",
    "resiliparse": "curation",
    "py3langid": "curation",
    "ftfy": "curation",
    "fsspec": "curation",
    "fastokens": "curation",
    "aiohttp": "rephrase",
    "lm_eval": "eval",
    "transformers": "hf",
    "triton": "gpu",
    "torchao": "gpu",
    "tensorboard": "tensorboard",
    "scipy": "mixing",
    "torch": None,
    "datasets": None,
    "pyarrow": None,
}


def install_command(package: str) -> str:
    """The command that installs `package`, as users type it."""
    extra = _EXTRAS.get(package, "")
    if extra is None:
        return "pip install -e ."
    return f"pip install -e '.[{extra}]'" if extra else f"pip install {package}"


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say what it is needed for and how to install it.

    Raises:
        UserError: the package is not installed, or is installed and fails to import (a GPU library without its driver).
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise UserError(f"{purpose} needs {package}, which needs {error.name}. Install it with: {install_command(package)}") from error
        raise UserError(f"{purpose} needs the package {package}. Install it with: {install_command(package)}") from error
    except (ImportError, OSError) as error:
        raise UserError(f"{purpose} needs the package {package}; it is installed but does not import: {error}. Reinstall it with: "
                        f"{install_command(package)}") from error  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """A ' Did you mean "x"?' for an unknown name, or the list of what is known when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}."
