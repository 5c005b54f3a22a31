"""Fitting a model: objectives, the training loop and its parts, the corruption network."""
