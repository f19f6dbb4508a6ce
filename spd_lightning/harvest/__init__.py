"""Harvesters: Lightning callbacks that write rows about prompts during `trainer.predict`.

Several harvesters can share one pass over the prompts.
"""
