"""Training data: sources, download, seeded splits, and the Dataset that holds or streams the numbers."""

from training.data.config import DataConfig
from training.data.dataset import Dataset
from training.data.load import load_dataset

__all__ = ["DataConfig", "Dataset", "load_dataset"]
