"""Measures bundles: a worker process runs each, this process measures the memory's speed and puts figures together."""
