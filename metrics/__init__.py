"""Metrics of captions and of heatmaps. They take plain values; no module here reads a command line."""
