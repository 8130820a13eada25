"""Weights in fewer bits: which, how, and the graph nodes that read them.

    recipe.py    which weight gets which scheme: ordered rules from a TOML file
    recipes/     the recipes shipped with the package
    scheme.py    what a method is given and what it gives back
    grid.py      scales, zero points and codes of blocks of weights
    rtn.py       method: round to nearest
    methods.py   the methods by name; a new one is a file and a line here
    pack.py      codes as the bytes that ONNX Runtime's kernels read, and back
    lazy.py      one weight, quantized when its bytes are asked for, in bounded memory
    nodes.py     MatMul to MatMulNBits, Gather to GatherBlockQuantized
    blocks.py    which blocks a quantized checkpoint's weights can be read in
    imported.py  weights that the checkpoint holds quantized, taken over code by code
    report.py    what became of the weights
    apply.py     a recipe applied to graphs: start reading here

This room knows weights and graphs; nothing about images or tokens.
"""
