"""Weights in fewer bits: which, how, and the graph nodes that read them.

    recipe.py    which weight gets which scheme: ordered rules from a TOML file
    recipes/     the recipes shipped with the package
    scheme.py    what a method is given and what it gives back
    grid.py      scales, zero points and codes of blocks of weights
    rtn.py       method: round to nearest
    search.py    method: the scale of every block by search
    hqq.py       method: grids that a few large weights do not decide about
    gptq.py      method: column by column, the later ones making up for the earlier ones' errors
    factor.py    large matrices as triangular factors, in place
    awq.py       method: inputs divided, and weights multiplied, by a scale of each channel
    methods.py   the methods by name; a new one is a file and a line here
    pack.py      codes as the bytes that ONNX Runtime's kernels read, and back
    lazy.py      one weight, quantized when its bytes are asked for, in bounded memory
    columns.py   one weight as products of integers want it: a scale an output, the other way round
    rotate.py    inputs and weights rotated in blocks, so that massive activations are shared
    nodes.py     MatMul to MatMulNBits, Gather to GatherBlockQuantized
    dynamic.py   MatMul to a product of integers, its activations rounded row by row
    blocks.py    which blocks a quantized checkpoint's weights can be read in
    imported.py  weights that the checkpoint holds quantized, taken over code by code
    join.py      products of the same activations in one: q, k and v; gate and up
    joined.py    the initializers of joined products
    calibration/ what goes into the weights, gathered on prompts; methods that look at it are run there
    cuda.py      which products take CUDA's fast kernels
    decide.py    what a weight gets of what its rule says
    report.py    what became of the weights
    stored.py    a bundle's quantized weights read back
    plan.py      which weights get how many bits within a bound
    apply.py     a recipe applied to graphs: start reading here

This room knows weights and graphs; nothing about images or tokens.
"""
