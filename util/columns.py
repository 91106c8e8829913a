"""The columns of metrics.csv."""

from util.metrics import METRICS, Column

SOURCE = "source"  # the name of a file whose results could not carry it
DIGEST = "digest"  # of what was read, see `util.results.Item`
FIGURES = {  # what is known of an image without its truth
    "residual": Column("residual / noise", ".3g"),
    "sigma": Column("estimated sigma", ".3g"),
    "seconds": Column("seconds", ".1f"),
}


def columns() -> dict[str, Column]:
    """All of them, in their order; those of a file that are not here come after them."""
    of_one = {
        f"sample_{name}": Column(f"{metric.label} of one sample", metric.format, metric.unit)
        for name, metric in METRICS.items()
    }
    return {**METRICS, **of_one, **FIGURES, SOURCE: Column("source"), DIGEST: Column("digest")}
