"""Attribution: which component drives which. Builds on `decomposition`, which knows nothing of
it.
"""
