"""Training data: sources, download, seeded splits, and the Dataset that holds or streams the numbers."""

from training.data.dataset import Dataset
from training.data.load import load_dataset

__all__ = ["Dataset", "load_dataset"]
