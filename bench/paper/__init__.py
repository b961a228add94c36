"""The pieces of `bench.paper_tables`: the paper's figures, traces, limits, steps, tables."""
