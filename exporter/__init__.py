"""Turns a checkpoint into ONNX graphs (`ir.Model` with lazy weights) and writes the bundle; knows nothing of bits."""
