"""Prepared cases → trained weights."""
