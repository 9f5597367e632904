"""Which metrics are better when lower; apart from the tasks, so that a search can ask without loading torch."""

LOWER_IS_BETTER = ("loss", "perplexity", "time_loss", "value_loss", "brier", "ece")
