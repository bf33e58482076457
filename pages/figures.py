"""Figures that scripts write beside their results."""

from pathlib import Path

from common.files import written_whole


def plot_losses(rows: list[dict], file: Path) -> None:
    """loss.png from the rows of metrics.jsonl: training loss by step, validation loss at each epoch's end."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "steps" in row]  # those of earlier versions do not count them
    training, validation = ([(row["steps"], row[key]) for row in rows if key in row] for key in ("loss", "val_loss"))
    stages = {row["stage"]: row["steps"] - row.get("step", 0) for row in reversed(rows)}  # by its first row
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training), linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation), "o-", label="validation, at each epoch's end")
    for stage, start in stages.items():
        axes.axvline(start, color="grey", linewidth=0.5)
        axes.annotate(f" {stage}", (start, 1), xycoords=("data", "axes fraction"), va="top", color="grey")
    axes.set(xlabel="optimizer step", ylabel="loss a supervised token (nats)")
    axes.legend()
    with written_whole(file) as part:
        figure.savefig(part, dpi=120, format="png")
