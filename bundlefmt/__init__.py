"""bundlefmt: run language models larger than memory, neuron by neuron from flash."""
