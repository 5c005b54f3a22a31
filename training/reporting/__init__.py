"""What a run looks like: figures, the report, the model card."""
