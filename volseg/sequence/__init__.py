"""Exact models of the labels of consecutive slices: chains, conditional and hidden Markov."""
