"""Data: data sets, prompts, splits, image stores, conditions."""
