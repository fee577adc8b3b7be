"""Which backend was fastest on a GPU, by op and number of rows: written by benchmarks/choices.py from recorded runs."""

FASTEST: dict[str, dict[int, str]] = {}
