"""One run: its config, network, measures, training loop, folder."""
