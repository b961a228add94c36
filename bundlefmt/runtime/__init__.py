"""The thin inference loop: config, attention, ffn, decoder, generate, evaluate, memory."""
