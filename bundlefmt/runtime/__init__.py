"""The thin inference loop: config, kernels, attention, ffn, decoder, generate, evaluate."""
