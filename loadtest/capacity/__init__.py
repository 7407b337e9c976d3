"""What a size of traffic needs, by a model whose constants one run takes: `python -m loadtest.capacity`."""
