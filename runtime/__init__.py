"""Runs a bundle with ONNX Runtime; knows nothing of torch."""
