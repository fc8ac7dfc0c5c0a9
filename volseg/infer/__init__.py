"""Sliding-window inference: where tiles lie, how they blend, what runs the network."""
