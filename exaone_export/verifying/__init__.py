"""What `verify --source` measures beside parity.

scores.py    positions of texts under two models, summed up with standard errors
layers.py    every quantized weight's signal-to-noise ratio
accuracy.py  the demonstration checkpoint's own task
pages.py     documents drawn for the built-in prompts
table.py     all of it, for people
"""
