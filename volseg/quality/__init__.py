"""How good scans are: facts and flags of each, and what is unusual in a dataset."""
