"""What a model's weights see: prompts run through it, one layer in memory at a time, each quantized before the next.

    prompts.py      token ids and patches, as plain arrays, and how much every token counts
    statistics.py   second moments of a module's inputs, summed up over the prompts
    states.py       the hidden states of all prompts, in a file
    stages.py       the model in steps, each of them a module whose weights are loaded alone
    parts.py        the modules those steps are made of, beside the model's own
    store.py        what became of the weights, one file for each step, and weights that are read from there
    plan.py         what is done to which weight: nothing, quantized for show, or quantized with statistics and kept
    needs.py        how much memory that will take
    job.py          a calibration as the rest of the room sees it
    run.py          the main path: start reading here

Prompts are made elsewhere; this folder knows no text and no image files.
"""
