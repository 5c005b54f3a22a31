"""What a run looks like: figures, the report, the model card, the table of a comparison."""
