"""Other servers of the same encoder graph: in environments of their own, as their documents recommend."""
