"""DataDream: few-shot guided synthetic data sets."""
