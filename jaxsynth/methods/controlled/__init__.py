"""Controlled generation: adapters against a ControlNet."""
