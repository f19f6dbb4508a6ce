"""The method: tensors in, tensors out. Nothing here reads a file, logs, draws, or knows a
particular model.
"""
