"""The sparse layer: router, dispatch, experts, combine, and the losses on routing."""
