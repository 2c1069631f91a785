"""The rows of a result: a CSV file that grows row by row, a table on the terminal, a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from provenance import provenance

Row = dict[str, Any]
MEASURED = (
    "tokens", "routing", "fullest_share", "implementation", "pass", "median_ms", "quartile_1_ms",
    "quartile_3_ms", "repeats", "tflops", "roof_tflops", "fraction_of_roof", "peak_gib",
    "saved_gib", "distance", "sm_mhz", "status",
)  # fmt: skip
SETTING = ("dtype", "d", "f", "num_experts", "top_k")
ABOUT = (
    "date", "commit", "device", "driver", "max_sm_mhz", "power_limit_w", "cuda", "torch", "triton",
    "python", "tests",
)  # fmt: skip
COLUMNS = (*MEASURED, *SETTING, *ABOUT)


class Results:
    """Every row is in the file before the next is measured, so a cut leaves what there was."""

    def __init__(self, folder: Path, *, device: str, setting: Row, tests: str) -> None:
        """tests: green, or how many were not, of the kernels that are measured."""
        folder.mkdir(parents=True, exist_ok=True)
        self.about = provenance(device) | {"tests": tests}
        name = "".join(c if c.isalnum() else "_" for c in self.about["device"]).strip("_").lower()
        stamp = self.about["date"].replace(":", "").replace("-", "")
        self.file = folder / f"moe_layer_{name or device}_{stamp}.csv"
        self.setting, self.rows = setting, []
        with self.file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow(COLUMNS)

    def add(self, **values: Any) -> None:
        """Append a row; columns that are not given stay empty."""
        row = {name: values.pop(name, "") for name in MEASURED}
        assert not values, values
        self.rows.append(row)
        whole = row | self.setting | self.about
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow([_text(whole[name]) for name in COLUMNS])

    def table(self) -> list[str]:
        """Lines of the terminal's table, quartiles in brackets."""
        lines = [
            f"tests: {self.about['tests']}",
            f"{'tokens':>7} {'routing':<10} {'implementation':<24} {'pass':<8} "
            f"{'ms [quartiles]':<28} {'TFLOP/s':>7} {'roof':>5} {'peak GiB':>8} {'saved':>6}  "
            "status",
        ]
        for row in self.rows:
            time = ""
            if row["status"] == "measured":
                time = "{median_ms:.3f} [{quartile_1_ms:.3f}, {quartile_3_ms:.3f}]".format(**row)
            lines.append(
                f"{row['tokens']:>7} {row['routing']:<10} {row['implementation']:<24} "
                f"{row['pass']:<8} {time:<28} {_short(row['tflops'], 1):>7} "
                f"{_short(row['fraction_of_roof'], 2):>5} {_short(row['peak_gib'], 2):>8} "
                f"{_short(row['saved_gib'], 3):>6}  {row['status']}"
            )
        return lines

    def picture(self) -> Path | None:
        """Draw TFLOP/s over tokens for uniform routing; None without matplotlib."""
        try:
            import matplotlib
        except ImportError:
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
        for pane, direction in zip(panes, ("forward", "backward"), strict=True):
            chosen = [
                row
                for row in self.rows
                if row["status"] == "measured" and row["routing"] == "uniform"
                and row["pass"] == direction and row["tflops"] != ""
            ]  # fmt: skip
            for name in dict.fromkeys(row["implementation"] for row in chosen):
                points = sorted(
                    (row["tokens"], row["tflops"])
                    for row in chosen
                    if row["implementation"] == name
                )
                pane.plot(*zip(*points, strict=True), marker="o", label=name)
            if chosen:
                pane.axhline(chosen[0]["roof_tflops"], color="black", linestyle=":")
                pane.set_xscale("log", base=2)
                pane.legend(fontsize="small")
            pane.set(title=direction, xlabel="tokens")
        panes[0].set(ylabel="TFLOP/s (dotted: torch.mm)")
        figure.suptitle(f"{self.about['device']}, commit {self.about['commit']}")
        file = self.file.with_suffix(".png")
        figure.savefig(file, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        return file


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else ""
