"""What training would do with a dataset: its fingerprint, and a recipe without "auto"."""
