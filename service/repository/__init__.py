"""The models that are served, and calibrated verdicts on the scores that they compute."""
