"""Runs: stages, their identities and artifacts, and results gathered from them."""
