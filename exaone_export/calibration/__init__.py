"""Prompts to calibrate on: a user's file, or the set that comes with the package, as the model takes them.

encode.py      token ids and patches of every prompt, with the checkpoint's own tokenizer and template
prompts.jsonl  our own prompts: Korean, English, code, tables, documents that are drawn when they are used
"""
