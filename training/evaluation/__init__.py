"""Evaluation of a fitted model: bounds on log p(x), how tight they are, and what the latents carry."""
