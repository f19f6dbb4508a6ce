"""Attribution: which component drives which. Builds on `decomposition`, never the reverse."""
