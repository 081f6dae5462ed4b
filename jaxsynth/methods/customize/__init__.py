"""Customisation: a text-to-image model learns a subject or a style from a few images."""
