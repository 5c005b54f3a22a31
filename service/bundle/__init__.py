"""The contract between training and serving: the manifest, the graphs' inputs and outputs, files and hashes."""
