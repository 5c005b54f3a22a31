"""Fitting a model: objectives, a resumable loop and its parts, the trainings of models and corruption networks."""
