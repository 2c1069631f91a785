"""How a notebook begins: the run it is of, sharp figures, and a mistake as one message."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from analysis.open_run import RunFiles, find_run_folder, open_run
from moe.errors import UserError

_SHOWN_DPI = 100  # figures have more dots than that, for screens of twice the density


def start(run: str | Path | None = None) -> RunFiles:
    """Find and read the run (analysis.open_run), and teach this notebook to show figures.

    From here on a UserError, one about what was given, is shown as its message alone.
    """
    prepare()
    opened = open_run(find_run_folder(run))
    model, router = opened.model, opened.router
    steps = [record["step"] for record in opened.metrics if "loss" in record]
    experts = (
        f"{model.num_experts} experts, {model.top_k} a token, router {router.name}"
        if model.is_sparse
        else "dense"
    )
    print(f"run: {opened.folder}")
    print(f"model: {model.name}, {model.num_layers} layers, {experts}")
    print(
        f"parameters: {model.num_parameters():,}, of which a token uses "
        f"{model.num_parameters(active=True):,}"
    )
    print(f"trained: {max(steps, default=0):,} steps of windows of {opened.seq_len:,} tokens")
    return opened


def prepare() -> None:
    """Teach this notebook to show matplotlib figures, and mistakes as one message."""
    from IPython.core.getipython import get_ipython
    from matplotlib.figure import Figure

    shell: Any = get_ipython()
    if shell is None:  # the paired .py, run as a script
        return
    shell.display_formatter.formatters["image/png"].for_type(Figure, _png)
    shell.set_custom_exc((UserError,), _message_alone)


def show(*figures: Any) -> None:
    """Show figures one below the other, each at its size in inches whatever its dots."""
    from IPython.display import display

    for figure in figures:
        display(figure)


def _png(figure: Any) -> tuple[bytes, dict[str, int]]:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    width, height = (int(_SHOWN_DPI * inches) for inches in figure.get_size_inches())
    return file.getvalue(), {"width": width, "height": height}


def _message_alone(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    trace: Any,
    tb_offset: int | None = None,
) -> list[str]:
    lines = [f"{kind.__name__}: {error}"]
    shell._showtraceback(kind, error, lines)  # as a front end expects it: red, and the run stops
    return lines
