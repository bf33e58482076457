"""Metrics of captions and of heatmaps. They take plain values; no module here reads a command line."""


class MetricUnavailable(Exception):
    """A metric cannot run on this machine; the message says why in one line."""
