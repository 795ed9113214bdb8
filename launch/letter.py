"""How the command line tells a person how it ended."""


def tell(message: str, code: int) -> int:
    """Print the one paragraph of an error, with the word for its exit code; returns the code."""
    from rich.console import Console
    from rich.text import Text

    label, style = {75: ("stopped", "bold yellow"), 2: ("error", "bold red")}.get(code, ("failed", "bold red"))
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{label}: ", style), message))
    return code
