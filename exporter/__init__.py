"""Turns a checkpoint into ONNX graphs (`ir.Model` with lazy weights) and writes the bundle.

    optimum_configs.py    names, free axes and dummy inputs of every graph, registered with optimum
    graphs.py             which graphs a model has and which module each holds
    trace.py              module -> `ir.Model`, under fake tensors: no weight is in memory
    translations.py       what each traced operator becomes in ONNX
    passes.py             the graph passes in their order
    passes_weights.py     transposed weights, constant shapes
    passes_names.py       readable names, layer labels, no trace of the tracing
    lowering_segments.py  attention inside frames as a loop over tiles of queries
    lowering_decode.py    attention of one token, for the CPU
    lowering_int8.py      attention over keys and values of 8 bits, for the CPU; int8_slots.py: where they lie
    lowering_packed.py    attention inside frames and windows as one packed operator, for CUDA
    cuda_passes.py        what graphs for CUDA have otherwise: fused norms, lengths that can be captured, next ids
    cuda_kernels.py       where each node would run on CUDA, told without a device from
    cuda_table.py         the types that its kernels take
    rotary_nodes.py       rotary tables of small models, computed by the graph
    bind.py               the checkpoint's tensors behind a graph's initializers, still unread
    write.py              structure to ``<graph>.onnx``, weights streamed to ``<graph>.onnx.data``
    parts.py              what is finished together: one weight, all its tensors
    datafile.py           a data file while it grows: aligned, read back, hashed
    journal.py            which parts are finished, so that an export that was killed goes on
    disk.py               every change of the disk, so that tests can stop it there
    interrupt.py          signals that have to wait
    reload.py             a float bundle's graphs read back
    source.py             a local folder or the hub
    hub.py                a model on the hub: its commit, its files, their bytes
    hub_errors.py         what the hub's failures mean
    transfer.py           again where it broke, told to a progress, stopped from outside
    placeholders.py       a hub model as a folder before its weights are here
    low_disk.py           shards that come while they are read, and go after use
    order.py              weights in the order of the source, so that each shard is needed once
    assets.py             files taken over from the checkpoint
    genai.py              genai_config.json
    layout.py             files named and laid out as transformers.js looks for them
    licence.py            what the licence file says of itself
    card.py               the bundle's README.md, a model card
    card_tables.py        its tables
    card_quality.py       what it says of quality
    lock.py               one export at a time to one folder
    partials.py           the folders that bundles grow in, and what dead processes left there
    staging.py            the bundle appears whole or not at all
    target.py             whether it can be written where it is asked for
    origin.py             the source's files: their hashes, and whether they stay as they are
    package.py            one bundle out of graphs, the manifest last
    report.py             what an export made, in figures
    job.py                from graphs to a bundle in its place
    push.py               a bundle uploaded to the hub
    export.py             the main path through all of these

This room knows nothing of bits: quantization changes the models between trace and writing.
"""
