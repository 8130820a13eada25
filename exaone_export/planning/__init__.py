"""`--quantize auto`: bits for every weight, chosen within a bound.

sensitivity.py  what each group of weights costs in answers under each choice, measured on the model
plan.py         the choice within the bound, as a recipe: start reading here
"""
