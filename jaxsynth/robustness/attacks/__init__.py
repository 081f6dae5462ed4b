"""Adversarial attacks with a perturbation bound."""
