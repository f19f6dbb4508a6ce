"""Lightning: modules that train targets and decompose them, their checkpoints, figures and
progress.
"""
