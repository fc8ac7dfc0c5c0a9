"""Sliding-window inference: positions and blending of tiles, and backends that run the network."""
