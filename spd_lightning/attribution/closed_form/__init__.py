"""Attribution graphs of decoders without a backward pass."""
