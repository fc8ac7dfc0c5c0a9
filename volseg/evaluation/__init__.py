"""Compare a prediction with its reference. Nothing in this package reads or writes files."""
