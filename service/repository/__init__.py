"""Which models are served, and the calibrated verdicts of their scores."""
