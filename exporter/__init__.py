"""Turns a checkpoint into ONNX graphs (`ir.Model` with lazy weights) and writes the bundle.

    optimum_configs.py    names, free axes and dummy inputs of every graph, registered with optimum
    graphs.py             which graphs a model has and which module each holds
    trace.py              module -> `ir.Model`, under fake tensors: no weight is in memory
    translations.py       what each traced operator becomes in ONNX
    passes.py             the graph passes in their order
    passes_weights.py     transposed weights, constant shapes
    passes_names.py       readable names, layer labels, no trace of the tracing
    lowering_segments.py  attention inside frames as a loop over tiles of queries
    bind.py               the checkpoint's tensors behind a graph's initializers, still unread
    write.py              structure to ``<graph>.onnx``, weights streamed to ``<graph>.onnx.data``
    reload.py             a float bundle's graphs read back
    source.py             a local folder or the hub
    assets.py             files taken over from the checkpoint
    genai.py              genai_config.json
    card.py               the bundle's README.md
    staging.py            the bundle appears whole or not at all
    package.py            one bundle out of graphs, the manifest last
    export.py             the main path through all of these

This room knows nothing of bits: quantization changes the models between trace and writing.
"""
