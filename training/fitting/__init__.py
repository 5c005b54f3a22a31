"""Fitting a model: objectives, a resumable loop and its parts, the trainings of a model and of the corruption network."""
