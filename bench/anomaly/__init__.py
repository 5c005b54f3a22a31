"""Outlier detection, measured: the tasks, the peers, the served bundles. ``python -m bench.anomaly`` runs them."""
