"""What EXAONE is: configurations, weights on disk, and the networks in plain PyTorch.

    errors.py     every deliberate error, with its exit code
    jsonfile.py   strict reading of JSON files
    config.py     config.json, in all its published spellings, as frozen dataclasses (no torch)
    quantization.py  what it says of quantized weights
    bundle.py     the on-disk contract of an exported bundle (no torch)
    limits.py     what a verification may hold a bundle to
    weights.py    safetensors files as named, lazily read tensors
    source.py     what a weight is to its readers, plain or quantized
    assemble.py   quantized weights recognised among a checkpoint's tensors,
    packed_layer.py  put together from their parts,
    packed.py     read as exact grids or as values,
    unpack.py     and unpacked from the words that formats store
    numerics.py   how a graph keeps half precision in range, and which kernels it may count on
    ops.py        the few fused operations, each with its plain PyTorch meaning
    text.py       decoder layers with window or global attention
    vision.py     vision encoder with window and full blocks
    embedding.py  token embedding with the image features merged in
    mtp.py        the multi-token-prediction draft head
    exaone.py     all of them together, loaded from a checkpoint folder

This room knows nothing about ONNX.
"""
